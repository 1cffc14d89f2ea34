"""The command line. Nothing heavy is imported before the chosen command needs it."""

import argparse
import sys
from typing import NoReturn

from mlx_sidecar.protocol.version import VERSION

from .commands import models, protocol, serve


def main() -> NoReturn:
    """Run `mlx-sidecar` with the arguments of the process."""
    arguments = _parser().parse_args()
    sys.exit(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-sidecar", description="A JSON-RPC sidecar runtime for MLX.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve.add_command(commands)
    models.add_commands(commands)
    protocol.add_commands(commands)
    return parser
