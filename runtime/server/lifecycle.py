"""When and how the process ends: the reasons, the watch on the host, the exit codes.

0      `shutdown` then `exit`, or the end of stdin with nothing lost
1      `exit` without `shutdown`, the host stopped reading, or its LSP headers were broken
2      wrong command line
70     the sidecar itself failed
128+n  signal n
"""

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

import anyio

_HOST_POLL_SECONDS = 1.0


class Ending(NamedTuple):
    """Why the process ends. With `grace` accepted requests may still run to their end."""

    reason: str
    exit_code: int
    grace: bool = False


INPUT_ENDED = Ending("the host closed our stdin", 0, grace=True)
HOST_DIED = Ending("the host process is gone", 0)
OUTPUT_BROKEN = Ending("the host stopped reading", 1)
FRAMING_LOST = Ending("the host's messages can no longer be told apart", 1)
ENGINE_DIED = Ending("the inference thread died", 70)


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


async def watch_signals(end: Callable[[Ending], None]) -> None:
    """Turn SIGTERM and SIGINT into endings."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            end(Ending(f"signal {received.name}", 128 + received))


async def watch_host(process_id: int, end: Callable[[Ending], None]) -> None:
    """End when the process `process_id` is gone: a wrapper may hold our stdin open when the host has died."""
    while _is_alive(process_id):
        await anyio.sleep(_HOST_POLL_SECONDS)
    end(HOST_DIED)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
