// A CTA's pieces of the schedule (planner.h), one after the other, and where their rows lie.
#pragma once

#include <cstddef>
#include <type_traits>

#include "../ptx/ptx.cuh"
#include "etap.h"
#include "params.h"

namespace etap::sm90 {

enum : int { kBarrierConsumers = 1 };  // named barrier of the 256 consumer threads; 0 is __syncthreads
constexpr int kConsumers = 256;
constexpr int kSharedMemoryLimit = 232448;  // of a CTA
constexpr float kNoMaximum = -1e30f;  // below every logit, finite: exp2(-inf - m) is 0, not NaN

template <int Q_DTYPE>
using QueryType = std::conditional_t<Q_DTYPE == ETAP_BF16, __nv_bfloat16, __half>;

// A kernel's entry of the catalogue.
template <typename K>
Kernel kernel_entry(void (*kernel)(DecodeParams)) {
  return Kernel{reinterpret_cast<const void *>(kernel), K::THREADS, static_cast<int>(sizeof(typename K::Shared))};
}

// Read where it is needed, so that no register holds it during the loop over KV blocks.
__device__ __forceinline__ int this_cta() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// KV tokens that a query token sees.
__device__ __forceinline__ int seen_by(const SequenceRecord &s, int token, bool causal) {
  return causal ? s.length - s.q_len + token + 1 : s.length;
}

// A piece as its CTA needs it.
struct PieceContext {
  SequenceRecord sequence;
  const int32_t *table;  // the sequence's row of the block table
  int block_begin, block_end;
  int kv_end;       // KV tokens that any row of the tile sees
  int rows;         // rows of the tile that exist; not more than 0: nothing to do
  int first_limit;  // KV tokens that every row of the tile sees
  int row_begin;    // first row of the tile among the sequence's query_len * num_heads rows
  bool unreadable;  // longer than the block table: no block is read, the rows become NaN
};

// What the end of a piece, and the merge, need to know of it: in shared memory, since O^T needs the registers.
struct PieceEnd {
  SequenceRecord sequence;
  int row_begin, rows;                  // PieceContext's
  int partial_row;                      // of the tile's first row among those of all slots; negative: it is not cut
  int first_row, next_row, row_step;    // likewise of part 0, of part 1, from there on
  int first_part, part, parts;          // Piece's
  int counter;                          // of p.counters
  int block_end, share_end;             // Piece's
  int left;                             // of the merge: CTAs that waited no longer when the last part came; -1: it wasn't this one
  uint32_t target;                      // of the merge: parts that are there when all are
};

// The pieces of a CTA, in order, for a converged warp. Lane i holds word i of its team's record: one load brings it all,
// where one load a field would wait for the memory once a field, before the first byte of KV.
struct Pieces {
  const DecodeParams &p;
  int word;
  int unit, begin;  // the piece at hand begins there; all that is kept, since O^T needs the registers

  __device__ __forceinline__ explicit Pieces(const DecodeParams &params) : p(params) {
    read_record();
    unit = field(offsetof(TeamRecord, unit_begin));
    begin = field(offsetof(TeamRecord, block_begin));
    wait_for_previous_kernel();
  }
  // Again where not even its one register can be kept.
  __device__ __forceinline__ void read_record() {
    constexpr int kWords = sizeof(TeamRecord) / sizeof(int);
    const int lane = threadIdx.x % 32;
    word = lane < kWords ? __ldcg(reinterpret_cast<const int *>(p.teams + this_cta() / p.team) + lane) : 0;
    // A workspace that this plan has not filled: no units.
    if (field(offsetof(TeamRecord, id)) != static_cast<int>(p.plan_id) &&
        lane == offsetof(TeamRecord, unit_end) / sizeof(int))
      word = -1;
  }
  __device__ __forceinline__ int field(size_t offset) const {
    return __shfl_sync(0xffffffffu, word, static_cast<int>(offset / sizeof(int)));
  }
  __device__ __forceinline__ bool done() const {
    const int end = field(offsetof(TeamRecord, unit_end));
    return unit > end || end < 0;
  }
  // `share_end`: Piece::share_end and block_end of the piece at hand, as context() told.
  __device__ __forceinline__ void next(int block_end, int share_end) {
    const bool more = block_end < share_end;
    begin = more ? block_end : 0;
    unit += !more;
  }
  __device__ __forceinline__ PieceContext context(int tile_rows, Piece &piece) const {
    TeamRecord record;
    record.unit_begin = field(offsetof(TeamRecord, unit_begin));
    record.unit_end = field(offsetof(TeamRecord, unit_end));
    record.block_end = field(offsetof(TeamRecord, block_end));
    record.block_begin = field(offsetof(TeamRecord, block_begin));
    record.begin_first = field(offsetof(TeamRecord, begin_first));
    record.begin_last = field(offsetof(TeamRecord, begin_last));
    record.end_last = field(offsetof(TeamRecord, end_last));
    constexpr size_t kFirst = offsetof(TeamRecord, first_sequence);
    const int sequence = p.groups == 1 ? unit : unit / p.groups, group = unit - sequence * p.groups;
    const int team = this_cta() / p.team, member = this_cta() - team * p.team;
    PieceContext c;
    c.sequence.length = field(kFirst + offsetof(SequenceRecord, length));
    c.sequence.q_begin = field(kFirst + offsetof(SequenceRecord, q_begin));
    c.sequence.q_len = field(kFirst + offsetof(SequenceRecord, q_len));
    if (unit != record.unit_begin) c.sequence = p.sequences[sequence];
    c.table = p.block_table + sequence * p.block_table_stride;
    const auto visible = [&](int row, int rows) {
      return visible_tokens(c.sequence.length, c.sequence.q_len, row, rows, p.num_heads, p.causal);
    };
    piece = piece_of(record, team, unit, begin, blocks_of(visible(group * p.group_rows, p.group_rows)), p.invariant);
    c.row_begin = group * p.group_rows + member * tile_rows;
    c.kv_end = visible(c.row_begin, tile_rows);
    c.unreadable = c.sequence.length > p.token_limit;
    c.block_begin = piece.block_begin;
    c.block_end = c.unreadable ? piece.block_begin : min(piece.block_end, blocks_of(c.kv_end));
    c.rows = min(tile_rows, c.sequence.q_len * p.num_heads - c.row_begin);
    c.first_limit = seen_by(c.sequence, c.row_begin / p.num_heads, p.causal);
    return c;
  }
  __device__ __forceinline__ PieceEnd end(int tile_rows, const PieceContext &c, const Piece &piece) const {
    const int member = this_cta() % p.team;
    const auto row_of = [&](int slot) { return slot * p.group_rows + member * tile_rows; };
    PieceEnd e;
    e.sequence = c.sequence;
    e.row_begin = c.row_begin;
    e.rows = c.rows;
    e.first_row = row_of(piece.slot);
    e.next_row = row_of(piece.next_slot);
    e.row_step = piece.slot_step * p.group_rows;
    e.partial_row = piece.parts > 1 ? row_of(slot_of(piece, piece.part)) : -1;
    e.first_part = piece.first_part;
    e.part = piece.part;
    e.parts = piece.parts;
    e.counter = piece.counter * p.team + member;
    e.block_end = piece.block_end;
    e.share_end = piece.share_end;
    e.left = -1;
    e.target = 0;
    return e;
  }
};

// Calls body(context) for the pieces of this CTA that have rows; `end`, if any, gets what the end of each needs, of the
// thread 128, visible after the barrier of load_query.
template <typename Body>
__device__ __forceinline__ void for_pieces(const DecodeParams &p, int tile_rows, PieceEnd *end, Body &&body) {
  for (Pieces pieces(p); !pieces.done();) {
    Piece piece;
    const PieceContext context = pieces.context(tile_rows, piece);
    if (context.rows > 0) {
      if (end != nullptr && threadIdx.x == 128) *end = pieces.end(tile_rows, context, piece);
      body(context);
    }
    pieces.next(piece.block_end, piece.share_end);
  }
}
template <typename Body>
__device__ __forceinline__ void for_pieces(const DecodeParams &p, int tile_rows, Body &&body) {
  for_pieces(p, tile_rows, nullptr, body);
}

// After each thread has initialised its barriers. What the plan wrote may be read before the kernel before this one is
// through: the plan's kernel lets nobody begin before its writes are visible (plan.cu). All else has to wait.
__device__ __forceinline__ void begin_kernel() {
  mbarrier_init_fence();
  __syncthreads();
  allow_next_kernel();
}

// One scale for the whole cache; 1 for 16-bit ones.
__device__ __forceinline__ float tensor_scale(const DecodeParams &p) {
  return p.kv_scale_ptr != nullptr ? __ldg(p.kv_scale_ptr) : p.kv_scale;
}

// Bytes that are a NaN in every format: what is copied in place of a page that does not exist.
struct NanBytes {
  uint32_t words[kBlockTokens * 128 / 4];
  constexpr NanBytes() : words() {
    for (uint32_t &word : words) word = 0xffffffffu;
  }
};
static __device__ const NanBytes kNanBytes{};

}  // namespace etap::sm90
