"""The client for programs without an event loop: the same methods, which wait.

The event loop runs in a thread of its own, one for each sidecar, and everything happens there. Methods may be
called from any thread.
"""

import atexit
import math
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from mlx_sidecar.protocol import messages as m

from .errors import SidecarDisconnected
from .generation import Generation
from .sidecar import DEFAULT_COMMAND, START_TIMEOUT_SECONDS, WINDOW_BYTES, Sidecar, Transport
from .waiting import call, follow, wait

ResultT = TypeVar("ResultT")


class SyncSidecar:
    """A running sidecar. Make one with `with SyncSidecar.spawn() as sidecar`, or `SyncSidecar.connect(path)`.

    `timeout` is in seconds. When it has passed, and when Ctrl-C interrupts the waiting, the request is
    cancelled on the server; the first raises TimeoutError. Everything else is as with `Sidecar`.
    """

    def __init__(self, portal: BlockingPortal, sidecar: Sidecar) -> None:
        self._portal = portal
        self._sidecar = sidecar
        self.info: m.InitializeResult = sidecar.info

    @classmethod
    @contextmanager
    def spawn(
        cls,
        command: Sequence[str] = DEFAULT_COMMAND,
        *,
        env: Mapping[str, str] | None = None,
        transport: Transport = "stdio",
        start_timeout: float = START_TIMEOUT_SECONDS,
        window_bytes: int = WINDOW_BYTES,
    ) -> Generator["SyncSidecar"]:
        """Start a sidecar, wait until it answers, and end it when the block is left; see `Sidecar.spawn`."""
        opening = Sidecar.spawn(
            command, env=env, transport=transport, start_timeout=start_timeout, window_bytes=window_bytes
        )
        with _opened(opening) as (portal, sidecar):
            yield cls(portal, sidecar)

    @classmethod
    @contextmanager
    def connect(
        cls,
        path: str | PathLike[str],
        *,
        start_timeout: float = START_TIMEOUT_SECONDS,
        window_bytes: int = WINDOW_BYTES,
    ) -> Generator["SyncSidecar"]:
        """Connect to a sidecar that listens, and hang up when the block is left; see `Sidecar.connect`."""
        opening = Sidecar.connect(path, start_timeout=start_timeout, window_bytes=window_bytes)
        with _opened(opening) as (portal, sidecar):
            yield cls(portal, sidecar)

    @property
    def process_id(self) -> int | None:
        """The id of the sidecar's process, if it is ours."""
        return self._sidecar.process_id

    def load(
        self,
        model: str,
        *,
        on_progress: Callable[[m.LoadProgress], object] | None = None,
        timeout: float | None = None,
        **params: Any,
    ) -> m.LoadResult:
        """Load a model; it is evaluated and warm when this returns.

        `on_progress` is called with how far it is, in this thread. What it raises comes out here, and cancels
        the request.
        """
        return follow(
            self._portal,
            lambda tell: self._sidecar.load(model, on_progress=tell, **params),
            on_progress,
            timeout,
        )

    def reload(
        self,
        model: str,
        *,
        on_progress: Callable[[m.LoadProgress], object] | None = None,
        timeout: float | None = None,
    ) -> m.LoadResult:
        """Read a loaded model anew while the old one serves, which stays if that fails. See `load`."""
        return follow(
            self._portal, lambda tell: self._sidecar.reload(model, on_progress=tell), on_progress, timeout
        )

    def unload(self, model: str, *, force: bool = False, timeout: float | None = None) -> m.UnloadResult:
        """Unload a model after its requests have ended; `force` ends them."""
        return wait(self._portal, partial(self._sidecar.unload, model, force=force), timeout)

    def alias(self, alias: str, model: str | None, *, timeout: float | None = None) -> m.AliasResult:
        """Let `alias` stand for a loaded model from now on; None takes it away."""
        return wait(self._portal, partial(self._sidecar.alias, alias, model), timeout)

    def models(self, *, timeout: float | None = None) -> list[m.ModelInfo]:
        """Return the models that were loaded, whether they are in memory now or not."""
        return wait(self._portal, self._sidecar.models, timeout)

    def pull(
        self,
        model: str,
        *,
        revision: str | None = None,
        on_progress: Callable[[m.PullProgress], object] | None = None,
        timeout: float | None = None,
    ) -> m.PullResult:
        """Bring a model onto the sidecar's machine; see `load` for `on_progress`."""
        return follow(
            self._portal,
            lambda tell: self._sidecar.pull(model, revision=revision, on_progress=tell),
            on_progress,
            timeout,
        )

    def load_adapter(
        self, model: str, adapter: str, path: str | PathLike[str], *, timeout: float | None = None
    ) -> m.LoadAdapterResult:
        """Load the LoRA adapter of an absolute folder beside a loaded model; `generate` takes its name."""
        return wait(self._portal, partial(self._sidecar.load_adapter, model, adapter, path), timeout)

    def unload_adapter(
        self, model: str, adapter: str, *, force: bool = False, timeout: float | None = None
    ) -> m.UnloadAdapterResult:
        """Unload an adapter after its requests have ended; `force` ends them."""
        work = partial(self._sidecar.unload_adapter, model, adapter, force=force)
        return wait(self._portal, work, timeout)

    def generate(self, model: str, *, timeout: float | None = None, **params: Any) -> "SyncGeneration":
        """Start generating at once and return the answer, which must be complete within `timeout`."""
        generation = call(self._portal, partial(self._sidecar.generate, model, **params))
        return SyncGeneration(self._portal, generation, timeout)

    def tokenize(self, model: str, *, timeout: float | None = None, **params: Any) -> list[int]:
        """Return the ids of `text` or `messages`."""
        return wait(self._portal, partial(self._sidecar.tokenize, model, **params), timeout)

    def detokenize(
        self, model: str, tokens: Sequence[int], *, timeout: float | None = None, **params: Any
    ) -> str:
        """Return the text of ids."""
        return wait(self._portal, partial(self._sidecar.detokenize, model, tokens, **params), timeout)

    def stats(self, *, timeout: float | None = None) -> m.StatsResult:
        """Return what the sidecar is doing and holding."""
        return wait(self._portal, self._sidecar.stats, timeout)

    def ping(self, *, timeout: float | None = None) -> m.PingResult:
        """Return at once, whatever the model is doing."""
        return wait(self._portal, self._sidecar.ping, timeout)

    def server_info(self, *, timeout: float | None = None) -> m.ServerInfoResult:
        """Return what `info` says, and the process behind it."""
        return wait(self._portal, self._sidecar.server_info, timeout)

    def close(self) -> int | None:
        """End the connection in order, and the process if it is ours; return its exit code then."""
        return wait(self._portal, self._sidecar.close)


class SyncGeneration:
    """An answer that is being generated: iterate over its parts, or call `text()`, or only `result()`.

    Leaving the loop early cancels the generation; `with` says so in the code. See `Generation`.
    """

    def __init__(self, portal: BlockingPortal, generation: Generation, timeout: float | None) -> None:
        self._portal = portal
        self._generation = generation
        self._deadline = time.monotonic() + (math.inf if timeout is None else timeout)

    def __enter__(self) -> "SyncGeneration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[m.GenerateProgress]:
        try:
            while parts := self._wait(self._generation.take):
                yield from parts
        finally:
            self.cancel()

    def text(self) -> str:
        """Return the whole text, once it is complete."""
        return self._wait(self._generation.text)

    def result(self) -> m.GenerateResult:
        """Return how it ended: finish reason, usage, timings."""
        return self._wait(self._generation.result)

    def cancel(self) -> None:
        """End the generation on the server; `result` then says "cancelled". Nothing if it has ended."""
        with suppress(SidecarDisconnected):
            call(self._portal, self._generation.cancel)

    def _wait(self, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        left = self._deadline - time.monotonic()
        return wait(self._portal, work, None if left == math.inf else max(left, 0))


@contextmanager
def _opened(opening: AbstractAsyncContextManager[Sidecar]) -> Generator[tuple[BlockingPortal, Sidecar]]:
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        sidecar = stack.enter_context(portal.wrap_async_context_manager(opening))
        # A block that nobody leaves is left here, while the interpreter still runs its threads.
        atexit.register(stack.close)
        stack.callback(atexit.unregister, stack.close)
        yield portal, sidecar
