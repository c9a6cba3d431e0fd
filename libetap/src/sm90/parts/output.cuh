// Where results go: the output, or - where the unit is cut into several pieces - a partial result in L2.
#pragma once

#include "query.cuh"

namespace etap::sm90 {

// A row's result: sum of P V against the maximum `top`, and sum of P.
struct RowSums {
  float top, sum;
};

// A row that sees no token gives 0, whatever stands in the cache.
__device__ __forceinline__ bool is_empty(const RowSums &r, int limit) { return r.sum == 0.f || limit <= 0; }

// COUNT values of a row's output, 4 or 2, from dim d on, from its sums of P V.
template <int COUNT>
__device__ __forceinline__ void store_values(const DecodeParams &p, int64_t token, int head, int d,
                                             const float (&sums)[COUNT], const RowSums &r, int limit, float kv_scale) {
  static_assert(COUNT == 4 || COUNT == 2);
  const float inverse = __fdividef(kv_scale, r.sum);
  float v[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) v[i] = is_empty(r, limit) ? 0.f : sums[i] * inverse;
  const int64_t at = token * p.out_row_stride + head * p.out_head_stride + d;
  if (p.out_dtype == ETAP_FP32) {
    float *const out = static_cast<float *>(p.out) + at;
    if (!p.out_vectors) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) out[i] = v[i];
    } else if constexpr (COUNT == 4) {
      *reinterpret_cast<float4 *>(out) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<float2 *>(out) = make_float2(v[0], v[1]);
    }
  } else {
    uint32_t pairs[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
      pairs[i / 2] = p.out_dtype == ETAP_BF16 ? pack2<__nv_bfloat16>(v[i], v[i + 1]) : pack2<__half>(v[i], v[i + 1]);
    uint16_t *const out = static_cast<uint16_t *>(p.out) + at;
    if (!p.out_vectors) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) out[i] = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
    } else if constexpr (COUNT == 4) {
      *reinterpret_cast<uint2 *>(out) = make_uint2(pairs[0], pairs[1]);
    } else {
      *reinterpret_cast<uint32_t *>(out) = pairs[0];
    }
  }
}
__device__ __forceinline__ void store_lse(const DecodeParams &p, int64_t token, int head, const RowSums &r, int limit) {
  if (p.lse != nullptr) {
    p.lse[token * p.lse_row_stride + head * p.lse_head_stride] =
        is_empty(r, limit) ? p.empty_lse : (r.top + __log2f(r.sum)) * p.lse_factor;
  }
}

// O of a CTA in shared memory: rows of D + 4 floats, so that the accumulator layout of O^T is written without bank
// conflicts.
template <int N, int D>
struct Exchange {
  static constexpr int ROW = D + 4, BYTES = N * ROW * 4;
};

// Called by all consumers once their CTA's sums are in the exchange (each thread's own writes suffice: it
// synchronises before). stats: [2][N], maxima and sums.
template <int N, int D>
__device__ __forceinline__ void store_exchange(const DecodeParams &p, const float *values, const float *stats,
                                               const RowInfo *row_info, const PieceEnd &end) {
  constexpr int kOfRow = D / 4;  // float4s; a warp's lie in one row
  named_barrier<kBarrierConsumers, kConsumers>();
  const int items = end.rows * kOfRow, partial_row = end.partial_row;
  const float kv_scale = tensor_scale(p);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) - 128; i < items; i += kConsumers) {
    const int n = i / kOfRow, d = i % kOfRow * 4;
    const float4 v = *reinterpret_cast<const float4 *>(values + n * Exchange<N, D>::ROW + d);
    const RowSums r{stats[n], stats[N + n]};
    if (partial_row >= 0) {
      __stcg(reinterpret_cast<float4 *>(p.partials + static_cast<int64_t>(partial_row + n) * D + d), v);
      if (d == 0) __stcg(p.stats + partial_row + n, make_float2(r.top, r.sum));
    } else {
      const RowInfo row = row_info[n];
      store_values(p, row.token(p), row.head(p), d, {v.x, v.y, v.z, v.w}, r, row.limit, kv_scale);
      if (d == 0) store_lse(p, row.token(p), row.head(p), r, row.limit);
    }
  }
}

// For warpgroup 1: statistics of a piece's rows, [2][N] maxima and sums, into the partial result or the log-sum-exp.
template <int N>
__device__ __forceinline__ void store_stats(const DecodeParams &p, const float (&stats)[2][N], const RowInfo *row_info,
                                            const PieceEnd &end) {
  const int n = threadIdx.x % 128;
  if (n >= end.rows) return;
  const RowSums r{stats[0][n], stats[1][n]};
  if (end.partial_row >= 0) {
    __stcg(p.stats + end.partial_row + n, make_float2(r.top, r.sum));
  } else {
    store_lse(p, row_info[n].token(p), row_info[n].head(p), r, row_info[n].limit);
  }
}

// A warp's strip of 16 dims from d on in shared memory, rows of kStripRow floats, to where they go. stats: maxima, and
// sums stats_stride further on.
constexpr int kStripRow = 20;  // so that neither side has bank conflicts
__device__ __forceinline__ void store_strip(const DecodeParams &p, const float *strip, int d, int d_latent,
                                            const float *stats, int stats_stride, const RowInfo *row_info,
                                            const PieceEnd &end) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 4, rows = end.rows, partial_row = end.partial_row;
#pragma unroll 2
  for (int n = lane / 4; n < rows; n += 8) {
    const float4 v = *reinterpret_cast<const float4 *>(strip + n * kStripRow + column);
    if (partial_row >= 0) {
      __stcg(reinterpret_cast<float4 *>(p.partials + static_cast<int64_t>(partial_row + n) * d_latent + d + column), v);
    } else {
      const RowInfo row = row_info[n];
      store_values(p, row.token(p), row.head(p), d + column, {v.x, v.y, v.z, v.w}, {stats[n], stats[stats_stride + n]},
                   row.limit, 1.f);
    }
  }
}

// Rows that belong to no piece. Ragged batches: rows of q past the last sequence get out = 0 and empty_lse, like rows
// that see no token. A workspace that this plan has not filled: every row becomes NaN. For the consumers of every CTA.
__device__ __forceinline__ void fill_spare_rows(const DecodeParams &p, int d_latent) {
  const bool planned = __ldg(&p.teams[this_cta() / p.team].id) == p.plan_id;
  if (planned && !p.ragged) return;
  const int lane = threadIdx.x % 32, ctas = gridDim.x;
  const int64_t begin = planned ? static_cast<int64_t>(p.sequences[p.batch].q_begin) * p.num_heads : 0;
  const float value = planned ? 0.f : NAN;
  for (int64_t i = begin + (threadIdx.x - 128) / 32 + int64_t{kConsumers / 32} * this_cta();
       i < static_cast<int64_t>(p.rows_of_q) * p.num_heads; i += int64_t{kConsumers / 32} * ctas) {
    const int64_t token = i / p.num_heads;
    const int head = static_cast<int>(i % p.num_heads);
    const RowSums sums{0.f, value};
    for (int d = 4 * lane; d < d_latent; d += 128)
      store_values(p, token, head, d, {value, value, value, value}, sums, 1, 1.f);
    if (lane == 0) store_lse(p, token, head, sums, 1);
  }
}

}  // namespace etap::sm90
