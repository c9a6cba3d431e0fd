// What every decode kernel does before and after its loop over KV blocks: bring the queries of a piece into shared
// memory, and turn the O^T that a CTA has summed into output, meeting the other CTAs of the cluster and the other
// pieces of a cut unit.
//
//     CTA 0   CTA 1   ...  CTA C-1          each holds O [N][D] (FP32, in shared memory), row maxima and row sums
//       |\     /|              |
//       | \   / |              |            every CTA owns 1/C of the N x D values and reads that part of all C
//      part   part    ...    part           through distributed shared memory
//       |       |              |
//    output, or - where the unit is cut into several pieces - a partial result in L2; the last piece to arrive (counted
//    for each of the C parts by itself, so that nobody waits for anybody) adds them up in the order of the pieces
#pragma once

#include "etap.h"
#include "params.h"
#include "ptx.cuh"
#include "workspace.h"

namespace etap::sm90 {

enum : int { kBarrierConsumers = 1 };  // named barrier of the 256 consumer threads; 0 is __syncthreads
constexpr int kConsumers = 256;
constexpr float kNoMaximum = -1e30f;  // below every logit, finite: exp2(-inf - m) is 0, not NaN

// A row of the tile: where it comes from and goes to, and what it sees.
struct RowInfo {
  int token;  // row of q, out and lse
  int head;
  int limit;  // KV tokens that it sees; 0 for rows past the tile's end
};

// A piece as its CTA needs it.
struct PieceContext {
  Piece piece;
  SequenceRecord sequence;
  int kv_end;       // KV tokens that any row of the tile sees
  int rows;         // rows of the tile that exist
  int first_limit;  // KV tokens that every row of the tile sees
  int row_begin;    // first row of the tile among the sequence's query_len * num_heads rows
};

__device__ __forceinline__ PieceContext piece_context(const DecodeParams &p, int worker, int unit, int tile_rows) {
  const WorkerRecord &record = p.workers[worker];
  PieceContext c;
  c.sequence = unit == record.unit_begin ? record.first_sequence : p.sequences[unit / p.tiles];
  const int tile = unit % p.tiles;
  c.kv_end = visible_tokens(c.sequence.length, c.sequence.q_len, tile, tile_rows, p.num_heads, p.causal);
  c.piece = piece_of(record, worker, unit, blocks_of(c.kv_end));
  c.row_begin = tile * tile_rows;
  c.rows = min(tile_rows, c.sequence.q_len * p.num_heads - c.row_begin);
  c.first_limit = p.causal ? c.sequence.length - c.sequence.q_len + c.row_begin / p.num_heads + 1 : c.sequence.length;
  return c;
}

// The same value, but the compiler can't know it. A context that is worked out again after the loop over KV blocks does
// not occupy registers during it, where O^T needs them.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ float tensor_scale(const DecodeParams &p) {
  return p.kv_scale_ptr != nullptr ? __ldg(p.kv_scale_ptr) : p.kv_scale;
}
// One scale for the whole cache: K's part of it goes into the softmax scale, V's into the output. 1 for 16-bit caches,
// and for 656-byte rows, where it belongs to the latent values only.
template <KvCopy COPY>
__device__ __forceinline__ float kv_scale_of(const DecodeParams &p) {
  return COPY == KvCopy::kE4m3 || COPY == KvCopy::kE4m3Group ? tensor_scale(p) : 1.f;
}

// Q as [N rows x 64 values] boxes with 128-byte swizzle, zeros past the tile's end, and the table of rows. A warp takes
// every eighth row. Ends with a barrier over the consumers; WGMMA may read Q after it.
template <typename T, int N, int D_LATENT, int D_ROPE>
__device__ __forceinline__ void load_query(const DecodeParams &p, const PieceContext &c, uint32_t q_at,
                                           RowInfo *row_info) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32;
#pragma unroll 2
  for (int n = warp; n < N; n += 8) {
    const bool exists = n < c.rows;
    const int row = exists ? c.row_begin + n : 0;
    const int token = row / p.num_heads, head = row - token * p.num_heads;
    const int64_t q_row = c.sequence.q_begin + token;
    const T *const latent =
        static_cast<const T *>(p.q_nope) + q_row * p.q_nope_row_stride + head * p.q_nope_head_stride;
    const auto copy = [&](int chunk, const T *source) {
      copy_async_16(q_at + (chunk >> 3) * (N * 128) + n * 128 + (((chunk & 7) ^ (n & 7)) << 4), source, exists);
    };
#pragma unroll
    for (int chunk = lane; chunk < D_LATENT / 8; chunk += 32) copy(chunk, latent + chunk * 8);
    if (D_ROPE > 0 && lane < D_ROPE / 8) {
      const T *const rope =
          static_cast<const T *>(p.q_rope) + q_row * p.q_rope_row_stride + head * p.q_rope_head_stride;
      copy(D_LATENT / 8 + lane, rope + lane * 8);
    }
    if (lane == 0) {
      const int seen = p.causal ? c.sequence.length - c.sequence.q_len + token + 1 : c.sequence.length;
      row_info[n] = RowInfo{static_cast<int>(q_row), head, exists ? seen : 0};
    }
  }
  copy_async_wait_all();
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}

// O of a CTA in shared memory: rows of D + 4 floats, so that the accumulator layout of O^T is written without bank
// conflicts.
template <int N, int D>
struct Exchange {
  static constexpr int ROW = D + 4, BYTES = N * ROW * 4;
  static constexpr int ITEMS = N * D / 4;  // float4s

  uint32_t values;       // shared-memory addresses: [N][ROW] sums of P V,
  uint32_t tops;         // [N] maxima they refer to (in log2),
  uint32_t sums;         // [N] sums of P
  uint32_t parts_ready;  // mbarriers, 8 arrivals a CTA of the cluster
  uint32_t parts_read;
  int *last_flag;
};

// A row's result: sum of P V against the maximum `top`, and sum of P.
struct Merged {
  float top, sum;
  float4 value;
};

// The weights of up to 32 parts of one row, one part a lane: lane i gives (and, from weights(), gets) part i's.
struct PartWeights {
  float top, sum, weight;  // over all parts so far; of this lane's part
  __device__ __forceinline__ PartWeights(float part_top, float part_sum) {
    top = part_top;
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, delta));
    weight = exp2_approx(part_top - top);
    sum = part_sum * weight;
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
  }
  __device__ __forceinline__ void add(float4 &total, const float4 &part, int i) const {
    const float w = __shfl_sync(0xffffffffu, weight, i);
    total = make_float4(total.x + w * part.x, total.y + w * part.y, total.z + w * part.z, total.w + w * part.w);
  }
};

__device__ __forceinline__ void store_output(const DecodeParams &p, const RowInfo &row, int d, const Merged &r,
                                             float kv_scale) {
  const float inverse = r.sum == 0.f ? 0.f : kv_scale / r.sum;
  const float4 v = make_float4(r.value.x * inverse, r.value.y * inverse, r.value.z * inverse, r.value.w * inverse);
  const int64_t at = row.token * p.out_row_stride + row.head * p.out_head_stride + d;
  if (p.out_dtype == ETAP_FP32) {
    float *const out = static_cast<float *>(p.out) + at;
    if (p.out_vectors) {
      *reinterpret_cast<float4 *>(out) = v;
    } else {
      out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    }
  } else {
    const bool bf16 = p.out_dtype == ETAP_BF16;
    const uint2 packed = make_uint2(bf16 ? pack2<__nv_bfloat16>(v.x, v.y) : pack2<__half>(v.x, v.y),
                                    bf16 ? pack2<__nv_bfloat16>(v.z, v.w) : pack2<__half>(v.z, v.w));
    uint16_t *const out = static_cast<uint16_t *>(p.out) + at;
    if (p.out_vectors) {
      *reinterpret_cast<uint2 *>(out) = packed;
    } else {
      out[0] = packed.x & 0xffff, out[1] = packed.x >> 16, out[2] = packed.y & 0xffff, out[3] = packed.y >> 16;
    }
  }
  if (d == 0 && p.lse != nullptr) {
    p.lse[row.token * p.lse_row_stride + row.head * p.lse_head_stride] =
        r.sum == 0.f ? -INFINITY : (r.top + __log2f(r.sum)) * p.lse_factor;
  }
}

// Called by all consumers once their CTA's sums are in the exchange (each thread's own writes suffice: it
// synchronises). `nth` counts the pieces of this CTA from 0. Before the exchange is written again the caller waits on
// parts_read.
template <int N, int D>
__device__ __forceinline__ void finish_piece(const DecodeParams &p, const PieceContext &c, const Exchange<N, D> &x,
                                             const RowInfo *row_info, float kv_scale, int worker, uint32_t cluster_size,
                                             uint32_t rank, uint32_t nth) {
  using X = Exchange<N, D>;
  const int consumer = threadIdx.x - 128, lane = threadIdx.x % 32;
  if (cluster_size > 1) {
    if (nth == 0) cluster_wait();  // every CTA's barriers are initialised
    __syncwarp();
    if (lane < static_cast<int>(cluster_size)) mbarrier_arrive_cluster(x.parts_ready, lane);
    mbarrier_wait_cluster(x.parts_ready, nth & 1);
  } else {
    named_barrier<kBarrierConsumers, kConsumers>();
  }
  // This CTA's part: whole groups of 32 float4s, so that a warp's lie in one row.
  const int begin = X::ITEMS / 32 * static_cast<int>(rank) / static_cast<int>(cluster_size) * 32;
  const int end = X::ITEMS / 32 * (static_cast<int>(rank) + 1) / static_cast<int>(cluster_size) * 32;
  const bool cut = c.piece.first_worker != c.piece.last_worker;
  const size_t partial_size = partial_floats(N, D, static_cast<int>(cluster_size));
  const size_t stats_at = X::ITEMS * 4 + rank * 2 * N;
  const auto partial_of = [&](int w) { return p.partials + partial_size * slot_of(w, c.piece.first_worker); };

#pragma unroll 1
  for (int index = begin + consumer; index < end; index += kConsumers) {
    const int n = index / (D / 4), d = index % (D / 4) * 4;
    if (n >= c.rows) break;
    // All parts in flight at once: a round trip through distributed shared memory is long. Beyond the last part: the
    // last again, unused.
    const uint32_t last = cluster_size - 1;
    const float top = load_cluster_float(x.tops + n * 4, min(static_cast<uint32_t>(lane), last));
    const float sum = load_cluster_float(x.sums + n * 4, min(static_cast<uint32_t>(lane), last));
    float4 parts[4];
    const uint32_t value_at = x.values + (n * X::ROW + d) * 4;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) parts[i] = load_cluster_float4(value_at, min(i, last));
    const PartWeights weights(lane <= static_cast<int>(last) ? top : kNoMaximum,
                              lane <= static_cast<int>(last) ? sum : 0.f);
    Merged r{weights.top, weights.sum, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i <= static_cast<int>(last)) weights.add(r.value, parts[i], i);
    }
    if (cluster_size > 4) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) parts[i] = load_cluster_float4(value_at, min(4 + i, last));
#pragma unroll
      for (int i = 4; i < 8; ++i) {
        if (i <= static_cast<int>(last)) weights.add(r.value, parts[i - 4], i);
      }
    }
    if (cut) {
      float *const partial = partial_of(worker);
      __stcg(reinterpret_cast<float4 *>(partial) + index, r.value);
      if (lane == 0) __stcg(reinterpret_cast<float2 *>(partial + stats_at) + n, make_float2(r.top, r.sum));
    } else {
      store_output(p, row_info[n], d, r, kv_scale);
    }
  }
  if (cluster_size > 1) {
    __syncwarp();
    if (lane < static_cast<int>(cluster_size)) mbarrier_arrive_cluster(x.parts_read, lane);
  } else {
    named_barrier<kBarrierConsumers, kConsumers>();
  }
  if (!cut) return;

  named_barrier<kBarrierConsumers, kConsumers>();
  if (consumer == 0) {
    int *const counter = p.counters + c.piece.first_worker * static_cast<int>(cluster_size) + rank;
    __threadfence();  // the barrier's other threads' partial results are published with this thread's
    const int arrived = atomicAdd(counter, 1);
    __threadfence();
    *x.last_flag = arrived == c.piece.last_worker - c.piece.first_worker;
    if (*x.last_flag) *counter = 0;
  }
  named_barrier<kBarrierConsumers, kConsumers>();
  if (!*x.last_flag) return;
#pragma unroll 1
  for (int index = begin + consumer; index < end; index += kConsumers) {
    const int n = index / (D / 4), d = index % (D / 4) * 4;
    if (n >= c.rows) break;
    Merged r{kNoMaximum, 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
    for (int first = c.piece.first_worker; first <= c.piece.last_worker; first += 32) {
      const int count = min(32, c.piece.last_worker - first + 1);
      float2 stats = make_float2(kNoMaximum, 0.f);
      if (lane < count) stats = __ldcg(reinterpret_cast<const float2 *>(partial_of(first + lane) + stats_at) + n);
      const PartWeights weights(stats.x, stats.y);
      float4 value{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
      for (int i = 0; i < count; ++i)
        weights.add(value, __ldcg(reinterpret_cast<const float4 *>(partial_of(first + i)) + index), i);
      const float top = fmaxf(r.top, weights.top), a = exp2_approx(r.top - top), b = exp2_approx(weights.top - top);
      r = Merged{top,
                 r.sum * a + weights.sum * b,
                 {r.value.x * a + value.x * b, r.value.y * a + value.y * b, r.value.z * a + value.z * b,
                  r.value.w * a + value.w * b}};
    }
    store_output(p, row_info[n], d, r, kv_scale);
  }
}

// Ragged batches: rows of q past the last sequence belong to nobody and get out = 0, lse = -inf, like rows that see no
// token.
__device__ __forceinline__ void fill_spare_rows(const DecodeParams &p, int d_latent) {
  if (p.total_q == 0 || blockIdx.x != gridDim.x - 1) return;
  const int lane = threadIdx.x % 32, begin = p.sequences[p.batch].q_begin;
  for (int64_t i = static_cast<int64_t>(begin) * p.num_heads + (threadIdx.x - 128) / 32;
       i < static_cast<int64_t>(p.total_q) * p.num_heads; i += kConsumers / 32) {
    const RowInfo row{static_cast<int>(i / p.num_heads), static_cast<int>(i % p.num_heads), 0};
    for (int d = 4 * lane; d < d_latent; d += 128) store_output(p, row, d, Merged{0.f, 0.f, {0.f, 0.f, 0.f, 0.f}}, 1.f);
  }
}

}  // namespace etap::sm90
