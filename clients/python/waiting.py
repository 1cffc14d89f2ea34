"""Waiting, in any thread, for work on the event loop's thread.

All of it raises SidecarDisconnected if that thread has ended.
"""

import math
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from anyio.from_thread import BlockingPortal

from .errors import SidecarDisconnected

PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")


def call(portal: BlockingPortal, work: Callable[[], ResultT]) -> ResultT:
    """Return what `work` returns, which does not wait."""
    with _not_ended():
        future = portal.start_task_soon(work)
    return future.result()


def wait(
    portal: BlockingPortal, work: Callable[[], Awaitable[ResultT]], timeout: float | None = None
) -> ResultT:
    """Return what `work` returns; raise TimeoutError, and cancel it, if that takes longer than `timeout`."""
    with _not_ended():
        future = portal.start_task_soon(work)
    try:
        return future.result(timeout)
    except BaseException:
        # Too late, or Ctrl-C: what is cancelled over there is cancelled on the server.
        future.cancel()
        raise


def follow(
    portal: BlockingPortal,
    work: Callable[[Callable[[PartT], object] | None], Awaitable[ResultT]],
    on_progress: Callable[[PartT], object] | None,
    timeout: float | None,
) -> ResultT:
    """Do as `wait` does, and call `on_progress`, in the thread that waits, with what `work` tells it."""
    if on_progress is None:
        return wait(portal, partial(work, None), timeout)
    deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    parts: SimpleQueue[PartT | None] = SimpleQueue()
    with _not_ended():
        future = portal.start_task_soon(work, parts.put)
    future.add_done_callback(lambda _: parts.put(None))
    try:
        while (part := _next(parts, deadline)) is not None:
            on_progress(part)
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _next(parts: "SimpleQueue[PartT | None]", deadline: float) -> PartT | None:
    try:
        return parts.get(timeout=None if deadline == math.inf else max(deadline - time.monotonic(), 0))
    except Empty:
        raise TimeoutError from None


@contextmanager
def _not_ended() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SidecarDisconnected("The connection to the sidecar has ended, with its block.") from error
