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
        self._scanned = 0
        self._body_bytes: int | None = None
        self._lost = False

    def feed(self, chunk: bytes) -> list[bytes | FramingLost]:
        """Return the bodies that `chunk` completes, and FramingLost once if that is how it ends."""
        frames: list[bytes | FramingLost] = []
        if self._lost:
            return frames
        self._buffer += chunk
        position = 0
        try:
            while (stop := self._end_of_body(position)) is not None:
                frames.append(bytes(self._buffer[position:stop]))
                self._body_bytes = None
                position = self._scanned = stop
        except ValueError as error:
            self._lost = True
            self._buffer.clear()
            return [*frames, FramingLost(str(error))]
        del self._buffer[:position]
        self._scanned -= position
        return frames

    def close(self) -> list[bytes | FramingLost]:
        """Return FramingLost if the stream ended inside a message."""
        if self._lost or (self._body_bytes is None and not self._buffer.strip()):
            return []
        return [FramingLost("The stream ended inside a message.")]

    def _end_of_body(self, position: int) -> int | None:
        """Take away the headers at `position`; return where the body behind them ends, once it is there."""
        if self._body_bytes is None:
            found = _END.search(self._buffer, max(position, self._scanned - 3))
            if found is None:
                self._scanned = len(self._buffer)
                if len(self._buffer) - position > MAX_HEADER_BYTES:
                    raise ValueError(f"The headers are longer than {MAX_HEADER_BYTES} bytes.")
                return None
            self._body_bytes = _content_length(bytes(self._buffer[position : found.start()]), self._max)
            del self._buffer[position : found.end()]
        stop = position + self._body_bytes
        return stop if len(self._buffer) >= stop else None


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
