"""Pulls for clients: each in a process of its own, which may fail as it likes.

The server itself never goes to the network.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import anyio
from anyio.abc import AsyncResource, ByteReceiveStream, Process, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream
from msgspec import UNSET, structs

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import PullFailed

OnProgress = Callable[[m.PullProgress], None]

log = logging.getLogger("models")

_MAX_LINE_BYTES = 1024 * 1024


async def pull(model: str, revision: str | None, on_progress: OnProgress) -> m.PullResult:
    """Bring a model onto this machine, as `mlx-sidecar pull` does, and return what it is.

    A cancel ends the process and all that it started; so does the end of this one.

    Raises:
        PullFailed: it could not be brought.
    """
    outcome: m.PullResult | PullFailed | None = None
    async with _process(model, revision) as process, anyio.create_task_group() as tasks:
        assert process.stdout is not None
        assert process.stderr is not None
        tasks.start_soon(_log_lines, process.stderr, model)
        outcome = await _outcome(process.stdout, model, on_progress)
        tasks.cancel_scope.cancel()
    if isinstance(outcome, m.PullResult):
        return outcome
    raise outcome or PullFailed(model, "what fetched it ended early")


@asynccontextmanager
async def _process(model: str, revision: str | None) -> AsyncGenerator[Process]:
    # -P: modules come from where Python is installed, not from the folder that the host happens to be in.
    command = [sys.executable, "-P", "-m", "mlx_sidecar.runtime", "pull", "--json", "--until-input-ends"]
    command += [f"--revision={revision}"] if revision is not None else []
    pipe = subprocess.PIPE
    process = await anyio.open_process(
        [*command, "--", model], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        yield process
    finally:
        # What the process itself has started is in its group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await cast(AsyncResource, process).aclose()


async def _outcome(
    output: ByteReceiveStream, model: str, on_progress: OnProgress
) -> m.PullResult | PullFailed | None:
    lines, seq = BufferedByteReceiveStream(output), 0
    while (line := await _line(lines)) is not None:
        event: dict[str, Any] = json.loads(line)
        if (said := event.get("progress")) is not None:
            seq += 1
            on_progress(_progress(seq, said))
        if (result := event.get("result")) is not None:
            return m.PullResult(model=model, bytes=result["bytes"], revision=result.get("revision", UNSET))
        if (error := event.get("error")) is not None:
            return PullFailed(model, cast(str, error["message"]).rstrip("."))
    return None


async def _log_lines(errors: ByteReceiveStream, model: str) -> None:
    lines = BufferedByteReceiveStream(errors)
    while (line := await _line(lines)) is not None:
        log.info("pulling %s: %s", model, line.decode(errors="replace"))


async def _line(lines: BufferedByteReceiveStream) -> bytes | None:
    try:
        return await lines.receive_until(b"\n", _MAX_LINE_BYTES)
    except (anyio.IncompleteRead, anyio.EndOfStream, anyio.DelimiterNotFound, anyio.ClosedResourceError):
        return None


def _progress(seq: int, said: dict[str, Any]) -> m.PullProgress:
    return m.PullProgress(
        seq=seq,
        phase=said["phase"],
        done_bytes=said["doneBytes"],
        total_bytes=said["totalBytes"],
        remaining_ms=said.get("remainingMs", UNSET),
    )


class Pulls:
    """At most one pull of a model and revision at a time: whoever asks for the same follows it."""

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._running: dict[tuple[str, str | None], _Shared] = {}

    async def pull(self, model: str, revision: str | None, on_progress: OnProgress) -> m.PullResult:
        """Return what a pull brings; it is stopped when nobody waits for it any more.

        Raises:
            PullFailed: it could not be brought.
        """
        key = model, revision
        shared = self._running.get(key)
        if shared is None:
            shared = self._running[key] = _Shared()
            self._tasks.start_soon(self._run, key, shared)
        try:
            outcome = await shared.follow(on_progress)
        finally:
            if not shared.followers and self._running.get(key) is shared:
                del self._running[key]
        if isinstance(outcome, m.PullResult):
            return outcome
        raise outcome

    async def _run(self, key: tuple[str, str | None], shared: "_Shared") -> None:
        model, revision = key
        try:
            with shared.scope:
                shared.outcome = await pull(model, revision, shared.tell)
        except PullFailed as error:
            shared.outcome = error
        except OSError as error:
            log.warning("pulling %s", model, exc_info=error)
            shared.outcome = PullFailed(model, "what fetches it could not be started")
        finally:
            shared.done.set()


class _Shared:
    """One pull, and those who follow it: how much each has been told, and how."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.done = anyio.Event()
        self.followers: dict[object, OnProgress] = {}
        self.outcome: m.PullResult | PullFailed = PullFailed("", "the sidecar ends")

    def tell(self, progress: m.PullProgress) -> None:
        for follower in self.followers.values():
            follower(progress)

    async def follow(self, on_progress: OnProgress) -> m.PullResult | PullFailed:
        """Return how it ended; whoever leaves last before that ends it."""
        me, seq = object(), 0

        def tell(progress: m.PullProgress) -> None:
            nonlocal seq
            seq += 1
            on_progress(structs.replace(progress, seq=seq))

        self.followers[me] = tell
        try:
            await self.done.wait()
        finally:
            del self.followers[me]
            if not self.followers:
                self.scope.cancel()
        return self.outcome
