"""The text side of a request: templates, tokens in, text out, stop strings.

Lives here: pure host-side work on strings and ids; nothing here waits, and nothing here imports MLX.
Does not live here: threads (api runs the slow parts in a pool), sampling (engine).
"""
