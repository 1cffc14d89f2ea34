"""The CUDA source of `ragged_attention`.

MLX writes the head of each kernel: a pointer for every input and output by its name, `NAME_shape` and
`NAME_strides` for those that the body mentions, and the template's arguments as constants.
"""

ATTEND = """
  // LANES neighbouring lanes hold a key, VECTOR elements each; a warp holds 32 / LANES keys, UNROLL times.
  constexpr int VECTOR = sizeof(T) == 4 && D <= 128 ? 4 : 8;
  constexpr int LANES = D / VECTOR > 16 ? 32 : D / VECTOR > 8 ? 16 : D / VECTOR > 4 ? 8 : 4;
  constexpr int UNROLL = 4, KEYS = 32 / LANES, STRIDE = WARPS * UNROLL * KEYS;
  constexpr int PIECES = VECTOR * sizeof(T) / 16;
  constexpr float LOWEST = -1e30f;
  struct Vector { uint4 pieces[PIECES]; };

  const int heads = q_shape[1], blocks = heads / HEADS;
  const int row = blockIdx.x / blocks, head = blockIdx.x % blocks * HEADS;
  const int kv_head = head / (heads / keys_shape[1]);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / LANES, at = threadIdx.x % LANES * VECTOR;
  const bool holds = at < D;
  const T* k = keys + row * keys_strides[0] + kv_head * keys_strides[1];
  const T* v = values + row * values_strides[0] + kv_head * values_strides[1];

  const int first = start[row], last = end[row], splits = gridDim.y;
  const int part = ((max(last - first, 0) + splits - 1) / splits + STRIDE - 1) / STRIDE * STRIDE;
  const int from = first + static_cast<int>(blockIdx.y) * part, to = min(from + part, last);
  if (from < to && to == last) {
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
      const T* new_k = new_keys + row * new_keys_strides[0] + kv_head * new_keys_strides[1];
      const T* new_v = new_values + row * new_values_strides[0] + kv_head * new_values_strides[1];
      const_cast<T*>(k)[(last - 1) * keys_strides[2] + d] = new_k[d * new_keys_strides[3]];
      const_cast<T*>(v)[(last - 1) * values_strides[2] + d] = new_v[d * new_values_strides[3]];
    }
    // This block reads them; others that share the key head write the same.
    __syncthreads();
  }
  float query[HEADS][VECTOR], sum[HEADS][VECTOR], top[HEADS], weight[HEADS];
  #pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const T* source = q + row * q_strides[0] + (head + h) * q_strides[1];
    top[h] = LOWEST;
    weight[h] = 0.0f;
    #pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float element = holds ? static_cast<float>(source[(at + i) * q_strides[3]]) : 0.0f;
      query[h][i] = element * __int_as_float(SCALE);
      sum[h][i] = 0.0f;
    }
  }

  for (int base = from + warp * UNROLL * KEYS; base < to; base += STRIDE) {
    Vector key[UNROLL], value[UNROLL];
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = min(base + u * KEYS + group, to - 1);
      const uint4* from_key = reinterpret_cast<const uint4*>(k + position * keys_strides[2] + at);
      const uint4* from_value = reinterpret_cast<const uint4*>(v + position * values_strides[2] + at);
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
        score[u][h] = base + u * KEYS + group < to ? dot : 10.0f * LOWEST;
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
        const float share = exp2f(score[u][h] - highest);
        weight[h] += share;
        #pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[h][i] += share * static_cast<float>(element[i]);
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
    const int64_t place = static_cast<int64_t>(row) * heads + head + h;
    FINISH
  }
"""
"""`FINISH` stands for `ALL_KEYS`, or `SOME_KEYS` if they are split."""

ALL_KEYS = "out[place * D + index % D] = static_cast<T>(total > 0.0f ? mixed / total : 0.0f);"

SOME_KEYS = """
    const int64_t piece = place * splits + blockIdx.y;
    mixes[piece * D + index % D] = mixed;
    if (index % D == 0) {
      scales[2 * piece] = highest;
      scales[2 * piece + 1] = total;
    }
"""

COMBINE = """
  const int pieces = scales_shape[2];
  const int64_t place = blockIdx.x, begin = place * pieces;
  float highest = -1e30f, total = 0.0f, mixed = 0.0f;
  for (int64_t p = begin; p < begin + pieces; ++p) highest = max(highest, scales[2 * p]);
  for (int64_t p = begin; p < begin + pieces; ++p) {
    const float factor = exp2f(scales[2 * p] - highest);
    total += factor * scales[2 * p + 1];
    mixed += factor * mixes[p * D + threadIdx.x];
  }
  out[place * D + threadIdx.x] = static_cast<T>(total > 0.0f ? mixed / total : 0.0f);
"""
