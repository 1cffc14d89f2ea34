"""The book of streams: every progress a server sends is checked against what came before it.

Progress comes only for a token that a request in flight has asked with, so all of it before the response, and
its `seq` rises. That of an answer counts parts from 1, by the parts that a progress holds, and the response
says what has been sent: `lastSeq`, `textBytes`, `usage.completionTokens`. Of how far a load or a pull is only
the newest counts, so some may be left out.
"""

import json
from typing import Any, cast

from .frames import Violation


class Stream:
    """What has come for one progress token. `shown` counts the values that a transcript has looked at.

    This one tells how far something is.
    """

    def __init__(self, token: int | str, request_id: Any) -> None:
        self.token = token
        self.request_id = request_id
        self.values: list[dict[str, Any]] = []
        self.last_seq = 0
        self.shown = 0
        self.ended = False

    def take(self, value: Any) -> None:
        """Note one progress value; raise Violation if it cannot follow the ones before."""
        if self.ended:
            raise Violation("a progress came after the response of its request")
        members = _members(value)
        self._check(members)
        self.last_seq = members["seq"]
        self.values.append(members)

    def end(self, response: dict[str, Any]) -> None:  # noqa: ARG002
        """Note the response; raise Violation if its result does not add up."""
        self.ended = True

    def _check(self, value: dict[str, Any]) -> None:
        seq, done, total = (value.get(name) for name in ("seq", "doneBytes", "totalBytes"))
        if not isinstance(seq, int) or not isinstance(done, int) or not isinstance(total, int):
            raise Violation("how far something is has `seq`, `doneBytes` and `totalBytes`")
        if not isinstance(value.get("phase"), str):
            raise Violation("how far something is has a `phase`")
        if seq <= self.last_seq:
            raise Violation(f"after seq {self.last_seq} came seq {seq}")
        if not 0 <= done <= total:
            raise Violation(f"{done} bytes of {total} cannot be done")


class AnswerStream(Stream):
    """The parts of an answer, which add up to it."""

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(value["text"] for value in self.values)

    @property
    def tokens(self) -> list[int]:
        """All ids so far."""
        return [token for value in self.values for token in value["tokens"]]

    def end(self, response: dict[str, Any]) -> None:
        """Note the response; raise Violation if its result does not add up."""
        super().end(response)
        if "result" not in response:
            return
        result = _members(response["result"])
        usage = _members(result.get("usage"))
        said = (result.get("lastSeq"), result.get("textBytes"), usage.get("completionTokens"))
        sent = (self.last_seq, len(self.text.encode()), len(self.tokens))
        if said != sent:
            raise Violation(
                f"lastSeq, textBytes and completionTokens are {list(said)}; the stream had {list(sent)}"
            )
        if "text" in result or "tokens" in result:
            raise Violation("the result of a stream repeats its text or its tokens")

    def _check(self, value: dict[str, Any]) -> None:
        seq, merged, text, tokens = (value.get(name) for name in ("seq", "merged", "text", "tokens"))
        parts = 1 if "merged" not in value else merged
        if not isinstance(parts, int) or not isinstance(text, str) or not isinstance(tokens, list):
            raise Violation("a part of an answer has `seq`, `text`, `tokens`, and perhaps `merged`")
        if parts < 1 or seq != self.last_seq + parts:
            raise Violation(f"after seq {self.last_seq} and {parts} part(s) came seq {seq}")


class Streams:
    """All streams of one conversation, by the JSON of their tokens."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}

    def sent(self, frame: bytes) -> None:
        """Note a frame that the client sends: it may ask for a stream."""
        try:
            message = json.loads(frame)
            token, request_id = message["params"]["partialResultToken"], message["id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        kind = AnswerStream if message.get("method") == "generate" else Stream
        self._streams[json.dumps(token)] = kind(token, request_id)

    def received(self, message: dict[str, Any]) -> None:
        """Note a progress, or the response to a streamed request; raise Violation if it is out of place."""
        if message.get("method") == "$/progress":
            params = _members(message.get("params"))
            self.of(json.dumps(params.get("token"))).take(params.get("value"))
        elif "id" in message:
            for stream in self._streams.values():
                if not stream.ended and json.dumps(stream.request_id) == json.dumps(message["id"]):
                    stream.end(message)

    def of(self, token: str) -> Stream:
        """Return the stream whose token has this JSON; raise Violation if nobody has asked for it."""
        if token not in self._streams:
            raise Violation(f"nobody has asked for progress with the token {token}")
        return self._streams[token]

    def contents(self) -> dict[str, tuple[str, list[int]]]:
        """Return text and ids of every answer, by token."""
        answers = [stream for stream in self._streams.values() if isinstance(stream, AnswerStream)]
        return {str(answer.token): (answer.text, answer.tokens) for answer in answers}


def _members(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
