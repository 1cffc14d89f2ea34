"""LSP framing without I/O: a block of headers, an empty line, and as many bytes as `Content-Length` says.

Format: Language Server Protocol, base protocol 0.9. A mistake in a header cannot be skipped, because nothing
says where the next message begins: the stream is lost with it.
"""

import re

MAX_HEADER_BYTES = 8 * 1024

_END = re.compile(rb"\r?\n\r?\n")
_CHARSETS = ("utf-8", "utf8")


class FramingLost:
    """Stands where the stream can no longer be followed; nothing comes after it."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


class HeaderSplitter:
    """Collects chunks and yields the bodies of complete messages."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max = max_frame_bytes
        self._buffer = bytearray()
        self._start: int = 0
        self._scanned: int = 0
        self._body_bytes: int | None = None
        self._lost = False

    def feed(self, chunk: bytes) -> list[bytes | FramingLost]:
        """Return the bodies that `chunk` completes, and FramingLost once if that is how it ends."""
        frames: list[bytes | FramingLost] = []
        if self._lost:
            return frames
        self._buffer += chunk
        try:
            while (body := self._next_body()) is not None:
                frames.append(body)
        except ValueError as error:
            self._lost = True
            self._buffer.clear()
            return [*frames, FramingLost(str(error))]
        # Once for all of them: each by itself would move what is behind it, every time.
        del self._buffer[: self._start]
        self._scanned -= self._start
        self._start = 0
        return frames

    def close(self) -> list[bytes | FramingLost]:
        """Return FramingLost if the stream ended inside a message."""
        if self._lost or (self._body_bytes is None and not self._buffer.strip()):
            return []
        return [FramingLost("The stream ended inside a message.")]

    def _next_body(self) -> bytes | None:
        """Return the next body, once it is there; `_start` moves over what has been dealt with."""
        if self._body_bytes is None:
            found = _END.search(self._buffer, max(self._start, self._scanned - 3))
            if found is None:
                self._scanned = len(self._buffer)
                if len(self._buffer) - self._start > MAX_HEADER_BYTES:
                    raise ValueError(f"The headers are longer than {MAX_HEADER_BYTES} bytes.")
                return None
            self._body_bytes = _content_length(bytes(self._buffer[self._start : found.start()]), self._max)
            self._start = found.end()
        stop = self._start + self._body_bytes
        if len(self._buffer) < stop:
            return None
        body = bytes(self._buffer[self._start : stop])
        self._start = self._scanned = stop
        self._body_bytes = None
        return body


def _content_length(block: bytes, limit: int) -> int:
    lengths: set[bytes] = set()
    for line in block.strip().splitlines():
        name, colon, value = line.partition(b":")
        if not colon:
            raise ValueError("A header has no colon.")
        name, value = name.strip().lower(), value.strip()
        if name == b"content-length":
            lengths.add(value)
        elif name == b"content-type" and not _is_utf8(value):
            raise ValueError("Content-Type names a charset other than utf-8.")
    if len(lengths) != 1 or not (text := lengths.pop()).isdigit():
        raise ValueError("There must be one Content-Length, a decimal number.")
    # Long before its value, the number of its digits shows that it is too large.
    if len(text) > len(str(limit)) or int(text) > limit:
        raise ValueError("The message is longer than limits.maxFrameBytes.")
    return int(text)


def _is_utf8(content_type: bytes) -> bool:
    _, found, charset = content_type.lower().partition(b"charset=")
    return not found or charset.strip(b" \"'").decode("ascii", "replace") in _CHARSETS
