"""The command line. Nothing heavy is imported before the chosen command needs it."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn, get_args

import msgspec

from mlx_sidecar.config.settings import LogLevel, Settings, default_home
from mlx_sidecar.protocol.version import VERSION

INTERNAL_ERROR = 70

_DEFAULTS = Settings(home=default_home(os.environ))


def main() -> NoReturn:
    """Run `mlx-sidecar` with the arguments of the process."""
    arguments = _parser().parse_args()
    if arguments.command == "serve":
        _serve(arguments)
    else:
        sys.exit(_bring(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-sidecar", description="A JSON-RPC sidecar runtime for MLX.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve the process that started this one, over stdin and stdout"
    )
    serve.add_argument(
        "--log-level",
        choices=get_args(LogLevel),
        default=_DEFAULTS.log_level,
        help="least severe line that goes to stderr (default: %(default)s)",
    )
    serve.add_argument(
        "--eof-grace",
        type=float,
        metavar="SECONDS",
        default=_DEFAULTS.eof_grace_seconds,
        help="how long accepted requests may still run after stdin ends (default: %(default)s)",
    )
    pull = commands.add_parser("pull", help="bring a model onto this machine")
    pull.add_argument("model", help="a known name such as smollm2-135m, or a hub id such as owner/model")
    pull.add_argument("--revision", help="branch, tag or commit of a hub model")
    load = commands.add_parser("import", help="make a model out of a GGUF file")
    load.add_argument("file", type=Path, help="the .gguf file")
    load.add_argument("name", help="what to call the model")
    return parser


def _serve(arguments: argparse.Namespace) -> NoReturn:
    # Before the imports below: whatever they print must not reach the wire.
    from .server.stdio import claim_stdio

    wire = claim_stdio()
    exit_code = INTERNAL_ERROR
    try:
        from .server.handshake import greet

        greeting = greet(wire)
        from .app import serve

        settings = msgspec.structs.replace(
            _DEFAULTS, log_level=arguments.log_level, eof_grace_seconds=arguments.eof_grace
        )
        _start_log(settings.log_level)
        exit_code = serve(settings, wire, greeting)
    except BaseException:
        import traceback

        traceback.print_exc()
    # Not sys.exit: with native threads in the process the interpreter's teardown is a place to crash, and
    # everything that must be written has been.
    sys.stderr.flush()
    os._exit(exit_code)


def _start_log(level: str) -> None:
    import logging

    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=layout)


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
