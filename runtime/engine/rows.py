"""The caches of several sequences of one model, all layers together.

A layer with a plain KV cache has a `KVRows`. The other kinds (rotating, recurrent) are mlx-lm's: one sequence
has the model's own cache and runs as mlx-lm runs it alone; two and more have what its `merge` makes.
"""

from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, make_prompt_cache

from .kv_rows import KVRows, Layout

_KV_DIMENSIONS = 4
"""Rows, heads, tokens, width: keys and values have them, a cache's bookkeeping has not."""


class Rows:
    """What the model is given as `cache`: `layers`, one for each of its own. Inference thread only."""

    def __init__(self, model: nn.Module, count: int = 1) -> None:
        """Begin `count` empty rows. More than one is for models with plain KV caches only."""
        self.count = count
        self.layout = Layout([0] * count)
        self.layers: list[Any] = [
            KVRows(self.layout) if type(layer) is KVCache else layer for layer in _new_caches(model)
        ]

    @property
    def padding(self) -> list[int]:
        """Positions that each row's plain KV caches hold before it begins."""
        return self.layout.padding

    @property
    def empty(self) -> bool:
        """Whether nothing has gone through the model yet. What is empty cannot be joined."""
        return any(layer.empty() for layer in self.layers)

    @property
    def end(self) -> int:
        """Length of the longest row, in tokens; 0 if no layer has a plain KV cache."""
        return max((layer.size() for layer in self._plain()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers if not layer.empty())

    def padding_bytes_with(self, other: "Rows") -> int:
        """Return the bytes of padding that the plain KV caches of both would hold if they were joined."""
        end = max(self.end, other.end)
        positions = sum(self.padding) + self.count * (end - self.end)
        positions += sum(other.padding) + other.count * (end - other.end)
        return positions * max(self._position_bytes(), other._position_bytes())

    def token_bytes(self) -> tuple[int, int]:
        """Return what each token of one sequence takes, and what a sequence takes whatever its length.

        Needs one row that something has gone through.
        """
        growing = fixed = 0
        for layer in self.layers:
            for part in _parts(layer):
                state: list[mx.array] = []
                _collect(part.state, state)
                if isinstance(part, ArraysCache):
                    fixed += sum(array.nbytes for array in state)
                    continue
                token = sum(
                    array.nbytes // array.shape[-2] for array in state if array.ndim == _KV_DIMENSIONS
                )
                window = getattr(part, "max_size", None) or getattr(part, "chunk_size", None)
                if window is None:
                    growing += token
                else:
                    fixed += window * token
        return growing, fixed

    def arrays(self, begin: int = 0, end: int | None = None) -> list[mx.array]:
        """Return all there is to evaluate of some layers, what only the host has use for included."""
        found: list[mx.array] = []
        for layer in self.layers[begin:end]:
            _collect(layer.state, found)
        return found

    def join(self, other: "Rows") -> None:
        """Take the rows of `other` in, behind our own. `other` is used up."""
        end = max(self.end, other.end)
        padding = [end - self.end + pad for pad in self.padding]
        padding += [end - other.end + pad for pad in other.padding]
        layout = Layout(padding)
        for position, (ours, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if isinstance(ours, KVRows):
                ours.join(theirs, layout)
            else:
                merged = _as_batch(ours, self.count)
                merged.extend(_as_batch(theirs, other.count))
                self.layers[position] = merged
        self.layout, self.count = layout, self.count + other.count

    def keep(self, rows: list[int]) -> None:
        """Keep some rows, in the order given; at least one."""
        padding = [self.padding[row] for row in rows]
        unused = min(padding)
        layout = Layout([pad - unused for pad in padding])
        indices = mx.array(rows)
        for position, layer in enumerate(self.layers):
            if isinstance(layer, KVRows):
                layer.keep(indices, layout, unused)
            elif len(rows) == 1:
                self.layers[position] = layer.extract(rows[0]) if self.count > 1 else layer
            else:
                layer.filter(indices)
        self.layout, self.count = layout, len(rows)

    def end_at(self, lengths: list[int]) -> None:
        """Drop what each row holds behind its length, by moving it to the common end."""
        end = max(lengths)
        for layer in self._plain():
            layer.end_at(end)
        padding = [end - length for length in lengths]
        if any(padding):
            self.layout = Layout(padding)
            by = mx.array(padding)
            for layer in self._plain():
                layer.shift(by, self.layout)

    def _position_bytes(self) -> int:
        return sum(layer.position_bytes for layer in self._plain())

    def _plain(self) -> list[KVRows]:
        return [layer for layer in self.layers if isinstance(layer, KVRows)]


def plain_only(model: nn.Module) -> bool:
    """Return whether every layer has a plain KV cache: then prompts can be prefilled together."""
    return all(type(layer) is KVCache for layer in _new_caches(model))


def why_not_batched(model: nn.Module) -> str | None:
    """Return why sequences of this model cannot share a batch; None if they can."""
    for layer in _new_caches(model):
        for part in _parts(layer):
            if not hasattr(part, "merge"):
                return f"its {type(part).__name__} holds one sequence only"
    return None


def _new_caches(model: nn.Module) -> list[Any]:
    caches: Any = make_prompt_cache(model)
    return caches


def _parts(layer: Any) -> list[Any]:
    if not isinstance(layer, CacheList):
        return [layer]
    members = cast(list[Any], layer.caches)
    return [part for member in members for part in _parts(member)]


def _as_batch(layer: Any, count: int) -> Any:
    return cast(Any, type(layer)).merge([layer]) if count == 1 else layer


def _collect(state: Any, found: list[mx.array]) -> None:
    if isinstance(state, mx.array):
        found.append(state)
    elif isinstance(state, list | tuple):
        for part in cast("list[Any]", state):
            _collect(part, found)
