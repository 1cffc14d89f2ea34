"""What a transcript says, once it has been read."""

from dataclasses import dataclass

from mlx_sidecar.protocol.framing import Framing

from .notation import Piece


@dataclass(frozen=True)
class Sent:
    """One thing to send: the bytes of `pieces`, as a frame or just so."""

    pieces: tuple[Piece, ...]
    framed: bool


@dataclass(frozen=True)
class Send:
    """Neighbouring lines `-->`: they leave in one write."""

    line: int
    items: tuple[Sent, ...]


@dataclass(frozen=True)
class Expect:
    """`<--`, or neighbouring lines `<-*`: frames that must come next; several may come in any order."""

    line: int
    patterns: tuple[str, ...]
    any_order: bool = False


@dataclass(frozen=True)
class ExpectProgress:
    """`<~~ TOKEN PATTERN`: the next progress of a stream. Both are JSON."""

    line: int
    token: str
    pattern: str


@dataclass(frozen=True)
class ExpectNothing:
    """`<-- nothing`: whatever was sent before is not answered."""

    line: int


@dataclass(frozen=True)
class Event:
    """`=== NAME ARGUMENT`: something happens to the connection, or must."""

    line: int
    name: str
    argument: str


Statement = Send | Expect | ExpectProgress | ExpectNothing | Event


@dataclass(frozen=True)
class Transcript:
    """One conversation. With `cases` it is held once for each, as the variable `case`."""

    name: str
    promise: str
    statements: tuple[Statement, ...]
    setup: str | None = None
    needs: frozenset[str] = frozenset()
    framing: Framing | None = None
    whole: bool = False
    cases: tuple[tuple[Piece, ...], ...] = ()

    @property
    def ends_connection(self) -> bool:
        """Whether nothing can follow on the same connection."""
        return any(isinstance(statement, Event) for statement in self.statements)
