"""What a model takes in memory: its weights, and what each of its sequences adds."""

from typing import Any

import mlx.core as mx

from ..scheduling.memory import Footprint
from .rows import Rows

_SMALL_BYTES, _PASSES = 64 * 1024 * 1024, 3
"""What a small model takes is so little that luck shows; of a large one a pass is felt by whoever decodes."""


def footprint(model: Any, weights_bytes: int, chunk_tokens: int, padding_bytes: int) -> Footprint:
    """Measure a model with forward passes of one token. Nothing else may be computed meanwhile.

    The peak of a step is `padding_bytes`, what rows of different length may waste, and that of one token
    times the tokens of a chunk; which is more than it is, as this pass computes logits and a chunk does not.
    """
    rows = Rows(model)
    peaks = [_peak(model, rows)]
    per_token, fixed = rows.token_bytes()
    # How soon a device frees what it no longer needs is a matter of luck; the least is what it needs.
    more = _PASSES - 1 if weights_bytes < _SMALL_BYTES else 0
    peaks += [_peak(model, Rows(model)) for _ in range(more)]
    return Footprint(weights_bytes, per_token, fixed, padding_bytes + min(peaks) * chunk_tokens)


def _peak(model: Any, rows: Rows) -> int:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(mx.array([[0]]), cache=rows.layers), rows.arrays())
    return max(mx.get_peak_memory() - before - rows.nbytes, 0)
