"""Whether a model may run several sequences in one batch: tried, not believed.

Some models' code takes no padded rows: it raises, or mixes rows up without a word. So before the first
request rows of different length go through the model alone and together, and must come out the same.
"""

import logging
from typing import Any, cast

import mlx.core as mx

from .rows import Rows, why_not_batched

log = logging.getLogger("engine")

_LENGTHS = (9, 4, 6)
_MOST_ERROR = {mx.float32: 1e-3}
_MOST_ERROR_16_BIT = 0.2
"""Root mean square of the difference, as a share of the logits' own spread. What 16 bits round away is far
below what it costs a row to look at another's tokens, or at its own in the wrong place."""


def why_alone(model: Any) -> str | None:
    """Return why each sequence of this model must run by itself; None if they may share batches."""
    reason = why_not_batched(model)
    if reason is not None:
        return reason
    try:
        error = _error_of_a_batch(model)
    except Exception as exception:
        log.info("the model's code raised on rows of different length", exc_info=exception)
        return "its code does not take rows of different length"
    # Turned round, because what is not a number is no success.
    if not cast(float, error.item()) <= _MOST_ERROR.get(error.dtype, _MOST_ERROR_16_BIT):
        return "its answers change when rows of different length share a batch"
    return None


def _error_of_a_batch(model: Any) -> mx.array:
    alone = mx.concatenate([_next_logits(model, _prefilled(model, length)) for length in _LENGTHS])
    rows = _prefilled(model, _LENGTHS[0])
    for length in _LENGTHS[1:]:
        rows.join(_prefilled(model, length))
    together = _next_logits(model, rows)
    difference = (together - alone).astype(mx.float32)
    spread = mx.std(alone.astype(mx.float32), axis=-1)
    return mx.max(mx.sqrt(mx.mean(difference**2, axis=-1)) / spread).astype(alone.dtype)


def _prefilled(model: Any, length: int) -> Rows:
    rows = Rows(model)
    model(mx.arange(1, length + 1)[None], cache=rows.layers)
    mx.eval(rows.arrays())
    return rows


def _next_logits(model: Any, rows: Rows) -> mx.array:
    return model(mx.ones((rows.count, 1), mx.int32), cache=rows.layers)[:, -1]
