"""The models in memory, as the event loop sees them: plain facts, a tokenizer, and who is using what.

The networks themselves stay on the inference thread; a name is all that crosses over.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import BackendUnavailable, InvalidModel, InvalidParams, ModelNotLoaded

from ..engine.thread import InferenceThread
from ..pool import Pool
from .loaded import LoadedModel
from .sources import find_model, weight_files
from .store import ModelStore

if TYPE_CHECKING:
    from ..text.tokenizer import ModelTokenizer
    from .loader import Network

log = logging.getLogger("models")


class ModelRegistry:
    """Loads and unloads by name; a model is in exactly one state, and a failed load leaves nothing behind."""

    def __init__(
        self,
        engine: InferenceThread,
        store: ModelStore,
        pages: Pages,
        pool: Pool,
        settings: Settings,
    ) -> None:
        self._engine = engine
        self._store = store
        self._pages = pages
        self._pool = pool
        self._settings = settings
        self._models: dict[str, LoadedModel] = {}

    def infos(self) -> list[m.ModelInfo]:
        """Return a line for every model, oldest first."""
        return [model.info() for model in self._models.values()]

    async def ready(self, name: str) -> LoadedModel:
        """Return a model that can be used now, after waiting for a load that is under way.

        Raises:
            ModelNotLoaded: it is not loaded, or its load failed.
        """
        model = self._models.get(name)
        while model is not None and model.state == "loading":
            await model.settled.wait()
            model = self._models.get(name)
        if model is None or model.state != "ready":
            raise ModelNotLoaded(name)
        return model

    def load(self, params: m.LoadParams) -> Awaitable[m.LoadResult]:
        """Bring a model into memory; one that is there already is answered at once.

        The entry is there when this returns, so that whatever is asked next finds it.

        Raises:
            ModelNotFound, InvalidModel, BackendUnavailable, InvalidParams.
        """
        present = self._models.get(params.model)
        return (
            self._bring(self._new(params.model), params) if present is None else self._join(present, params)
        )

    async def unload(self, params: m.UnloadParams) -> m.UnloadResult:
        """Give a model's memory back, after its requests have ended; `force` ends them.

        Raises:
            ModelNotLoaded: it is not loaded.
        """
        model = await self.ready(params.model)
        model.state = "unloading"
        model.settled = anyio.Event()
        if params.force:
            model.forced_out = True
            for sequence in model.sequences:
                self._engine.cancel(sequence)
        # Once begun an unload runs to its end, whoever stops waiting for it: half of one is no state.
        with anyio.CancelScope(shield=True):
            while model.users:
                model.idle = anyio.Event()
                await model.idle.wait()
            await asyncio.wrap_future(self._discard(model.name))
            del self._models[model.name]
            model.state = "unloaded"
            model.settled.set()
        log.info("unloaded %s", model.name)
        return m.UnloadResult(model=model.name, state="unloaded")

    def _new(self, name: str) -> LoadedModel:
        model = self._models[name] = LoadedModel(name)
        return model

    async def _bring(self, model: LoadedModel, params: m.LoadParams) -> m.LoadResult:
        try:
            await self._load(model, params)
        except BaseException:
            del self._models[model.name]
            raise
        finally:
            model.settled.set()
        return model.facts

    async def _join(self, present: LoadedModel, params: m.LoadParams) -> m.LoadResult:
        while present.state != "ready":
            await present.settled.wait()
            if (now := self._models.get(params.model)) is None:
                return await self._bring(self._new(params.model), params)
            present = now
        return _same_dtype(present, params)

    async def _load(self, model: LoadedModel, params: m.LoadParams) -> None:
        began = time.monotonic()
        try:
            device = await asyncio.wrap_future(self._engine.started())
        except (ImportError, OSError, RuntimeError):
            raise BackendUnavailable() from None
        waited_ms = (time.monotonic() - began) * 1000
        try:
            folder = await self._pool.run(find_model, model.name, self._store)
            pages = await self._pool.run(self._pages.of_files, weight_files(folder))
        except OSError as error:
            raise InvalidModel(model.name, "its files went away while they were read") from error
        work = self._engine.run(lambda: self._load_network(model.name, folder, params.dtype, device.kind))
        try:
            tokenizer = await self._load_tokenizer(model.name, folder)
            result = await asyncio.wrap_future(work)
        except Exception:
            await asyncio.wrap_future(self._discard(model.name))
            raise
        except BaseException:
            # Cancelled: nobody waits for it any more, and the engine frees it before it does anything else.
            self._discard(model.name)
            raise
        result.load_ms = (time.monotonic() - began) * 1000
        result.phases.runtime_ms = waited_ms
        if pages is not None:
            result.pages = m.PagesReport(resident_bytes=pages[0], total_bytes=pages[1])
        model.become_ready(tokenizer, result)
        log.info("loaded %s as %s in %.0f ms", model.name, result.dtype, result.load_ms)

    async def _load_tokenizer(self, name: str, folder: Path) -> "ModelTokenizer":
        try:
            return await self._pool.run(_read_tokenizer, folder)
        except ValueError as error:
            raise InvalidModel(name, str(error)) from error
        except OSError as error:
            raise InvalidModel(name, "its files went away while they were read") from error

    def _discard(self, name: str) -> Future[None]:
        return self._engine.run(lambda: self._engine.detach(name))

    def _load_network(self, name: str, folder: Path, dtype: m.DtypeRequest, device: str) -> m.LoadResult:
        """Load, warm up and attach; runs on the inference thread."""
        from ..engine.fused import fuse_projections
        from ..engine.model_batch import ModelBatch
        from ..engine.warm_up import warm_up

        network, problem = _try_to_load(name, folder, dtype, device)
        if network is None:
            raise InvalidModel(name, problem)
        chunk = (
            self._settings.prefill_chunk_tokens_cpu
            if device == "cpu"
            else self._settings.prefill_chunk_tokens
        )
        if device == "cuda":
            log.info("fused %d groups of projections", fuse_projections(network.module))
        batch = ModelBatch(network.module, prefill_chunk_tokens=chunk)
        warmup_ms = warm_up(batch, device)
        self._engine.attach(name, batch)
        result = m.LoadResult(
            model=name,
            state="ready",
            dtype=network.dtype,
            parameters=network.parameters,
            context_length=network.context_length,
            vocabulary=network.vocabulary,
            bytes=network.nbytes,
            load_ms=network.load_ms,
            phases=m.LoadPhases(runtime_ms=0, weights_ms=network.load_ms, warmup_ms=warmup_ms),
        )
        if network.reason is not None:
            result.reason = network.reason
        return result


def _read_tokenizer(folder: Path) -> "ModelTokenizer":
    # Imported here, in the pool: the tokenizers library is not needed to answer `initialize`.
    from ..text.tokenizer import ModelTokenizer

    return ModelTokenizer(folder)


def _try_to_load(name: str, folder: Path, dtype: m.DtypeRequest, device: str) -> "tuple[Network | None, str]":
    """Return the network, or what is wrong with it.

    Not as an exception: its traceback would keep a half-built network alive for as long as it travels.
    """
    from .loader import LoadError, load_network

    try:
        return load_network(folder, dtype, device), ""
    except LoadError as error:
        log.warning("loading %s failed", name, exc_info=error)
        return None, str(error)


def _same_dtype(model: LoadedModel, params: m.LoadParams) -> m.LoadResult:
    if params.dtype not in ("auto", "stored", model.facts.dtype):
        raise InvalidParams("dtype", f"the model is loaded as {model.facts.dtype}; unload it first")
    return model.facts
