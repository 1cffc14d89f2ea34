"""From what stands in a layer to the value of a setting, or to an error that says what to write."""

import re
from pathlib import Path
from typing import Any

import msgspec

from .fields import Field

_MOST_SHOWN = 60
_NULL = {"", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class ConfigError(Exception):
    """A setting that cannot be followed. The message names the place, the key, the problem, the way out."""


class BadValueError(Exception):
    """A value that a setting cannot have: what is wrong, and `path`, where inside it, such as `[0].model`."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem)
        self.path = path


def plain(text: str) -> Any:
    """Return what unquoted text means: null, a boolean, a number as in JSON, else itself.

    The rules of YAML 1.2, not those of 1.1: `on`, `1:30`, `0o17` and `1_000` are text.
    """
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if re.fullmatch(r"-?(0|[1-9]\d{0,300})(\.\d+)?([eE][+-]?\d+)?", text, re.ASCII):
        return msgspec.json.decode(text)
    return text


def parse(field: Field, text: str) -> Any:
    """Return what the text of a variable or a flag means; see `check`."""
    if field.is_text:
        return text
    if field.kind in (bool, int):
        return plain(text)
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise BadValueError(f"{shown(text)} is not JSON: {error}") from None


def check(field: Field, value: Any, folder: Path) -> Any:
    """Return the value of a setting; a relative path starts at `folder`.

    Raises:
        BadValueError: it cannot have that value.
    """
    if field.kind is Path:
        return _path(field, value, folder)
    try:
        return msgspec.convert(value, field.type)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        if path:
            raise BadValueError(problem, path.rstrip("`")) from None
        raise BadValueError(f"{shown(value)} is not {field.expects}") from None


def _path(field: Field, value: Any, folder: Path) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadValueError(f"{shown(value)} is not {field.expects}")
    try:
        return (folder / Path(value).expanduser()).absolute()
    except RuntimeError:
        raise BadValueError(f"{shown(value)} begins with a home folder that is not known") from None
    except FileNotFoundError:
        raise BadValueError(f"{shown(value)} starts at the working folder, which is gone") from None


def shown(value: Any) -> str:
    """Return a value for a message: as JSON, and not too much of it."""
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def unknown(name: str, known: list[str]) -> str:
    """Return what to say of a name that means nothing."""
    from difflib import get_close_matches

    alike = get_close_matches(name, known, 1)
    return "unknown." + (f" Did you mean {alike[0]}?" if alike else "")
