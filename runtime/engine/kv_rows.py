"""The keys and values of several sequences in one layer.

mlx-lm's `BatchKVCache` computes offsets in every layer and gives an array mask even where nothing is padded,
which is the slow path of attention. Here the layout of the rows is one object for all layers, kept on the
host: rows that begin together cost what one sequence costs, and nothing about them is read back.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

GROWTH = 256
"""Positions by which the buffers grow, as in mlx-lm's caches."""

_LONG, _GROWTH_OF_LONG = 2048, 1024
"""From where on they grow faster: every size of a buffer is another graph to compile."""


class Layout:
    """Where rows begin. They all end at the same position, so shorter ones are padded on the left."""

    def __init__(self, padding: list[int]) -> None:
        self.padding = padding
        self._offsets: tuple[int, int | mx.array] = (-1, 0)
        self._ends: tuple[int, mx.array] | None = None
        self._starts: mx.array | None = None
        self._left = mx.array(padding) if any(padding) else None

    def offsets(self, end: int) -> int | mx.array:
        """Return the position of the token behind `end` in each row: (B,), or one number if all are equal."""
        if self._left is None:
            return end
        if self._offsets[0] != end:
            # One array for all layers: every layer asks at the same end.
            self._offsets = (end, end - self._left)
        return self._offsets[1]

    @property
    def starts(self) -> mx.array:
        """Where each row begins, int32, on the device; longer than (B,), see `_on_device`."""
        if self._starts is None:
            self._starts = _on_device(self.padding)
        return self._starts

    def ends(self, end: int) -> mx.array:
        """Return `end` for every row, as `starts`."""
        if self._ends is None or self._ends[0] != end:
            self._ends = (end, _on_device([end] * len(self.padding)))
        return self._ends[1]

    def set_ends(self, end: int, ends: mx.array) -> None:
        """Keep what `ends` will be asked for, because it is there already."""
        self._ends = (end, ends)

    def mask(self, length: int, end: int, window_size: int | None, *, return_array: bool) -> Any:
        """Return the attention mask of `length` tokens behind `end`, as mlx-lm's models take it."""
        if self._left is not None:
            return create_causal_mask(length, offset=end, left_padding=self._left, window_size=window_size)
        if window_size is not None:
            return create_causal_mask(length, offset=end, window_size=window_size)
        if length == 1:
            return None
        return create_causal_mask(length, offset=end) if return_array else "causal"


class KVRows:
    """One layer's cache for all rows of a batch: keys (B, H, T, Dk) and values (B, H, T, Dv).

    To the model it is what mlx-lm's `KVCache` is.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._end = 0

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token in its sequence; one number if that is so for every row."""
        return self.layout.offsets(self._end)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers, with the room that they have left."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def position_bytes(self) -> int:
        """Bytes of one token of one row; 0 while nothing has been written."""
        return sum(buffer.nbytes // (buffer.shape[0] * buffer.shape[2]) for buffer in self.state)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> "mx.array | str | None":
        """Return the mask for the next `length` tokens."""
        return self.layout.mask(length, self._end, window_size, return_array=return_array)

    def size(self) -> int:
        """Return the length of the longest row."""
        return self._end

    def empty(self) -> bool:
        """Return whether nothing has been written."""
        return self.keys is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write (B, H, N, D) behind what is there, and return all of it."""
        begin, self._end = self._end, self._end + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = _room_for(keys, self._end), _room_for(values, self._end)
        elif self._end > self.keys.shape[2]:
            self.keys = _grown(self.keys, begin, self._end)
            self.values = _grown(self.values, begin, self._end)
        self.keys[..., begin : self._end, :] = keys
        self.values[..., begin : self._end, :] = values
        if self._end == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., : self._end, :], self.values[..., : self._end, :]

    def room_for_one(self) -> list[mx.array]:
        """Return the buffers, with room for one more token of every row. Something must have been written."""
        assert self.keys is not None
        assert self.values is not None
        if self._end == self.keys.shape[2]:
            self.keys = _grown(self.keys, self._end, self._end + 1)
            self.values = _grown(self.values, self._end, self._end + 1)
        return [self.keys, self.values]

    def advance(self) -> None:
        """Take note that somebody has written a token behind the last."""
        self._end += 1

    def join(self, other: "KVRows", layout: Layout) -> None:
        """Take the rows of `other` in, behind our own; `layout` is that of the result."""
        assert self.keys is not None
        assert self.values is not None
        assert other.keys is not None
        assert other.values is not None
        self.keys = _stacked(self.keys, self._end, other.keys, other._end)
        self.values = _stacked(self.values, self._end, other.values, other._end)
        self._end, self.layout = max(self._end, other._end), layout

    def keep(self, rows: mx.array, layout: Layout, unused: int) -> None:
        """Keep some rows, in the order given; the first `unused` positions are none of theirs."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys[..., unused:, :][rows]
            self.values = self.values[..., unused:, :][rows]
        self._end, self.layout = self._end - unused, layout

    def end_at(self, end: int) -> None:
        """Forget what stands behind `end`."""
        self._end = min(self._end, end)

    def shift(self, by: mx.array, layout: Layout) -> None:
        """Move each row (B,) positions towards the end, over what stands there."""
        if self.keys is not None and self.values is not None:
            source = mx.maximum(mx.arange(self.keys.shape[2]) - by[:, None], 0)[:, None, :, None]
            self.keys = mx.take_along_axis(self.keys, source, axis=2)
            self.values = mx.take_along_axis(self.values, source, axis=2)
        self.layout = layout


def _on_device(numbers: list[int]) -> mx.array:
    # MLX keeps what is no longer than eight bytes in the host's memory, as it does what is made of Python
    # numbers; a kernel would fetch it over the bus for every block.
    return mx.array([*numbers, 0, 0], mx.int32) + 0


def _room_for(new: mx.array, end: int) -> mx.array:
    rows, heads, _, width = new.shape
    return mx.zeros((rows, heads, _rounded(end), width), new.dtype)


def _grown(old: mx.array, begin: int, end: int) -> mx.array:
    rows, heads, _, width = old.shape
    more = mx.zeros((rows, heads, _rounded(end) - begin, width), old.dtype)
    return mx.concatenate([old[..., :begin, :], more], axis=2)


def _stacked(first: mx.array, first_end: int, second: mx.array, second_end: int) -> mx.array:
    end = max(first_end, second_end)
    (rows, heads, _, width), more = first.shape, second.shape[0]
    # With room for the next token: else the first step behind a join would copy everything again.
    both = mx.zeros((rows + more, heads, _rounded(end + 1), width), first.dtype)
    both[:rows, :, end - first_end : end] = first[..., :first_end, :]
    both[rows:, :, end - second_end : end] = second[..., :second_end, :]
    return both


def _rounded(positions: int) -> int:
    growth = GROWTH if positions <= _LONG else _GROWTH_OF_LONG
    return -(-positions // growth) * growth
