"""One connection to a target, as the player sees it: frames out, in one framing and one way of cutting."""

import time
from collections import deque
from enum import Enum
from typing import Any

from mlx_sidecar.protocol.framing import Frame, FrameReader, Framing
from mlx_sidecar.protocol.headers import FramingLost
from mlx_sidecar.protocol.ndjson import FrameTooLarge

from .frames import Violation, decode
from .target import Channel, TargetError


class Cutting(Enum):
    """How many bytes go into one write."""

    WHOLE = "whole"
    BYTEWISE = "bytewise"


class Connection:
    """Wraps a channel. `log` keeps the last things that were said, for the report of a failure."""

    def __init__(self, channel: Channel, framing: Framing, cutting: Cutting, patience: float) -> None:
        self.channel = channel
        self.patience = patience
        self.log: deque[str] = deque(maxlen=12)
        self._framing = framing
        self._cutting = cutting
        self._reader = FrameReader(framing)
        self._frames: deque[Frame] = deque()
        self._ended = False

    def renew(self, channel: Channel) -> None:
        """Go on over another channel, as if nothing had been said."""
        self.channel.close()
        self.channel = channel
        self._reader = FrameReader(self._framing)
        self._frames.clear()
        self._ended = False

    def write(self, items: list[tuple[bytes, bool]]) -> None:
        """Send bytes; those marked True as a frame.

        Raises:
            TargetError: the target does not read.
        """
        for data, _ in items:
            self.log.append(f"--> {_shorten(data)}")
        data = b"".join(self._framing.wrap(data) if framed else data for data, framed in items)
        if self._cutting is Cutting.WHOLE:
            self.channel.write(data, self.patience)
        else:
            for index in range(len(data)):
                self.channel.write(data[index : index + 1], self.patience)

    def read(self) -> Any:
        """Return the next message, or None at the end of the target's output.

        Raises:
            TargetError: nothing complete came in time.
            Violation: what came breaks a rule that holds for every frame.
        """
        deadline = time.monotonic() + self.patience
        while not self._frames and not self._ended:
            if time.monotonic() > deadline:
                raise TargetError(f"no complete frame came for {self.patience:g} s")
            chunk = self.channel.read(self.patience)
            self._ended = not chunk
            self._frames.extend(self._reader.feed(chunk) if chunk else self._reader.close())
        if not self._frames:
            self.log.append("<-- (the end)")
            return None
        return self._decode(self._frames.popleft())

    def _decode(self, frame: Frame) -> Any:
        if isinstance(frame, FramingLost):
            raise Violation(f"the headers of a frame are broken: {frame.problem}")
        if isinstance(frame, FrameTooLarge):
            raise Violation("a frame is longer than any may be")
        self.log.append(f"<-- {_shorten(frame)}")
        return decode(frame)


def _shorten(data: bytes, most: int = 400) -> str:
    text = data.decode("utf-8", "backslashreplace")
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]} ({len(data)} bytes)"
