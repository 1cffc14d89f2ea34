"""The inference thread: the one place where models run.

Lives here: the thread, its batches of sequences, sampling, and how MLX is imported.
Does not live here: text, files, requests; a sequence comes in as ids and leaves as ids.
"""
