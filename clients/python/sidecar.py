"""The sidecar as an object: a process, and a method for every request."""

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import msgspec
from anyio.abc import Process

from mlx_sidecar.protocol import messages as m

from .connection import Connection
from .errors import SidecarExited, SidecarNotStarted
from .generation import Generation

ResultT = TypeVar("ResultT")

_STDERR_TAIL_BYTES = 8 * 1024
_PATIENCE_SECONDS = 2.0
DEFAULT_COMMAND = ("mlx-sidecar", "serve")


class Sidecar:
    """A running sidecar. Make one with `async with Sidecar.spawn() as sidecar`.

    Parameters of requests are those of the protocol, in its camelCase; results are its structs.
    """

    def __init__(self, connection: Connection, process: Process, info: m.InitializeResult) -> None:
        self._connection = connection
        self._process = process
        self._generations = 0
        self.info = info

    @classmethod
    @asynccontextmanager
    async def spawn(
        cls, command: Sequence[str] = DEFAULT_COMMAND, env: Mapping[str, str] | None = None
    ) -> AsyncGenerator["Sidecar"]:
        """Start a sidecar, wait until it answers, and end it when the block is left.

        Raises:
            SidecarNotStarted: the program is missing.
            SidecarExited: it ended instead of answering.
        """
        try:
            process = await anyio.open_process(list(command), env=env)
        except OSError as error:
            raise SidecarNotStarted(
                f"{command[0]} could not be started ({error.strerror}). Install it, or pass `command`."
            ) from error
        assert process.stdin is not None
        connection = Connection(process.stdin)
        # Raised outside the task group, which would wrap it in an ExceptionGroup that nobody expects.
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, connection, process)
            try:
                yield cls(connection, process, await _initialize(connection))
            except Exception as error:
                failure = error
            finally:
                await _end(connection, process)
        if failure is not None:
            raise failure

    @property
    def process_id(self) -> int:
        """The id of the sidecar's process."""
        return self._process.pid

    async def load(self, model: str, **params: Any) -> m.LoadResult:
        """Load a model; it is evaluated and warm when this returns."""
        return await self._request("load", {"model": model, **params}, m.LoadResult)

    async def unload(self, model: str, *, force: bool = False) -> m.UnloadResult:
        """Unload a model after its requests have ended; `force` ends them."""
        return await self._request("unload", {"model": model, "force": force}, m.UnloadResult)

    async def models(self) -> list[m.ModelInfo]:
        """Return the models in memory."""
        return (await self._request("models", {}, m.ModelsResult)).models

    def generate(self, model: str, **params: Any) -> Generation:
        """Return an answer to be iterated over as it grows."""
        self._generations += 1
        return Generation(self._connection, f"generate-{self._generations}", {"model": model, **params})

    async def tokenize(self, model: str, **params: Any) -> list[int]:
        """Return the ids of `text` or `messages`."""
        return (await self._request("tokenize", {"model": model, **params}, m.TokenizeResult)).tokens

    async def detokenize(self, model: str, tokens: list[int], **params: Any) -> str:
        """Return the text of ids."""
        params |= {"model": model, "tokens": tokens}
        return (await self._request("detokenize", params, m.DetokenizeResult)).text

    async def stats(self) -> m.StatsResult:
        """Return what the sidecar is doing and holding."""
        return await self._request("stats", {}, m.StatsResult)

    async def ping(self) -> m.PingResult:
        """Return at once, whatever the model is doing."""
        return await self._request("ping", {}, m.PingResult)

    async def close(self) -> int:
        """End the process in order and return its exit code."""
        await _end(self._connection, self._process)
        assert self._process.returncode is not None
        return self._process.returncode

    async def _request(self, method: str, params: dict[str, Any], result: type[ResultT]) -> ResultT:
        pending = await self._connection.send(method, params)
        try:
            return msgspec.json.decode(await pending.result(), type=result)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._connection.notify("$/cancelRequest", {"id": pending.id})
            raise


async def _initialize(connection: Connection) -> m.InitializeResult:
    params = {
        "protocolVersion": m.PROTOCOL_VERSION,
        "clientInfo": {"name": "mlx-sidecar-python"},
        "processId": os.getpid(),
    }
    pending = await connection.send("initialize", params)
    return msgspec.json.decode(await pending.result(), type=m.InitializeResult)


async def _read(connection: Connection, process: Process) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    tail = bytearray()

    async def keep_log() -> None:
        assert process.stderr is not None
        async for chunk in process.stderr:
            tail.extend(chunk)
            del tail[:-_STDERR_TAIL_BYTES]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_log)
        await connection.read(process.stdout)
    exit_code = await process.wait()
    connection.close(SidecarExited(exit_code, tail.decode(errors="replace").strip()))


async def _end(connection: Connection, process: Process) -> None:
    """Ask by `shutdown` and `exit`, by closing stdin, by SIGTERM, by SIGKILL; return when it has ended."""
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(_PATIENCE_SECONDS):
            pending = await connection.send("shutdown", {})
            await pending.answered.wait()
            await connection.notify("exit", {})
        assert process.stdin is not None
        await process.stdin.aclose()
        for hurry in (process.terminate, process.kill):
            with anyio.move_on_after(_PATIENCE_SECONDS):
                await process.wait()
            if process.returncode is None:
                hurry()
        await process.wait()
