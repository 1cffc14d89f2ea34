"""Bytes and peers: who is connected, what came in, what goes out, when the process ends.

Lives here: the pipes and their threads, connections, the outbox, the reasons to exit.
Does not live here: what a method does (api), how a message looks (protocol).
"""
