"""`mlx-sidecar serve`."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from mlx_sidecar.protocol.framing import Framing

from .settings import add_flags, source_of


def add_command(commands: Any) -> None:
    """Add `serve`."""
    # A flag that is cut short would mean another one as soon as there is one more setting.
    serve = commands.add_parser(
        "serve", help="serve the process that started this one, or many", allow_abbrev=False
    )
    where = serve.add_mutually_exclusive_group()
    where.add_argument(
        "--pipe", type=Path, metavar="PATH", help="connect to the host, which listens on a Unix socket there"
    )
    where.add_argument(
        "--listen",
        type=Path,
        metavar="PATH",
        help="listen on a Unix socket there, in a private folder; any number of clients share one runtime",
    )
    where.add_argument(
        "--listen-fds", action="store_true", help="listen on the socket that systemd or its like passed to us"
    )
    serve.add_argument(
        "--framing",
        choices=[framing.value for framing in Framing],
        help="how messages are kept apart (default: found out from a client's first byte)",
    )
    add_flags(serve)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> NoReturn:
    from ..serve import Endpoint, serve

    framing = Framing(arguments.framing) if arguments.framing else None
    endpoint = Endpoint(arguments.pipe, arguments.listen, arguments.listen_fds, framing)
    serve(source_of(arguments), endpoint)
