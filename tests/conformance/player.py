"""Plays one transcript on one connection, and stops at the first thing that is not as it must be."""

import json
import signal
from collections.abc import Callable, Iterable
from typing import Any, cast

from . import transcript as t
from .connection import Connection
from .frames import Violation
from .matchers import Matcher
from .notation import Variables, as_variable, build, expand
from .streams import Streams
from .target import Channel, TargetError

_SILENCE = "is anybody there?"


class Failure(Exception):
    """The target did not keep a promise: the transcript's line, what was expected, what came instead."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


class Player:
    """Holds what a conversation has established: saved values and streams.

    `reopen` makes another channel to the same target.
    """

    def __init__(self, connection: Connection, variables: Variables, reopen: Callable[[], Channel]) -> None:
        self.variables = dict(variables)
        self._connection = connection
        self._reopen = reopen
        self._streams = Streams()
        self._line = 0

    def play(self, statements: Iterable[t.Statement]) -> None:
        """Play statements in order.

        Raises:
            Failure: at the first that does not come true.
        """
        for statement in statements:
            self._line = statement.line
            try:
                self._play(statement)
            except (TargetError, Violation) as error:
                raise Failure(self._line, str(error)) from None

    def check_alive(self) -> None:
        """Raise Failure unless the target has nothing more to say and answers a ping."""
        self.play([t.ExpectNothing(self._line)])

    def _play(self, statement: t.Statement) -> None:
        match statement:
            case t.Send():
                self._send(statement)
            case t.Expect():
                self._expect(statement)
            case t.ExpectProgress():
                self._expect_progress(statement)
            case t.ExpectNothing():
                self._expect_nothing()
            case t.Event():
                self._happen(statement)

    def _send(self, statement: t.Send) -> None:
        items = [(build(item.pieces, self.variables), item.framed) for item in statement.items]
        for data, framed in items:
            if framed:
                self._streams.sent(data)
        self._connection.write(items)

    def _expect(self, statement: t.Expect) -> None:
        left = [self._pattern(text) for text in statement.patterns]
        while left:
            message = self._next_message()
            problems = [self._mismatch(pattern, message) for pattern in left]
            if None not in problems:
                raise Failure(self._line, _unlike(left, problems, message))
            del left[problems.index(None)]

    def _expect_progress(self, statement: t.ExpectProgress) -> None:
        stream = self._streams.of(json.dumps(json.loads(statement.token)))
        while stream.shown == len(stream.values):
            message = self._receive()
            if not _is_progress(message):
                raise Failure(self._line, f"expected progress, got {_show(message)}")
        value = stream.values[stream.shown]
        stream.shown += 1
        pattern = self._pattern(statement.pattern)
        problem = self._mismatch(pattern, value)
        if problem is not None:
            raise Failure(self._line, _unlike([pattern], [problem], value))

    def _expect_nothing(self) -> None:
        # Whatever was to be answered has been before the answer to this; what else comes is too much.
        ping = {"jsonrpc": "2.0", "id": _SILENCE, "method": "ping"}
        self._connection.write([(json.dumps(ping).encode(), True)])
        message = self._next_message()
        if self._mismatch({"id": _SILENCE}, message) is not None:
            raise Failure(self._line, f"expected nothing but the answer to a ping, got {_show(message)}")

    def _happen(self, event: t.Event) -> None:
        match event.name:
            case "eof":
                self._connection.channel.end_input()
            case "signal":
                self._connection.channel.send_signal(signal.Signals[f"SIG{event.argument}"])
            case "reconnect":
                self._connection.renew(self._reopen())
                self._streams = Streams()
            case _:
                self._expect_end()
                code = self._connection.channel.exit_code(self._connection.patience)
                if event.name == "exit" and code not in (None, int(event.argument)):
                    raise Failure(self._line, f"expected exit code {event.argument}, got {code}")

    def _expect_end(self) -> None:
        message = self._next_message(may_end=True)
        if message is not None:
            raise Failure(self._line, f"expected the end of the connection, got {_show(message)}")

    def _next_message(self, *, may_end: bool = False) -> Any:
        """Return the next message that is not progress."""
        while _is_progress(message := self._receive(may_end=may_end)):
            pass
        return message

    def _receive(self, *, may_end: bool = False) -> Any:
        message = self._connection.read()
        if message is None and not may_end:
            raise Failure(self._line, "the target ended the connection")
        if isinstance(message, dict):
            self._streams.received(cast(dict[str, Any], message))
        return cast(Any, message)

    def _pattern(self, text: str) -> Any:
        return json.loads(expand(text.encode(), self.variables))

    def _mismatch(self, pattern: Any, value: Any) -> str | None:
        matcher = Matcher(self._streams.contents())
        problem = matcher.mismatch(pattern, value)
        if problem is None:
            self.variables |= {name: as_variable(saved) for name, saved in matcher.saves.items()}
        return problem


def _is_progress(message: Any) -> bool:
    return isinstance(message, dict) and cast(dict[str, Any], message).get("method") == "$/progress"


def _unlike(patterns: list[Any], problems: list[str | None], message: Any) -> str:
    if len(patterns) > 1:
        said = " or ".join(_show(pattern) for pattern in patterns)
        return f"expected {said}\ngot      {_show(message)}"
    return f"{problems[0]}\nexpected {_show(patterns[0])}\ngot      {_show(message)}"


def _show(value: Any) -> str:
    text = "the end" if value is None else json.dumps(value)
    return text if len(text) <= 600 else f"{text[:600]}…"
