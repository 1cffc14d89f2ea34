"""`mlx-sidecar serve`."""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec

from mlx_sidecar.config.settings import LogFormat, LogLevel, Settings, default_home
from mlx_sidecar.protocol.framing import Framing

_DEFAULTS = Settings(home=default_home(os.environ))


def add_command(commands: Any) -> None:
    """Add `serve`."""
    serve = commands.add_parser("serve", help="serve the process that started this one, or many")
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
    serve.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        default=_DEFAULTS.log_format,
        help="lines for people, or one JSON object each (default: %(default)s)",
    )
    serve.add_argument(
        "--log-level",
        choices=get_args(LogLevel),
        default=_DEFAULTS.log_level,
        help="least severe line that goes to stderr (default: %(default)s)",
    )
    serve.add_argument(
        "--eof-grace",
        type=_seconds,
        metavar="SECONDS",
        default=_DEFAULTS.eof_grace_seconds,
        help="how long accepted requests may still run after a client's last word (default: %(default)s)",
    )
    _add_engine_limits(serve)
    serve.set_defaults(run=_serve)


def _add_engine_limits(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--max-sequences",
        type=_count,
        metavar="N",
        default=_DEFAULTS.max_sequences,
        help="sequences of a model that run at the same time (default: 256, on a CPU 64)",
    )
    serve.add_argument(
        "--max-waiting",
        type=_count,
        metavar="N",
        default=_DEFAULTS.max_waiting,
        help="requests that may wait for their turn; one more is `overloaded` (default: %(default)s)",
    )
    serve.add_argument(
        "--memory-budget",
        type=_count,
        metavar="BYTES",
        default=_DEFAULTS.memory_budget_bytes,
        help="what weights and caches may take together (default: nine tenths of the device's memory)",
    )
    serve.add_argument(
        "--stall-timeout",
        type=_seconds,
        metavar="SECONDS",
        default=_DEFAULTS.stall_seconds,
        help="a step that takes longer ends the process, with code 70 (default: %(default)s)",
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no length of time")
    return seconds


def _serve(arguments: argparse.Namespace) -> NoReturn:
    from ..serve import Endpoint, serve

    settings = msgspec.structs.replace(
        _DEFAULTS,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
        eof_grace_seconds=arguments.eof_grace,
        max_sequences=arguments.max_sequences,
        max_waiting=arguments.max_waiting,
        memory_budget_bytes=arguments.memory_budget,
        stall_seconds=arguments.stall_timeout,
    )
    framing = Framing(arguments.framing) if arguments.framing else None
    serve(settings, Endpoint(arguments.pipe, arguments.listen, arguments.listen_fds, framing))
