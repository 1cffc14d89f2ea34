"""Channels whose other end a test holds, and what arrives there."""

import json
import socket
import threading
from collections import deque
from types import TracebackType
from typing import Any, Self

from mlx_sidecar.runtime.server.channel import Channel

PATIENCE_SECONDS = 30.0


class FarEnd:
    """The peer's end of `channel`, a socket. What nobody reads here fills it up."""

    def __init__(self) -> None:
        near, self.socket = socket.socketpair()
        self.socket.settimeout(PATIENCE_SECONDS)
        self.channel = Channel.over(near)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self.channel.release()

    def say(self, *messages: dict[str, Any]) -> None:
        """Send messages to the server, in one write."""
        self.socket.sendall(b"".join(line({"jsonrpc": "2.0"} | message) for message in messages))

    def hear(self) -> Any:
        """Return the next message, waiting for it."""
        return json.loads(self._file.readline())

    def rest(self) -> list[Any]:
        """Return every message up to the end of the connection, waiting for it."""
        return [json.loads(frame) for frame in self._file]

    def close(self) -> None:
        """Go away without a word."""
        self._file.close()
        self.socket.close()


class NarrowChannel(Channel):
    """Takes as many bytes without waiting as it is told, then none until `open`; keeps every write."""

    def __init__(self, *takes: int) -> None:
        self.writes: list[bytes] = []
        self.closed = False
        self._takes = deque(takes)
        self._is_open = threading.Event()

    @property
    def written(self) -> bytes:
        """Everything that went through."""
        return b"".join(self.writes)

    def messages(self) -> list[Any]:
        """Return everything that went through, as messages."""
        return [json.loads(frame) for frame in self.written.splitlines()]

    def open(self) -> None:
        """Take whatever comes from now on."""
        self._is_open.set()

    def try_write(self, data: bytes) -> int:
        """Take what there is room for."""
        if self.closed:
            raise BrokenPipeError
        room = len(data) if self._is_open.is_set() else self._takes.popleft() if self._takes else 0
        self._keep(data[:room])
        return min(room, len(data))

    def write_all(self, data: bytes | memoryview) -> None:
        """Take everything, once the channel is open."""
        assert self._is_open.wait(PATIENCE_SECONDS)
        if self.closed:
            raise BrokenPipeError
        self._keep(bytes(data))

    def close(self) -> None:
        """Fail from now on, also where somebody waits."""
        self.closed = True
        self._is_open.set()

    def _keep(self, data: bytes) -> None:
        if data:
            self.writes.append(data)


def line(message: object) -> bytes:
    """Return a message as it stands on the wire."""
    return json.dumps(message).encode() + b"\n"
