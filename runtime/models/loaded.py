"""One model in memory, as the event loop sees it: plain facts, a tokenizer, and who is using it."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio

from mlx_sidecar.protocol import messages as m

from ..engine.sequence import Sequence

if TYPE_CHECKING:
    from ..text.tokenizer import ModelTokenizer


class LoadedModel:
    """One entry: what a request needs to know of a model, and the sequences that it runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: m.ModelState = "loading"
        self.settled = anyio.Event()
        self.idle = anyio.Event()
        self.sequences: set[Sequence] = set()
        self.users = 0
        self.forced_out = False
        self.result: m.LoadResult | None = None
        self._tokenizer: ModelTokenizer | None = None

    @property
    def tokenizer(self) -> "ModelTokenizer":
        """The tokenizer; there once the model is ready."""
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def facts(self) -> m.LoadResult:
        """What `load` answered; there once the model is ready."""
        assert self.result is not None
        return self.result

    def become_ready(self, tokenizer: "ModelTokenizer", result: m.LoadResult) -> None:
        """Open the model to requests."""
        self._tokenizer, self.result, self.state = tokenizer, result, "ready"

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Keep the model from being unloaded while the block runs."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if self.users == 0:
                self.idle.set()

    def info(self) -> m.ModelInfo:
        """Return this model's line of `models`."""
        info = m.ModelInfo(model=self.name, state=self.state, in_use=self.users)
        if self.result is not None:
            info.dtype = self.result.dtype
            info.parameters = self.result.parameters
            info.context_length = self.result.context_length
            info.bytes = self.result.bytes
        return info
