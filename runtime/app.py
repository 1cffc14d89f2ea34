"""The composition root: the only file that knows every part. It builds them and hands each what it needs."""

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import anyio

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.framing import Framing

from .api.generate import GenerateApi
from .api.lifecycle import shutdown
from .api.models import ModelsApi
from .api.presence import PresenceApi
from .api.stats import StatsApi
from .api.tokens import TokensApi
from .engine.sequence import Emission
from .engine.thread import InferenceThread
from .models.registry import ModelRegistry
from .models.store import ModelStore
from .pool import Pool
from .server.channel import Channel
from .server.connection import Connection, Handler, OnEvent
from .server.exit_codes import UNAVAILABLE
from .server.guests import CANCEL_SECONDS, FLUSH_SECONDS, Guests
from .server.lifecycle import (
    ENGINE_STALLED,
    LISTENING_FAILED,
    Ending,
    Lifecycle,
    ending_of_host,
    engine_died,
    watch_engine,
    watch_host,
    watch_signals,
)
from .server.peer import Peer, PeerEvent
from .server.unix_socket import Listener
from .telemetry.counters import Counters
from .telemetry.vitals import Vitals

log = logging.getLogger("app")

_ENGINE_STOP_SECONDS = 2.0


def serve_host(settings: Settings, vitals: Vitals, host: Peer) -> int:
    """Serve one host until one of us ends; return the exit code."""
    return _run(settings, vitals, lambda app: app.serve_host(host))


def serve_guests(
    settings: Settings,
    vitals: Vitals,
    listener: Listener,
    framing: Framing | None,
    on_ready: Callable[[], None],
) -> int:
    """Serve whoever connects, until a signal; return the exit code. `on_ready` is called when we do."""
    return _run(settings, vitals, lambda app: app.serve_guests(listener, framing, on_ready))


def _run(settings: Settings, vitals: Vitals, serve: "Callable[[App], None]") -> int:
    return anyio.run(_serve, settings, vitals, serve, backend_options={"use_uvloop": True})


async def _serve(settings: Settings, vitals: Vitals, serve: "Callable[[App], None]") -> int:
    app = App(settings, vitals)
    ending = await app.run(serve)
    log.info("ending: %s", ending.reason)
    could_not_work = vitals.state == "failed" and ending.exit_code == 0
    app.engine.stop(_ENGINE_STOP_SECONDS)
    return UNAVAILABLE if could_not_work else ending.exit_code


class App:
    """The parts of one process, and how they are joined. Built and run on the event loop."""

    def __init__(self, settings: Settings, vitals: Vitals) -> None:
        self._settings = settings
        self._vitals = vitals
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._lifecycle = Lifecycle()
        self._tasks = anyio.create_task_group()
        self._host: Connection | None = None
        self._guests: Guests | None = None
        self._over = False
        self._delivered: deque[list[Emission]] = deque()
        self._awakened = False
        blas, pages, counters = Blas(), Pages(), Counters()
        self.engine = InferenceThread(self._deliver, self._on_engine_death, blas, vitals, self._settings)
        self._handlers = self._build(blas, pages, counters)

    async def run(self, serve: "Callable[[App], None]") -> Ending:
        """Let `serve` begin, and return why it ended, with everything said that had to be."""
        async with self._tasks:
            await self._tasks.start(watch_signals, self._lifecycle.end)
            self._tasks.start_soon(
                watch_engine, self._vitals.last_step_age_ms, self._settings.stall_seconds, self._on_stall
            )
            serve(self)
            await self._drain()
            self._over = True
            self._tasks.cancel_scope.cancel()
        ending = await self._lifecycle.wait()
        # Who only stopped talking may still be reading: `serve < requests.jsonl | something slow`.
        patience = max(FLUSH_SECONDS, self._settings.eof_grace_seconds) if ending.grace else FLUSH_SECONDS
        deadline = time.monotonic() + patience
        for connection in self._connections():
            connection.flush()
            connection.peer.outbox.wait_until_idle(max(deadline - time.monotonic(), 0))
        return ending

    def serve_host(self, host: Peer) -> None:
        """Serve one host, whose end is ours."""

        def on_event(connection: Connection, event: PeerEvent) -> None:
            self._lifecycle.end(ending_of_host(event, shut_down=connection.shut_down))

        def on_open(params: m.InitializeParams) -> None:
            self.engine.start()
            if params.process_id is not None:
                self._tasks.start_soon(watch_host, params.process_id, self._lifecycle.end)

        self._host = self._connect(host, on_open, on_event)

    def serve_guests(self, listener: Listener, framing: Framing | None, on_ready: Callable[[], None]) -> None:
        """Serve whoever connects."""
        immediate = PresenceApi(self._vitals).methods()

        def open_connection(channel: Channel, on_event: OnEvent) -> Connection:
            peer = Peer(channel, immediate, framing, self._vitals.pulses)
            connection = self._connect(peer, lambda _: self.engine.start(), on_event)
            peer.start()
            return connection

        self._guests = Guests(
            listener,
            open_connection,
            self._post,
            self._tasks,
            grace_seconds=self._settings.eof_grace_seconds,
            max_connections=self._settings.max_connections,
        )
        self._guests.start(lambda: self._lifecycle.end(LISTENING_FAILED))
        on_ready()

    def _connect(
        self, peer: Peer, on_open: Callable[[m.InitializeParams], None], on_event: OnEvent
    ) -> Connection:
        connection = Connection(peer, self._tasks, self._handlers, on_open, on_event)
        peer.attach(connection, self._post)
        return connection

    def _connections(self) -> list[Connection]:
        guests = self._guests.present if self._guests is not None else ()
        return [*guests, *([self._host] if self._host is not None else [])]

    def _build(self, blas: Blas, pages: Pages, counters: Counters) -> dict[str, Handler]:
        pool = Pool(self._settings.tokenizer_threads)
        store = ModelStore(self._settings.home)
        registry = ModelRegistry(self.engine, store, pages, pool, self._settings)
        models = ModelsApi(registry)
        tokens = TokensApi(registry, pool)
        return {
            "shutdown": shutdown,
            "load": models.load,
            "unload": models.unload,
            "models": models.models,
            "generate": GenerateApi(registry, self.engine, pool, counters).generate,
            "tokenize": tokens.tokenize,
            "detokenize": tokens.detokenize,
            "stats": StatsApi(self.engine, registry, counters, blas, pages, self._vitals).stats,
        }

    def _deliver(self, emissions: list[Emission]) -> None:
        """Take a step's emissions, on the inference thread.

        Waking the event loop costs more than a token: a step that comes before it has woken wakes it no more.
        """
        self._delivered.append(emissions)
        if not self._awakened:
            self._awakened = True
            self._post(self._hand_over)

    def _hand_over(self) -> None:
        # Before the look at what is there: a step that comes behind it wakes us again.
        self._awakened = False
        for _ in range(len(self._delivered)):
            for emission in self._delivered.popleft():
                emission.sequence.on_emission(emission)

    def _on_engine_death(self, error: BaseException) -> None:
        self._post(self._lifecycle.end, engine_died(error))

    def _on_stall(self) -> None:
        log.critical("no step has ended for %s s; the process ends", self._settings.stall_seconds)
        self.engine.abandon()
        # Behind the failures that have just been delivered.
        self._post(self._lifecycle.end, ENGINE_STALLED)

    def _post(self, callback: Callable[..., object], *args: object) -> None:
        """Call on the event loop, from any thread.

        In the context of our own task: in the thread's empty one anyio cannot tell which loop it runs on.
        """
        # The loop is closed when everything has ended; a reader that notices later has nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._call, callback, *args, context=self._context)

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        # What is noticed behind the end concerns nobody: the tasks that would deal with it are gone.
        if not self._over:
            callback(*args)

    async def _drain(self) -> None:
        """Wait for a reason to end; then let the accepted requests end, by themselves or cancelled."""
        ending = await self._lifecycle.wait()
        if ending.grace and self._host is not None:
            with anyio.move_on_after(self._settings.eof_grace_seconds):
                await self._settled_or_hurried(self._host, ending)
        connections = self._connections()
        for connection in connections:
            connection.peer.intake.shut_down = True
            connection.cancel_all()
        with anyio.move_on_after(CANCEL_SECONDS):
            for connection in connections:
                await connection.settled()

    async def _settled_or_hurried(self, connection: Connection, ending: Ending) -> None:
        async with anyio.create_task_group() as race:

            async def stop_on_hurry() -> None:
                await self._lifecycle.wait(beyond=ending)
                race.cancel_scope.cancel()

            race.start_soon(stop_on_hurry)
            await connection.settled()
            race.cancel_scope.cancel()
