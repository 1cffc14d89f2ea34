"""The models that were asked for, by name and by alias, and what can be done with them.

The networks themselves stay on the inference thread; a key is all that crosses over. Who is in memory, and
who has to leave, is for `residency`.
"""

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import asynccontextmanager, contextmanager

import anyio
from msgspec import UnsetType

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import (
    InvalidAdapter,
    InvalidParams,
    ModelNotLoaded,
    SidecarError,
    Unloaded,
)

from ..engine.sequence import Sequence
from ..engine.thread import InferenceThread
from . import adapters
from .entry import Attempt, Entry
from .loaded import LoadedModel, Use
from .loading import Loading
from .progress import Tell
from .residency import Post, Residency, Spawn

log = logging.getLogger("models")

_TAKEN = "there is one of that name; unload it first"
_MOST_FAILURES = 64
"""So many models whose load failed are remembered, for `models` to say why."""


class ModelRegistry:
    """Names, aliases and versions; a failed load leaves nothing behind but its reason."""

    def __init__(
        self, engine: InferenceThread, loading: Loading, settings: Settings, spawn: Spawn, post: Post
    ) -> None:
        self._engine = engine
        self._loading = loading
        self._settings = settings
        self._spawn = spawn
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        # Still on their way out, while others have their names already.
        self._succeeded: list[Entry] = []
        self.residency = Residency(engine, loading, settings, self._entries, spawn, post, self._forget)

    def infos(self) -> list[m.ModelInfo]:
        """Return a line for every model, oldest first."""
        by_model: dict[str, list[str]] = {}
        for alias, name in self._aliases.items():
            by_model.setdefault(name, []).append(alias)
        leaving = [self._info(entry, []) for entry in self._succeeded if entry.state != "unloaded"]
        return leaving + [
            self._info(entry, sorted(by_model.get(entry.name, []))) for entry in self._entries.values()
        ]

    def key_of(self, name: str) -> str | None:
        """Return what the engine calls a model; None if it has never been in memory."""
        model = self._entries[name].model if name in self._entries else None
        return None if model is None else model.key

    @property
    def entries(self) -> list[Entry]:
        """Every model, oldest first."""
        return list(self._entries.values())

    def find(self, name: str) -> Entry:
        """Return a model by its name or an alias.

        Raises:
            ModelNotLoaded: nobody has loaded it.
        """
        entry = self._entries.get(self._aliases.get(name, name))
        if entry is None or entry.is_past:
            raise ModelNotLoaded(name)
        return entry

    @asynccontextmanager
    async def using(
        self, name: str | Entry, adapter: str | None = None
    ) -> AsyncGenerator[tuple[LoadedModel, list[Use]]]:
        """Keep a model in memory while the block runs, after bringing it there if need be.

        Who had to go back to wait for it names it by what `find` has returned.

        Raises:
            ModelNotLoaded: nobody has loaded it.
            AdapterNotLoaded: it has no such adapter.
            SidecarError: it could not be brought back.
        """
        if isinstance(name, str):
            name = self.find(name)
            name.touch()
            if self._settings.predictive_preload:
                self.residency.predictor.note_request(name.name, time.monotonic())
        entry = name
        model = await self._ready(entry)
        with model.in_use(adapter) as uses:
            try:
                yield model, uses
            finally:
                entry.last_used = time.monotonic()

    async def known(self, name: str) -> LoadedModel:
        """Return what is known of a model, tokenizer included, be it in memory or not.

        Raises:
            ModelNotLoaded: nobody has loaded it.
            SidecarError: its load, which was waited for, failed.
        """
        entry = self.find(name)
        return entry.model or await self._ready(entry)

    def load(self, params: m.LoadParams, tell: Tell | None = None) -> Awaitable[m.LoadResult]:
        """Bring a model into memory; one that is there already is answered at once.

        The entry is there when this returns, so that whatever is asked next finds it.

        Raises:
            ModelNotFound, InvalidModel, UnsafeModel, OutOfMemory, BackendUnavailable, InvalidParams.
        """
        name = _name(params, self._aliases)
        alias = params.alias
        if not isinstance(alias, UnsetType) and alias in self._entries and alias != name:
            raise InvalidParams("alias", "is the name of another loaded model")
        if name not in self._entries or self._entries[name].is_past:
            self._begin(name, params)
        if not isinstance(alias, UnsetType):
            # One that leads nowhere else may be used by requests that come before the model is there.
            self._aliases.setdefault(alias, name)
        return self._load(name, params, tell)

    async def reload(self, params: m.ReloadParams, tell: Tell | None = None) -> m.LoadResult:
        """Read a model anew beside the one that serves, which then leaves when its last request has ended.

        Raises:
            ModelNotLoaded, ModelNotFound, InvalidModel, UnsafeModel, OutOfMemory, Unloaded.
        """
        entry = self.find(params.model)
        await self._ready(entry)
        attempt = Attempt()
        old: LoadedModel | None = None
        with _told(attempt, tell):
            entry.renewals += 1
            try:
                entry.busy += 1  # It must not leave to make room for itself.
                old = await self.residency.renew(entry, attempt)
            finally:
                entry.busy -= 1
                entry.renewals -= 1
                entry.nudge()
                if old is not None:
                    self._spawn(self.residency.depart, old)
        assert entry.model is not None
        return entry.model.facts

    async def unload(self, params: m.UnloadParams) -> m.UnloadResult:
        """Give a model's memory back, after its requests have ended; `force` ends them.

        Raises:
            ModelNotLoaded: it is not loaded.
        """
        name = self._aliases.get(params.model, params.model)
        entry = self._entries.get(name)
        if entry is None or (entry.leaving and not params.force) or entry.state == "failed":
            raise ModelNotLoaded(params.model)
        if entry.leaving:
            self._force_out(entry)
            while entry.state != "unloaded":
                await entry.changed()
            return m.UnloadResult(model=name, state="unloaded")
        entry.leaving = True
        # Once begun an unload runs to its end, whoever stops waiting for it: half of one is no state.
        with anyio.CancelScope(shield=True):
            await self._leave(entry, force=params.force)
        log.info("unloaded %s", name)
        return m.UnloadResult(model=name, state="unloaded")

    def alias(self, params: m.AliasParams) -> m.AliasResult:
        """Let an alias stand for another model, or for none; requests that have come stay where they are.

        Raises:
            ModelNotLoaded: the model is not loaded.
            InvalidParams: the alias is the name of a model.
        """
        previous = self._aliases.get(params.alias)
        if params.model is None:
            self._aliases.pop(params.alias, None)
            return m.AliasResult(alias=params.alias, model=None, previous=previous)
        if params.alias in self._entries:
            raise InvalidParams("alias", "is the name of a loaded model")
        entry = self.find(params.model)
        self._aliases[params.alias] = entry.name
        return m.AliasResult(alias=params.alias, model=entry.name, previous=previous)

    async def load_adapter(self, params: m.LoadAdapterParams) -> m.LoadAdapterResult:
        """Bring an adapter into memory beside its model.

        Raises:
            ModelNotLoaded, InvalidAdapter, OutOfMemory.
        """
        began = time.monotonic()
        entry = self.find(params.model)
        await self._ready(entry)
        entry.busy += 1
        try:
            claim = f"{entry.name}/{params.adapter}"
            needed = await adapters.projected_bytes(self._loading, params.path)
            async with self.residency.staying(entry, claim, needed) as model:
                if params.adapter in model.adapters:
                    raise InvalidAdapter(entry.name, params.adapter, _TAKEN)
                box = await adapters.read(self._loading, model.name, params.adapter, params.path)
                result = await adapters.attach(self._engine, model, params.adapter, params.path, box)
        finally:
            entry.busy -= 1
            entry.nudge()
        result.load_ms = (time.monotonic() - began) * 1000
        return result

    async def unload_adapter(self, params: m.UnloadAdapterParams) -> m.UnloadAdapterResult:
        """Give an adapter's memory back, after its requests have ended; `force` ends them.

        Raises:
            ModelNotLoaded, AdapterNotLoaded.
        """
        entry = self.find(params.model)
        model = await self._ready(entry)
        adapter = model.adapter(params.adapter)
        adapter.use.gone = Unloaded(model.name, params.adapter)
        if params.force:
            self._end(list(adapter.use.sequences), adapter.use.gone)
        with anyio.CancelScope(shield=True):
            await adapter.use.ended()
            await adapters.detach(self._engine, model, params.adapter)
        return m.UnloadAdapterResult(model=model.name, adapter=params.adapter)

    def _begin(self, name: str, params: m.LoadParams) -> Entry:
        failed = [entry for entry in self._entries.values() if entry.state == "failed"]
        if len(failed) >= _MOST_FAILURES:
            self._forget(failed[0])
        if (old := self._entries.get(name)) is not None:
            self._forget(old)
            if old.leaving:
                self._succeeded.append(old)
        entry = self._entries[name] = Entry(name, params)
        _apply(entry, params)
        self.residency.start(entry)
        return entry

    async def _load(self, name: str, params: m.LoadParams, tell: Tell | None) -> m.LoadResult:
        while True:
            entry = self._entries.get(name)
            if entry is None or entry.is_past:
                entry = self._begin(name, params)
            try:
                model = await self._ready(entry, tell)
                break
            except _Gone:
                continue
            except SidecarError:
                if entry.state == "failed":
                    self._drop_aliases(entry)
                raise
        _same_dtype(model, params)
        _apply(entry, params)
        if not isinstance(params.alias, UnsetType):
            self._aliases[params.alias] = name
        return model.facts

    async def _ready(self, entry: Entry, tell: Tell | None = None) -> LoadedModel:
        """Wait until a model is in memory, bringing it back if need be.

        Raises:
            SidecarError: it could not be brought there.
            ModelNotLoaded: it was unloaded meanwhile.
        """
        entry.busy += 1
        try:
            while entry.state != "ready":
                if entry.cut:
                    raise Unloaded(entry.name)
                if entry.state in ("unloaded", "failed"):
                    raise _Gone(entry.name)
                if entry.state == "evicted":
                    self.residency.start(entry)
                if entry.attempt is None:
                    await entry.changed()
                    continue
                with _told(entry.attempt, tell):
                    await entry.attempt.wait()
            assert entry.model is not None
            return entry.model
        finally:
            entry.busy -= 1
            entry.nudge()

    async def _leave(self, entry: Entry, *, force: bool) -> None:
        if force:
            self._force_out(entry)
        # Whoever came before is still served.
        while entry.busy or entry.attempt or entry.renewals or entry.state in ("draining", "unloading"):
            await entry.changed()
        if entry.model is not None and entry.state == "ready":
            entry.become("draining")
            await self.residency.depart(entry.model, entry)
        self._forget(entry)
        entry.become("unloaded")
        self._succeeded = [other for other in self._succeeded if other is not entry]

    def _force_out(self, entry: Entry) -> None:
        entry.cut = True
        if entry.attempt is not None:
            entry.attempt.scope.cancel()
        if entry.model is not None:
            self._end(entry.model.force_out(), Unloaded(entry.name))

    def _end(self, sequences: list[Sequence], failure: SidecarError) -> None:
        for sequence in sequences:
            self._engine.cancel(sequence, failure)

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self._drop_aliases(entry)

    def _drop_aliases(self, entry: Entry) -> None:
        for alias in [alias for alias, name in self._aliases.items() if name == entry.name]:
            del self._aliases[alias]

    def _info(self, entry: Entry, aliases: list[str]) -> m.ModelInfo:
        info = entry.info(self._settings.model_ttl_ms, aliases)
        footprint = None if entry.model is None else self._engine.footprint(entry.model.key)
        if footprint is not None:
            info.kv_bytes_per_token = footprint.kv_per_token
            info.prefill_peak_bytes = footprint.prefill_peak
        return info


class _Gone(ModelNotLoaded):
    """It was unloaded while somebody waited for it."""


@contextmanager
def _told(attempt: Attempt, tell: Tell | None) -> Generator[None]:
    if tell is None:
        yield
        return
    number = attempt.watch.listen(tell)
    try:
        yield
    finally:
        attempt.watch.leave(number)


def _name(params: m.LoadParams, aliases: dict[str, str]) -> str:
    if isinstance(params.revision, UnsetType):
        return aliases.get(params.model, params.model)
    return f"{params.model}@{params.revision}"


def _apply(entry: Entry, params: m.LoadParams) -> None:
    if not isinstance(params.pin, UnsetType):
        entry.pinned = params.pin
    if not isinstance(params.ttl_ms, UnsetType):
        entry.ttl_ms = params.ttl_ms


def _same_dtype(model: LoadedModel, params: m.LoadParams) -> None:
    if params.dtype not in ("auto", "stored", model.facts.dtype):
        raise InvalidParams("dtype", f"the model is loaded as {model.facts.dtype}; unload it first")
