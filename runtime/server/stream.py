"""The slot of one stream: parts that have not been written yet, and those that the client has not confirmed.

Not thread-safe by itself: the outbox that it belongs to holds its lock around every call.
"""

from collections import deque
from collections.abc import Callable

from msgspec import UNSET, UnsetType

from mlx_sidecar.protocol.messages import GenerateProgress, LoadProgress, PullProgress, TokenLogProbs

Part = GenerateProgress | LoadProgress | PullProgress

_PART_BYTES = 320
"""What a part of one token costs in memory besides its text: objects, a string's head, a list, a number."""

_LOG_PROB_BYTES = 160
"""What a log-probability costs besides, with the token that it is of."""

_FRAME_TEXT_BYTES = 256 * 1024
_FRAME_COST = 5 * 1024 * 1024
"""Bounds of what is merged into one frame: even with everything escaped it stays far below the limit."""


class Stream:
    """Parts of an answer on their way out, in order, and the response that comes behind them.

    `on_overflow` is called, by whoever added a part, if too much waits for the connection.
    """

    def __init__(self, token: int | str, on_overflow: Callable[[], None]) -> None:
        self.token = token
        self.on_overflow = on_overflow
        self.response: bytes | None = None
        self.queued = False
        self._parts: deque[tuple[Part, int]] = deque()
        self._unacked: deque[tuple[int, int]] = deque()
        self._unacked_bytes = 0

    def add(self, part: Part) -> int:
        """Append a part; return what it costs until it is taken, in bytes."""
        text_bytes = _text_bytes(part)
        self._parts.append((part, text_bytes))
        return _cost(part, text_bytes)

    def ready(self, window: int | None) -> bool:
        """Return whether there is something to take. The end of a stream does not wait for the window."""
        if self.response is not None:
            return True
        return bool(self._parts) and (window is None or self._unacked_bytes < window)

    def take(self, window: int | None) -> tuple[Part | None, int]:
        """Return the next parts merged into one, and what they cost; None if there are none."""
        if not self._parts:
            return None, 0
        part, size = self._parts.popleft()
        cost = _cost(part, size)
        if not self._parts:
            return self._sent(part, size, window), cost
        parts: list[Part] = [part]
        while self._parts and size < _FRAME_TEXT_BYTES and cost < _FRAME_COST and self._fits(window, size):
            part, text_bytes = self._parts.popleft()
            size += text_bytes
            cost += _cost(part, text_bytes)
            parts.append(part)
        return self._sent(_merged(parts), size, window), cost

    def ended(self) -> bytes | None:
        """Return the response once every part before it has been taken."""
        return None if self._parts else self.response

    def ack(self, seq: int) -> None:
        """Take what the client has confirmed out of the window."""
        while self._unacked and self._unacked[0][0] <= seq:
            self._unacked_bytes -= self._unacked.popleft()[1]

    def _sent(self, part: Part, text_bytes: int, window: int | None) -> Part:
        if window is not None and text_bytes:
            self._unacked.append((part.seq, text_bytes))
            self._unacked_bytes += text_bytes
        return part

    def _fits(self, window: int | None, more: int) -> bool:
        return window is None or self.response is not None or self._unacked_bytes + more < window


def _text_bytes(part: Part) -> int:
    if not isinstance(part, GenerateProgress):
        return 0
    return len(part.text) if part.text.isascii() else len(part.text.encode())


def _cost(part: Part, text_bytes: int) -> int:
    cost = text_bytes + _PART_BYTES
    if isinstance(part, GenerateProgress) and not isinstance(part.log_probs, UnsetType):
        cost += _LOG_PROB_BYTES * sum(1 + len(of_token.top) for of_token in part.log_probs)
    return cost


def _merged(parts: list[Part]) -> Part:
    answers = [part for part in parts if isinstance(part, GenerateProgress)]
    # How far something is: the newest says it all.
    return _merged_answers(answers) if answers else parts[-1]


def _merged_answers(parts: list[GenerateProgress]) -> GenerateProgress:
    log_probs: list[TokenLogProbs] | UnsetType = UNSET
    if not isinstance(parts[0].log_probs, UnsetType):
        log_probs = [one for part in parts if part.log_probs for one in part.log_probs]
    return GenerateProgress(
        seq=parts[-1].seq,
        text="".join(part.text for part in parts),
        tokens=[token for part in parts for token in part.tokens],
        merged=len(parts),
        log_probs=log_probs,
    )
