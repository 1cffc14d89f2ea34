"""The composition root: the only file that knows every part. It builds them and hands each what it needs."""

import asyncio
import logging
import time
from functools import partial

import anyio
from anyio.abc import TaskGroup

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.native.pages import Pages

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
from .server.lifecycle import INPUT_ENDED, OUTPUT_BROKEN, Ending, Lifecycle, watch_host, watch_signals
from .server.outbox import Outbox
from .server.stdio import PipeReader, Wire
from .telemetry.counters import Counters

log = logging.getLogger("app")

_CANCEL_SECONDS = 2.0
_FLUSH_SECONDS = 2.0
_ENGINE_STOP_SECONDS = 2.0


def serve(settings: Settings, wire: Wire) -> int:
    """Serve the host at the other end of `wire` until one of us ends; return the exit code."""
    return anyio.run(_serve, settings, wire, backend_options={"use_uvloop": True})


async def _serve(settings: Settings, wire: Wire) -> int:
    loop = asyncio.get_running_loop()
    lifecycle = Lifecycle()
    blas = Blas()

    def deliver(emissions: list[Emission]) -> None:
        loop.call_soon_threadsafe(_hand_over, emissions)

    def end_from_thread(ending: Ending) -> None:
        loop.call_soon_threadsafe(lifecycle.end, ending)

    engine = InferenceThread(deliver, blas)
    outbox = Outbox(wire.write, partial(end_from_thread, OUTPUT_BROKEN))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_signals, lifecycle.end)
        handlers = _handlers(settings, engine, blas, tasks, lifecycle)
        connection = Connection(outbox, tasks, handlers, partial(_exit, lifecycle))

        def on_chunk(chunk: bytes) -> None:
            loop.call_soon_threadsafe(take, chunk)

        def take(chunk: bytes) -> None:
            connection.feed(chunk)
            reader.release()

        def on_end() -> None:
            loop.call_soon_threadsafe(connection.end_input)
            end_from_thread(INPUT_ENDED)

        reader = PipeReader(wire.read, on_chunk, on_end)
        reader.start()
        ending = await _drain(connection, lifecycle, settings.eof_grace_seconds)
        tasks.cancel_scope.cancel()
    log.info("ending: %s", ending.reason)
    outbox.close(_FLUSH_SECONDS)
    engine.stop(_ENGINE_STOP_SECONDS)
    return ending.exit_code


def _handlers(
    settings: Settings, engine: InferenceThread, blas: Blas, tasks: TaskGroup, lifecycle: Lifecycle
) -> dict[str, Handler]:
    started_at = time.monotonic()
    pages, counters = Pages(), Counters()
    pool = anyio.CapacityLimiter(settings.tokenizer_threads)
    registry = ModelRegistry(engine, ModelStore(settings.home), pages, pool, settings)
    lifecycle_api = LifecycleApi(
        engine, lambda process_id: tasks.start_soon(watch_host, process_id, lifecycle.end), started_at
    )
    models_api = ModelsApi(registry)
    generate_api = GenerateApi(registry, engine, pool, counters)
    tokens_api = TokensApi(registry, pool)
    stats_api = StatsApi(engine, registry, counters, blas, pages, started_at)
    return {
        "initialize": lifecycle_api.initialize,
        "ping": lifecycle_api.ping,
        "shutdown": lifecycle_api.shutdown,
        "load": models_api.load,
        "unload": models_api.unload,
        "models": models_api.models,
        "generate": generate_api.generate,
        "tokenize": tokens_api.tokenize,
        "detokenize": tokens_api.detokenize,
        "stats": stats_api.stats,
    }


def _hand_over(emissions: list[Emission]) -> None:
    for emission in emissions:
        emission.sequence.on_emission(emission)


def _exit(lifecycle: Lifecycle, connection: Connection) -> None:
    lifecycle.end(Ending("the host said exit", 0 if connection.shut_down else 1))


async def _drain(connection: Connection, lifecycle: Lifecycle, grace_seconds: float) -> Ending:
    """Wait for a reason to end; then let the accepted requests end, by themselves or cancelled."""
    ending = await lifecycle.wait()
    if ending.grace:
        with anyio.move_on_after(grace_seconds):
            async with anyio.create_task_group() as race:

                async def stop_on_haste() -> None:
                    nonlocal ending
                    ending = await lifecycle.wait(beyond=ending)
                    race.cancel_scope.cancel()

                race.start_soon(stop_on_haste)
                await connection.settled()
                race.cancel_scope.cancel()
    connection.cancel_all()
    with anyio.move_on_after(_CANCEL_SECONDS):
        await connection.settled()
    return ending
