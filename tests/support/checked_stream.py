"""A stream whose both directions are held up to the schema while they pass."""

import json

from anyio.abc import ByteStream
from support.schema import Conversation


class CheckedStream(ByteStream):
    """Passes everything on as it is; what was wrong with the server's lines is added to `problems`."""

    def __init__(self, stream: ByteStream, problems: list[str]) -> None:
        self._stream = stream
        self._problems = problems
        self._conversation = Conversation()
        self._line = b""

    async def send(self, item: bytes) -> None:
        """Note what was asked."""
        self._conversation.said(item)
        await self._stream.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Check the lines that end here."""
        chunk = await self._stream.receive(max_bytes)
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            self._check(line)
        return chunk

    async def send_eof(self) -> None:
        """Say nothing more."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()

    def _check(self, line: bytes) -> None:
        # An exception in here would be one of the client's, which it is not.
        try:
            self._conversation.heard(json.loads(line))
        except (AssertionError, ValueError) as problem:
            self._problems.append(str(problem))
