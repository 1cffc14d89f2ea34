"""One model in memory, as the event loop sees it: plain facts, a tokenizer, and who is using it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import AdapterNotLoaded, SidecarError, Unloaded

from ..engine.sequence import Sequence

if TYPE_CHECKING:
    from ..text.tokenizer import ModelTokenizer


class Use:
    """Counts who uses something, and tells when nobody does. `gone` is what ends those who still do."""

    def __init__(self) -> None:
        self.users = 0
        self.sequences: set[Sequence] = set()
        self.gone: SidecarError | None = None
        self.on_idle: Callable[[], None] = lambda: None
        self._idle = anyio.Event()

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Count a user while the block runs."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if self.users == 0:
                self._idle.set()
                self.on_idle()

    async def ended(self) -> None:
        """Wait until nobody uses it."""
        while self.users:
            self._idle = anyio.Event()
            await self._idle.wait()


class LoadedAdapter:
    """A LoRA adapter beside a model in memory."""

    def __init__(self, path: str, info: m.LoadAdapterResult) -> None:
        self.path = path
        self.use = Use()
        self._info = info

    def info(self) -> m.AdapterInfo:
        """Return its line of `models`; its bytes as they were when it came."""
        info = self._info
        return m.AdapterInfo(adapter=info.adapter, rank=info.rank, bytes=info.bytes, in_use=self.use.users)


class LoadedModel:
    """One version of a model: what a request needs to know of it, and the sequences that it runs.

    `key` is what the engine calls it; while two versions of a model are in memory `name` is that of both.
    """

    def __init__(self, name: str, key: str, tokenizer: "ModelTokenizer", facts: m.LoadResult) -> None:
        self.name = name
        self.key = key
        self.tokenizer = tokenizer
        self.facts = facts
        self.use = Use()
        self.adapters: dict[str, LoadedAdapter] = {}

    def adapter(self, name: str) -> LoadedAdapter:
        """Return an adapter by its name.

        Raises:
            AdapterNotLoaded: there is none.
        """
        found = self.adapters.get(name)
        if found is None or found.use.gone is not None:
            raise AdapterNotLoaded(self.name, name)
        return found

    @contextmanager
    def in_use(self, adapter: str | None = None) -> Generator[list[Use]]:
        """Keep the model, and one of its adapters, from being unloaded while the block runs.

        Raises:
            AdapterNotLoaded: there is no such adapter.
        """
        with self.use():
            if adapter is None:
                yield [self.use]
            else:
                use = self.adapter(adapter).use
                with use():
                    yield [self.use, use]

    def force_out(self) -> list[Sequence]:
        """Say that nobody may go on; return the sequences to end."""
        self.use.gone = Unloaded(self.name)
        return list(self.use.sequences)
