"""A linear layer to which every row of a batch adds what its own adapter has learned.

LoRA (Hu et al., arXiv:2106.09685) gives an adapter two thin matrices for each layer that it changes. Those of
several adapters lie in one stack, and `gather_mm` takes for each row the ones of its adapter: the base's
weights are there once, and are read once, whoever is in the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx import nn


class LowRank(NamedTuple):
    """What an adapter adds to one layer for inputs x: `(x @ a.T) @ b`, with the adapter's scale in `b`."""

    a: mx.array
    """(rank, inputs)"""

    b: mx.array
    """(rank, outputs)"""

    @property
    def rank(self) -> int:
        """How thin the matrices are."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Stack:
    """The matrices of several adapters for one layer, by slot, filled up with zeros to the largest rank.

    `a` is (slots, inputs, rank), `b` (slots, rank, outputs); `ranks` are those of the slots that have any.
    """

    a: mx.array
    b: mx.array
    ranks: dict[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of both, the zeros included."""
        return self.a.nbytes + self.b.nbytes

    def parts(self) -> dict[int, LowRank]:
        """Return what was put in, by slot, as views of the stack."""
        return {
            slot: LowRank(self.a[slot, :, :rank].T, self.b[slot, :rank]) for slot, rank in self.ranks.items()
        }


def stacked(parts: Mapping[int, LowRank], slots: int, linear: Any) -> Stack:
    """Put at least one part of what is added to `linear` into slots; nothing is evaluated yet."""
    ranks = {slot: part.rank for slot, part in parts.items()}
    dtype = _dtype([array for part in parts.values() for array in part], linear)
    a = _filled_up({slot: part.a for slot, part in parts.items()}, slots, max(ranks.values()), dtype)
    b = _filled_up({slot: part.b for slot, part in parts.items()}, slots, max(ranks.values()), dtype)
    # Both lie in memory with the rank first: products of few rows are faster that way.
    return Stack(a.swapaxes(1, 2), b, ranks)


class RowSlots:
    """The slot of each row (B,) in the forward pass that is being built; None if no row has an adapter."""

    def __init__(self) -> None:
        self.slots: mx.array | None = None


class AdaptedLinear(nn.Module):
    """Stands where `linear` stood. Without an adapter in any row it computes what that computes."""

    def __init__(self, linear: Any, rows: RowSlots, stack: Stack) -> None:
        super().__init__()
        self.linear = linear
        # No arrays to the module's tree: the weights of the model stay those of the model alone.
        self.stack = stack
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, T, outputs) for x (B, T, inputs).

        Raises:
            ValueError: x has not one row for each sequence, so that nobody knows whose is whose.
        """
        y: mx.array = self.linear(x)
        slots = self._rows.slots
        if slots is None:
            return y
        if x.ndim != 3 or x.shape[0] != slots.size:  # noqa: PLR2004
            raise ValueError("the inputs of a layer are not one row for each sequence")
        thin = mx.gather_mm(x, self.stack.a, rhs_indices=slots)
        return y + mx.gather_mm(thin, self.stack.b, rhs_indices=slots).astype(y.dtype)


def sizes(module: Any) -> tuple[int, int] | None:
    """Return the inputs and outputs of a layer that can be adapted; None for any other module."""
    if not isinstance(module, nn.Linear | nn.QuantizedLinear):
        return getattr(module, "sizes", None)
    weight: mx.array = cast(Any, module)["weight"]
    outputs, inputs = weight.shape
    return (inputs * 32 // module.bits if isinstance(module, nn.QuantizedLinear) else inputs), outputs


def _dtype(arrays: list[mx.array], linear: Any) -> mx.Dtype:
    """Return a type that loses nothing of an adapter's precision, nor has to be changed in every step."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32  # There gather_mm knows no other.
    base = [linear[name] for name in ("scales", "weight") if name in linear][:1]
    return mx.result_type(*arrays, *base)


def _filled_up(matrices: Mapping[int, mx.array], slots: int, rank: int, dtype: mx.Dtype) -> mx.array:
    width = next(iter(matrices.values())).shape[1]
    nothing = mx.zeros((rank, width), dtype)
    return mx.stack(
        [
            mx.pad(matrices[slot].astype(dtype), [(0, rank - matrices[slot].shape[0]), (0, 0)])
            if slot in matrices
            else nothing
            for slot in range(slots)
        ]
    )
