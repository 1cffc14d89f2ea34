"""LoRA adapters of models in memory: read beside whoever decodes, attached between two steps."""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidAdapter

from ..engine.thread import InferenceThread
from .loaded import LoadedAdapter, LoadedModel
from .loading import Loading

if TYPE_CHECKING:
    from ..engine.adapters import AdapterWeights

log = logging.getLogger("models")

_GROWTH = 2
"""16-bit matrices become float32 on a CPU."""


async def projected_bytes(loading: Loading, path: str) -> int:
    """Return what an adapter may take in memory, by the sizes of its files; 0 if there are none."""

    def work() -> int:
        with suppress(OSError):
            return sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) * _GROWTH
        return 0

    return await asyncio.wrap_future(loading.on_thread(work))


async def read(loading: Loading, model: str, adapter: str, path: str) -> "list[AdapterWeights]":
    """Return what an adapter adds, in a box that whoever attaches it empties.

    Raises:
        InvalidAdapter: there is no adapter, or not one that can be used.
    """

    def work() -> "list[AdapterWeights] | str":
        from ..engine.adapters import AdapterError
        from .adapter_files import read_adapter

        try:
            folder = Path(path)
            if not folder.is_absolute() or not folder.is_dir():
                return "there is no folder at that path, which must be absolute"
            return [read_adapter(folder)]
        except AdapterError as error:
            return str(error)
        except OSError:
            return "its files cannot be read"

    found = await asyncio.wrap_future(loading.on_thread(work))
    if isinstance(found, str):
        raise InvalidAdapter(model, adapter, found)
    return found


async def attach(
    engine: InferenceThread, model: LoadedModel, adapter: str, path: str, box: "list[AdapterWeights]"
) -> m.LoadAdapterResult:
    """Let a model's requests use an adapter.

    Raises:
        InvalidAdapter: it does not fit the model.
    """
    began = time.monotonic()
    modules = len(box[0].layers)

    def work() -> tuple[int, int] | str:
        from ..engine.adapters import AdapterError

        batch = engine.batch(model.key)
        try:
            batch.attach_adapter(adapter, box.pop())
        except AdapterError as error:
            return str(error)
        engine.resize(model.key)
        report = next(one for one in batch.report().adapters if one.name == adapter)
        return report.rank, report.nbytes

    # What is in the engine has to be known here, whoever stops waiting for it.
    attached = engine.run(work)
    with anyio.CancelScope(shield=True):
        await asyncio.wrap_future(attached)
    found = attached.result()
    if isinstance(found, str):
        raise InvalidAdapter(model.name, adapter, found)
    rank, size = found
    result = m.LoadAdapterResult(
        model=model.name,
        adapter=adapter,
        rank=rank,
        bytes=size,
        in_use=0,
        modules=modules,
        load_ms=(time.monotonic() - began) * 1000,
    )
    model.adapters[adapter] = LoadedAdapter(path, result)
    return result


async def detach(engine: InferenceThread, model: LoadedModel, adapter: str) -> None:
    """Give an adapter's memory back, unless its model has left with it. Nobody may be using it."""

    def work() -> None:
        if engine.footprint(model.key) is not None:
            engine.batch(model.key).detach_adapter(adapter)
            engine.resize(model.key)
            engine.give_memory_back()

    await asyncio.wrap_future(engine.run(work))
    del model.adapters[adapter]


async def bring_adapters_back(
    engine: InferenceThread, loading: Loading, old: LoadedModel, new: LoadedModel
) -> None:
    """Give a model that has come back its adapters, but for those that cannot be read any more."""
    for name, adapter in old.adapters.items():
        if adapter.use.gone is not None:
            continue
        try:
            box = await read(loading, new.name, name, adapter.path)
            await attach(engine, new, name, adapter.path, box)
        except InvalidAdapter as error:
            log.warning("%s came back without an adapter: %s", new.name, error.message)
