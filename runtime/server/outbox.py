"""What waits to be written to one peer, and the thread that writes it.

Frames sent in one turn of the event loop go out in one write. Sending never waits for the pipe.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from .stdio import write_all

log = logging.getLogger("server")


class Outbox:
    """Takes whole frames on the event loop and writes them, in order, on a thread of its own.

    `on_broken` is called on that thread, once, when the peer has closed its end.
    """

    def __init__(self, descriptor: int, on_broken: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_broken = on_broken
        self._turn: list[bytes] = []
        self._queue: queue.SimpleQueue[bytes | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Queue one frame, wrapped. Call on the event loop."""
        if not self._turn:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._turn.append(frame)

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the writing thread once everything sent so far has been written."""
        self._end_turn()
        self._queue.put(callback)

    def close(self, timeout: float) -> None:
        """Write what is queued, for at most `timeout` seconds."""
        self._end_turn()
        self._queue.put(None)
        self._thread.join(timeout)

    def _end_turn(self) -> None:
        if self._turn:
            self._queue.put(b"".join(self._turn))
            self._turn = []

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if not isinstance(item, bytes):
                item()
                continue
            try:
                write_all(self._descriptor, item)
            except OSError as error:
                log.info("the host has closed its end (%s)", error.strerror)
                self._on_broken()
                return
