"""The composition root: the only file that knows every part. It builds them and hands each what it needs."""

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import anyio

from mlx_sidecar.config.layers import Effective
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.framing import Framing

from .api.generate import GenerateApi
from .api.lifecycle import shutdown
from .api.models import ModelsApi
from .api.presence import PresenceApi
from .api.pull import PullApi
from .api.stats import StatsApi
from .api.tokens import TokensApi
from .engine.sequence import Emission
from .engine.thread import InferenceThread
from .models.housekeeping import Housekeeping
from .models.loading import Loading
from .models.preloading import Preloading
from .models.pulling import Pulls
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
from .settings_watch import watch_settings
from .telemetry.counters import Counters
from .telemetry.logs import adjust_log
from .telemetry.vitals import Vitals

log = logging.getLogger("app")

_ENGINE_STOP_SECONDS = 2.0


def serve_host(effective: Effective, vitals: Vitals, host: Peer) -> int:
    """Serve one host until one of us ends; return the exit code."""
    return _run(effective, vitals, lambda app: app.serve_host(host))


def serve_guests(
    effective: Effective,
    vitals: Vitals,
    listener: Listener,
    framing: Framing | None,
    on_ready: Callable[[], None],
) -> int:
    """Serve whoever connects, until a signal; return the exit code. `on_ready` is called when we do."""
    return _run(effective, vitals, lambda app: app.serve_guests(listener, framing, on_ready))


def _run(effective: Effective, vitals: Vitals, serve: "Callable[[App], None]") -> int:
    return anyio.run(_serve, effective, vitals, serve, backend_options={"use_uvloop": True})


async def _serve(effective: Effective, vitals: Vitals, serve: "Callable[[App], None]") -> int:
    app = App(effective, vitals)
    ending = await app.run(serve)
    log.info("ending: %s", ending.reason)
    could_not_work = vitals.state == "failed" and ending.exit_code == 0
    app.engine.stop(_ENGINE_STOP_SECONDS)
    return UNAVAILABLE if could_not_work else ending.exit_code


class App:
    """The parts of one process, and how they are joined. Built and run on the event loop."""

    def __init__(self, effective: Effective, vitals: Vitals) -> None:
        self._effective = effective
        self._settings = effective.settings
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
                watch_engine, self._vitals.last_step_age_ms, lambda: self._settings.stall_ms, self._on_stall
            )
            self._tasks.start_soon(watch_settings, self._effective, self._apply_settings)
            if self._settings.models_preload:
                self.engine.start()
            for work in self._background:
                self._tasks.start_soon(work)
            serve(self)
            await self._drain()
            self._over = True
            self._tasks.cancel_scope.cancel()
        ending = await self._lifecycle.wait()
        # Who only stopped talking may still be reading: `serve < requests.jsonl | something slow`.
        patience = max(FLUSH_SECONDS, self._settings.eof_grace_ms / 1000) if ending.grace else FLUSH_SECONDS
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
            self._settings,
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
        loading = Loading(self.engine, store, pages, pool, self._settings)
        registry = ModelRegistry(self.engine, loading, self._settings, self._tasks.start_soon, self._post)
        housekeeping = Housekeeping(registry, self.engine, pages, self._settings)
        self._background = [housekeeping.run, Preloading(registry, self._settings).run]
        models = ModelsApi(registry)
        tokens = TokensApi(registry, pool)
        generate = GenerateApi(registry, self.engine, pool, counters, housekeeping)
        stats = StatsApi(
            self.engine, registry, counters, blas, pages, self._settings, self._vitals, housekeeping
        )
        return {
            "shutdown": shutdown,
            "load": models.load,
            "reload": models.reload,
            "unload": models.unload,
            "alias": models.alias,
            "models": models.models,
            "pull": PullApi(Pulls(self._tasks)).pull,
            "loadAdapter": models.load_adapter,
            "unloadAdapter": models.unload_adapter,
            "generate": generate.generate,
            "tokenize": tokens.tokenize,
            "detokenize": tokens.detokenize,
            "stats": stats.stats,
        }

    async def _apply_settings(self, changed: set[str]) -> None:
        if changed & {"log_level", "log_format"}:
            adjust_log(self._settings.log_level, self._settings.log_format)
        # The others read them where they use them.
        reconfigured = self.engine.run(self.engine.reconfigure)
        if self._vitals.state == "ready":  # Else nobody may ever start it, or wait for it.
            await asyncio.wrap_future(reconfigured)

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
        log.critical("no step has ended for %d ms; the process ends", self._settings.stall_ms)
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
            with anyio.move_on_after(self._settings.eof_grace_ms / 1000):
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
