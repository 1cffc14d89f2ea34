"""A decode step compiled whole, for models with plain KV caches, on CUDA.

The step is bound by the host: Python builds some thousand nodes, and MLX encodes them. Compiled, the graph is
built once for each shape. What stood in the way are the caches, which MLX copies whole when a slice of them
is assigned while the last step still reads them; here attention writes them in place, so that they are the
same arrays in every step. See `ragged_attention`, which also reads no padding and needs no mask.
"""

from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx_lm.models import base

from .kv_rows import KVRows
from .ragged_attention import append_and_attend, why_not_ragged
from .rows import Rows

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

_attention = cast(Any, base).scaled_dot_product_attention


class PlainStep:
    """Gives the logits of the next token of every row, by the model's code as it stands."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def rows_for(self, sequences: int) -> int:
        """Return the number of rows for so many sequences."""
        return sequences

    def __call__(self, inputs: mx.array, rows: Rows) -> mx.array:
        """Return logits (B, V) for tokens (B,), and let the rows end one token later."""
        return self._model(inputs[:, None], cache=rows.layers)[:, -1]


class CompiledStep:
    """Gives what `PlainStep` gives, for models that `why_not_compiled` has nothing against."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._plain = PlainStep(model)
        self._compiled: Any = mx.compile(self._logits)

    def rows_for(self, sequences: int) -> int:
        """Return the number of rows for so many sequences: few numbers, as each is another graph."""
        return next((count for count in _ROWS if count >= sequences), sequences)

    def __call__(self, inputs: mx.array, rows: Rows) -> mx.array:
        """Return logits (B, V) for tokens (B,), and let the rows end one token later."""
        if rows.empty:
            return self._plain(inputs, rows)
        buffers = [layer.room_for_one() for layer in rows.layers]
        layout = rows.layout
        logits, ends = self._compiled(inputs, layout.starts, layout.ends(rows.end + 1), buffers)
        for layer in rows.layers:
            layer.advance()
        layout.set_ends(rows.end + 1, ends)
        return logits

    def _logits(
        self, inputs: mx.array, starts: mx.array, ends: mx.array, buffers: list[list[mx.array]]
    ) -> tuple[mx.array, mx.array]:
        offsets = (ends - starts - 1)[: inputs.shape[0]]
        layers = [_Appended(keys, values, starts, ends, offsets) for keys, values in buffers]
        return self._model(inputs[:, None], cache=layers)[:, -1], ends + 1


class _Appended(NamedTuple):
    """What the model is given as a layer's cache: attention itself writes to it."""

    keys: mx.array
    values: mx.array
    starts: mx.array
    ends: mx.array
    offset: mx.array

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> None:
        if length != 1 or return_array or window_size is not None:
            raise NotImplementedError("the kernel knows no such mask")

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def attend_in_place() -> None:
    """Let attention of mlx-lm's models write to our caches. Before a model's code is imported."""
    base.scaled_dot_product_attention = _attend


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    if not isinstance(cache, _Appended):
        return _attention(queries, keys, values, cache, scale, mask, sinks)
    if mask is not None or sinks is not None:
        raise NotImplementedError("the kernel knows no masks and no sinks")
    return append_and_attend(queries, keys, values, cache.keys, cache.values, cache.starts, cache.ends, scale)


def why_not_compiled(model: Any) -> str | None:
    """Return why steps of this model cannot be compiled; None if they may be tried."""
    if not mx.cuda.is_available():
        return "compiled steps write their caches in a CUDA kernel"
    rows = Rows(model)
    if not all(isinstance(layer, KVRows) for layer in rows.layers):
        return "its caches are not all plain KV caches"
    model(mx.array([[1, 2, 3]]), cache=rows.layers)
    keys, values = rows.layers[0].state
    if keys.shape != values.shape:
        return "its keys and values are not of the same size"
    return why_not_ragged(keys.shape[-1], keys.dtype)
