"""Both directions of one connection, as bytes, held up to the schema."""

import json

from support.schema import Conversation

from mlx_sidecar.protocol.framing import MAX_OUTBOUND_FRAME_BYTES, Frame, FrameReader, Framing


class Eavesdropper:
    """Checks what a server says, in whatever framing; an AssertionError says what is wrong where.

    Of what a client says only the questions are noted: it may say what it likes.
    """

    def __init__(self) -> None:
        self._conversation = Conversation()
        self._said = FrameReader()
        self._heard: FrameReader | None = None

    def said(self, data: bytes) -> None:
        """Note bytes of the client, before they are answered."""
        for frame in self._said.feed(data):
            if isinstance(frame, bytes):
                # To JSON a line end in a body is a blank.
                self._conversation.said(frame.replace(b"\n", b" "))

    def heard(self, data: bytes) -> None:
        """Check the frames that end in these bytes of the server."""
        if self._heard is None:
            # A server answers as it is spoken to.
            self._heard = FrameReader(self._said.framing or Framing.NDJSON, MAX_OUTBOUND_FRAME_BYTES)
        self._check(self._heard.feed(data))

    def ended(self) -> None:
        """Check that the server's last frame was a whole one."""
        if self._heard is not None:
            self._check(self._heard.close())

    def _check(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert isinstance(frame, bytes), f"The server's frames cannot be told apart: {frame}"
            self._conversation.heard(json.loads(frame))
