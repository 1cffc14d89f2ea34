"""Reads a JSON file of a model folder within limits, before any library opens it."""

import json
import os
import stat
from pathlib import Path
from typing import Any, cast

import msgspec

MIB = 1024 * 1024
MAX_JSON_BYTES = 16 * MIB
MAX_JSON_DEPTH = 64


class BadFile(Exception):
    """The file is not what it has to be; the message names it, without its folder, and says why."""


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        BadFile: it is no ordinary file, too large, not JSON, too deep, or not an object.
        OSError: it cannot be read.
    """
    try:
        value = _decode(read_bounded(path, max_bytes))
    except (ValueError, RecursionError):
        raise BadFile(f"its {path.name} is not valid JSON") from None
    if depth_exceeds(value, MAX_JSON_DEPTH):
        raise BadFile(f"its {path.name} is nested deeper than {MAX_JSON_DEPTH} levels")
    if not isinstance(value, dict):
        raise BadFile(f"its {path.name} is not a JSON object")
    return cast(dict[str, Any], value)


def _decode(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError:
        # Slower, but Python's own reader takes Infinity, which stands in some configs.
        return json.loads(content)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return what is in a file.

    Raises:
        BadFile: it is no ordinary file, or too large.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK a pipe of that name would be waited for, without end.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(f"its {path.name} is not an ordinary file")
        if status.st_size > max_bytes:
            raise BadFile(f"its {path.name} is too large: more than {max_bytes // MIB} MiB")
        return file.read(max_bytes)


def depth_exceeds(value: object, limit: int) -> bool:
    """Tell whether lists and objects are nested in each other more than `limit` times."""
    level = [value]
    for _ in range(limit + 1):
        level = [inner for outer in level for inner in children(outer)]
        if not level:
            return False
    return True


def children(value: object) -> list[Any]:
    """Return what a list or an object holds; of anything else, nothing."""
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).values())
    return cast("list[Any]", value) if isinstance(value, list) else []
