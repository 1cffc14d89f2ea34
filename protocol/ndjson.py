"""NDJSON framing without I/O: bytes in, whole lines out.

Lines end at byte 0x0A and nowhere else. The splitter looks at every byte once and holds only the unfinished
line, so feeding n bytes costs O(n) however they are cut, and memory stays within the frame limit.
"""

_BLANK = b" \t\r"


class FrameTooLarge:
    """Stands in place of a line that grew beyond the limit and is skipped up to its newline."""


class LineSplitter:
    """Collects chunks and yields complete, non-blank lines without their newline."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max = max_frame_bytes
        self._line = bytearray()
        self._skipping = False

    def feed(self, chunk: bytes) -> list[bytes | FrameTooLarge]:
        """Return the lines that `chunk` completes; an oversized one is reported once, in its place."""
        frames: list[bytes | FrameTooLarge] = []
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._take(chunk[start:end], frames)
            self._finish(frames)
            start = end + 1
        self._take(chunk[start:], frames)
        return frames

    def close(self) -> list[bytes | FrameTooLarge]:
        """Return what stands after the last newline: a final line may lack one."""
        frames: list[bytes | FrameTooLarge] = []
        self._finish(frames)
        return frames

    def _take(self, piece: bytes, frames: list[bytes | FrameTooLarge]) -> None:
        if self._skipping:
            return
        if len(self._line) + len(piece) > self._max:
            self._skipping = True
            self._line.clear()
            frames.append(FrameTooLarge())
        else:
            self._line += piece

    def _finish(self, frames: list[bytes | FrameTooLarge]) -> None:
        line = bytes(self._line)
        if line.strip(_BLANK):
            frames.append(line)
        self._line.clear()
        self._skipping = False
