"""Plays many transcripts, each in every framing and cutting, and keeps them from disturbing each other.

Starting a server and loading a model takes far longer than most conversations. So those that open in the
same way share a connection, as long as each leaves it in order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mlx_sidecar.protocol.framing import Framing

from .connection import Connection, Cutting
from .notation import NotationError, as_variable, build
from .parser import load_setup
from .player import Failure, Player
from .target import Target, TargetError
from .transcript import Transcript

# A model may take its time to load; what comes after is answered at once.
_SETUP_PATIENCE = 120.0


@dataclass(frozen=True)
class Variant:
    """One way of saying the same."""

    framing: Framing
    cutting: Cutting

    def __str__(self) -> str:
        return f"{self.framing.value} {self.cutting.value}"


ALL_VARIANTS = tuple(Variant(framing, cutting) for framing, cutting in product(Framing, Cutting))


@dataclass(frozen=True)
class Outcome:
    """How one transcript went in one variant: at most one of `skipped` and `failed` is set.

    `failed` tells what was expected and what came; `conversation` the last things said before.
    """

    transcript: Transcript
    variant: Variant
    skipped: str | None = None
    failed: str | None = None
    conversation: tuple[str, ...] = ()


class Runner:
    """Holds what stays the same for a whole run. `patience` bounds, in seconds, every single wait.

    `given` has values of variables: `model`, which the target can load, and `adapter`, a folder.
    """

    def __init__(self, target: Target, given: Mapping[str, str], patience: float) -> None:
        self._target = target
        self._given = given
        self._patience = patience
        self._offers = target.offers | given.keys()

    def run(
        self,
        transcripts: Sequence[Transcript],
        variants: Sequence[Variant] = ALL_VARIANTS,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
    ) -> list[Outcome]:
        """Play everything and return how it went, variant by variant."""
        outcomes: list[Outcome] = []
        for variant in variants:
            for outcome in self._run_variant(transcripts, variant):
                on_outcome(outcome)
                outcomes.append(outcome)
        return outcomes

    def _run_variant(self, transcripts: Sequence[Transcript], variant: Variant) -> Iterator[Outcome]:
        sessions = _Sessions(self._target, variant, self._patience, self._given)
        try:
            # Those that end their connection come last: the first of them can still use a shared one.
            for transcript in sorted(transcripts, key=lambda one: (one.ends_connection, one.name)):
                reason = self._reason_to_skip(transcript, variant)
                if reason is None:
                    yield sessions.hold(transcript)
                else:
                    yield Outcome(transcript, variant, skipped=reason)
        finally:
            sessions.close()

    def _reason_to_skip(self, transcript: Transcript, variant: Variant) -> str | None:
        if missing := transcript.needs - self._offers:
            return f"needs {min(missing)}"
        if transcript.framing not in (None, variant.framing):
            return f"{transcript.framing.value} only"
        if transcript.whole and variant.cutting is not Cutting.WHOLE:
            return "whole only"
        return None


@dataclass(eq=False)
class _Session:
    connection: Connection
    variables: dict[str, bytes]


class _Sessions:
    """Open connections of one variant, by the setup they have been opened with."""

    def __init__(self, target: Target, variant: Variant, patience: float, given: Mapping[str, str]) -> None:
        self._target = target
        self._variant = variant
        self._patience = patience
        self._variables = {name: as_variable(value) for name, value in given.items()}
        self._open: dict[str | None, _Session] = {}

    def hold(self, transcript: Transcript) -> Outcome:
        """Hold one conversation, over a connection that was kept or a new one."""
        session = self._open.pop(transcript.setup, None)
        try:
            if session is None:
                session = self._connect()
                self._set_up(session, transcript.setup)
            self._play(session, transcript)
            if transcript.setup is not None and not transcript.ends_connection:
                self._open[transcript.setup] = session
        except (Failure, TargetError, NotationError) as error:
            return self._failed(transcript, session, error)
        finally:
            if session is not None and session not in self._open.values():
                session.connection.channel.close()
        return Outcome(transcript, self._variant)

    def close(self) -> None:
        """Close what is still open."""
        for session in self._open.values():
            session.connection.channel.close()

    def _connect(self) -> _Session:
        channel = self._target.open()
        connection = Connection(channel, self._variant.framing, self._variant.cutting, self._patience)
        return _Session(connection, dict(self._variables))

    def _set_up(self, session: _Session, name: str | None) -> None:
        if name is None:
            return
        session.connection.patience = max(self._patience, _SETUP_PATIENCE)
        player = Player(session.connection, session.variables, self._target.open)
        try:
            player.play(load_setup(name).statements)
        except Failure as failure:
            raise Failure(0, f"the setup {name!r} did not work: {failure.problem}") from None
        session.variables = player.variables
        session.connection.patience = self._patience

    def _play(self, session: _Session, transcript: Transcript) -> None:
        session.connection.log.clear()
        for case in transcript.cases or ((),):
            said = build(case, {})
            player = Player(session.connection, session.variables | {"case": said}, self._target.open)
            try:
                player.play(transcript.statements)
                if not transcript.ends_connection:
                    player.check_alive()
            except Failure as failure:
                if not case:
                    raise
                raise Failure(failure.line, f"for the case {said[:100]!r}: {failure.problem}") from None

    def _failed(self, transcript: Transcript, session: _Session | None, error: Exception) -> Outcome:
        line = f"line {error.line}: " if isinstance(error, Failure) and error.line else ""
        conversation: list[str] = []
        if session is not None:
            conversation += session.connection.log
            if log := session.connection.channel.log_tail().strip():
                conversation += ["the process's last words on stderr:", *log.splitlines()]
        return Outcome(transcript, self._variant, failed=f"{line}{error}", conversation=tuple(conversation))
