"""Conversations that every implementation of the protocol must hold alike, and the runner that replays them.

Lives here: transcripts, the notation they are written in, and what plays them to a process or a socket.
Does not live here: any implementation, and whatever only ours promises.
"""
