// Softmax over the rows of S^T [64 tokens, N query rows], as the accumulator of one warpgroup's WGMMA m64nNk16 holds
// it.
//
// Thread (warp, group = lane / 4, quad = lane % 4) holds of tokens 16 warp + group and + 8 the columns 8 j + 2 quad and
// + 1:
//
//     S[4 j + e]      token 16 warp + group,      column 8 j + 2 quad + e
//     S[4 j + 2 + e]  token 16 warp + group + 8,  column 8 j + 2 quad + e            e = 0, 1;  j = 0 .. N / 8 - 1
//
// A column's 64 tokens lie in the 8 groups of 4 warps. What is kept per column - maximum m, sum l - has index 2 j + e.
#pragma once

#include "sm90/parts/piece.cuh"

namespace etap::sm90 {

// The running maximum is lazy: exponents refer to it until a logit exceeds it by more than 2^kSlack.
constexpr float kSlack = 8.f;
// Logits that are multiplied by less have none: what is masked must stay so where their scale is 0.
constexpr float kLeastScale = 0x1p-100f;

template <typename T, int N>
struct ColumnSoftmax {
  // Logits in units of log2, -inf where a row does not see a token. row_info is that of column 0.
  __device__ __forceinline__ static void scale_and_mask(const DecodeParams &p, float (&S)[N / 2], float scale_log2,
                                                        int block, int first_limit, const RowInfo *row_info) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) S[i] *= scale_log2;
    if ((block + 1) * kBlockTokens > first_limit)
      mask(p, S, block * kBlockTokens + warp * 16 + lane / 4, first_limit, row_info);
  }
  // The same for logits that are scaled, where the thread's tokens are `token` and token + 8.
  __device__ __forceinline__ static void mask(const DecodeParams &p, float (&S)[N / 2], int token, int first_limit,
                                              const RowInfo *row_info) {
    const int quad = threadIdx.x % 4;
    if (p.tree_mask != nullptr) {
      // A lane asks for one row, or two, what it sees of the warp's 16 tokens.
#pragma unroll
      for (int first = 0; first < N; first += 32) {
        const RowInfo &asked = row_info[min(first + static_cast<int>(threadIdx.x % 32), N - 1)];
        const uint32_t mine = seen_drafts(p, asked, token - token % 16 - first_limit, asked.limit - first_limit);
#pragma unroll
        for (int i = first / 4; i < min(first + 32, N) / 4; ++i) {
          const int row = 8 * (i / 2) + 2 * quad + i % 2;
          const uint32_t seen = __shfl_sync(0xffffffffu, mine, row - first) >> token % 16;
          if (!(seen & 1)) S[4 * (i / 2) + i % 2] = -INFINITY;
          if (!(seen >> 8 & 1)) S[4 * (i / 2) + i % 2 + 2] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int limit = row_info[8 * (i / 2) + 2 * quad + i % 2].limit;
      if (token >= limit) S[4 * (i / 2) + i % 2] = -INFINITY;
      if (token + 8 >= limit) S[4 * (i / 2) + i % 2 + 2] = -INFINITY;
    }
  }

  // The thread's two tokens, where a list has holes.
  __device__ __forceinline__ static void mask_holes(float (&S)[N / 2], bool first, bool second) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      if (first) S[4 * (i / 2) + i % 2] = -INFINITY;
      if (second) S[4 * (i / 2) + i % 2 + 2] = -INFINITY;
    }
  }

  // P = 2^(S - m) rounded to T; sum[i] gets the thread's two unrounded terms, times the weights of its two tokens.
  __device__ __forceinline__ static void exponentiate(const float (&S)[N / 2], const float (&m)[N / 4],
                                                      float (&sum)[N / 4], uint32_t (&P)[N / 4],
                                                      float2 weight = {1.f, 1.f}) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float a = exp2_approx(S[4 * j] - m[2 * j]), b = exp2_approx(S[4 * j + 1] - m[2 * j + 1]);
      const float c = exp2_approx(S[4 * j + 2] - m[2 * j]), d = exp2_approx(S[4 * j + 3] - m[2 * j + 1]);
      sum[2 * j] = a * weight.x + c * weight.y;
      sum[2 * j + 1] = b * weight.x + d * weight.y;
      P[2 * j] = pack2<T>(a, b);
      P[2 * j + 1] = pack2<T>(c, d);
    }
  }

  // P^T to shared memory, K-major at p_at (row n: 64 tokens, 128-byte swizzle), for WGMMA to read after a barrier.
  __device__ __forceinline__ static void store(const uint32_t (&P)[N / 4], uint32_t p_at) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // This warp's 16 tokens are the 16-byte chunks 2 warp and 2 warp + 1 of a row.
    const int n_in_8 = lane & 7, half = (lane >> 3) & 1, j_of_lane = lane >> 4;
    const uint32_t chunk_at = p_at + n_in_8 * 128 + (((2 * warp + half) ^ n_in_8) << 4);
#pragma unroll
    for (int j = 0; j + 1 < N / 8; j += 2) {
      store_matrix_x4_transposed(chunk_at + (j + j_of_lane) * 1024, P[2 * j], P[2 * j + 1], P[2 * j + 2], P[2 * j + 3]);
    }
    if (N / 8 % 2 == 1) {
      store_matrix_x2_transposed(chunk_at + (N / 8 - 1) * 1024, P[2 * (N / 8 - 1)], P[2 * (N / 8 - 1) + 1]);
    }
    fence_proxy_async();
  }
  __device__ __forceinline__ static void exponentiate(const float (&S)[N / 2], const float (&m)[N / 4],
                                                      float (&sum)[N / 4], uint32_t p_at, float2 weight = {1.f, 1.f}) {
    uint32_t P[N / 4];
    exponentiate(S, m, sum, P, weight);
    store(P, p_at);
  }

  // Does a logit of this thread exceed its column's maximum by more than the slack?
  __device__ __forceinline__ static bool above(const float (&S)[N / 2], const float (&m)[N / 4]) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) any |= fmaxf(S[4 * (i / 2) + i % 2], S[4 * (i / 2) + i % 2 + 2]) > m[i] + kSlack;
    return any;
  }

  // This warp's maxima, [N] of shared memory.
  __device__ __forceinline__ static void store_maxima(const float (&S)[N / 2], float *maxima) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      float top = fmaxf(S[4 * (i / 2) + i % 2], S[4 * (i / 2) + i % 2 + 2]);
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
      if (lane < 4) maxima[8 * (i / 2) + 2 * lane + i % 2] = top;
    }
  }

  // From the four warps' maxima [4][N]: moves the maxima of those columns (and only those: a row's bits must not depend
  // on its neighbours) that are exceeded by more than the slack. factor[i] rescales what was summed against the old
  // one.
  __device__ __forceinline__ static void update(const float *maxima, float (&m)[N / 4], float (&l)[N / 4],
                                                float (&factor)[N / 4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float *const column = maxima + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
      const float top = fmaxf(fmaxf(column[0], column[N]), fmaxf(column[2 * N], column[3 * N]));
      factor[i] = 1.f;
      if (top > m[i] + kSlack) {
        factor[i] = exp2_approx(m[i] - top);
        m[i] = top;
        l[i] *= factor[i];
      }
    }
  }

  // Adds the groups' shares of l: every thread has its warp's sums then.
  __device__ __forceinline__ static void reduce_groups(float (&l)[N / 4]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      l[i] += __shfl_xor_sync(0xffffffffu, l[i], 4);
      l[i] += __shfl_xor_sync(0xffffffffu, l[i], 8);
      l[i] += __shfl_xor_sync(0xffffffffu, l[i], 16);
    }
  }
};

}  // namespace etap::sm90
