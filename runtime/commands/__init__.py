"""Lives here: the commands of `mlx-sidecar`, a module for each family: its arguments, and what it prints.

Does not live here: what the commands do, which is in the rooms they call, nor what a client asks over the
wire (api/). Nothing heavy is imported before the chosen command runs."""
