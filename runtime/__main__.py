"""`python -m mlx_sidecar.runtime`, for hosts that have an interpreter and no script."""

from .cli import main

main()
