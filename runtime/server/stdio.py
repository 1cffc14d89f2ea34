"""The process's own stdin and stdout, claimed for the wire, and the thread that reads.

`claim_stdio` runs before any heavy import. Afterwards descriptor 1 leads to stderr and descriptor 0 to
nothing, so a print, a C library's banner or a child process can neither write into the wire nor read from it.
"""

import fcntl
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

_FIRST_PRIVATE_DESCRIPTOR = 10
_READ_BYTES = 256 * 1024
_CHUNKS_AHEAD = 16


class Wire(NamedTuple):
    """Private descriptors of the host's pipes, closed in child processes."""

    read: int
    write: int


def claim_stdio() -> Wire:
    """Move stdin and stdout to private descriptors and divert the standard ones. Call once, first."""
    wire = Wire(*(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_PRIVATE_DESCRIPTOR) for fd in (0, 1)))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    try:
        os.dup2(2, 1)
    except OSError:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    os.close(nowhere)
    return wire


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte, however many writes that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class PipeReader:
    """Reads a descriptor on a thread of its own, with `os.read` and no buffer that could hold bytes back.

    `on_chunk` and `on_end` are called on that thread. After `_CHUNKS_AHEAD` chunks the thread waits until
    `release` has been called for one of them, so a host that floods us fills its own pipe and not our memory.
    """

    def __init__(
        self, descriptor: int, on_chunk: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        self._descriptor = descriptor
        self._on_chunk = on_chunk
        self._on_end = on_end
        self._room = threading.Semaphore(_CHUNKS_AHEAD)
        # A daemon: blocked in os.read it holds no lock, and the process may end under it.
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def start(self) -> None:
        """Begin reading."""
        self._thread.start()

    def release(self) -> None:
        """Say that one chunk has been dealt with."""
        self._room.release()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            try:
                chunk = os.read(self._descriptor, _READ_BYTES)
            except OSError:
                chunk = b""
            if not chunk:
                break
            self._on_chunk(chunk)
        self._on_end()
