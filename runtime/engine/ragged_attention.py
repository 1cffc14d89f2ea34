"""Attention of one new token per sequence over keys and values of different lengths, as a CUDA kernel.

MLX has fast attention for one query where all sequences have the same length. Where they differ it wants a mask,
and with a mask it leaves its fast kernels: scores, mask, softmax and product become separate kernels over the
longest length. This kernel is told instead where each sequence begins and ends, reads only that, and takes the
whole buffer of a KV cache, so nothing is sliced, padded or copied.

The method is flash-decoding (Dao, Haziza, Massa, Sizov 2023, https://pytorch.org/blog/flash-decoding/): every
block reads a part of the keys once, for all query heads that share them, keeps a running maximum and sum
(Milakov and Gimelshein 2018), and where the blocks would be too few to fill the device the keys are split among
several blocks, whose results a second kernel combines.
"""

import math
import struct
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

_WARPS = 8
_MOST_SPLITS = 32
_KEYS_PER_SPLIT = 128  # fewer are not worth a block of their own
_ENOUGH_BLOCKS = 264  # two for each multiprocessor of a large device
_ACCUMULATORS = 1024  # elements of output, heads times their size, that a warp holds


def ragged_attention(
    q: mx.array, keys: mx.array, values: mx.array, start: mx.array, end: mx.array, scale: float
) -> mx.array:
    """Return softmax(scale * q k) v over the keys from `start` to `end` of each row: (B, Hq, 1, D), as `q`.

    `start` and `end` should be the results of an operation on the device, of more than 8 bytes: others MLX
    keeps in the host's memory, and every block would wait for the bus.

    Args:
        q: (B, Hq, 1, D), D a multiple of 8 up to 256; float32, float16 or bfloat16.
        keys: (B, Hkv, T, D) of that type, Hkv a divisor of Hq; its last axis contiguous. T may exceed every `end`.
        values: as `keys`.
        start: (B,) or longer, int32: the first key of each row.
        end: as `start`: the position behind the last key. A row without keys gives zeros.
        scale: of the scores, before the softmax.
    """
    return _attend(q, keys, values, start, end, scale, ())


def append_and_attend(
    q: mx.array, fresh_keys: mx.array, fresh_values: mx.array,
    keys: mx.array, values: mx.array, start: mx.array, end: mx.array, scale: float,
) -> mx.array:  # fmt: skip
    """Write (B, Hkv, 1, D) at `end` - 1 of each row, in place, and return what `ragged_attention` does then."""
    return _attend(q, keys, values, start, end, scale, (fresh_keys, fresh_values))


class _Plan(NamedTuple):
    template: list[tuple[str, Any]]
    blocks: int
    splits: int


def _attend(
    q: mx.array, keys: mx.array, values: mx.array, start: mx.array, end: mx.array, scale: float,
    fresh: tuple[mx.array, ...],
) -> mx.array:  # fmt: skip
    rows, heads, _, size = q.shape
    template, blocks, splits = _plan(rows, heads, keys.shape[1], keys.shape[2], size, q.dtype, scale)
    launch: dict[str, Any] = {
        "inputs": [q, keys, values, start, end, *fresh],
        "template": template,
        "grid": (blocks * _WARPS * 32, splits, 1),
        "threadgroup": (_WARPS * 32, 1, 1),
    }
    if splits == 1:
        [out] = _kernel(bool(fresh), False)(output_shapes=[q.shape], output_dtypes=[q.dtype], **launch)
        return out
    shapes = [(rows, heads, splits, size), (rows, heads, splits, 2)]
    parts = _kernel(bool(fresh), True)(output_shapes=shapes, output_dtypes=[mx.float32] * 2, **launch)
    [out] = _combine()(
        inputs=parts,
        template=template[:2],
        grid=(rows * heads * size, 1, 1),
        threadgroup=(size, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


@cache
def _plan(rows: int, heads: int, kv_heads: int, length: int, size: int, dtype: mx.Dtype, scale: float) -> _Plan:
    group = heads // kv_heads
    together = max(n for n in range(1, min(group, 8) + 1) if group % n == 0 and (n * size <= _ACCUMULATORS or n == 1))
    blocks = rows * heads // together
    splits = max(1, min(_ENOUGH_BLOCKS // blocks, length // _KEYS_PER_SPLIT, _MOST_SPLITS))
    # Exponentials are of base 2 on the device. A template takes no float, so its bits.
    [bits] = struct.unpack("i", struct.pack("f", scale * math.log2(math.e)))
    template = [("T", dtype), ("D", size), ("HEADS", together), ("WARPS", _WARPS), ("SCALE", bits)]
    return _Plan(template, blocks, splits)


@cache
def _kernel(append: bool, split: bool) -> Any:
    fresh = ["fresh_keys", "fresh_values"] if append else []
    source = _ATTEND.replace("APPEND", _APPEND if append else "")
    return mx.fast.cuda_kernel(
        name="ragged_attention" + "_append" * append + "_split" * split,
        input_names=["q", "keys", "values", "start", "end", *fresh],
        output_names=["mixes", "scales"] if split else ["out"],
        source=source.replace("FINISH", _SOME_KEYS if split else _ALL_KEYS),
        ensure_row_contiguous=False,
    )


@cache
def _combine() -> Any:
    return mx.fast.cuda_kernel(
        name="ragged_attention_combine",
        input_names=["mixes", "scales"],
        output_names=["out"],
        source=_COMBINE,
        ensure_row_contiguous=False,
    )


# A key is held by LANES neighbouring lanes, VECTOR elements each; a warp holds 32 / LANES keys, UNROLL times.
_ATTEND = """
  constexpr int VECTOR = sizeof(T) == 4 && D <= 128 ? 4 : 8;
  constexpr int LANES = D / VECTOR > 16 ? 32 : D / VECTOR > 8 ? 16 : D / VECTOR > 4 ? 8 : 4;
  constexpr int UNROLL = 4;
  constexpr int STRIDE = WARPS * UNROLL * 32 / LANES;
  constexpr int PIECES = VECTOR * sizeof(T) / 16;
  constexpr float LOWEST = -1e30f;
  struct Vector { uint4 pieces[PIECES]; };

  const int blocks = q_shape[1] / HEADS;
  const int row = blockIdx.x / blocks, head = blockIdx.x % blocks * HEADS;
  const int kv_head = head / (q_shape[1] / keys_shape[1]);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / LANES, at = threadIdx.x % LANES * VECTOR;
  const bool holds = at < D;
  const T* k = keys + row * keys_strides[0] + kv_head * keys_strides[1] + at;
  const T* v = values + row * values_strides[0] + kv_head * values_strides[1] + at;

  const int first = start[row], last = end[row];
  const int share = (max(last - first, 0) + gridDim.y - 1) / gridDim.y;
  const int part = (share + STRIDE - 1) / STRIDE * STRIDE;
  const int from = first + blockIdx.y * part, to = min(from + part, last);
  APPEND
  float query[HEADS][VECTOR], sum[HEADS][VECTOR], top[HEADS], weight[HEADS];
  #pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const T* source = q + row * q_strides[0] + (head + h) * q_strides[1];
    top[h] = LOWEST;
    weight[h] = 0.0f;
    #pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      query[h][i] = holds ? static_cast<float>(source[(at + i) * q_strides[3]]) * __int_as_float(SCALE) : 0.0f;
      sum[h][i] = 0.0f;
    }
  }

  for (int base = from + warp * UNROLL * (32 / LANES); base < to; base += STRIDE) {
    Vector key[UNROLL], value[UNROLL];
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = min(base + u * (32 / LANES) + group, to - 1);
      const uint4* from_key = reinterpret_cast<const uint4*>(k + position * keys_strides[2]);
      const uint4* from_value = reinterpret_cast<const uint4*>(v + position * values_strides[2]);
      #pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        key[u].pieces[p] = holds ? from_key[p] : uint4{0, 0, 0, 0};
        value[u].pieces[p] = holds ? from_value[p] : uint4{0, 0, 0, 0};
      }
    }
    float score[UNROLL][HEADS];
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const T* element = reinterpret_cast<const T*>(&key[u]);
      #pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        float dot = 0.0f;
        #pragma unroll
        for (int i = 0; i < VECTOR; ++i) dot += query[h][i] * static_cast<float>(element[i]);
        #pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffff, dot, offset);
        score[u][h] = base + u * (32 / LANES) + group < to ? dot : 10.0f * LOWEST;
      }
    }
    #pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float highest = top[h];
      #pragma unroll
      for (int u = 0; u < UNROLL; ++u) highest = max(highest, score[u][h]);
      const float fade = exp2f(top[h] - highest);
      top[h] = highest;
      weight[h] *= fade;
      #pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum[h][i] *= fade;
      #pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const T* element = reinterpret_cast<const T*>(&value[u]);
        const float share_of_key = exp2f(score[u][h] - highest);
        weight[h] += share_of_key;
        #pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[h][i] += share_of_key * static_cast<float>(element[i]);
      }
    }
  }

  __shared__ float sums[WARPS][HEADS * D], tops[WARPS][HEADS], weights[WARPS][HEADS];
  #pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    #pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
      const float other = __shfl_xor_sync(0xffffffff, top[h], offset);
      const float highest = max(top[h], other);
      const float mine = exp2f(top[h] - highest), theirs = exp2f(other - highest);
      top[h] = highest;
      weight[h] = mine * weight[h] + theirs * __shfl_xor_sync(0xffffffff, weight[h], offset);
      #pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        sum[h][i] = mine * sum[h][i] + theirs * __shfl_xor_sync(0xffffffff, sum[h][i], offset);
    }
    if (group == 0 && holds) {
      #pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums[warp][h * D + at + i] = sum[h][i];
    }
    if (threadIdx.x % 32 == 0) {
      tops[warp][h] = top[h];
      weights[warp][h] = weight[h];
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < HEADS * D; index += WARPS * 32) {
    const int h = index / D;
    float highest = LOWEST, total = 0.0f, mixed = 0.0f;
    for (int w = 0; w < WARPS; ++w) highest = max(highest, tops[w][h]);
    for (int w = 0; w < WARPS; ++w) {
      const float factor = exp2f(tops[w][h] - highest);
      total += factor * weights[w][h];
      mixed += factor * sums[w][index];
    }
    const int64_t place = static_cast<int64_t>(row) * q_shape[1] + head + h;
    FINISH
  }
"""

_ALL_KEYS = "out[place * D + index % D] = static_cast<T>(total > 0.0f ? mixed / total : 0.0f);"

_SOME_KEYS = """
    const int64_t piece = place * gridDim.y + blockIdx.y;
    mixes[piece * D + index % D] = mixed;
    if (index % D == 0) {
      scales[2 * piece] = highest;
      scales[2 * piece + 1] = total;
    }
"""

_COMBINE = """
  const int pieces = scales_shape[2];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * pieces;
  float highest = -1e30f, total = 0.0f, mixed = 0.0f;
  for (int p = 0; p < pieces; ++p) highest = max(highest, scales[2 * (place + p)]);
  for (int p = 0; p < pieces; ++p) {
    const float factor = exp2f(scales[2 * (place + p)] - highest);
    total += factor * scales[2 * (place + p) + 1];
    mixed += factor * mixes[(place + p) * D + threadIdx.x];
  }
  out[static_cast<int64_t>(blockIdx.x) * D + threadIdx.x] = static_cast<T>(total > 0.0f ? mixed / total : 0.0f);
"""

# The last key and value are new: they are written before any thread of this block reads them.
_APPEND = """
  if (from < to && to == last) {
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
      const T* fresh_k = fresh_keys + row * fresh_keys_strides[0] + kv_head * fresh_keys_strides[1];
      const T* fresh_v = fresh_values + row * fresh_values_strides[0] + kv_head * fresh_values_strides[1];
      const_cast<T*>(k)[(last - 1) * keys_strides[2] + d - at] = fresh_k[d * fresh_keys_strides[3]];
      const_cast<T*>(v)[(last - 1) * values_strides[2] + d - at] = fresh_v[d * fresh_values_strides[3]];
    }
    __syncthreads();
  }
"""
