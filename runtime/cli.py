"""The command line. Nothing heavy is imported before the chosen command needs it."""

import argparse
import sys
from typing import NoReturn

from mlx_sidecar.protocol.version import VERSION

from .commands import serve


def main() -> NoReturn:
    """Run `mlx-sidecar` with the arguments of the process."""
    arguments = _parser(sys.argv[1:2]).parse_args()
    sys.exit(arguments.run(arguments))


def _parser(first: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-sidecar", description="A JSON-RPC sidecar runtime for MLX.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve.add_command(commands)
    # Whoever starts a server waits for it, and not for the arguments of other commands.
    if first != ["serve"]:
        from .commands import config, models, protocol

        models.add_commands(commands)
        config.add_command(commands)
        protocol.add_commands(commands)
    return parser
