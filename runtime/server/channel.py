"""The bytes of one peer: a pair of descriptors, or one socket for both directions.

Reading blocks, on the reader's thread. Writing comes in two forms: `write_all` waits for the peer,
`try_write` never does. Nothing here makes a descriptor non-blocking: O_NONBLOCK belongs to the open file,
which a parent or a child may share with us. For the same reason it may be set all the same.
"""

import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from mlx_sidecar.native.pulse import Pulses

if TYPE_CHECKING:
    from mlx_sidecar.native._core import Pulse

_READ_BYTES = 256 * 1024


class Channel:
    """Both directions of a peer. Any thread may write; only one at a time does."""

    # What reads and writes in our place, if there is such a thing.
    _reader: "Pulse | None" = None
    _writer: "Pulse | None" = None

    def __init__(self, read: int, write: int) -> None:
        self._read = read
        self._write = write
        self._socket = socket.socket(fileno=write) if _is(stat.S_ISSOCK, write) else None
        self._is_pipe = _is(stat.S_ISFIFO, write)
        self._is_file = _is(stat.S_ISREG, write)

    @classmethod
    def over(cls, connected: socket.socket) -> "Channel":
        """Return the channel of a connected socket, which from now on belongs to it."""
        descriptor = connected.detach()
        return cls(descriptor, descriptor)

    def quicken(self, pulses: Pulses, framing: str) -> "Pulse | None":
        """Let a pulse write for us from now on, and return it. Call before anything is written."""
        self._writer = pulses.over(self._read, self._write, framing)
        return self._writer

    def read_ahead(self, greeted: bytes) -> None:
        """Let the pulse read for us, if there is one. `greeted` was read before, and has been dealt with."""
        if self._writer is not None:
            self._reader = self._writer
            self._reader.start(greeted)

    def has_input(self) -> bool:
        """Return whether `read` would return at once."""
        return bool(_poll(self._read, select.POLLIN, 0))

    def read(self) -> bytes:
        """Return what the peer has said, waiting for it; empty at the end of its input."""
        if self._reader is not None:
            return self._reader.read()
        while True:
            try:
                return os.read(self._read, _READ_BYTES)
            except BlockingIOError:
                _poll(self._read, select.POLLIN, None)
            except OSError:
                return b""

    def wait_until_gone(self) -> None:
        """Return when the peer no longer reads what we write. Call after the end of its input."""
        while not _poll(self._write, 0, None) & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            pass

    def write_all(self, data: bytes | memoryview) -> None:
        """Write every byte, however many writes and however long that takes.

        Raises:
            OSError: the peer has closed its end.
        """
        if self._writer is not None:
            self._writer.write_all(data)
            return
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._write, view) :]
            except BlockingIOError:
                _poll(self._write, select.POLLOUT, None)

    def try_write(self, data: bytes) -> int:
        """Write what fits without waiting; return the number of bytes, which may be 0.

        Raises:
            OSError: the peer has closed its end.
        """
        if self._writer is not None:
            return self._writer.try_write(data)
        if self._socket is not None:
            try:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return 0
        if self._is_file:
            return os.write(self._write, data)
        # A pipe that polls as writable takes at least PIPE_BUF bytes without waiting (POSIX, pipe(7)).
        if self._is_pipe and _poll(self._write, select.POLLOUT, 0) & select.POLLOUT:
            return os.write(self._write, data[: select.PIPE_BUF])
        return 0

    def close(self) -> None:
        """End a socket in both directions, which also ends a `read` that is waiting; pipes stay open."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give a socket's descriptor back. Nobody may read or write any more."""
        if self._reader is not None:
            self._reader.stop()
        if self._socket is not None:
            self._socket.close()


def _is(kind: Callable[[int], bool], descriptor: int) -> bool:
    return kind(os.fstat(descriptor).st_mode)


def _poll(descriptor: int, events: int, timeout_ms: int | None) -> int:
    poll = select.poll()
    poll.register(descriptor, events)
    found = poll.poll(timeout_ms)
    return found[0][1] if found else 0
