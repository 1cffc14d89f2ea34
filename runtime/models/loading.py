"""From a name to a model that runs: find its folder, check it, read it beside whoever decodes, warm it up.

Nothing of a load that fails or is cancelled stays, wherever it was.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import UNSET

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import BackendUnavailable, InvalidModel, OutOfMemory, SidecarError

from ..engine.sequence import Device
from ..engine.thread import InferenceThread
from ..pool import Pool
from .entry import Entry
from .folder_check import check_folder
from .loaded import LoadedModel
from .loader_thread import LoaderThread
from .precision import DOES_NOT_RUN, projected_bytes
from .progress import LoadWatch
from .sources import find_model, read_config
from .store import ModelStore
from .weight_files import stamp, weight_facts

if TYPE_CHECKING:
    from ..engine.model_batch import ModelBatch
    from ..text.tokenizer import ModelTokenizer
    from .loader import Loaded, Network

ResultT = TypeVar("ResultT")
MakeRoom = Callable[[int], Awaitable[None]]

log = logging.getLogger("models")

_NO_MEMORY = "the device has no memory left"
_GONE = "its files went away while they were read"
_CHANGED = "its files changed while they were read"
_MODEL_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Loading:
    """Loads one model at a time."""

    def __init__(
        self, engine: InferenceThread, store: ModelStore, pages: Pages, pool: Pool, settings: Settings
    ) -> None:
        self._engine = engine
        self._store = store
        self._pages = pages
        self._pool = pool
        self._settings = settings
        self._thread = LoaderThread()

    async def device(self) -> Device:
        """Return what MLX runs on, as soon as it does.

        Raises:
            BackendUnavailable: it cannot run here.
        """
        try:
            return await asyncio.wrap_future(self._engine.started())
        except (ImportError, OSError, RuntimeError):
            raise BackendUnavailable() from None

    def on_thread(self, work: Callable[[], ResultT]) -> "Future[ResultT]":
        """Run `work` where weights are read."""
        return self._thread.run(work)

    async def load(self, entry: Entry, key: str, watch: LoadWatch, make_room: MakeRoom) -> LoadedModel:
        """Return the model that an entry names, attached to the engine as `key`.

        `make_room` is given the bytes that the weights will take, and waits until they may come.

        Raises:
            BackendUnavailable, ModelNotFound, InvalidModel, UnsafeModel, OutOfMemory.
        """
        began = time.monotonic()
        device = await self.device()
        waited_ms = (time.monotonic() - began) * 1000
        watch.enter("checking")
        try:
            return await self._load(entry, key, watch, make_room, device, began, waited_ms)
        except BaseException as error:
            # Also when cancelled: then nobody waits for it, and the engine frees it before anything else.
            self._engine.release_claim(key)
            self._engine.run(lambda: self._engine.detach(key))
            if isinstance(error, OSError):
                raise InvalidModel(entry.name, _GONE) from error
            raise

    async def _load(
        self,
        entry: Entry,
        key: str,
        watch: LoadWatch,
        make_room: MakeRoom,
        device: Device,
        began: float,
        waited_ms: float,
    ) -> LoadedModel:
        name, params = entry.name, entry.params
        revision = None if params.revision is UNSET else params.revision
        folder = await self._pool.run(find_model, params.model, self._store, revision)
        before = await self._pool.run(stamp, folder)
        # Again: what was checked on the way here may have been other files than these.
        await self._pool.run(check_folder, name, folder)
        facts = await self._pool.run(weight_facts, name, folder)
        pages = await self._pool.run(self._pages.of_files, facts.files)
        config = await self._pool.run(read_config, name, folder)
        needed = projected_bytes(facts.bytes_by_dtype, config, params.dtype, device.kind)
        watch.note(0, needed, 0, facts.tensors)
        tokenizer = await self._read_tokenizer(name, folder)
        watch.enter("queued")
        await make_room(needed)
        watch.enter("weights")
        box = await self._read_weights(name, folder, needed, params.dtype, device.kind, watch)
        if await self._pool.run(stamp, folder) != before:
            raise InvalidModel(name, _CHANGED)
        watch.enter("warmup")
        try:
            result = await self._attach(name, key, box, device.kind)
        except _MODEL_ERRORS as error:
            raise self._explained(name, needed, error) from error
        result.load_ms = (time.monotonic() - began) * 1000
        result.phases.runtime_ms = waited_ms
        if pages is not None:
            result.pages = m.PagesReport(resident_bytes=pages[0], total_bytes=pages[1])
        log.info("loaded %s as %s in %.0f ms", name, result.dtype, result.load_ms)
        return LoadedModel(name, key, tokenizer, result)

    async def _read_tokenizer(self, name: str, folder: Path) -> "ModelTokenizer":
        try:
            return await self._pool.run(_read_tokenizer, folder)
        except ValueError as error:
            raise InvalidModel(name, str(error)) from error

    async def _read_weights(
        self, name: str, folder: Path, needed: int, dtype: m.DtypeRequest, device: str, watch: LoadWatch
    ) -> "list[Network]":
        """Return the network in a box, which is emptied by whoever takes it over: one reference, or none."""
        loop, abandoned = asyncio.get_running_loop(), threading.Event()
        box: list[Network] = []

        def on_piece(loaded: "Loaded") -> None:
            if abandoned.is_set():
                raise _AbandonedError
            with contextlib.suppress(RuntimeError):  # The loop has ended, and with it everything.
                loop.call_soon_threadsafe(watch.note, *loaded)

        def read() -> str | None:
            network, problem = _try_to_load(name, folder, dtype, device, on_piece)
            if network is not None:
                box.append(network)
            return problem

        try:
            problem = await asyncio.wrap_future(self._thread.run(read))
        except BaseException:
            abandoned.set()
            # If it was done already; if not, the box is lost with the load.
            box.clear()
            raise
        if problem == _NO_MEMORY:
            raise self._no_memory(name, needed)
        if problem is not None:
            raise InvalidModel(name, problem)
        return box

    def _explained(self, name: str, needed: int, error: Exception) -> SidecarError:
        from ..engine.device import is_out_of_memory

        return self._no_memory(name, needed) if is_out_of_memory(error) else InvalidModel(name, DOES_NOT_RUN)

    def _no_memory(self, name: str, needed: int) -> OutOfMemory:
        return OutOfMemory(needed, self._engine.report().memory.free_bytes, model=name)

    async def _attach(self, name: str, key: str, box: "list[Network]", device: str) -> m.LoadResult:
        from ..engine.warm_up import warm_up

        began = time.monotonic()
        result = _result(name, box[0])
        batches = await self._on_engine(lambda: [self._batch(box, device)])
        warming = await self._on_engine(lambda: [warm_up(batches[0], device)])
        # A part at a time: other models have their steps in between.
        while await self._on_engine(lambda: next(warming[0], _DONE) is not _DONE):
            pass
        await self._on_engine(lambda: self._engine.attach(key, batches.pop()))
        result.phases.warmup_ms = (time.monotonic() - began) * 1000
        return result

    def _batch(self, box: "list[Network]", device: str) -> "ModelBatch":
        from ..engine.fused import fuse_projections
        from ..engine.model_batch import ModelBatch

        module = box.pop().module
        settings = self._settings
        chunk = settings.prefill_chunk_tokens_cpu if device == "cpu" else settings.prefill_chunk_tokens
        if device == "cuda":
            log.info("fused %d groups of projections", fuse_projections(module))
        return ModelBatch(module, prefill_chunk_tokens=chunk)

    async def _on_engine(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.wrap_future(self._engine.run(work))


_DONE: Any = object()


class _AbandonedError(Exception):
    """Nobody wants the model any more."""


def _read_tokenizer(folder: Path) -> "ModelTokenizer":
    # Imported here, in the pool: the tokenizers library is not needed to answer `initialize`.
    from ..text.tokenizer import ModelTokenizer

    return ModelTokenizer(folder)


def _try_to_load(
    name: str,
    folder: Path,
    dtype: m.DtypeRequest,
    device: str,
    on_piece: "Callable[[Loaded], None]",
) -> "tuple[Network | None, str | None]":
    """Return the network, or what is wrong with it.

    Not as an exception: its traceback would keep a half-built network alive for as long as it travels.
    """
    from .loader import LoadError, load_network

    try:
        return load_network(folder, dtype, device, on_piece), None
    except MemoryError:
        return None, _NO_MEMORY
    except LoadError as error:
        log.warning("loading %s failed", name, exc_info=error)
        return None, str(error)
    except _AbandonedError:
        return None, "nobody wants it any more"


def _result(name: str, network: "Network") -> m.LoadResult:
    result = m.LoadResult(
        model=name,
        state="ready",
        dtype=network.dtype,
        parameters=network.parameters,
        context_length=network.context_length,
        vocabulary=network.vocabulary,
        bytes=network.nbytes,
        load_ms=network.load_ms,
        phases=m.LoadPhases(runtime_ms=0, weights_ms=network.load_ms, warmup_ms=0),
    )
    if network.reason is not None:
        result.reason = network.reason
    return result
