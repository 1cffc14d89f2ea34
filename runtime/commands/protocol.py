"""`mlx-sidecar schema` and `mlx-sidecar conformance`."""

import argparse
import sys
from typing import Any


def add_commands(commands: Any) -> None:
    """Add what is about the protocol itself."""
    _add_schema(commands.add_parser("schema", help="print the protocol, for programs or for people"))
    _add_conformance(commands.add_parser("conformance", help="see whether a server keeps the protocol"))


def _add_schema(schema: argparse.ArgumentParser) -> None:
    schema.add_argument(
        "--format",
        choices=["openrpc", "markdown"],
        default="openrpc",
        help="an OpenRPC document, or the reference made of it (default: %(default)s)",
    )
    schema.set_defaults(run=_schema)


def _add_conformance(conformance: argparse.ArgumentParser) -> None:
    from mlx_sidecar.conformance.arguments import add_arguments

    add_arguments(conformance)
    conformance.set_defaults(run=_conformance)


def _schema(arguments: argparse.Namespace) -> int:
    from mlx_sidecar.protocol import openrpc

    if arguments.format == "openrpc":
        sys.stdout.write(openrpc.text())
    else:
        from mlx_sidecar.protocol import reference

        sys.stdout.write(reference.markdown(openrpc.document()))
    return 0


def _conformance(arguments: argparse.Namespace) -> int:
    from mlx_sidecar.conformance.command import run

    return run(arguments)
