"""The two framings of a connection: NDJSON, and LSP headers for the clients that speak those.

Which one is decided once, by the first byte that is not blank: no JSON text begins with a C, and every LSP
header block in use does. Answers go out in the framing that was found. The server says nothing before the
client has, so it always knows.
"""

from enum import Enum

from .headers import FramingLost, HeaderSplitter
from .ndjson import FrameTooLarge, LineSplitter

MAX_INBOUND_FRAME_BYTES = 64 * 1024 * 1024
MAX_OUTBOUND_FRAME_BYTES = 16 * 1024 * 1024

Frame = bytes | FrameTooLarge | FramingLost

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


class Framing(Enum):
    """How messages are kept apart."""

    NDJSON = "ndjson"
    LSP = "lsp"

    def wrap(self, frame: bytes) -> bytes:
        """Return the bytes that carry `frame`."""
        if self is Framing.LSP:
            return b"Content-Length: %d\r\n\r\n%b" % (len(frame), frame)
        return frame + b"\n"


class FrameReader:
    """Collects chunks of either framing and yields frames; `framing` is None until it is known."""

    def __init__(
        self, framing: Framing | None = None, max_frame_bytes: int = MAX_INBOUND_FRAME_BYTES
    ) -> None:
        self._max = max_frame_bytes
        self._held = b""
        self._splitter: LineSplitter | HeaderSplitter | None = None
        self.framing = framing

    def settle(self, framing: Framing, *, begun: bool) -> None:
        """Take the framing from somebody who has seen more; `begun` says that the first frame went there."""
        self.framing = framing
        if begun:
            self._held = _BLANK[:1]

    def feed(self, chunk: bytes) -> list[Frame]:
        """Return the frames that `chunk` completes."""
        if self._splitter is None:
            self._held += chunk
            if _BOM.startswith(self._held):
                return []
            chunk = self._held.removeprefix(_BOM).lstrip(_BLANK)
            self._held = _BLANK[:1]  # Behind it no BOM is one, however the bytes are cut.
            if not chunk:
                return []
            self.framing = self.framing or _detect(chunk)
            self._splitter = self._make(self.framing)
        return [*self._splitter.feed(chunk)]

    def close(self) -> list[Frame]:
        """Return what the end of the stream completes or breaks."""
        return [] if self._splitter is None else [*self._splitter.close()]

    def _make(self, framing: Framing) -> LineSplitter | HeaderSplitter:
        return HeaderSplitter(self._max) if framing is Framing.LSP else LineSplitter(self._max)


def _detect(start: bytes) -> Framing:
    return Framing.LSP if start[:1] in b"Cc" else Framing.NDJSON
