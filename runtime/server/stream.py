"""The slot of one stream: parts that have not been written yet, and those that the client has not confirmed.

Not thread-safe by itself: the outbox that it belongs to holds its lock around every call.
"""

from collections import deque
from collections.abc import Callable

from mlx_sidecar.protocol.messages import GenerateProgress

_FRAME_TEXT_BYTES = 256 * 1024
_FRAME_PARTS = 16 * 1024
"""Bounds of what is merged into one frame: even with everything escaped it stays far below the limit."""

_PART_BYTES = 320
"""What a part of one token costs in memory besides its text: objects, a string's head, a list, a number."""


class Stream:
    """Parts of an answer on their way out, in order, and the response that comes behind them.

    `on_overflow` is called, by whoever added a part, if too much waits for the connection.
    """

    def __init__(self, token: int | str, on_overflow: Callable[[], None]) -> None:
        self.token = token
        self.on_overflow = on_overflow
        self.response: bytes | None = None
        self.queued = False
        self._parts: deque[tuple[GenerateProgress, int]] = deque()
        self._unacked: deque[tuple[int, int]] = deque()
        self._unacked_bytes = 0

    def add(self, part: GenerateProgress) -> int:
        """Append a part; return what it costs until it is taken, in bytes."""
        text_bytes = len(part.text) if part.text.isascii() else len(part.text.encode())
        self._parts.append((part, text_bytes))
        return text_bytes + _PART_BYTES

    def ready(self, window: int | None) -> bool:
        """Return whether there is something to take. The end of a stream does not wait for the window."""
        if self.response is not None:
            return True
        return bool(self._parts) and (window is None or self._unacked_bytes < window)

    def take(self, window: int | None) -> tuple[GenerateProgress | None, int]:
        """Return the next parts merged into one, and what they cost; None if there are none."""
        if not self._parts:
            return None, 0
        part, size = self._parts.popleft()
        if not self._parts:
            return self._sent(part, size, window), size + _PART_BYTES
        texts, tokens = [part.text], list(part.tokens)
        while self._parts and size < _FRAME_TEXT_BYTES and len(texts) < _FRAME_PARTS:
            if not self._fits(window, size):
                break
            part, text_bytes = self._parts.popleft()
            size += text_bytes
            texts.append(part.text)
            tokens += part.tokens
        merged = GenerateProgress(seq=part.seq, text="".join(texts), tokens=tokens, merged=len(texts))
        return self._sent(merged, size, window), size + _PART_BYTES * len(texts)

    def ended(self) -> bytes | None:
        """Return the response once every part before it has been taken."""
        return None if self._parts else self.response

    def ack(self, seq: int) -> None:
        """Take what the client has confirmed out of the window."""
        while self._unacked and self._unacked[0][0] <= seq:
            self._unacked_bytes -= self._unacked.popleft()[1]

    def _sent(self, part: GenerateProgress, text_bytes: int, window: int | None) -> GenerateProgress:
        if window is not None:
            self._unacked.append((part.seq, text_bytes))
            self._unacked_bytes += text_bytes
        return part

    def _fits(self, window: int | None, more: int) -> bool:
        return window is None or self.response is not None or self._unacked_bytes + more < window
