"""The attention kernel against float64, on a CUDA device: `python -m benchmarks.gpu.ragged_check`.

Rows of different lengths lie in buffers whose other positions are not numbers, so that reading one of them
shows. Prints the relative errors and those of MLX's masked attention; ends with 1 if one is too large.
"""

import json
import sys
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sidecar.runtime.engine.ragged_attention import append_and_attend, why_not_ragged

LIMITS = {mx.float32: 1e-6, mx.float16: 6e-4, mx.bfloat16: 5e-3}
Floats = NDArray[np.float64]


class Case(NamedTuple):
    """Sizes of one call; `length` is that of the buffer."""

    rows: int
    heads: int
    kv_heads: int
    length: int
    size: int
    dtype: mx.Dtype


CASES = [
    Case(40, 24, 8, 256, 128, mx.bfloat16),
    Case(3, 24, 8, 900, 128, mx.float32),
    Case(2, 8, 2, 600, 256, mx.bfloat16),
    Case(3, 8, 8, 300, 80, mx.float16),
    Case(40, 8, 1, 200, 64, mx.float32),
    Case(4, 64, 8, 500, 128, mx.bfloat16),
]


def check(case: Case, generator: np.random.Generator) -> dict[str, Any]:
    """Return the relative errors of one case, and whether only the new position was written."""
    rows, heads, kv_heads, length, size, dtype = case
    start, end = spans(generator, rows, length)

    def random(*shape: int) -> mx.array:
        # Positions before heads, as a projection gives them.
        return mx.array(generator.standard_normal(shape)).astype(dtype).transpose(0, 2, 1, 3)

    q, new_keys, new_values = (random(rows, 1, count, size) for count in (heads, kv_heads, kv_heads))
    inside = (np.arange(length) >= start[:, None]) & (np.arange(length) < end[:, None])
    hole = mx.where(mx.array(inside)[:, None, :, None], 0.0, float("nan")).astype(dtype)
    # A buffer with more room than `length`, of which the kernel gets a slice.
    room = [(0, 0), (0, 0), (0, 56), (0, 0)]
    keys, values = (
        mx.pad(random(rows, length, kv_heads, size) + hole, room)[:, :, :length] for _ in range(2)
    )
    mx.eval(q, new_keys, new_values, keys, values)
    before = (exact(keys), exact(values))
    span = (mx.array(start, mx.int32), mx.array(end, mx.int32))
    scale = size**-0.5
    out = append_and_attend(q, new_keys, new_values, keys, values, *span, scale)
    mx.eval(out)
    for buffer, new in zip(before, (new_keys, new_values), strict=True):
        for row in np.flatnonzero(end > start):
            buffer[row, :, end[row] - 1] = exact(new)[row, :, 0]
    truth = attention(exact(q), before[0], before[1], start, end, scale)
    masked = mx.fast.scaled_dot_product_attention(
        q, mx.nan_to_num(keys), mx.nan_to_num(values), scale=scale, mask=mx.array(inside)[:, None, None]
    )
    some = end > start  # A mask that hides everything has no defined result.
    error = relative(exact(out), truth)
    pairs = zip((keys, values), before, strict=True)
    written = all(np.array_equal(exact(now), then, equal_nan=True) for now, then in pairs)
    return {
        "case": [*case[:5], str(dtype)],
        "error": error,
        "error_of_masked_attention": relative(exact(masked)[some], truth[some]),
        "buffers_as_expected": written,
        "ok": error < LIMITS[dtype] and written,
    }


def spans(generator: np.random.Generator, rows: int, length: int) -> tuple[Any, Any]:
    """Return where rows begin and end: one has all positions, one none, one a single one, others some."""
    start = generator.integers(0, length // 2, rows)
    end = start + generator.integers(1, length // 2, rows)
    start[0], end[0] = 0, length
    if rows > 2:
        end[1], end[2] = start[1], start[2] + 1
    return start, end


def attention(q: Floats, keys: Floats, values: Floats, start: Any, end: Any, scale: float) -> Floats:
    """Return attention over the span of each row, in float64."""
    out = np.zeros_like(q)
    group = q.shape[1] // keys.shape[1]
    for row, head in np.ndindex(q.shape[:2]):
        if start[row] < end[row]:
            span = (row, head // group, slice(start[row], end[row]))
            scores = keys[span] @ q[row, head, 0] * scale
            weights = np.exp(scores - scores.max())
            out[row, head, 0] = weights @ values[span] / weights.sum()
    return out


def exact(array: mx.array) -> Floats:
    """Return a copy in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def relative(out: Floats, truth: Floats) -> float:
    """Return the norm of the difference over that of the truth."""
    return float(np.linalg.norm(out - truth) / np.linalg.norm(truth))


def main() -> int:
    """Check every case; return the exit code."""
    if (reason := why_not_ragged(128, mx.bfloat16)) is not None:
        sys.exit(f"cannot check the kernel here: {reason}")
    generator = np.random.default_rng(1)
    results = [check(case, generator) for case in CASES]
    print(json.dumps(results, indent=1))
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
