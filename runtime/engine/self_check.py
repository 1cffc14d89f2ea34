"""Whether a model may run several sequences in one batch, and in which way: tried, not believed.

Some models' code takes no padded rows: it raises, or mixes rows up without a word. So before the first two
sequences meet rows of different length go through the model alone and together, and must come out the same.
"""

import logging
from collections.abc import Generator
from typing import Any, cast

import mlx.core as mx

from .compiled_step import CompiledStep, PlainStep, why_not_compiled
from .rows import Rows, why_not_batched

log = logging.getLogger("engine")

Step = PlainStep | CompiledStep

_LENGTHS = (9, 4, 6)
_MOST_ERROR = {mx.float32: 1e-3}
_MOST_ERROR_16_BIT = 0.2
"""Root mean square of the difference, as a share of the logits' own spread. What 16 bits round away is far
below what it costs a row to look at another's tokens, or at its own in the wrong place."""


class SharingCheck:
    """Finds out, a pass of the model at a time, whether its sequences may share batches."""

    def __init__(self, model: Any) -> None:
        self._trying = _try_together(model)
        self._done = False
        self._why_alone: str | None = None

    def advance(self) -> bool:
        """Do a little; return whether there is more to do."""
        if not self._done:
            try:
                next(self._trying)
            except StopIteration as done:
                self._why_alone, self._done = done.value, True
        return not self._done

    def why_alone(self) -> str | None:
        """Return why each sequence of this model must run by itself; None if they may share batches."""
        while not self._done:
            self.advance()
        return self._why_alone


def _try_together(model: Any) -> Generator[None, None, str | None]:
    reason = why_not_batched(model)
    if reason is not None:
        return reason
    try:
        alone: list[mx.array] = []
        for length in _LENGTHS:
            rows = _prefilled(model, length)
            yield
            alone.append(_next_logits(model, rows))
            mx.eval(alone)
            yield
        together = _prefilled(model, _LENGTHS[0])
        for length in _LENGTHS[1:]:
            yield
            together.join(_prefilled(model, length))
        yield
        same = _are_same(mx.concatenate(alone), _next_logits(model, together))
    except Exception as exception:
        log.info("the model's code raised on rows of different length", exc_info=exception)
        return "its code does not take rows of different length"
    return None if same else "its answers change when rows of different length share a batch"


def fastest_step(model: Any) -> tuple[Step, str | None]:
    """Return how to decode, and why not by a compiled step; None if it is one."""
    reason = why_not_compiled(model)
    if reason is not None:
        return PlainStep(model), reason
    try:
        step = CompiledStep(model)
        plain = _next_logits(model, _together(model))
        same = _are_same(plain, step(mx.ones(len(_LENGTHS), mx.int32), _together(model)))
    except Exception as exception:
        log.info("the model's code cannot be compiled", exc_info=exception)
        return PlainStep(model), "its code cannot be compiled"
    return (step, None) if same else (PlainStep(model), "its answers change when the step is compiled")


def _are_same(expected: mx.array, found: mx.array) -> bool:
    difference = (found - expected).astype(mx.float32)
    spread = mx.std(expected.astype(mx.float32), axis=-1)
    error = cast(float, mx.max(mx.sqrt(mx.mean(difference**2, axis=-1)) / spread).item())
    # What is not a number is not the same.
    return error <= _MOST_ERROR.get(expected.dtype, _MOST_ERROR_16_BIT)


def _together(model: Any) -> Rows:
    rows = _prefilled(model, _LENGTHS[0])
    for length in _LENGTHS[1:]:
        rows.join(_prefilled(model, length))
    return rows


def _prefilled(model: Any, length: int) -> Rows:
    rows = Rows(model)
    model(mx.arange(1, length + 1)[None], cache=rows.layers)
    mx.eval(rows.arrays())
    return rows


def _next_logits(model: Any, rows: Rows) -> mx.array:
    return model(mx.ones((rows.count, 1), mx.int32), cache=rows.layers)[:, -1]
