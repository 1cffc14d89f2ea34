"""The flags of settings, which `serve` and `config` share: one for every key."""

import argparse
import os
from pathlib import Path
from typing import get_args

from mlx_sidecar.config.fields import FIELDS, Field
from mlx_sidecar.config.layers import SettingsSource


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and a flag for every setting."""
    group = parser.add_argument_group("settings", "each overrides its MLX_SIDECAR_… variable, and the file")
    group.add_argument(
        "--config", type=Path, metavar="PATH", help="the settings file (default: the user's runtime.yaml)"
    )
    for field in FIELDS.values():
        if field.kind is bool:
            _add_switch(group, field)
        else:
            group.add_argument(field.flag, dest=field.key, metavar=_metavar(field), help=_help(field))


def source_of(arguments: argparse.Namespace) -> SettingsSource:
    """Return where the settings of this process come from, with the flags that were given."""
    flags = {key: text for key in FIELDS if (text := getattr(arguments, key)) is not None}
    return SettingsSource.of(os.environ, flags, arguments.config)


def _add_switch(group: argparse._ArgumentGroup, field: Field) -> None:  # pyright: ignore[reportPrivateUsage]
    said, other = (field.flag, "true"), (field.negated_flag, "false")
    for flag, value in (said, other):
        helped = _help(field) if flag == field.flag else f"the opposite of {field.flag}"
        group.add_argument(flag, dest=field.key, action="store_const", const=value, help=helped)


def _help(field: Field) -> str:
    default = "" if field.default is None else f" (default: {field.written})"
    return f"{field.description}{default}".replace("%", "%%")


def _metavar(field: Field) -> str:
    if choices := get_args(field.kind):
        return f"{{{','.join(choices)}}}" if field.is_text else "JSON"
    return "PATH" if field.kind is Path else "N"
