"""A model that somebody asked for, in memory or not: how to load it, where it stands, who waits for it."""

import time

import anyio
from msgspec import UNSET, UnsetType

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import SidecarError

from .loaded import LoadedModel
from .progress import LoadWatch


class Attempt:
    """One try to bring a model into memory. Any number wait for it; the last who gives up cancels it."""

    def __init__(self) -> None:
        self.watch = LoadWatch()
        self.scope = anyio.CancelScope()
        self._waiting = 0
        self._error: SidecarError | None = None
        self._ended = anyio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether it has succeeded or failed."""
        return self._ended.is_set()

    def end(self, error: SidecarError | None = None) -> None:
        """Let everybody who waits go on, or fail."""
        self._error = error
        self._ended.set()

    async def wait(self) -> None:
        """Wait for the end.

        Raises:
            SidecarError: why it failed.
        """
        self._waiting += 1
        try:
            await self._ended.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and not self.has_ended:
                self.scope.cancel()
        if self._error is not None:
            raise self._error.with_traceback(None)


class Entry:
    """One name in the registry. `model` stays known while it is evicted; the network is gone then."""

    def __init__(self, name: str, params: m.LoadParams) -> None:
        self.name = name
        self.params = params
        self.state: m.ModelState = "queued"
        self.model: LoadedModel | None = None
        self.attempt: Attempt | None = None
        self.failure: SidecarError | None = None
        self.pinned = False
        self.ttl_ms: int | UnsetType | None = UNSET
        self.leaving = False
        self.cut = False
        self.renewals = 0
        self.busy = 0
        self.uses = 0
        self.loads = 0
        self.last_used = time.monotonic()
        self._changed = anyio.Event()

    @property
    def is_past(self) -> bool:
        """Whether nobody can use it any more: it is being unloaded, or its load failed."""
        return self.leaving or self.state in ("failed", "unloaded")

    @property
    def is_idle(self) -> bool:
        """Whether it is in memory and nobody uses or waits for it."""
        return self.state == "ready" and not self.busy and self.model is not None and not self.model.use.users

    def become(self, state: m.ModelState) -> None:
        """Change the state, and tell whoever waits for that."""
        self.state = state
        self.nudge()

    def nudge(self) -> None:
        """Let whoever waits for a change look again."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def changed(self) -> None:
        """Wait for the next change of state."""
        await self._changed.wait()

    def touch(self) -> None:
        """Note that it was asked for."""
        self.uses += 1
        self.last_used = time.monotonic()

    def ttl_seconds(self, default_ms: int | None) -> float | None:
        """Return after how many seconds without use it leaves memory; None is never."""
        ttl_ms = default_ms if isinstance(self.ttl_ms, UnsetType) else self.ttl_ms
        return None if ttl_ms is None else ttl_ms / 1000

    def info(self, default_ttl_ms: int | None, aliases: list[str]) -> m.ModelInfo:
        """Return this model's line of `models`."""
        model = self.model
        ttl = self.ttl_seconds(default_ttl_ms)
        info = m.ModelInfo(
            model=self.name,
            state=self.state,
            in_use=model.use.users if model else 0,
            uses=self.uses,
            loads=self.loads,
            pinned=self.pinned,
            aliases=aliases,
            adapters=[adapter.info() for adapter in model.adapters.values()] if model else [],
            ttl_ms=None if ttl is None else round(ttl * 1000),
        )
        if self.failure is not None:
            info.failure = m.ModelFailure(kind=self.failure.kind, message=self.failure.message)
        if model is not None:
            info.idle_ms = 0.0 if model.use.users else round((time.monotonic() - self.last_used) * 1000, 3)
            facts = model.facts
            info.dtype, info.reason, info.parameters = facts.dtype, facts.reason, facts.parameters
            info.context_length, info.load_ms = facts.context_length, facts.load_ms
            if self.state in ("ready", "draining", "unloading"):
                info.bytes = facts.bytes
        return info
