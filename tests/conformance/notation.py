r"""How transcripts write bytes: literals, repetition, and variables.

    'it\'s\x00\n'      the bytes between the quotes; escapes are \xNN \n \r \t \\ \'
    'ab'*1000          a thousand times
    'ab'*${limit}/4    a quarter of a saved number times; or -1, once less
    ${name}            a saved value: of a string what stands between its quotes, of the rest its JSON

Variables have values wherever they stand, in literals and in JSON.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PIECE = re.compile(r"'((?:[^'\\]|\\.)*)'(?:\*(\d+|\$\{\w+\})(?:([/-])(\d+))?)?(?:\s+|$)")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.)")
_VARIABLE = re.compile(rb"\$\{(\w+)\}")
_SIMPLE = {"n": b"\n", "r": b"\r", "t": b"\t", "\\": b"\\", "'": b"'"}

Variables = Mapping[str, bytes]
"""Names to the bytes that stand for them."""


class NotationError(Exception):
    """Something is written in a way that has no meaning."""


@dataclass(frozen=True)
class Piece:
    """Bytes, said `times` // `divisor` - `less` times over."""

    text: bytes
    times: bytes = b"1"
    divisor: int = 1
    less: int = 0


def verbatim(text: str) -> tuple[Piece, ...]:
    """Return the piece that says `text` once, as it stands."""
    return (Piece(text.encode()),)


def parse_pieces(line: str) -> tuple[Piece, ...]:
    """Return the pieces of one line of literals.

    Raises:
        NotationError: something in the line is not a literal.
    """
    pieces: list[Piece] = []
    position = 0
    while position < len(line):
        found = _PIECE.match(line, position)
        if found is None:
            raise NotationError(f"not a literal: {line[position : position + 40]!r}")
        text, times, sign, number = found.groups()
        divisor, less = (int(number), 0) if sign == "/" else (1, int(number or 0))
        pieces.append(Piece(_unescape(text), (times or "1").encode(), divisor, less))
        position = found.end()
    return tuple(pieces)


def build(pieces: tuple[Piece, ...], variables: Variables) -> bytes:
    """Return the bytes that `pieces` stand for.

    Raises:
        NotationError: a variable has no value.
    """
    return b"".join(
        expand(piece.text, variables) * (int(expand(piece.times, variables)) // piece.divisor - piece.less)
        for piece in pieces
    )


def expand(text: bytes, variables: Variables) -> bytes:
    """Return `text` with the values of its variables; raise NotationError where one has none."""

    def value(found: re.Match[bytes]) -> bytes:
        name = found[1].decode()
        if name not in variables:
            raise NotationError(f"nothing has been saved as {name!r}")
        return variables[name]

    return _VARIABLE.sub(value, text)


def as_variable(value: Any) -> bytes:
    """Return the bytes that stand for a saved value."""
    text = json.dumps(value)
    return (text[1:-1] if isinstance(value, str) else text).encode()


def blank_variables(text: str) -> str:
    """Return `text` with 0 in place of every variable: JSON, if the transcript is right."""
    return _VARIABLE.sub(b"0", text.encode()).decode()


def _unescape(text: str) -> bytes:
    said = b""
    position = 0
    for found in _ESCAPE.finditer(text):
        said += text[position : found.start()].encode()
        code = found[1]
        if len(code) > 1:
            said += bytes([int(code[1:], 16)])
        elif code in _SIMPLE:
            said += _SIMPLE[code]
        else:
            raise NotationError(f"there is no escape \\{code}")
        position = found.end()
    return said + text[position:].encode()
