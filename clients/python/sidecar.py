"""The sidecar as an object: a connection to it, and a method for every request."""

import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import anyio
from anyio.abc import ByteStream

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.version import VERSION

from .connection import PartT
from .errors import SidecarDisconnected, SidecarNotStarted, last_words
from .generation import Generation
from .peers import PATIENCE_SECONDS, Peer, Remote, start_on_pipe, start_on_stdio

Transport = Literal["stdio", "pipe"]
DEFAULT_COMMAND = ("mlx-sidecar", "serve")
START_TIMEOUT_SECONDS = 30.0
WINDOW_BYTES = 256 * 1024
ResultT = TypeVar("ResultT")


class Sidecar:
    """A running sidecar. Make one with `async with Sidecar.spawn() as sidecar`, or `Sidecar.connect(path)`.

    Parameters of requests are those of the protocol, in its camelCase; results are its structs. Every request
    raises SidecarRequestError if the server refuses it, and SidecarDisconnected (SidecarExited, if the
    process was ours) if there is no server any more. A task that is cancelled while it waits, by
    `anyio.fail_after` for instance, cancels its request on the server.
    """

    def __init__(self, peer: Peer, info: m.InitializeResult, window_bytes: int) -> None:
        self._peer = peer
        self._connection = peer.connection
        self._window_bytes = window_bytes
        self.info = info

    @classmethod
    @asynccontextmanager
    async def spawn(
        cls,
        command: Sequence[str] = DEFAULT_COMMAND,
        *,
        env: Mapping[str, str] | None = None,
        transport: Transport = "stdio",
        start_timeout: float = START_TIMEOUT_SECONDS,
        window_bytes: int = WINDOW_BYTES,
    ) -> AsyncGenerator["Sidecar"]:
        """Start a sidecar, wait until it answers, and end it when the block is left.

        `transport` "pipe" talks over a private Unix socket instead of stdin and stdout, for a `command` that
        prints things of its own. Text of a stream beyond `window_bytes` that nobody has taken stays with the
        server.

        Raises:
            SidecarNotStarted: the program is missing, or did not answer within `start_timeout` seconds.
            SidecarExited: it ended instead of answering.
        """
        start = start_on_stdio if transport == "stdio" else start_on_pipe
        async with cls._with(await start(command, env), start_timeout, window_bytes) as sidecar:
            yield sidecar

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        start_timeout: float = START_TIMEOUT_SECONDS,
        window_bytes: int = WINDOW_BYTES,
    ) -> AsyncGenerator["Sidecar"]:
        """Connect to a `mlx-sidecar serve --listen PATH`, and hang up when the block is left.

        Raises:
            SidecarNotStarted: nobody serves `path`, or nobody answered within `start_timeout` seconds.
            SidecarDisconnected: the server hung up instead of answering.
        """
        try:
            stream = await anyio.connect_unix(path)
        except OSError as error:
            raise SidecarNotStarted(
                f"Nobody serves {os.fspath(path)} ({error.strerror}). Run `mlx-sidecar serve --listen` there."
            ) from error
        async with cls.over(stream, start_timeout=start_timeout, window_bytes=window_bytes) as sidecar:
            yield sidecar

    @classmethod
    @asynccontextmanager
    async def over(
        cls,
        stream: ByteStream,
        *,
        start_timeout: float = START_TIMEOUT_SECONDS,
        window_bytes: int = WINDOW_BYTES,
    ) -> AsyncGenerator["Sidecar"]:
        """Talk over a stream that leads to a sidecar, and close it when the block is left.

        Raises:
            SidecarNotStarted: nobody answered within `start_timeout` seconds.
            SidecarDisconnected: the stream ended instead.
        """
        async with cls._with(Remote(stream), start_timeout, window_bytes) as sidecar:
            yield sidecar

    @property
    def process_id(self) -> int | None:
        """The id of the sidecar's process, if it is ours."""
        return self._peer.process_id

    async def load(
        self, model: str, *, on_progress: Callable[[m.LoadProgress], object] | None = None, **params: Any
    ) -> m.LoadResult:
        """Load a model; it is evaluated and warm when this returns.

        `on_progress` is called with how far it is. What it raises comes out here, and cancels the request.
        """
        params = {"model": model, **params}
        return await self._follow("load", params, m.LoadResult, m.LoadProgress, on_progress)

    async def reload(
        self, model: str, *, on_progress: Callable[[m.LoadProgress], object] | None = None
    ) -> m.LoadResult:
        """Read a loaded model anew while the old one serves, which stays if that fails. See `load`."""
        return await self._follow("reload", {"model": model}, m.LoadResult, m.LoadProgress, on_progress)

    async def unload(self, model: str, *, force: bool = False) -> m.UnloadResult:
        """Unload a model after its requests have ended; `force` ends them."""
        params = {"model": model, "force": force}
        return await self._connection.send("unload", params).result(m.UnloadResult)

    async def alias(self, alias: str, model: str | None) -> m.AliasResult:
        """Let `alias` stand for a loaded model from now on; None takes it away."""
        params = {"alias": alias, "model": model}
        return await self._connection.send("alias", params).result(m.AliasResult)

    async def models(self) -> list[m.ModelInfo]:
        """Return the models that were loaded, whether they are in memory now or not."""
        return (await self._connection.send("models", {}).result(m.ModelsResult)).models

    async def pull(
        self,
        model: str,
        *,
        revision: str | None = None,
        on_progress: Callable[[m.PullProgress], object] | None = None,
    ) -> m.PullResult:
        """Bring a model onto the sidecar's machine, of which `revision` names a branch, tag or commit.

        `on_progress` is called with how far it is. What it raises comes out here, and cancels the request.
        """
        params = {"model": model} | ({} if revision is None else {"revision": revision})
        return await self._follow("pull", params, m.PullResult, m.PullProgress, on_progress)

    async def load_adapter(
        self, model: str, adapter: str, path: str | os.PathLike[str]
    ) -> m.LoadAdapterResult:
        """Load the LoRA adapter of an absolute folder beside a loaded model; `generate` takes its name."""
        params = {"model": model, "adapter": adapter, "path": os.fspath(path)}
        return await self._connection.send("loadAdapter", params).result(m.LoadAdapterResult)

    async def unload_adapter(self, model: str, adapter: str, *, force: bool = False) -> m.UnloadAdapterResult:
        """Unload an adapter after its requests have ended; `force` ends them."""
        params = {"model": model, "adapter": adapter, "force": force}
        return await self._connection.send("unloadAdapter", params).result(m.UnloadAdapterResult)

    def generate(self, model: str, **params: Any) -> Generation:
        """Start generating at once and return the answer, to be iterated over as it grows.

        `adapter` is the name of one that was loaded. `deadlineMs` ends it on the server, `priority` says who
        goes first there, and `deduplicate=False` keeps it from sharing the work of an identical request.
        """
        request = self._connection.stream("generate", {"model": model, **params}, m.GenerateProgress)
        return Generation(self._connection, request, self._window_bytes)

    async def tokenize(self, model: str, **params: Any) -> list[int]:
        """Return the ids of `text` or `messages`."""
        sent = self._connection.send("tokenize", {"model": model, **params})
        return (await sent.result(m.TokenizeResult)).tokens

    async def detokenize(self, model: str, tokens: Sequence[int], **params: Any) -> str:
        """Return the text of ids."""
        sent = self._connection.send("detokenize", {"model": model, "tokens": tokens, **params})
        return (await sent.result(m.DetokenizeResult)).text

    async def stats(self) -> m.StatsResult:
        """Return what the sidecar is doing and holding."""
        return await self._connection.send("stats", {}).result(m.StatsResult)

    async def ping(self) -> m.PingResult:
        """Return at once, whatever the model is doing."""
        return await self._connection.send("ping", {}).result(m.PingResult)

    async def server_info(self) -> m.ServerInfoResult:
        """Return what `info` says, and the process behind it."""
        return await self._connection.send("server/info", {}).result(m.ServerInfoResult)

    async def close(self) -> int | None:
        """End the connection in order, and the process if it is ours; return its exit code then.

        Requests in flight are cancelled. Leaving the block does the same.
        """
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(PATIENCE_SECONDS):
                await self._connection.send("shutdown", {}).end()
                self._connection.notify("exit", {})
            self._connection.finish()
            await self._peer.end(PATIENCE_SECONDS)
            await self._connection.closed.wait()
        return self._peer.exit_code

    async def _follow(
        self,
        method: str,
        params: Mapping[str, Any],
        result: type[ResultT],
        progress: type[PartT],
        on_progress: Callable[[PartT], object] | None,
    ) -> ResultT:
        if on_progress is None:
            return await self._connection.send(method, params).result(result)
        request = self._connection.stream(method, params, progress)
        try:
            while parts := await request.take():
                for part in parts:
                    on_progress(part)
        finally:
            request.cancel()
        return await request.result(result)

    @classmethod
    @asynccontextmanager
    async def _with(cls, peer: Peer, start_timeout: float, window_bytes: int) -> AsyncGenerator["Sidecar"]:
        # Raised outside the task group, which would wrap it in an ExceptionGroup that nobody expects.
        failure: BaseException | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_talk, peer)
            try:
                sidecar = cls(peer, await _initialize(peer, start_timeout, window_bytes), window_bytes)
                try:
                    yield sidecar
                finally:
                    await sidecar.close()
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                failure = error
            finally:
                with anyio.CancelScope(shield=True):
                    await peer.end(0)
        if failure is not None:
            raise failure


async def _talk(peer: Peer) -> None:
    # Whatever happens around it: the ending needs a connection that works.
    with anyio.CancelScope(shield=True):
        try:
            await peer.talk()
        finally:
            peer.connection.close(SidecarDisconnected("The connection to the sidecar has ended."))


async def _initialize(peer: Peer, start_timeout: float, window_bytes: int) -> m.InitializeResult:
    params = {
        "protocolVersion": m.PROTOCOL_VERSION,
        "clientInfo": {"name": "mlx-sidecar-python", "version": VERSION},
        # A sidecar that is not ours has no reason to end with us.
        "processId": None if peer.process_id is None else os.getpid(),
        "flowControl": {"windowBytes": window_bytes},
    }
    info: m.InitializeResult | None = None
    with anyio.move_on_after(start_timeout):
        info = await peer.connection.send("initialize", params).result(m.InitializeResult)
    if info is None:
        said = last_words(peer.log_tail)
        raise SidecarNotStarted(f"The sidecar did not answer within {start_timeout} seconds.{said}")
    if info.protocol_version != m.PROTOCOL_VERSION:
        raise SidecarNotStarted(
            f"The sidecar speaks version {info.protocol_version} of the protocol, this client version "
            f"{m.PROTOCOL_VERSION}. Install the same version of both."
        )
    peer.connection.max_frame_bytes = info.limits.max_frame_bytes
    return info
