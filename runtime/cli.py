"""The command line. Nothing heavy is imported before the chosen command needs it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec

from mlx_sidecar.config.settings import LogFormat, LogLevel, Settings, default_home
from mlx_sidecar.protocol.framing import Framing
from mlx_sidecar.protocol.version import VERSION

_DEFAULTS = Settings(home=default_home(os.environ))


def main() -> NoReturn:
    """Run `mlx-sidecar` with the arguments of the process."""
    arguments = _parser().parse_args()
    sys.exit(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-sidecar", description="A JSON-RPC sidecar runtime for MLX.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve the process that started this one, or many"))
    _add_bringers(commands)
    _add_schema(commands.add_parser("schema", help="print the protocol, for programs or for people"))
    _add_conformance(commands.add_parser("conformance", help="see whether a server keeps the protocol"))
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
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


def _add_bringers(commands: Any) -> None:
    pull = commands.add_parser("pull", help="bring a model onto this machine")
    pull.add_argument("model", help="a known name such as smollm2-135m, or a hub id such as owner/model")
    pull.add_argument("--revision", help="branch, tag or commit of a hub model")
    load = commands.add_parser("import", help="make a model out of a GGUF file")
    load.add_argument("file", type=Path, help="the .gguf file")
    load.add_argument("name", help="what to call the model")
    for bringer in (pull, load):
        bringer.set_defaults(run=_bring)


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


def _serve(arguments: argparse.Namespace) -> NoReturn:
    from .serve import Endpoint, serve

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


def _bring(arguments: argparse.Namespace) -> int:
    from .models.pull import PullError, import_file, pull
    from .models.store import ModelStore

    def report(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    store = ModelStore(_DEFAULTS.home)
    try:
        if arguments.command == "pull":
            folder = pull(arguments.model, store, report, arguments.revision)
        else:
            folder = import_file(arguments.file, arguments.name, store, report)
    except PullError as error:
        report(f"mlx-sidecar: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


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
