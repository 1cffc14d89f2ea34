"""When and how the process ends: the reasons, the watch on the host."""

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

import anyio
from anyio.abc import TaskStatus

from . import exit_codes
from .peer import PeerEvent

_HOST_POLL_SECONDS = 1.0
_ENGINE_POLL_SECONDS = 1.0


class Ending(NamedTuple):
    """Why the process ends. With `grace` accepted requests may still run to their end."""

    reason: str
    exit_code: int
    grace: bool = False


HOST_DIED = Ending("the host process is gone", exit_codes.CLEAN)

_OF_THE_HOST = {
    PeerEvent.INPUT_ENDED: Ending("the host has no more to say", exit_codes.CLEAN, grace=True),
    PeerEvent.GONE: HOST_DIED,
    PeerEvent.BROKEN: Ending("the host stopped reading", exit_codes.BROKEN_OFF),
    PeerEvent.FRAMING_LOST: Ending("the host's messages can no longer be told apart", exit_codes.BROKEN_OFF),
    PeerEvent.EXIT: Ending("the host said exit without shutdown", exit_codes.BROKEN_OFF),
}


def ending_of_host(event: PeerEvent, *, shut_down: bool) -> Ending:
    """Return what `event` means for a process that serves one host."""
    if event is PeerEvent.EXIT and shut_down:
        return Ending("the host said exit", exit_codes.CLEAN)
    return _OF_THE_HOST[event]


def engine_died(error: BaseException) -> Ending:
    """Return the ending for an inference thread that cannot go on."""
    code = exit_codes.OUT_OF_MEMORY if isinstance(error, MemoryError) else exit_codes.INTERNAL_ERROR
    return Ending("the inference thread died", code)


ENGINE_STALLED = Ending("the inference thread stands still", exit_codes.INTERNAL_ERROR)

LISTENING_FAILED = Ending("nobody can connect any more", exit_codes.INTERNAL_ERROR)


class Lifecycle:
    """Holds the first reason to end; everything that can end the process reports here, on the event loop."""

    def __init__(self) -> None:
        self._ended = anyio.Event()
        self._ending: Ending | None = None

    def end(self, ending: Ending) -> None:
        """Say that the process should end. A hasty reason replaces a patient one."""
        if self._ending is None or (self._ending.grace and not ending.grace):
            self._ending = ending
            self._ended.set()
            self._ended = anyio.Event()

    async def wait(self, *, beyond: Ending | None = None) -> Ending:
        """Return the reason to end, once there is one other than `beyond`."""
        while self._ending is None or self._ending is beyond:
            await self._ended.wait()
        return self._ending


async def watch_signals(
    end: Callable[[Ending], None], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Turn SIGTERM and SIGINT into endings."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for received in signals:
            end(Ending(f"signal {received.name}", 128 + received))


async def watch_host(process_id: int, end: Callable[[Ending], None]) -> None:
    """End when the process `process_id` is gone: a wrapper may hold our stdin open when the host has died."""
    try:
        descriptor = os.pidfd_open(process_id)
    except (ProcessLookupError, OverflowError):
        pass
    except (AttributeError, OSError):
        while _is_alive(process_id):
            await anyio.sleep(_HOST_POLL_SECONDS)
    else:
        # Tells at once, and also of a host that nobody has reaped, which `kill` takes to be alive.
        try:
            await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)
    end(HOST_DIED)


async def watch_engine(
    step_age_ms: Callable[[], float | None], stall_ms: Callable[[], float], on_stall: Callable[[], None]
) -> None:
    """Call `on_stall` when a step takes longer than `stall_ms`. `step_age_ms` is None between steps."""
    while (step_age_ms() or 0) < stall_ms():
        await anyio.sleep(min(_ENGINE_POLL_SECONDS, stall_ms() / 4000))
    on_stall()


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
