"""`mlx-sidecar config`."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from mlx_sidecar.config.fields import FIELDS
from mlx_sidecar.config.layers import Effective
from mlx_sidecar.config.values import ConfigError

from ..server import exit_codes
from .settings import add_flags, source_of

_INDENT = "    "


def add_command(commands: Any) -> None:
    """Add `config`."""
    config = commands.add_parser(
        "config", help="print every setting, its value and where that came from", allow_abbrev=False
    )
    form = config.add_mutually_exclusive_group()
    form.add_argument("--explain", action="store_true", help="with the unit and the reason of each")
    form.add_argument("--json", action="store_true", help="as one JSON object")
    form.add_argument("--default", action="store_true", help="print runtime.yaml, to begin one of your own")
    add_flags(config)
    config.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    if arguments.default:
        from mlx_sidecar.config import yaml_text

        sys.stdout.write(yaml_text.text())
        return exit_codes.CLEAN
    try:
        effective = source_of(arguments).read()
    except ConfigError as error:
        sys.stderr.write(f"mlx-sidecar: {error}\n")
        return exit_codes.USAGE
    if arguments.json:
        text = msgspec.json.format(msgspec.json.encode(_document(effective), enc_hook=str)).decode()
    else:
        text = "\n".join(_lines(effective, explain=arguments.explain))
    sys.stdout.write(f"{text}\n")
    return exit_codes.CLEAN


def _document(effective: Effective) -> dict[str, Any]:
    return {
        "file": effective.source.file,
        "settings": {
            key: {
                "value": getattr(effective.settings, key),
                "origin": effective.origins[key],
                "live": field.live,
                "description": field.description,
            }
            for key, field in FIELDS.items()
        },
    }


def _lines(effective: Effective, *, explain: bool) -> Iterator[str]:
    from shutil import get_terminal_size
    from textwrap import wrap

    width = get_terminal_size().columns
    keys = max(map(len, FIELDS))
    origins = max(map(len, effective.origins.values()))
    yield f"{effective.source.file or 'no file'}{'' if effective.seen else ' (there is none)'}\n"
    for key, field in FIELDS.items():
        value = _shown(getattr(effective.settings, key))
        line = f"{key:{keys}}  {effective.origins[key]:{origins}}  "
        # Alone on its line if it is long: a path that was cut cannot be copied.
        yield line + value if len(line + value) <= width else f"{line.rstrip()}\n{_INDENT}{value}"
        if explain:
            about = f"{field.description} ({'live' if field.live else 'restart'})"
            yield "\n".join(wrap(about, width, initial_indent=_INDENT, subsequent_indent=_INDENT)) + "\n"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode().strip('"')
