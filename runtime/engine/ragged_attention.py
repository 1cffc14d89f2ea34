"""Attention of one new token per sequence over keys and values of different lengths, as a CUDA kernel.

MLX has fast attention for one query where all sequences have the same length. Where they differ it wants a
mask, and with a mask it leaves its fast kernels: scores, mask, softmax and product become separate kernels
over the longest length. This one is told instead where each sequence begins and ends, reads only that, and
takes the whole buffer of a KV cache, to which it writes the new token itself: nothing is sliced, padded or
copied.

The method is flash-decoding (Dao, Haziza, Massa, Sizov 2023, https://pytorch.org/blog/flash-decoding/). A
block reads its part of the keys once for all query heads that share them, with a running maximum and sum
(Milakov and Gimelshein 2018). Where the blocks would be too few to fill the device, the keys of a sequence
are split among several, and a second kernel combines what they found. All sums are float32.
"""

import math
import struct
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .ragged_attention_source import ALL_KEYS, ATTEND, COMBINE, SOME_KEYS

_WARPS = 8
_MOST_SPLITS = 32
_KEYS_PER_SPLIT = 128
"""Fewer keys are not worth a block of their own."""
_ENOUGH_BLOCKS = 264
"""Two for each multiprocessor of a large device."""
_MOST_HEADS = 4
"""Query heads of one block: with more, its registers leave too little room for a second one beside it."""
_SIZES = range(16, 257, 8)

_Kind = tuple[tuple[int, ...], mx.Dtype]
"""What an array is: its shape and type."""


def why_not_ragged(size: int, dtype: mx.Dtype) -> str | None:
    """Return why heads of `size` elements cannot go through the kernel here; None if they can."""
    if not mx.cuda.is_available():
        return "it is a CUDA kernel"
    if dtype not in (mx.float32, mx.float16, mx.bfloat16):
        return f"it does not know {dtype}"
    return None if size in _SIZES else f"its heads have {size} elements"


def append_and_attend(
    q: mx.array, new_keys: mx.array, new_values: mx.array, keys: mx.array, values: mx.array,
    start: mx.array, end: mx.array, scale: float,
) -> mx.array:  # fmt: skip
    """Write one position of each row, then return softmax(scale * q k) v over the row: (B, Hq, 1, D), as `q`.

    The buffers change in place, which MLX does not know: they stay the same arrays, so that a compiled step
    can have them as inputs. Nothing else may share them, and whatever reads or copies them is right only if
    it is built after the result has gone to `mx.eval` or `mx.async_eval`. (Where a slice is assigned instead,
    MLX copies the buffer whenever the device has not yet finished the step that last read it.)

    Args:
        q: (B, Hq, 1, D), float32, float16 or bfloat16. For D see `why_not_ragged`.
        new_keys: (B, Hkv, 1, D) of the same type, written at `end` - 1; Hkv a divisor of Hq.
        new_values: as `new_keys`.
        keys: (B, Hkv, T, D) of the same type; T may exceed every `end`.
        values: as `keys`.
        start: (B,) or longer, int32: the first key of each row. Better not under 3 elements: MLX keeps those
            in the host's memory, where every block waits for the bus.
        end: as `start`: the position behind the last key. A row without keys gives zeros and gets none.
        scale: what the scores are multiplied by before the softmax.

    Raises:
        ValueError: The shapes or types do not fit together.
    """
    inputs = [q, keys, values, start, end, new_keys, new_values]
    rows, heads, _, size = q.shape
    template, blocks, splits = _plan(scale, *[(array.shape, array.dtype) for array in inputs])
    whole = splits == 1
    attended = _attend_kernel(whole)(
        inputs=inputs,
        template=template,
        grid=(blocks * _WARPS * 32, splits, 1),
        threadgroup=(_WARPS * 32, 1, 1),
        output_shapes=[q.shape] if whole else [(rows, heads, splits, size), (rows, heads, splits, 2)],
        output_dtypes=[q.dtype] if whole else [mx.float32, mx.float32],
    )
    if whole:
        return attended[0]
    return _combine_kernel()(
        inputs=attended,
        template=template[:2],
        grid=(rows * heads * size, 1, 1),
        threadgroup=(size, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )[0]


class _Plan(NamedTuple):
    template: list[tuple[str, Any]]
    blocks: int
    splits: int


@cache
def _plan(scale: float, *inputs: _Kind) -> _Plan:
    (q, dtype), (keys, _), (values, _), (start, _), (end, _), *new = inputs
    rows, heads, _, size = q
    _, kv_heads, length, _ = keys
    types = [dtype] * 3 + [mx.int32] * 2 + [dtype] * 2
    fits = q[2] == 1 and values == keys and (keys[0], keys[3]) == (rows, size) and heads % kv_heads == 0
    fits = fits and size in _SIZES and min(*start, *end) >= rows and types == [kind for _, kind in inputs]
    if not (fits and all(shape == (rows, kv_heads, 1, size) for shape, _ in new)):
        raise ValueError(f"these do not fit together: {inputs}")
    together = max(count for count in range(1, _MOST_HEADS + 1) if heads // kv_heads % count == 0)
    blocks = rows * heads // together
    splits = max(min(_ENOUGH_BLOCKS // blocks, length // _KEYS_PER_SPLIT, _MOST_SPLITS), 1)
    # A constant and no input, for a scalar would lie in the host's memory. A template takes no float, so its
    # bits; and exponentials are of base 2 on the device.
    [scale_bits] = struct.unpack("i", struct.pack("f", scale * math.log2(math.e)))
    template = [("T", dtype), ("D", size), ("HEADS", together), ("WARPS", _WARPS), ("SCALE", scale_bits)]
    return _Plan(template, blocks, splits)


@cache
def _attend_kernel(whole: bool) -> Any:
    return mx.fast.cuda_kernel(
        name=f"ragged_attention_append{'' if whole else '_split'}",
        input_names=["q", "keys", "values", "start", "end", "new_keys", "new_values"],
        output_names=["out"] if whole else ["mixes", "scales"],
        source=ATTEND.replace("FINISH", ALL_KEYS if whole else SOME_KEYS),
        # A transposed query and a slice of a buffer are taken as they lie.
        ensure_row_contiguous=False,
    )


@cache
def _combine_kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="ragged_attention_combine", input_names=["mixes", "scales"], output_names=["out"], source=COMBINE
    )
