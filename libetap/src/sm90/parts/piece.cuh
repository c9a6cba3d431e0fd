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
#include "sm90/ptx/ptx.cuh"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

enum : int { kBarrierConsumers = 1 };  // named barrier of the 256 consumer threads; 0 is __syncthreads
constexpr int kConsumers = 256;
constexpr float kNoMaximum = -1e30f;  // below every logit, finite: exp2(-inf - m) is 0, not NaN

// Between the initialisation of barriers and the roles: a CTA's threads meet, and the kernel overlaps with the one
// before it, whose results it may read from here on, and the one after it.
__device__ __forceinline__ void begin_kernel() {
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
}
// A second kernel of a call reads nothing of the first's and waits for it at its end, for the sake of those behind
// both.
__device__ __forceinline__ void begin_second_kernel() {
  __syncthreads();
  allow_next_kernel();
}

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

// The pieces of this CTA's worker, in order, for a converged warp. Lane i holds word i of the record: one load brings
// it all, where one load a field would wait for the memory once a field, before the first byte of KV.
struct Pieces {
  static constexpr int WORDS = sizeof(WorkerRecord) / sizeof(int);

  const DecodeParams &p;
  int word;
  int unit;  // at hand; all that is kept, since O^T needs the registers

  // From the worker's `nth` unit on. Made again for each, it keeps no register in between.
  __device__ __forceinline__ explicit Pieces(const DecodeParams &params, int nth = 0) : p(params) {
    read_record();
    unit = field(offsetof(WorkerRecord, unit_begin)) + nth;
  }
  // Again where not even its one register can be kept.
  __device__ __forceinline__ void read_record() {
    const int lane = threadIdx.x % 32;
    word = lane < WORDS ? reinterpret_cast<const int *>(p.records + cta_index())[lane] : 0;
  }
  __device__ __forceinline__ int field(size_t offset) const {
    return __shfl_sync(0xffffffffu, word, static_cast<int>(offset / sizeof(int)));
  }
  __device__ __forceinline__ bool done() const { return unit > field(offsetof(WorkerRecord, unit_end)); }
  __device__ __forceinline__ void next() { ++unit; }
  __device__ __forceinline__ PieceContext context(int tile_rows) const {
    WorkerRecord record;
    record.unit_begin = field(offsetof(WorkerRecord, unit_begin));
    record.block_begin = field(offsetof(WorkerRecord, block_begin));
    record.unit_end = field(offsetof(WorkerRecord, unit_end));
    record.block_end = field(offsetof(WorkerRecord, block_end));
    record.begin_first = field(offsetof(WorkerRecord, begin_first));
    record.begin_last = field(offsetof(WorkerRecord, begin_last));
    record.end_last = field(offsetof(WorkerRecord, end_last));
    constexpr size_t kFirst = offsetof(WorkerRecord, first_sequence);
    const int sequence = unit / p.tiles, tile = unit - sequence * p.tiles;
    PieceContext c;
    c.ctas = field(offsetof(WorkerRecord, single)) == 1 ? 1 : static_cast<int>(cluster_size());
    c.sequence.length = field(kFirst + offsetof(SequenceRecord, length));
    c.sequence.q_begin = field(kFirst + offsetof(SequenceRecord, q_begin));
    c.sequence.q_len = field(kFirst + offsetof(SequenceRecord, q_len));
    c.sequence.table = field(kFirst + offsetof(SequenceRecord, table));
    if (unit != record.unit_begin) c.sequence = p.sequences[sequence];
    const bool of_prefix = tile_rows == kPrefixRows && is_prefix(c.sequence), causal = p.causal && !of_prefix;
    const int column = tile_rows == kPrefixRows && !of_prefix ? c.sequence.table : 0;
    c.table = p.block_table + (of_prefix ? c.sequence.table : sequence) * p.block_table_stride + column;
    c.kv_end = visible_tokens(c.sequence.length, c.sequence.q_len, tile, tile_rows, p.num_heads, causal);
    c.piece = piece_of(record, worker_of(c.ctas), unit, blocks_of(c.kv_end));
    c.unreadable = c.sequence.length > p.token_limit - (column << p.page_shift);
    if (c.unreadable) c.piece.block_end = c.piece.block_begin;
    c.row_begin = tile * tile_rows;
    c.rows = min(tile_rows, c.sequence.q_len * p.num_heads - c.row_begin);
    c.first_limit = c.sequence.length;
    if (causal) c.first_limit += c.row_begin / p.num_heads + 1 - c.sequence.q_len;
    if (p.tree_mask != nullptr && !of_prefix) c.first_limit -= c.sequence.q_len;
    return c;
  }
};

// What the end of a piece needs to know, in shared memory: during the loop over KV blocks O^T needs the registers.
struct PieceEnd {
  int ctas, rows;
  int first_worker, last_worker;  // that share the unit
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
    *end = PieceEnd{c.ctas, c.rows, c.piece.first_worker, c.piece.last_worker, 0, kept};
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

// A row's result: sum of P V against the maximum `top`, and sum of P.
struct Merged {
  float top, sum;
  float4 value;
};

// Merges, for ITEMS rows, PARTS (a power of two) parts of a row, of which `count` exist. stats(item, part) is a part's
// maximum and sum, value(item, part) its sum of P V; beyond the last part they may be any part's. All loads are in
// flight at once.
template <int PARTS, int ITEMS, typename Stats, typename Value>
__device__ __forceinline__ void merge_parts(int count, Stats &&stats, Value &&value, Merged (&merged)[ITEMS]) {
  const int mine = threadIdx.x % PARTS;
  float2 part[ITEMS];
  float4 values[ITEMS][PARTS];
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    part[item] = stats(item, mine);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) values[item][i] = value(item, i);
  }
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    float top = mine < count ? part[item].x : kNoMaximum;
#pragma unroll
    for (int delta = PARTS / 2; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, delta));
    const float weight = mine < count ? exp2_approx(part[item].x - top) : 0.f;
    float sum = mine < count ? part[item].y * weight : 0.f;
#pragma unroll
    for (int delta = PARTS / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const float w = __shfl_sync(0xffffffffu, weight, i);
      const float4 v = values[item][i];
      total = make_float4(total.x + w * v.x, total.y + w * v.y, total.z + w * v.z, total.w + w * v.w);
    }
    merged[item] = Merged{top, sum, total};
  }
}

__device__ __forceinline__ Merged sum_of(const Merged &x, const Merged &y) {
  const float top = fmaxf(x.top, y.top), a = exp2_approx(x.top - top), b = exp2_approx(y.top - top);
  return Merged{top,
                x.sum * a + y.sum * b,
                {x.value.x * a + y.value.x * b, x.value.y * a + y.value.y * b, x.value.z * a + y.value.z * b,
                 x.value.w * a + y.value.w * b}};
}

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

  // Values d to d + 3 and, where there are more, those 128 further on, from sums of P V. What is the same for a row is
  // asked once.
  template <int COUNT>
  __device__ __forceinline__ void store(int d, float4 (&values)[COUNT]) const {
#pragma unroll
    for (float4 &v : values)
      v = empty ? make_float4(0.f, 0.f, 0.f, 0.f)
                : make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
    if (p.out_dtype == ETAP_FP32) {
      float *const out = static_cast<float *>(p.out) + at + d;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float4 &v = values[i];
        if (p.out_vectors) {
          *reinterpret_cast<float4 *>(out + 128 * i) = v;
        } else {
          out[128 * i] = v.x, out[128 * i + 1] = v.y, out[128 * i + 2] = v.z, out[128 * i + 3] = v.w;
        }
      }
    } else if (p.out_dtype == ETAP_BF16) {
      store_16<__nv_bfloat16>(d, values);
    } else {
      store_16<__half>(d, values);
    }
  }
  template <typename T, int COUNT>
  __device__ __forceinline__ void store_16(int d, const float4 (&values)[COUNT]) const {
    uint16_t *const out = static_cast<uint16_t *>(p.out) + at + d;
    if (p.out_vectors) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        *reinterpret_cast<uint2 *>(out + 128 * i) =
            make_uint2(pack2<T>(values[i].x, values[i].y), pack2<T>(values[i].z, values[i].w));
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const uint32_t first = pack2<T>(values[i].x, values[i].y), second = pack2<T>(values[i].z, values[i].w);
        uint16_t *const to = out + 128 * i;
        to[0] = first & 0xffff, to[1] = first >> 16, to[2] = second & 0xffff, to[3] = second >> 16;
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

__device__ __forceinline__ void store_output(const DecodeParams &p, const RowInfo &row, int d, const Merged &r,
                                             float kv_scale) {
  const OutputRow out(p, row, r.sum, kv_scale);
  float4 values[1] = {r.value};
  out.store(d, values);
  if (d == 0) out.store_lse(row, r.top, r.sum);
}

// Of a worker that is one CTA: the output of a unit that is its own, or sums, row by row, for who merges. As in
// load_query, a lane finds out what is to be known of one row, and a warp takes row after row.
template <int N, int D, int PAD>
__device__ __forceinline__ void finish_alone(const DecodeParams &p, const Exchange<N, D, PAD> &x,
                                             const RowInfo *row_info, float kv_scale) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32, first_worker = x.end->first_worker;
  const bool cut = first_worker != x.end->last_worker, kept = N == kPrefixRows && !cut && x.end->kept >= 0;
  const int rows = x.end->rows, mine = min(warp + 8 * lane, N - 1);
  const float top = load_shared_float(x.tops + mine * 4), sum = load_shared_float(x.sums + mine * 4);
  const RowInfo row = row_info[mine];
  const OutputRow out(p, row, sum, kv_scale);
  const bool merged = cut || kept;
  float *const partial = p.partials + partial_floats(N, D, 1) * slot_of(worker_of(1), first_worker);
  float *sums = partial + mine * D, *stats = partial + N * D + 2 * mine;
  if (kept) {
    sums = p.kept + (2 * (static_cast<int64_t>(row.token) * p.num_heads + row.head) + x.end->kept) * kept_floats(D);
    stats = sums + D;
  }
  if (warp + 8 * lane < rows) {
    if (merged) {
      __stcg(reinterpret_cast<float2 *>(stats), make_float2(top, sum));
    } else {
      out.store_lse(row, top, sum);
    }
  }
#pragma unroll 1
  for (int i = 0; warp + 8 * i < rows; ++i) {
    float4 values[D / 128];
#pragma unroll
    for (int j = 0; j < D / 128; ++j)
      values[j] = load_shared_float4(x.values + (warp + 8 * i) * (x.ROW * 4) + j * 512 + lane * 16);
    if (merged) {
      float4 *const to = reinterpret_cast<float4 *>(of_lane(sums, i)) + lane;
#pragma unroll
      for (int j = 0; j < D / 128; ++j) __stcg(to + j * 32, values[j]);
    } else {
      out.of_lane(i).store(lane * 4, values);
    }
  }
  named_barrier<kBarrierConsumers, kConsumers>();  // what follows is written over these
}

// Of single CTAs behind which no kernel merges: the last of a cut unit's to arrive adds up what the others have left
// and what it has itself, in the order of the pieces.
template <int N, int D, int PAD>
__device__ __forceinline__ void finish_cut(const DecodeParams &p, const Exchange<N, D, PAD> &x, const RowInfo *row_info,
                                           float kv_scale) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32;
  const int first_worker = x.end->first_worker, last_worker = x.end->last_worker, others = last_worker - first_worker;
  int *const counter = p.counters + first_worker;
  const auto ask = [&](auto arrived) {
    if (threadIdx.x == 128) x.end->is_last = arrived(counter) == others;
    named_barrier<kBarrierConsumers, kConsumers>();
    return x.end->is_last != 0;
  };
  // Where all others are there its own sums need not travel.
  if (!ask([](const int *c) { return arrivals_so_far(c); })) {
    finish_alone(p, x, row_info, kv_scale);
    if (!ask([](int *c) { return count_arrival(c); })) return;
  }
  if (threadIdx.x == 128) *counter = 0;
  // Latency is all there is: what is in flight at once, rows of a warp first, and their pieces.
  constexpr int kInFlight = N <= 32 || N == 64 ? 4 : 2;  // with 40 to 56 rows registers are scarce
  constexpr int kRows = N >= 32 ? kInFlight : N >= 16 ? 2 : 1, kPieces = kInFlight / kRows;
  const int rows = x.end->rows, own = worker_of(1);
#pragma unroll 1
  for (int first = warp; first < rows; first += 8 * kRows) {
    const auto row_of = [&](int i) { return min(first + 8 * i, rows - 1); };
    float top[kRows], sum[kRows];
    float4 total[kRows][D / 128];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      top[i] = kNoMaximum;
      sum[i] = 0.f;
#pragma unroll
      for (float4 &t : total[i]) t = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll 1
    for (int begin = first_worker; begin <= last_worker; begin += kPieces) {
      float2 stats[kPieces][kRows];
      float4 values[kPieces][kRows][D / 128];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int worker = min(begin + piece, last_worker);
        const float *const partial = p.partials + partial_floats(N, D, 1) * slot_of(worker, first_worker);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int n = row_of(i);
          if (worker == own) {
            stats[piece][i] = make_float2(load_shared_float(x.tops + n * 4), load_shared_float(x.sums + n * 4));
#pragma unroll
            for (int j = 0; j < D / 128; ++j)
              values[piece][i][j] = load_shared_float4(x.values + n * (x.ROW * 4) + j * 512 + lane * 16);
          } else {
            stats[piece][i] = __ldcg(reinterpret_cast<const float2 *>(partial + N * D + 2 * n));
#pragma unroll
            for (int j = 0; j < D / 128; ++j)
              values[piece][i][j] = __ldcg(reinterpret_cast<const float4 *>(partial + n * D) + j * 32 + lane);
          }
        }
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const bool exists = begin + piece <= last_worker;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float2 its = exists ? stats[piece][i] : make_float2(kNoMaximum, 0.f);
          const float higher = fmaxf(top[i], its.x);
          const float a = exp2_approx(top[i] - higher), b = exists ? exp2_approx(its.x - higher) : 0.f;
          top[i] = higher;
          sum[i] = sum[i] * a + its.y * b;
#pragma unroll
          for (int j = 0; j < D / 128; ++j) {
            float4 &t = total[i][j];
            const float4 v = values[piece][i][j];
            t = make_float4(t.x * a + v.x * b, t.y * a + v.y * b, t.z * a + v.z * b, t.w * a + v.w * b);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + 8 * i >= rows) break;
      const RowInfo row = row_info[first + 8 * i];
      const OutputRow out(p, row, sum[i], kv_scale);
      out.store(lane * 4, total[i]);
      if (lane == 0) out.store_lse(row, top[i], sum[i]);
    }
  }
  named_barrier<kBarrierConsumers, kConsumers>();  // what follows is written over these
}

// Called by all consumers once their CTA's sums are in the exchange (each thread's own writes suffice: it
// synchronises). `nth` counts the pieces of this CTA from 0. Before the exchange is written again the caller waits on
// parts_read.
template <int N, int D, int PAD>
__device__ __forceinline__ void finish_piece(const DecodeParams &p, const Exchange<N, D, PAD> &x,
                                             const RowInfo *row_info, float kv_scale, uint32_t nth) {
  using X = Exchange<N, D, PAD>;
  const int consumer = opaque(static_cast<int>(threadIdx.x)) - 128, lane = consumer & 31;
  const int ctas = x.end->ctas, rank = rank_of(ctas);
  if (ctas > 1) {
    if (nth == 0) cluster_wait();  // every CTA's barriers are initialised
    __syncwarp();
    if (lane < ctas) mbarrier_arrive_cluster(x.parts_ready, lane);
    mbarrier_wait_cluster(x.parts_ready, nth & 1);
  } else {
    named_barrier<kBarrierConsumers, kConsumers>();
    if (p.merged_after || x.end->first_worker == x.end->last_worker) return finish_alone(p, x, row_info, kv_scale);
    return finish_cut(p, x, row_info, kv_scale);
  }
  const int rows = x.end->rows, first_worker = x.end->first_worker, last_worker = x.end->last_worker;
  const bool cut = first_worker != last_worker;
  // This CTA's part: whole groups of 32 float4s, so that a warp's lie in one row.
  const int begin = X::ITEMS / 32 * rank / ctas * 32, end = X::ITEMS / 32 * (rank + 1) / ctas * 32;
  const size_t partial_size = partial_floats(N, D, ctas);
  const size_t stats_at = X::ITEMS * 4 + rank * 2 * N;
  const auto partial_of = [&](int w) { return p.partials + partial_size * slot_of(w, first_worker); };
  const auto rank_of_part = [&](int part) { return part < ctas ? part : rank; };

  // Calls merge(index of each item, results) for this thread's items, and store(index, n, d, result) for those that
  // exist. Few parts of a large tile: several items
  // at once, or latency is all there is.
  const auto for_items = [&](auto items, auto &&merge, auto &&store) {
    constexpr int kItems = items;
#pragma unroll 1
    for (int index = begin + consumer; index < end && index / (D / 4) < rows; index += kItems * kConsumers) {
      const auto index_of = [&](int item) { return index + item * kConsumers; };
      Merged merged[kItems];
      merge([&](int item) { return index_of(item) < end ? index_of(item) : index; }, merged);
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int n = index_of(item) / (D / 4), d = index_of(item) % (D / 4) * 4;
        if (index_of(item) < end && n < rows) store(index_of(item), n, d, merged[item]);
      }
    }
  };
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2> two{};
  constexpr std::integral_constant<int, 8> eight{};
  constexpr std::integral_constant<int, (N > 32 ? 4 : 1)> some{};
  constexpr std::integral_constant<int, (N > 32 ? 2 : 1)> few{};

  const auto merge_ctas = [&](auto parts, auto items) {
    const auto store = [&](int index, int n, int d, const Merged &r) {
      if (cut) {
        float *const partial = partial_of(worker_of(ctas));
        __stcg(reinterpret_cast<float4 *>(partial) + index, r.value);
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
  const auto merge_pieces = [&](auto parts, auto items) {
    const auto merge = [&](auto &&index_of, auto &merged) {
#pragma unroll
      for (Merged &r : merged) r = Merged{kNoMaximum, 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
      for (int first = first_worker; first <= last_worker; first += parts) {
        const auto from = [&](int part) { return partial_of(min(first + part, last_worker)); };
        Merged next[items()];
        merge_parts<parts>(
            last_worker - first + 1,
            [&](int item, int part) {
              return __ldcg(reinterpret_cast<const float2 *>(from(part) + stats_at) + index_of(item) / (D / 4));
            },
            [&](int item, int part) { return __ldcg(reinterpret_cast<const float4 *>(from(part)) + index_of(item)); },
            next);
#pragma unroll
        for (int item = 0; item < items; ++item) merged[item] = sum_of(merged[item], next[item]);
      }
    };
    for_items(items, merge, [&](int, int n, int d, const Merged &r) { store_output(p, row_info[n], d, r, kv_scale); });
  };
  if (last_worker - first_worker < 2) {
    merge_pieces(two, some);
  } else {
    merge_pieces(eight, one);
  }
  named_barrier<kBarrierConsumers, kConsumers>();  // the next piece's rows and end are written over these
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
    for (int d = 4 * lane; d < d_latent; d += 128) store_output(p, row, d, Merged{0.f, 0.f, {0.f, 0.f, 0.f, 0.f}}, 1.f);
  }
}

}  // namespace etap::sm90
