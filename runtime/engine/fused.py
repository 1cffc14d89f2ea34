"""Projections of the same input as one matrix product.

With more than one row every product goes through cuBLASLt, which costs the host some 35 µs however small it
is. Query, key and value, or gate and up, are rows of one matrix as well as of several.
"""

from typing import Any, cast

import mlx.core as mx
from mlx import nn

from .adapted_linear import sizes

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_KINDS: tuple[type, ...] = (nn.Linear, nn.QuantizedLinear)


def fuse_projections(model: Any) -> int:
    """Replace projections that mlx-lm's models call on the same input, in place; return how many groups.

    The weights are joined, not copied: memory stays the same.
    """
    # Not the projections themselves: whoever holds them all holds their weights until the last is joined.
    parents: list[Any] = [module for _, module in model.named_modules() if type(module) not in _KINDS]
    return sum(_fuse(module, names) for module in parents for names in _GROUPS)


class _Part(nn.Module):
    """Stands for one projection of a group."""

    def __init__(self, whole: "_Whole", index: int) -> None:
        super().__init__()
        # Underscored, so that it is no child: the group's weights stand in the tree once.
        self._whole = whole
        self._index = index

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the projection that it stands for."""
        return self._whole.sizes(self._index)

    def __call__(self, x: mx.array) -> mx.array:
        return self._whole.part(x, self._index)


class _Whole:
    """The product of a group, kept from the first part that is asked for until the last one is taken."""

    def __init__(self, linear: Any, ends: list[int]) -> None:
        self._linear = linear
        self._ends = ends
        self._x: mx.array | None = None
        self._parts: list[mx.array | None] = []

    def sizes(self, index: int) -> tuple[int, int]:
        inputs, outputs = cast("tuple[int, int]", sizes(self._linear))
        ends = [0, *self._ends, outputs]
        return inputs, ends[index + 1] - ends[index]

    def part(self, x: mx.array, index: int) -> mx.array:
        if x is not self._x or self._parts[index] is None:
            self._x, self._parts = x, list(mx.split(self._linear(x), self._ends, axis=-1))
        part, self._parts[index] = self._parts[index], None
        if not any(other is not None for other in self._parts):
            self._x = None
        assert part is not None
        return part


def _fuse(module: Any, names: tuple[str, ...]) -> bool:
    linears: list[Any] = [module.get(name) for name in names]
    first = linears[0]
    if type(first) not in _KINDS or any(_shape(linear) != _shape(first) for linear in linears):
        return False
    sizes = [linear["weight"].shape[0] for linear in linears]
    for name in ("weight", "scales", "biases", "bias"):
        if name in first:
            first[name] = mx.concatenate([linear[name] for linear in linears])
    mx.eval(first.parameters())
    whole = _Whole(first, [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)])
    for index, name in enumerate(names):
        module[name] = _Part(whole, index)
    module[f"fused_{names[0]}"] = first
    return True


def _shape(linear: Any) -> tuple[Any, ...]:
    """Return all that must be the same in projections that can be joined."""
    if type(linear) not in _KINDS:
        return ()
    weight = linear["weight"]
    how = (getattr(linear, name, None) for name in ("bits", "group_size", "mode"))
    return (type(linear).__name__, set(linear), weight.dtype, weight.shape[1], *how)
