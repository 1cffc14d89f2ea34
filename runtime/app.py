"""The composition root: the only file that knows every part. It builds them and hands each what it needs."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable
from functools import partial

import anyio
from anyio.abc import TaskGroup

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol.framing import FrameReader

from .api.generate import GenerateApi
from .api.lifecycle import LifecycleApi
from .api.models import ModelsApi
from .api.stats import StatsApi
from .api.tokens import TokensApi
from .engine.sequence import Emission
from .engine.thread import InferenceThread
from .models.registry import ModelRegistry
from .models.store import ModelStore
from .server.connection import Connection, Handler
from .server.handshake import Greeting
from .server.lifecycle import (
    ENGINE_DIED,
    FRAMING_LOST,
    INPUT_ENDED,
    OUTPUT_BROKEN,
    Ending,
    Lifecycle,
    watch_host,
    watch_signals,
)
from .server.outbox import Outbox
from .server.stdio import PipeReader, Wire
from .telemetry.counters import Counters

log = logging.getLogger("app")

_CANCEL_SECONDS = 2.0
_FLUSH_SECONDS = 2.0
_ENGINE_STOP_SECONDS = 2.0


def serve(settings: Settings, wire: Wire, greeting: Greeting) -> int:
    """Serve the host at the other end of `wire` until one of us ends; return the exit code."""
    return anyio.run(_serve, settings, wire, greeting, backend_options={"use_uvloop": True})


async def _serve(settings: Settings, wire: Wire, greeting: Greeting) -> int:
    app = App(settings)
    ending = await app.run(wire, greeting)
    log.info("ending: %s", ending.reason)
    app.engine.stop(_ENGINE_STOP_SECONDS)
    return ending.exit_code


class App:
    """The parts of one process, and how they are joined. Built and run on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._started_at = time.monotonic()
        self._lifecycle = Lifecycle()
        self._blas, self._pages, self._counters = Blas(), Pages(), Counters()
        self.engine = InferenceThread(self._deliver, partial(self._end_from_thread, ENGINE_DIED), self._blas)

    async def run(self, wire: Wire, greeting: Greeting) -> Ending:
        """Serve one connection over `wire`; return why it ended, with everything said that had to be."""
        outbox = Outbox(wire.write, partial(self._end_from_thread, OUTPUT_BROKEN))
        ending: Ending | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_signals, self._lifecycle.end)
            lifecycle = LifecycleApi(self.engine, partial(self._watch, tasks), self._started_at)
            connection = Connection(
                outbox,
                tasks,
                self._handlers(lifecycle),
                self._on_exit,
                partial(self._lifecycle.end, FRAMING_LOST),
                FrameReader(greeting.framing),
            )
            if greeting.accepted is not None:
                lifecycle.opened(connection, greeting.accepted)
                self.engine.start()
            connection.feed(greeting.unread)
            self._start_reader(wire, connection)
            ending = await self._drain(connection)
            tasks.cancel_scope.cancel()
        outbox.close(_FLUSH_SECONDS)
        assert ending is not None
        return ending

    def _watch(self, tasks: TaskGroup, process_id: int) -> None:
        tasks.start_soon(watch_host, process_id, self._lifecycle.end)

    def _handlers(self, lifecycle: LifecycleApi) -> dict[str, Handler]:
        pool = anyio.CapacityLimiter(self._settings.tokenizer_threads)
        store = ModelStore(self._settings.home)
        registry = ModelRegistry(self.engine, store, self._pages, pool, self._settings)
        models = ModelsApi(registry)
        tokens = TokensApi(registry, pool)
        return {
            "initialize": lifecycle.initialize,
            "ping": lifecycle.ping,
            "shutdown": lifecycle.shutdown,
            "load": models.load,
            "unload": models.unload,
            "models": models.models,
            "generate": GenerateApi(registry, self.engine, pool, self._counters).generate,
            "tokenize": tokens.tokenize,
            "detokenize": tokens.detokenize,
            "stats": StatsApi(
                self.engine, registry, self._counters, self._blas, self._pages, self._started_at
            ).stats,
        }

    def _start_reader(self, wire: Wire, connection: Connection) -> None:
        def take(chunk: bytes) -> None:
            connection.feed(chunk)
            reader.release()

        def on_chunk(chunk: bytes) -> None:
            self._post(take, chunk)

        def on_end() -> None:
            self._post(connection.end_input)
            self._end_from_thread(INPUT_ENDED)

        reader = PipeReader(wire.read, on_chunk, on_end)
        reader.start()

    def _deliver(self, emissions: list[Emission]) -> None:
        self._post(_hand_over, emissions)

    def _end_from_thread(self, ending: Ending) -> None:
        self._post(self._lifecycle.end, ending)

    def _post(self, callback: Callable[..., object], *args: object) -> None:
        """Call on the event loop, from another thread.

        In the context of our own task: in the thread's empty one anyio cannot tell which loop it runs on.
        """
        self._loop.call_soon_threadsafe(callback, *args, context=self._context)

    def _on_exit(self, connection: Connection) -> None:
        self._lifecycle.end(Ending("the host said exit", 0 if connection.shut_down else 1))

    async def _drain(self, connection: Connection) -> Ending:
        """Wait for a reason to end; then let the accepted requests end, by themselves or cancelled."""
        ending = await self._lifecycle.wait()
        if ending.grace:
            with anyio.move_on_after(self._settings.eof_grace_seconds):
                await self._settled_or_hurried(connection, ending)
        connection.cancel_all()
        with anyio.move_on_after(_CANCEL_SECONDS):
            await connection.settled()
        return await self._lifecycle.wait()

    async def _settled_or_hurried(self, connection: Connection, ending: Ending) -> None:
        async with anyio.create_task_group() as race:

            async def stop_on_hurry() -> None:
                await self._lifecycle.wait(beyond=ending)
                race.cancel_scope.cancel()

            race.start_soon(stop_on_hurry)
            await connection.settled()
            race.cancel_scope.cancel()


def _hand_over(emissions: list[Emission]) -> None:
    for emission in emissions:
        emission.sequence.on_emission(emission)
