"""Models: where they come from, how they get into memory, which ones are there.

Lives here: the store, `pull`, the GGUF import, loading, the registry.
Does not live here: running a model (engine), its text side (text).
"""
