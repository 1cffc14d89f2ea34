"""The thread that brings weights into memory while the inference thread goes on decoding.

It has MLX streams of its own. What it hands over is evaluated: a graph belongs to the thread that built it.
"""

import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

ResultT = TypeVar("ResultT")

_NICENESS = 10
"""On Linux a thread has a niceness of its own, and so have those that it starts: MLX's for its stream. With
this one a load gets a tenth of a core that tokens need as well, and all of one that nobody needs."""


class LoaderThread:
    """Does one thing at a time, in the order in which it was asked. Starts with the first."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def run(self, work: Callable[[], ResultT]) -> "Future[ResultT]":
        """Run `work` on this thread and return a future of its result; cancelled, it never begins."""
        if self._thread.ident is None:
            self._thread.start()
        future: Future[ResultT] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(command)
        return future

    def stop(self, timeout: float) -> bool:
        """End the thread after what it is doing; return whether it ended within `timeout` seconds."""
        if self._thread.ident is None:
            return True
        self._work.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (command := self._work.get()) is not None:
            command()
            # Or it would keep what it made until the next one comes.
            del command
        self._clear_streams()

    def _clear_streams(self) -> None:
        # Without it the process aborts when the interpreter ends.
        import mlx.core as mx

        mx.clear_streams()
