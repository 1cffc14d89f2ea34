"""Reads transcripts: who says what, in which order, and what must be answered. README.md has the notation.

Parsing checks everything that can be known before playing, so that a mistake in a transcript is never taken
for a mistake of the target.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from mlx_sidecar.protocol.framing import Framing

from .matchers import PatternError, check_pattern
from .notation import NotationError, Piece, blank_variables, parse_pieces, verbatim
from .transcript import Event, Expect, ExpectNothing, ExpectProgress, Send, Sent, Statement, Transcript

TRANSCRIPTS = Path(__file__).parent / "transcripts"
SETUPS = "setup"
NEEDS = ("model", "adapter", "process", "socket")
EVENTS = ("eof", "closed", "exit", "reconnect", "signal")

_STATEMENT = re.compile(r"(-->frame|-->bytes|-->|<--|<-\*|<~~|===)(?:\s+(.*))?$", re.DOTALL)


class TranscriptError(Exception):
    """A transcript is not written as it must be; the message begins with its name and line."""


@dataclass
class _Draft:
    """What a transcript's lines have said so far."""

    name: str
    folder: Path
    promise: list[str] = field(default_factory=list[str])
    statements: list[Statement] = field(default_factory=list[Statement])
    headers: dict[str, str] = field(default_factory=dict[str, str])


def load_transcripts(folder: Path = TRANSCRIPTS) -> list[Transcript]:
    """Return every transcript under `folder` that is not a setup, by name.

    Raises:
        TranscriptError: one of them is not written as it must be.
    """
    paths = sorted(folder.glob("*/*.txt"))
    return [load_transcript(folder, path) for path in paths if path.parent.name != SETUPS]


def load_setup(name: str, folder: Path = TRANSCRIPTS) -> Transcript:
    """Return the opening called `name`; raise TranscriptError if there is none."""
    path = folder / SETUPS / f"{name}.txt"
    if not path.is_file():
        raise TranscriptError(f"there is no setup {name!r}")
    return load_transcript(folder, path)


def load_transcript(folder: Path, path: Path) -> Transcript:
    """Return the transcript in `path`, with what its setup needs added to its own needs."""
    name = path.relative_to(folder).with_suffix("").as_posix()
    transcript = parse(name, path.read_text(encoding="utf-8"), path.parent)
    if transcript.setup is None:
        return transcript
    return replace(transcript, needs=transcript.needs | load_setup(transcript.setup, folder).needs)


def parse(name: str, text: str, folder: Path = TRANSCRIPTS) -> Transcript:
    """Return the transcript written in `text`; `folder` is where `@each` looks for its cases.

    Raises:
        TranscriptError: with the name and the line.
    """
    draft = _Draft(name, folder)
    line = 0
    try:
        for line, content in _logical_lines(text):
            _take(draft, line, content)
        return _finish(draft)
    except (NotationError, PatternError, ValueError) as error:
        raise TranscriptError(f"{name}:{line}: {error}") from None


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, each with the indented ones that continue it."""
    held: tuple[int, str] | None = None
    for number, raw in enumerate(text.split("\n"), 1):
        if raw[:1] in (" ", "\t") and raw.strip() and held is not None:
            held = held[0], f"{held[1]} {raw.strip()}"
            continue
        if held is not None:
            yield held
        held = (number, raw.strip()) if raw.strip() else None
    if held is not None:
        yield held


def _take(draft: _Draft, line: int, content: str) -> None:
    if content.startswith("#"):
        if not draft.headers and not draft.statements:
            draft.promise.append(content.lstrip("# "))
    elif content.startswith("@"):
        header, _, value = content[1:].partition(" ")
        draft.headers[header] = f"{draft.headers.get(header, '')} {value}".strip()
    elif (found := _STATEMENT.match(content)) is not None:
        _add(draft.statements, line, found[1], (found[2] or "").strip())
    else:
        raise ValueError(f"a line begins with none of the markers: {content[:40]!r}")


def _add(statements: list[Statement], line: int, marker: str, rest: str) -> None:
    last = statements[-1] if statements else None
    if marker.startswith("-->"):
        pieces = verbatim(rest) if marker == "-->" else parse_pieces(rest)
        item = Sent(pieces, framed=marker != "-->bytes")
        if isinstance(last, Send):
            statements[-1] = replace(last, items=(*last.items, item))
        else:
            statements.append(Send(line, (item,)))
    elif marker == "===":
        statements.append(_event(line, rest))
    elif marker == "<~~":
        token, pattern = _two_values(rest)
        statements.append(ExpectProgress(line, token, pattern))
    elif marker == "<--" and rest == "nothing":
        statements.append(ExpectNothing(line))
    else:
        check_pattern(json.loads(blank_variables(rest)))
        if marker == "<-*" and isinstance(last, Expect) and last.any_order:
            statements[-1] = replace(last, patterns=(*last.patterns, rest))
        else:
            statements.append(Expect(line, (rest,), any_order=marker == "<-*"))


def _event(line: int, rest: str) -> Event:
    name, _, argument = rest.partition(" ")
    if name not in EVENTS or (name in ("exit", "signal")) != bool(argument):
        raise ValueError(f"there is no event {rest!r}")
    return Event(line, name, argument)


def _two_values(rest: str) -> tuple[str, str]:
    """Split a token from the pattern behind it; without one anything will do."""
    _, end = json.JSONDecoder().raw_decode(rest)
    pattern = rest[end:].strip() or '"$any"'
    check_pattern(json.loads(blank_variables(pattern)))
    return rest[:end], pattern


def _finish(draft: _Draft) -> Transcript:
    headers = dict(draft.headers)
    transcript = Transcript(
        name=draft.name,
        promise=" ".join(takewhile(bool, draft.promise)),
        statements=tuple(draft.statements),
        setup=headers.pop("setup", None),
        needs=frozenset(headers.pop("needs", "").split()),
        framing=Framing(headers.pop("framing")) if "framing" in headers else None,
        whole=headers.pop("whole", None) is not None,
        cases=_cases(draft.folder / headers.pop("each")) if "each" in headers else (),
    )
    if headers or not transcript.needs <= set(NEEDS):
        raise ValueError(f"there is no header or need {[*headers, *(transcript.needs - set(NEEDS))][0]!r}")
    if not transcript.promise or not transcript.statements:
        raise ValueError("a transcript has a promise and at least one statement")
    return transcript


def _cases(path: Path) -> tuple[tuple[Piece, ...], ...]:
    lines: Iterable[tuple[int, str]] = _logical_lines(path.read_text(encoding="utf-8"))
    return tuple(parse_pieces(content) for _, content in lines if not content.startswith("#"))
