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

#include <cstddef>
#include <type_traits>

#include "etap.h"
#include "sm90/params.h"
#include "sm90/parts/partial.cuh"
#include "sm90/ptx/ptx.cuh"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

enum : int { kBarrierConsumers = 1 };  // named barrier of the 256 consumer threads; 0 is __syncthreads
constexpr int kConsumers = 256;

// A row of the tile: where it comes from and goes to, and what it sees.
struct RowInfo {
  int token;  // row of q, out and lse
  int head;
  int limit;  // KV tokens that it sees, or, of a tree, may see; 0 for rows past the tile's end
};

// Of CTAs that share a worker's pieces - its cluster, or one alone - which worker of the plan that is, and which of
// them this one is.
__device__ __forceinline__ int worker_of(int ctas) { return ctas == 1 ? cta_index() : cluster_index(); }
__device__ __forceinline__ int rank_of(int ctas) { return ctas == 1 ? 0 : static_cast<int>(cluster_rank()); }

// A piece as its CTA needs it.
struct PieceContext {
  int ctas;  // that share it: block i of it belongs to the one with rank i % ctas
  Piece piece;
  SequenceRecord sequence;
  const int32_t *table;  // the sequence's row of the block table
  int kv_end;            // KV tokens that any row of the tile sees
  int rows;              // rows of the tile that exist; not more than 0: nothing to do
  int first_limit;       // KV tokens that every row of the tile sees
  int row_begin;         // first row of the tile among the sequence's query_len * num_heads rows
  bool unreadable;       // longer than the block table: no block is read, the rows become NaN
  __device__ __forceinline__ int first_block() const { return piece.block_begin + rank_of(ctas); }
  // What the sums of P begin with.
  __device__ __forceinline__ float first_sum() const { return unreadable ? NAN : 0.f; }
};

// The pieces of this CTA's worker, in order. Its record is in shared memory (begin_kernel): it is asked for once, while
// the kernel before is at its end, and takes no registers.
struct Pieces {
  const DecodeParams &p;
  const WorkerRecord &record;
  int unit;  // at hand, or the chunk of one; all that is kept, since O^T needs the registers

  // From the worker's `nth` unit on. Made again for each, it keeps no register in between.
  __device__ __forceinline__ Pieces(const DecodeParams &params, const WorkerRecord &of_cta, int nth = 0)
      : p(params), record(of_cta), unit(of_cta.unit_begin + nth) {}
  __device__ __forceinline__ bool done() const { return unit > record.unit_end; }
  __device__ __forceinline__ void next() { ++unit; }
  __device__ __forceinline__ int ctas() const { return record.single == 1 ? 1 : static_cast<int>(cluster_size()); }
  // Opaque: what is worked out of it would take registers from piece to piece.
  __device__ __forceinline__ int chunks_log2() const { return opaque(p.chunks_log2); }
  __device__ __forceinline__ PieceContext context(int tile_rows) const {
    const int whole = unit >> record.numbers_log2, sequence = whole / p.tiles, tile = whole - sequence * p.tiles;
    PieceContext c;
    c.ctas = ctas();
    c.sequence = record.first_sequence;
    if (unit != record.unit_begin) c.sequence = p.sequences[sequence];
    const bool of_prefix = tile_rows == kPrefixRows && is_prefix(c.sequence), causal = p.causal && !of_prefix;
    const int column = tile_rows == kPrefixRows && !of_prefix ? c.sequence.table : 0;
    c.table = p.block_table + (of_prefix ? c.sequence.table : sequence) * p.block_table_stride + column;
    c.kv_end = visible_tokens(c.sequence.length, c.sequence.q_len, tile, tile_rows, p.num_heads, causal);
    const int blocks = blocks_of(c.kv_end);
    c.piece = chunks_log2() > 0 ? chunk_piece(unit, blocks, chunks_log2(), record.numbers_log2)
                                : piece_of(record, worker_of(c.ctas), unit, blocks);
    c.row_begin = tile * tile_rows;
    c.rows = min(tile_rows, c.sequence.q_len * p.num_heads - c.row_begin);
    if (c.piece.block_begin > 0 && c.piece.block_begin >= blocks) c.rows = 0;  // a chunk that the unit does not have
    c.unreadable = c.sequence.length > p.token_limit - (column << p.page_shift);
    if (c.unreadable) c.kv_end = c.piece.block_end = c.piece.block_begin = 0;  // nor is the table looked at
    c.first_limit = c.sequence.length;
    if (causal) c.first_limit += c.row_begin / p.num_heads + 1 - c.sequence.q_len;
    if (p.tree_mask != nullptr && !of_prefix) c.first_limit -= c.sequence.q_len;
    return c;
  }
};

// Between the initialisation of barriers and the roles: a CTA's threads meet, and the kernel overlaps with the one
// before it, whose results it may read from here on, and the one after it. `record` becomes this CTA's, sooner: the
// plan is written, since no plan kernel lets another begin before its end.
__device__ __forceinline__ void begin_kernel(const DecodeParams &p, WorkerRecord &record) {
  constexpr int kWords = sizeof(WorkerRecord) / sizeof(int);
  if (threadIdx.x < kWords)
    reinterpret_cast<int *>(&record)[threadIdx.x] = reinterpret_cast<const int *>(p.records + cta_index())[threadIdx.x];
  __syncthreads();
  // A second kernel of a call reads nothing of the first's, and waits for it at its end, for the sake of those behind
  // both.
  if (!p.second) wait_for_previous_kernel();
  allow_next_kernel();
}

// What the end of a piece needs to know, in shared memory: during the loop over KV blocks O^T needs the registers.
struct PieceEnd {
  int ctas, rows;
  int first_worker, last_worker;  // that share the unit
  float *partial;                 // where its partial result goes
  int is_last;                    // of the parts of a cut unit, to arrive
  int kept;                       // a whole unit's results: 0 those of a prefix, 1 those behind one, -1 the output's
};

// Which of 32 tokens a draft sees, the lowest bit the first of them, which is draft `first` of its tree's `drafts`;
// below 0: before the drafts, and seen. Bits behind the drafts may be anything.
__device__ __forceinline__ uint32_t seen_drafts(const DecodeParams &p, const RowInfo &row, int first, int drafts) {
  const uint32_t *const mask = p.tree_mask + row.token * p.tree_mask_stride;
  const auto word = [&](int w) { return w < 0 ? ~0u : w * 32 < drafts ? __ldg(mask + w) : 0u; };
  return __funnelshift_r(word(first >> 5), word((first >> 5) + 1), first);
}

// Bytes that are a NaN in every format: what is copied in place of a page that does not exist.
struct NanBytes {
  uint32_t words[kBlockTokens * 128 / 4];
  constexpr NanBytes() : words() {
    for (uint32_t &word : words) word = 0xffffffffu;
  }
};
static __device__ const NanBytes kNanBytes{};
// And of a token that is not there: a row.
struct alignas(16) ZeroBytes {
  char bytes[2 * 1024];
};
static __device__ const ZeroBytes kZeroBytes{};

// One scale for the whole FP8 cache.
__device__ __forceinline__ float tensor_scale(const DecodeParams &p) {
  return p.kv_scale_ptr != nullptr ? __ldg(p.kv_scale_ptr) : p.kv_scale;
}

// 16 bytes of a row of q that is not aligned to them.
__device__ __forceinline__ void copy_query_by_twos(uint32_t to, const void *from, bool exists) {
  uint32_t words[4] = {0, 0, 0, 0};
  if (exists) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      words[i / 2] |= static_cast<uint32_t>(__ldg(static_cast<const unsigned short *>(from) + i)) << (16 * (i % 2));
  }
  store_shared_16(to, words);
}

template <typename T>
__device__ __forceinline__ T *of_lane(T *pointer, int lane) {
  return reinterpret_cast<T *>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Q as [N rows x 64 values] boxes with 128-byte swizzle, zeros past the tile's end, the table of rows, and what
// finish_piece will ask for. A warp takes every eighth row, and each of its lanes finds out where one of them is: what
// is met once for all rows is met cold, at some 20 cycles an instruction. Ends with a barrier over the consumers; WGMMA
// may read Q after it.
template <typename T, int N, int D_LATENT, int D_ROPE>
__device__ __forceinline__ void load_query(const DecodeParams &p, const PieceContext &c, uint32_t q_at,
                                           RowInfo *row_info, PieceEnd *end) {
  static_assert(N % 8 == 0 && N <= 256);
  const bool of_prefix = N == kPrefixRows && is_prefix(c.sequence), causal = p.causal && !of_prefix;
  if (threadIdx.x == 128) {
    const int kept = of_prefix ? 0 : N == kPrefixRows && is_behind_prefix(c.sequence) ? 1 : -1;
    float *const partial = p.partials + partial_floats(N, p.partial_row, 1) * c.piece.slot;
    *end = PieceEnd{c.ctas, c.rows, c.piece.first_worker, c.piece.last_worker, partial, 0, kept};
  }
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32, mine = warp + 8 * lane;
  const bool exists = mine < c.rows;
  const int row = exists ? c.row_begin + mine : 0, token = row / p.num_heads, head = row - token * p.num_heads;
  const int q_row = of_prefix ? __ldg(p.q_rows + ~c.sequence.q_begin + token) : c.sequence.q_begin + token;
  const T *const latent = static_cast<const T *>(p.q_nope) + q_row * p.q_nope_row_stride + head * p.q_nope_head_stride;
  const T *rope = nullptr;
  if (D_ROPE > 0) rope = static_cast<const T *>(p.q_rope) + q_row * p.q_rope_row_stride + head * p.q_rope_head_stride;
  if (lane < N / 8) {
    const int seen = causal ? c.sequence.length - c.sequence.q_len + token + 1 : c.sequence.length;
    row_info[mine] = RowInfo{q_row, head, exists ? seen : 0};
  }
  // Row `warp + 8 i` of every box lies 8 rows below the one before, so the swizzle is the same.
  const auto each_row = [&](auto copy) {
#pragma unroll 1
    for (int i = 0; i < N / 8; ++i) {
      const T *const from = of_lane(latent, i), *const rope_from = of_lane(rope, i);
      const bool there = warp + 8 * i < c.rows;
      const auto at = [&](int chunk) {
        return q_at + (chunk >> 3) * (N * 128) + (warp + 8 * i) * 128 + (((chunk & 7) ^ warp) << 4);
      };
#pragma unroll
      for (int chunk = lane; chunk < D_LATENT / 8; chunk += 32) copy(at(chunk), from + chunk * 8, there);
      if (D_ROPE > 0 && lane < D_ROPE / 8) copy(at(D_LATENT / 8 + lane), rope_from + lane * 8, there);
    }
  };
  if (p.q_vectors) {
    each_row([](uint32_t to, const T *from, bool there) { copy_async_16(to, from, there); });
  } else {
    each_row([](uint32_t to, const T *from, bool there) { copy_query_by_twos(to, from, there); });
  }
  copy_async_wait_all();
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}

// O of a CTA in shared memory: rows of D + PAD floats, so that the layout of the accumulators - 4 for O^T's, 8 for O's
// - is written without bank conflicts.
template <int N, int D, int PAD = 4>
struct Exchange {
  static constexpr int ROW = D + PAD, BYTES = N * ROW * 4;
  static constexpr int ITEMS = N * D / 4;  // float4s

  uint32_t values;       // shared-memory addresses: [N][ROW] sums of P V,
  uint32_t tops;         // [N] maxima they refer to (in log2),
  uint32_t sums;         // [N] sums of P
  uint32_t parts_ready;  // mbarriers, 8 arrivals a CTA of the cluster
  uint32_t parts_read;
  PieceEnd *end;
};

// Where a row's result goes, and what its sums are multiplied by. A row that sees no token gets zeros, whatever stands
// in the cache.
struct OutputRow {
  const DecodeParams &p;
  bool empty;
  float inverse;
  int64_t at;

  __device__ __forceinline__ OutputRow(const DecodeParams &params, const RowInfo &row, float sum, float kv_scale)
      : p(params) {
    empty = sum == 0.f || row.limit <= 0;
    inverse = __fdividef(kv_scale, sum);
    at = row.token * p.out_row_stride + row.head * p.out_head_stride;
  }

  // The row that another lane of the warp has.
  __device__ __forceinline__ OutputRow of_lane(int lane) const {
    OutputRow row(*this);
    row.empty = __shfl_sync(0xffffffffu, static_cast<int>(empty), lane) != 0;
    row.inverse = __shfl_sync(0xffffffffu, inverse, lane);
    row.at = __shfl_sync(0xffffffffu, at, lane);
    return row;
  }

  // Values d to d + 3 and, where there are more, those 128 further on, from sums of P V. Short code rather than fast
  // where values can't be written four at a time: kernels are met cold. DTYPE: the output's where it is known.
  template <int DTYPE = -1, int COUNT>
  __device__ __forceinline__ void store(int d, float4 (&values)[COUNT]) const {
    const int dtype = DTYPE >= 0 ? DTYPE : p.out_dtype;
#pragma unroll
    for (float4 &v : values)
      v = empty ? make_float4(0.f, 0.f, 0.f, 0.f)
                : make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
    float *const wide = static_cast<float *>(p.out) + at + d;
    uint16_t *const narrow = static_cast<uint16_t *>(p.out) + at + d;
    const auto pair = [dtype](float low, float high) {
      return dtype == ETAP_BF16 ? pack2<__nv_bfloat16>(low, high) : pack2<__half>(low, high);
    };
    if (!p.out_vectors) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          const float4 &v = values[i];
          const float value = e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
          if (dtype == ETAP_FP32) {
            wide[128 * i + e] = value;
          } else {
            narrow[128 * i + e] = static_cast<uint16_t>(pair(value, 0.f));
          }
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float4 &v = values[i];
      if (dtype == ETAP_FP32) {
        *reinterpret_cast<float4 *>(wide + 128 * i) = v;
      } else {
        *reinterpret_cast<uint2 *>(narrow + 128 * i) = make_uint2(pair(v.x, v.y), pair(v.z, v.w));
      }
    }
  }
  // By one thread.
  __device__ __forceinline__ void store_lse(const RowInfo &row, float top, float sum) const {
    if (p.lse == nullptr) return;
    p.lse[row.token * p.lse_row_stride + row.head * p.lse_head_stride] =
        empty ? p.empty_lse : (top + __log2f(sum)) * p.lse_factor;
  }
};

template <int QUADS>
__device__ __forceinline__ void store_output(const DecodeParams &p, const RowInfo &row, int d, const Merged<QUADS> &r,
                                             float kv_scale) {
  const OutputRow out(p, row, r.sum, kv_scale);
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    float4 values[1] = {r.value[q]};
    out.store(d + 4 * q, values);
  }
  if (d == 0) out.store_lse(row, r.top, r.sum);
}

// Of a worker that is one CTA, row by row from the exchange: the output of a unit that is its own, or, `merged`, sums
// for who merges. As in load_query, a lane finds out what is to be known of one row, and a warp takes row after row.
template <int N, int D, int PAD>
__device__ __forceinline__ void store_rows(const DecodeParams &p, const Exchange<N, D, PAD> &x, const RowInfo *row_info,
                                           float kv_scale, bool merged) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32;
  const int rows = x.end->rows, mine = min(warp + 8 * lane, N - 1);
  float2 stats = make_float2(load_shared_float(x.tops + mine * 4), load_shared_float(x.sums + mine * 4));
  const RowInfo row = row_info[mine];
  const OutputRow out(p, row, stats.y, kv_scale);
  float *const partial = x.end->partial;
  float *sums = partial + mine * p.partial_row, *stats_at = partial + N * p.partial_row + 2 * mine;
  if (N == kPrefixRows && x.end->kept >= 0 && x.end->first_worker == x.end->last_worker) {
    sums = p.kept + (2 * (static_cast<int64_t>(row.token) * p.num_heads + row.head) + x.end->kept) * kept_floats(D);
    stats_at = sums + D;
  }
  if (!merged && warp + 8 * lane < rows) out.store_lse(row, stats.x, stats.y);
#pragma unroll 1
  for (int i = 0; warp + 8 * i < rows; ++i) {
    float4 values[D / 128];
#pragma unroll
    for (int j = 0; j < D / 128; ++j)
      values[j] = load_shared_float4(x.values + (warp + 8 * i) * (x.ROW * 4) + j * 512 + lane * 16);
    if (!merged) {
      out.of_lane(i).store(lane * 4, values);
      continue;
    }
    float *const to = of_lane(sums, i);
    const float by = p.narrow ? narrowing(values, stats, lane == i) : 1.f;
#pragma unroll
    for (int j = 0; j < D / 128; ++j) {
      if (p.narrow) {
        __stcg(reinterpret_cast<uint2 *>(to) + j * 32 + lane, narrow(values[j], by));
      } else {
        __stcg(reinterpret_cast<float4 *>(to) + j * 32 + lane, values[j]);
      }
    }
    if (lane == i) __stcg(reinterpret_cast<float2 *>(stats_at), stats);
  }
  named_barrier<kBarrierConsumers, kConsumers>();  // what follows is written over these
}

// Of single CTAs behind which no kernel merges, the last of a cut unit's to arrive: adds what the others have left and
// what it has itself, in the order of the pieces, and puts the sums where it had its own.
template <typename Four, int N, int D, int PAD>
__device__ __forceinline__ void add_others(const DecodeParams &p, const Exchange<N, D, PAD> &x) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32;
  const int first_worker = x.end->first_worker, last_worker = x.end->last_worker;
  constexpr int kOfRow = row_floats(D, sizeof(Four) == sizeof(uint2));
  // Latency is all there is: what is in flight at once, rows of a warp first, and their pieces. Registers are scarce.
  constexpr int kInFlight = N <= 32 ? 4 : 2;
  constexpr int kRows = N >= 32 ? kInFlight : N >= 16 ? 2 : 1, kPieces = kInFlight / kRows;
  const int rows = x.end->rows, own = worker_of(1);
#pragma unroll 1
  for (int first = warp; first < rows; first += 8 * kRows) {
    const auto row_of = [&](int i) { return min(first + 8 * i, rows - 1); };
    Merged<D / 128> total[kRows];
#pragma unroll
    for (Merged<D / 128> &t : total) t = nothing_merged<D / 128>();
#pragma unroll 1
    for (int begin = first_worker; begin <= last_worker; begin += kPieces) {
      float2 stats[kPieces][kRows];
      Four values[kPieces][kRows][D / 128];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int worker = min(begin + piece, last_worker);
        const float *const partial = p.partials + partial_floats(N, kOfRow, 1) * slot_of(worker, first_worker);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int n = row_of(i);
          if (worker == own) {
            stats[piece][i] = make_float2(load_shared_float(x.tops + n * 4), load_shared_float(x.sums + n * 4));
            float4 wide[D / 128];
#pragma unroll
            for (int j = 0; j < D / 128; ++j)
              wide[j] = load_shared_float4(x.values + n * (x.ROW * 4) + j * 512 + lane * 16);
            as_they_travel(wide, stats[piece][i], values[piece][i]);  // the same bits whoever arrives last
          } else {
            stats[piece][i] = __ldcg(reinterpret_cast<const float2 *>(partial + N * kOfRow + 2 * n));
#pragma unroll
            for (int j = 0; j < D / 128; ++j)
              values[piece][i][j] = __ldcg(reinterpret_cast<const Four *>(partial + n * kOfRow) + j * 32 + lane);
          }
        }
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const bool exists = begin + piece <= last_worker;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          Merged<D / 128> its{exists ? stats[piece][i].x : kNoMaximum, exists ? stats[piece][i].y : 0.f, {}};
#pragma unroll
          for (int j = 0; j < D / 128; ++j) its.value[j] = widen(values[piece][i][j]);
          total[i] = sum_of(total[i], its);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int n = row_of(i);
      if (first + 8 * i >= rows) break;
#pragma unroll
      for (int j = 0; j < D / 128; ++j)
        store_shared_float4(x.values + n * (x.ROW * 4) + j * 512 + lane * 16, total[i].value[j]);
      if (lane == 0) {
        store_shared_float(x.tops + n * 4, total[i].top);
        store_shared_float(x.sums + n * 4, total[i].sum);
      }
    }
  }
  __syncwarp();
}

// The end of a piece of a single CTA.
template <int N, int D, int PAD>
__device__ __forceinline__ void finish_alone(const DecodeParams &p, const Exchange<N, D, PAD> &x,
                                             const RowInfo *row_info, float kv_scale) {
  const int first_worker = x.end->first_worker, others = x.end->last_worker - first_worker;
  int *const counter = p.counters + first_worker;
  const auto ask = [&](auto arrived) {  // have all others arrived?
    if (threadIdx.x == 128) x.end->is_last = arrived(counter) == others;
    named_barrier<kBarrierConsumers, kConsumers>();
    return x.end->is_last != 0;
  };
  const bool merges = others > 0 && !p.merged_after;
  bool merged = others > 0 || (N == kPrefixRows && x.end->kept >= 0);
  // Where all others are there its own sums need not travel.
  if (merges && ask([](const int *c) { return arrivals_so_far(c); })) merged = false;
#pragma unroll 1
  for (;;) {
    if (merges && !merged) {
      if (threadIdx.x == 128) *counter = 0;
      if (p.narrow) {
        add_others<uint2>(p, x);
      } else {
        add_others<float4>(p, x);
      }
    }
    store_rows(p, x, row_info, kv_scale, merged);
    if (!merges || !merged || !ask([](int *c) { return count_arrival(c); })) return;
    merged = false;
  }
}

// The end of a piece of a cluster, whose CTAs have all arrived.
template <int N, int D, int PAD>
__device__ __forceinline__ void finish_together(const DecodeParams &p, const Exchange<N, D, PAD> &x,
                                                const RowInfo *row_info, float kv_scale) {
  using X = Exchange<N, D, PAD>;
  const int consumer = opaque(static_cast<int>(threadIdx.x)) - 128, lane = consumer & 31;
  const int ctas = x.end->ctas, rank = rank_of(ctas);
  const int rows = x.end->rows, first_worker = x.end->first_worker, last_worker = x.end->last_worker;
  const bool cut = first_worker != last_worker;
  // This CTA's part: whole groups of 32 float4s, so that a warp's lie in one row.
  const int begin = X::ITEMS / 32 * rank / ctas * 32, end = X::ITEMS / 32 * (rank + 1) / ctas * 32;
  const size_t partial_size = partial_floats(N, D, ctas);
  const size_t stats_at = X::ITEMS * 4 + rank * 2 * N;
  const auto partial_of = [&](int w) { return p.partials + partial_size * slot_of(w, first_worker); };
  const auto rank_of_part = [&](int part) { return part < ctas ? part : rank; };

  // Calls merge(index of each item, results) for this thread's items, and store(index, n, d, result) for those that
  // exist. Few parts of a large tile: several items at once, or latency is all there is.
  const auto for_items = [&](auto items, auto &&merge, auto &&store) {
    constexpr int kItems = items;
#pragma unroll 1
    for (int index = begin + consumer; index < end && index / (D / 4) < rows; index += kItems * kConsumers) {
      const auto index_of = [&](int item) { return index + item * kConsumers; };
      Merged<> merged[kItems];
      merge([&](int item) { return index_of(item) < end ? index_of(item) : index; }, merged);
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int n = index_of(item) / (D / 4), d = index_of(item) % (D / 4) * 4;
        if (index_of(item) < end && n < rows) store(index_of(item), n, d, merged[item]);
      }
    }
  };
  constexpr std::integral_constant<int, 2> two{};
  constexpr std::integral_constant<int, 8> eight{};
  constexpr std::integral_constant<int, (N > 32 ? 4 : 1)> some{};
  constexpr std::integral_constant<int, (N > 32 ? 2 : 1)> few{};

  const auto merge_ctas = [&](auto parts, auto items) {
    const auto store = [&](int index, int n, int d, const Merged<> &r) {
      if (cut) {
        float *const partial = partial_of(worker_of(ctas));
        __stcg(reinterpret_cast<float4 *>(partial) + index, r.value[0]);
        if (lane == 0) __stcg(reinterpret_cast<float2 *>(partial + stats_at) + n, make_float2(r.top, r.sum));
      } else {
        store_output(p, row_info[n], d, r, kv_scale);
      }
    };
    const auto merge = [&](auto &&index_of, auto &merged) {
      merge_parts<parts>(
          ctas,
          [&](int item, int part) {
            const int n = index_of(item) / (D / 4);
            return make_float2(load_cluster_float(x.tops + n * 4, rank_of_part(part)),
                               load_cluster_float(x.sums + n * 4, rank_of_part(part)));
          },
          [&](int item, int part) {
            const int n = index_of(item) / (D / 4), d = index_of(item) % (D / 4) * 4;
            return load_cluster_float4(x.values + (n * X::ROW + d) * 4, rank_of_part(part));
          },
          merged);
    };
    for_items(items, merge, store);
  };
  if (ctas <= 2) {
    merge_ctas(two, some);
  } else {
    merge_ctas(eight, few);
  }
  __syncwarp();
  if (lane < ctas) mbarrier_arrive_cluster_relaxed(x.parts_read, lane);  // what was read is in registers
  if (!cut) return;

  named_barrier<kBarrierConsumers, kConsumers>();
  if (consumer == 0) {
    int *const counter = p.counters + first_worker * ctas + rank;
    x.end->is_last = count_arrival(counter) == last_worker - first_worker;
    if (x.end->is_last) *counter = 0;
  }
  named_barrier<kBarrierConsumers, kConsumers>();
  if (!x.end->is_last) return;
  const auto merge = [&](auto &&index_of, auto &merged) {
    constexpr int kPieces = 4;  // at a time
#pragma unroll
    for (Merged<> &r : merged) r = nothing_merged<1>();
#pragma unroll 1
    for (int first = first_worker; first <= last_worker; first += kPieces) {
      const auto from = [&](int part) { return partial_of(min(first + part, last_worker)); };
      Merged<> next[few()];
      merge_parts<kPieces>(
          last_worker - first + 1,
          [&](int item, int part) {
            return __ldcg(reinterpret_cast<const float2 *>(from(part) + stats_at) + index_of(item) / (D / 4));
          },
          [&](int item, int part) { return __ldcg(reinterpret_cast<const float4 *>(from(part)) + index_of(item)); },
          next);
#pragma unroll
      for (int item = 0; item < few(); ++item) merged[item] = sum_of(merged[item], next[item]);
    }
  };
  for_items(few, merge, [&](int, int n, int d, const Merged<> &r) { store_output(p, row_info[n], d, r, kv_scale); });
  named_barrier<kBarrierConsumers, kConsumers>();  // the next piece's rows and end are written over these
}

// Called by all consumers once their CTA's sums are in the exchange (each thread's own writes suffice: it
// synchronises). `nth` counts the pieces of this CTA from 0. Before the exchange is written again the caller waits on
// parts_read.
template <int N, int D, int PAD>
__device__ __forceinline__ void finish_piece(const DecodeParams &p, const Exchange<N, D, PAD> &x,
                                             const RowInfo *row_info, float kv_scale, uint32_t nth) {
  const int lane = threadIdx.x % 32, ctas = x.end->ctas;
  if (ctas == 1) {
    named_barrier<kBarrierConsumers, kConsumers>();
    return finish_alone(p, x, row_info, kv_scale);
  }
  if (nth == 0) cluster_wait();  // every CTA's barriers are initialised
  __syncwarp();
  if (lane < ctas) mbarrier_arrive_cluster(x.parts_ready, lane);
  mbarrier_wait_cluster(x.parts_ready, nth & 1);
  finish_together(p, x, row_info, kv_scale);
}

// Ragged batches: rows of q past the last sequence belong to nobody and get out = 0 and empty_lse, like rows that see
// no token.
__device__ __forceinline__ void fill_spare_rows(const DecodeParams &p, int d_latent) {
  if (p.total_q == 0 || blockIdx.x != gridDim.x - 1) return;
  const int lane = threadIdx.x % 32, begin = p.sequences[p.batch].q_begin;
  const int heads = p.num_heads;
  for (int64_t i = static_cast<int64_t>(begin) * heads + (threadIdx.x - 128) / 32;
       i < static_cast<int64_t>(p.total_q) * heads; i += kConsumers / 32) {
    const RowInfo row{static_cast<int>(i / heads), static_cast<int>(i % heads), 0};
    for (int d = 4 * lane; d < d_latent; d += 128) store_output(p, row, d, Merged<>{0.f, 0.f, {}}, 1.f);
  }
}

}  // namespace etap::sm90
