"""The commands of `mlx-sidecar`: one small module per family, its arguments and what it prints.

Lives here: command-line arguments, what a person or a script reads in answer, exit codes of commands.
Does not live here: what the commands do, which is in the rooms they call; nothing heavy is imported before.
"""
