"""Who is in memory. Models come one at a time, in the order they were asked for; others leave to make room.

Whoever is idle leaves first. If that is not enough those in use are drained: their requests end, new ones
wait, and when the newcomer is there they are brought back in their turn. So nothing that was asked for is
dropped, and nobody who wants a model waits for ever.

A request can be too large beside the models in memory as well. Then it is `hungry`, and others leave for it.

Who is only expected to be asked for is a guess: it takes what is free and the place of idle models, unless
those are expected soon as well. As soon as somebody waits for it, it is a guess no more.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.protocol.errors import InternalError, OutOfMemory, SidecarError

from ..engine.thread import InferenceThread
from ..scheduling.memory import Shortfall
from .adapters import bring_adapters_back
from .entry import Attempt, Entry
from .eviction import Plan, Resident, choose_victims, expired
from .loaded import LoadedModel
from .loading import Loading
from .prediction import Predictor

ResultT = TypeVar("ResultT")
Spawn = Callable[..., object]
Post = Callable[..., object]

log = logging.getLogger("models")

SOON_SECONDS = 600.0
"""Who is expected later than this is not kept for it: so much memory is not held for so long."""


class Residency:
    """Brings entries into memory and out of it. Lives on the event loop."""

    def __init__(
        self,
        engine: InferenceThread,
        loading: Loading,
        settings: Settings,
        entries: Mapping[str, Entry],
        spawn: Spawn,
        post: Post,
        forget: Callable[[Entry], None],
    ) -> None:
        self.predictor = Predictor()
        self.evicted = self.expired = self.brought_back = 0
        self._engine = engine
        self._loading = loading
        self._settings = settings
        self._entries = entries
        self._spawn = spawn
        self._forget = forget
        self._turn = anyio.Lock()
        self._news = anyio.Event()
        self._hungry: dict[str, int] = {}
        self._guesses: set[Entry] = set()
        self._departing = 0
        self._keys = 0
        engine.on_hungry = lambda key, needed: post(self._take_hunger, key, needed)

    def start(self, entry: Entry) -> Attempt:
        """Begin to bring an entry into memory; several that are begun come one after the other."""
        attempt = entry.attempt = Attempt()
        entry.become("queued")
        self._spawn(self._bring, entry, attempt)
        return attempt

    async def bring_back(self, entry: Entry) -> bool:
        """Begin to bring an evicted entry back that nobody has asked for yet; return whether it comes.

        If others take the room before its turn it stays away.
        """
        if entry.model is None or self._turn.locked():
            return False  # Who was asked for comes first.
        gap = await self._shortfall(entry.model.facts.bytes)
        if entry.state != "evicted" or not self._plan(gap.now, entry, guess=True).possible:
            return False
        self.predictor.note_brought_back(entry.name, time.monotonic())
        self._guesses.add(entry)
        self.start(entry)
        return True

    async def renew(self, entry: Entry, attempt: Attempt) -> LoadedModel | None:
        """Bring another version of an entry into memory, beside the one that serves, and let it take over.

        Returns:
            the old version, see `depart`; None if it had left to make room for another.

        Raises:
            SidecarError: why the old version stays.
        """
        async with self._turn:
            if entry.state != "ready":
                await self._bring_in(entry, attempt)
                return None
            old, entry.model = entry.model, await self._load(entry, attempt)
            entry.loads += 1
            return old

    @asynccontextmanager
    async def staying(self, entry: Entry, room_for: str, needed: int) -> AsyncGenerator[LoadedModel]:
        """Keep a model in memory, and room beside it, while the block runs; nobody comes or leaves meanwhile.

        Nothing in it may wait for a request: who drains a model would wait for it in turn.

        Raises:
            SidecarError: it could not be brought back, or there is no room.
        """
        async with self._turn:
            if entry.state != "ready":
                await self._bring_in(entry, Attempt())
            assert entry.model is not None
            await self._make_room(entry, room_for, needed)
            try:
                yield entry.model
            finally:
                self._engine.release_claim(room_for)

    async def depart(self, model: LoadedModel, entry: Entry | None = None) -> None:
        """Give a model's memory back when its last request has ended; `entry` is told when that is."""
        # From now on who needs room may wait for it.
        self._departing += 1
        # Once begun it runs to its end, whoever stops waiting for it: half of it is no state.
        with anyio.CancelScope(shield=True):
            try:
                await model.use.ended()
                if entry is not None:
                    entry.become("unloading")
                await self._on_engine(lambda: self._engine.detach(model.key))
            finally:
                self._departing -= 1
                self._wake()

    async def evict(self, entry: Entry) -> bool:
        """Let an idle entry leave memory until it is asked for; return whether it was idle."""
        model = entry.model
        if model is None or not entry.is_idle:
            return False
        await self._give_up(entry, model)
        return True

    async def evict_expired(self) -> None:
        """Let those leave that nobody has used for their time to live."""
        ttl_ms = self._settings.model_ttl_ms
        default = None if ttl_ms is None else ttl_ms / 1000
        for name in expired(self._residents(), time.monotonic(), default):
            # Unloading goes on beside it.
            entry = self._entries.get(name)
            if entry is not None and await self.evict(entry):
                self.expired += 1
                log.info("%s was not used and left memory", name)

    async def evict_oldest(self) -> bool:
        """Let the idle model leave that is missed least; return whether there was one."""
        victims = self._plan(1, idle_only=True).evict
        if not victims:
            return False
        evicted = await self.evict(self._entries[victims[0]])
        self.evicted += evicted
        return evicted

    async def _bring(self, entry: Entry, attempt: Attempt) -> None:
        returning = entry.model is not None
        error: SidecarError | None = InternalError()
        try:
            with attempt.scope:
                async with self._turn:
                    if entry.state != "ready":  # Or a reload has brought it meanwhile.
                        entry.become("loading")
                        entry.model = await self._load(entry, attempt)
                        entry.loads += 1
                        self.brought_back += returning
                error = None
        except SidecarError as failure:
            # It is kept, and must not keep what was being loaded.
            error = failure.with_traceback(None)
            error.__cause__ = error.__context__ = None
        except Exception:
            log.exception("loading %s failed", entry.name)
        finally:
            cancelled = attempt.scope.cancelled_caught
            self._guesses.discard(entry)
            if entry.state == "ready":
                error = None  # Also when nobody waits for it any more: a reload has brought it.
            entry.attempt, entry.failure = None, None if cancelled else error
            if error is None:
                entry.become("ready")
            elif returning:
                self.predictor.note_evicted(entry.name, time.monotonic())
                entry.become("evicted")
            else:
                entry.become("unloaded" if cancelled else "failed")
                if cancelled:
                    self._forget(entry)
            attempt.end(entry.failure)

    async def _bring_in(self, entry: Entry, attempt: Attempt) -> None:
        """Bring back an entry that left while somebody waited for the turn, who has it now."""
        entry.become("loading")
        try:
            entry.model = await self._load(entry, attempt)
        except BaseException:
            entry.become("queued" if entry.attempt else "evicted")
            raise
        entry.loads += 1
        self.brought_back += 1
        entry.become("ready")

    async def _load(self, entry: Entry, attempt: Attempt) -> LoadedModel:
        self._keys += 1
        # While one version leaves memory another may be on its way there.
        key = f"{entry.name}#{self._keys}"
        adapters = (
            sum(adapter.info().bytes for adapter in entry.model.adapters.values()) if entry.model else 0
        )

        async def make_room(needed: int) -> None:
            await self._make_room(entry, key, needed + adapters)

        model = await self._loading.load(entry, key, attempt.watch, make_room)
        model.use.on_idle = self._wake
        try:
            if entry.model is not None:
                await bring_adapters_back(self._engine, self._loading, entry.model, model)
        except BaseException:
            self._engine.run(lambda: self._engine.detach(key))
            raise
        return model

    async def _make_room(self, entry: Entry, key: str, needed: int) -> None:
        """Claim memory for `key`, once others have left it.

        Raises:
            OutOfMemory: what is pinned, or may not be evicted, leaves too little.
        """
        while True:
            news = self._news
            gap = await self._shortfall(needed)
            if gap.now <= 0 and await self._claim(key, needed):
                return
            guess = entry in self._guesses and not entry.busy
            idle = self._plan(gap.now, entry, idle_only=True, guess=guess)
            if idle.possible:
                await self._settle(idle, entry)
                continue
            if guess and entry.attempt is not None:
                entry.attempt.scope.cancel()
                await checkpoint_if_cancelled()
            if gap.ever <= 0:
                # The rest is held by requests, which end by themselves.
                if await self._claim(key, needed):
                    return
                continue
            plan = self._plan(gap.ever, entry)
            if plan.possible:
                await self._settle(plan, entry)
            elif self._departing:
                await news.wait()
            else:
                movable = sum(one.bytes for one in self._residents(entry) if not one.pinned)
                if not self._settings.evict_models:
                    movable = 0
                raise OutOfMemory(needed, max(needed - gap.ever + movable, 0), model=entry.name)

    async def _claim(self, key: str, needed: int) -> bool:
        """Wait until those who run leave the room; return whether they did: the budget may have shrunk."""
        granted = False
        try:
            granted = await asyncio.wrap_future(self._engine.claim(key, needed))
        finally:
            if not granted:
                self._engine.release_claim(key)
        return granted

    async def _settle(self, plan: Plan, protected: Entry | None) -> None:
        """Carry a plan out, and feed whoever is hungry on the way."""
        draining = {self._entries[name] for name in (*plan.evict, *plan.drain)}
        for entry in draining:
            entry.become("draining")
        try:
            while draining or self._hungry:
                news = self._news
                for entry in [entry for entry in draining if not _used(entry)]:
                    draining.discard(entry)
                    await self._evict_drained(entry)
                for key in list(self._hungry):
                    await self._feed(key, draining, protected)
                if self._hungry or draining:
                    # What has happened since is news too.
                    await self._something(news, draining)
        finally:
            for entry in draining:
                if entry.state == "draining":
                    entry.become("ready")

    async def _evict_drained(self, entry: Entry) -> None:
        assert entry.model is not None
        await self._give_up(entry, entry.model)
        self.evicted += 1
        log.info("%s left memory to make room", entry.name)

    async def _feed(self, key: str, draining: set[Entry], protected: Entry | None) -> None:
        """Let others leave so that a request to the model `key` has room; refuse it if that cannot be."""
        gap = await self._shortfall(self._hungry[key], beside=key)
        own = next((entry for entry in self._entries.values() if _key(entry) == key), None)
        if own in draining:
            # Or two that leave would wait for each other: it comes back with its model, in its turn.
            self._hungry.pop(key, None)
            await self._on_engine(lambda: self._engine.displace(key))
            return
        if gap.ever <= 0 or self._engine.footprint(key) is None:
            self._hungry.pop(key, None)
            return
        others = [entry for entry in (own, protected, *draining) if entry is not None]
        plan = self._plan(gap.ever, *others)
        coming = sum(self._bytes(entry) for entry in draining if entry is not own)
        if plan.possible:
            more = {self._entries[name] for name in (*plan.evict, *plan.drain)}
            for entry in more:
                entry.become("draining")
            draining |= more
        elif coming < gap.ever and not self._departing:
            self._hungry.pop(key, None)
            await self._on_engine(self._engine.refuse_hopeless)

    async def _something(self, news: anyio.Event, draining: set[Entry]) -> None:
        """Wait for news, unless there is something to do at once."""
        if all(_used(entry) for entry in draining) and (draining or self._departing):
            await news.wait()

    async def _give_up(self, entry: Entry, model: LoadedModel) -> None:
        with anyio.CancelScope(shield=True):
            entry.become("unloading")
            await self._on_engine(lambda: self._engine.detach(model.key))
            self.predictor.note_evicted(entry.name, time.monotonic())
            entry.become("evicted")

    def _take_hunger(self, key: str, needed: int) -> None:
        self._hungry[key] = max(needed, self._hungry.get(key, 0))
        self._wake()
        self._spawn(self._feed_hungry)

    async def _feed_hungry(self) -> None:
        async with self._turn:
            await self._settle(Plan([], [], possible=True), None)

    def _plan(self, missing: int, *protected: Entry, idle_only: bool = False, guess: bool = False) -> Plan:
        if not self._settings.evict_models:
            return Plan([], [], possible=missing <= 0)
        residents = self._residents(*protected)
        if idle_only or guess:
            residents = [one for one in residents if not one.in_use]
        if guess:
            residents = [one for one in residents if one.next_use is None]
        return choose_victims(residents, missing, 0)

    def _residents(self, *without: Entry) -> list[Resident]:
        now = time.monotonic()
        return [
            Resident(
                name=entry.name,
                bytes=self._bytes(entry),
                last_used=entry.last_used,
                in_use=not entry.is_idle,
                pinned=entry.pinned,
                next_use=self._next_use(entry, now),
                ttl=_own_ttl(entry),
            )
            for entry in self._entries.values()
            if entry.state == "ready" and entry not in without
        ]

    def _next_use(self, entry: Entry, now: float) -> float | None:
        if not self._settings.predictive_preload:
            return None
        at = self.predictor.next_use(entry.name, now)
        return None if at is None or at > now + SOON_SECONDS else at

    def _bytes(self, entry: Entry) -> int:
        key = _key(entry)
        footprint = None if key is None else self._engine.footprint(key)
        return 0 if footprint is None else footprint.weights

    def _wake(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    async def _shortfall(self, needed: int, beside: str | None = None) -> Shortfall:
        return await self._on_engine(lambda: self._engine.shortfall(needed, beside))

    async def _on_engine(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.wrap_future(self._engine.run(work))


def _key(entry: Entry) -> str | None:
    return None if entry.model is None else entry.model.key


def _used(entry: Entry) -> bool:
    return entry.model is not None and entry.model.use.users > 0


def _own_ttl(entry: Entry) -> float | None:
    """Return the time to live that an entry has been given; infinity is never, None is none of its own."""
    own: Any = entry.ttl_ms
    if own is None:
        return float("inf")
    return own / 1000 if isinstance(own, int) else None
