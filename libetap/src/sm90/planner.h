// The schedule of a step: which worker computes which KV blocks of which sequence.
//
// A *unit* is one tile of query rows of one sequence; it has to walk the KV blocks (64 tokens) that its rows can see.
// A *worker* is a cluster of CTAs. Units stand in a row, and every worker takes a contiguous piece of that row:
//
//     unit 0            unit 1      unit 2                 unit 3
//     |--------------|  |-------|  |---------------------|  |-----|
//     '-- worker 0 --''--- worker 1 ---''--- worker 2 ---''-- worker 3 --'
//
// so a unit is cut only where a worker's share ends, and a worker has at most two cut units: its first and its last.
// A partial result therefore needs no list of slots: slot 2w belongs to the unit that worker w continues, slot 2w + 1
// to the unit that it begins and the next worker continues.
//
// Where to cut: workers are filled in order up to a budget of block times. A piece costs its blocks and a fixed part
// (query load, pipeline fill and drain). Even budgets are not always best - 64 sequences on 66 workers want no cut at
// all - so a warp tries 32 budgets, one a lane, and keeps the one whose longest worker is shortest.
//
// Everything here runs on the host too, where tests compare it with a brute-force model.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ETAP_HD __host__ __device__ __forceinline__
#else
#define ETAP_HD inline
#endif

namespace etap::sm90 {

constexpr int kBlockTokens = 64;
constexpr int kCandidates = 32;

struct PlanShape {
  int batch;
  int tiles;      // row tiles a sequence
  int tile_rows;  // N
  int num_heads;
  int max_query_len;
  int workers;
  int cluster;  // CTAs a worker
  bool causal;
  bool never_split;  // batch-invariant mode: a unit's bits must not depend on where its neighbours are cut
};

struct alignas(16) SequenceRecord {
  int length;   // KV tokens
  int q_begin;  // first row of q
  int q_len;    // query tokens
  int reserved;
};

// Units unit_begin .. unit_end (inclusive; none when unit_begin > unit_end), from block_begin of the first to block_end
// of the last.
struct alignas(16) WorkerRecord {
  int unit_begin, block_begin, unit_end, block_end;
  int begin_first, begin_last;  // the workers that share unit_begin
  int end_last;  // the last worker that shares unit_end, when that is another unit (its first is this one)
  int reserved;
  SequenceRecord first_sequence;  // of unit_begin: one dependent load less before the first byte of KV
};

struct Piece {
  int block_begin, block_end;
  int first_worker, last_worker;
};

ETAP_HD Piece piece_of(const WorkerRecord &w, int worker, int unit, int unit_blocks) {
  const bool is_begin = unit == w.unit_begin, is_end = unit == w.unit_end;
  Piece p;
  p.block_begin = is_begin ? w.block_begin : 0;
  p.block_end = is_end ? w.block_end : unit_blocks;
  p.first_worker = is_begin ? w.begin_first : worker;
  p.last_worker = is_begin ? w.begin_last : (is_end ? w.end_last : worker);
  return p;
}
ETAP_HD int slot_of(int worker, int first_worker) { return worker == first_worker ? 2 * worker + 1 : 2 * worker; }

// KV tokens that tile `tile` of a sequence can see: all of them, or, causal, those up to the tile's last query token.
ETAP_HD int visible_tokens(int length, int q_len, int tile, int tile_rows, int num_heads, bool causal) {
  const int rows = q_len * num_heads, row_begin = tile * tile_rows;
  if (length <= 0 || row_begin >= rows) return 0;
  if (!causal) return length;
  const int row_last = (row_begin + tile_rows < rows ? row_begin + tile_rows : rows) - 1;
  const int tokens = length - q_len + row_last / num_heads + 1;
  return tokens > 0 ? tokens : 0;
}
ETAP_HD int blocks_of(int tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

// Costs in blocks of the whole worker, whose CTAs walk `cluster` blocks at a time.
struct Costs {
  int piece;      // fixed part of a piece
  int min_piece;  // a cut leaves at least that much on both sides
  int split;      // what one cut anywhere adds to the step: partial results travel through L2
};
ETAP_HD Costs costs_of(int cluster) { return Costs{5 * cluster, cluster, 2 * cluster}; }

struct NoEmit {
  ETAP_HD void worker(int, const WorkerRecord &) {}
  ETAP_HD void split(int, int, int) {}
};

ETAP_HD void mark_split(WorkerRecord *workers, int unit, int first, int last) {
  for (int w = first; w < last; ++w) {
    if (workers[w].unit_begin == unit) {
      workers[w].begin_first = first;
      workers[w].begin_last = last;
    } else {
      workers[w].end_last = last;
    }
  }
}

// Fills workers in order up to `budget`; the last one takes whatever is left. Returns the cost of the outcome: the
// longest worker, and the price of cutting if any unit was cut. `emit.worker(w, record)` gets every worker;
// `emit.split(unit, first, last)`, called before worker `last` is emitted, tells the earlier ones who shares their unit
// (`mark_split`).
template <typename Blocks, typename Emit>
ETAP_HD int64_t assign(const PlanShape &shape, const Blocks &blocks, int64_t wanted_budget, Emit &&emit) {
  const Costs costs = costs_of(shape.cluster);
  const int units = shape.batch * shape.tiles;
  int budget = wanted_budget < 0x3fffffff ? static_cast<int>(wanted_budget) : 0x3fffffff;
  int unit = 0, done = 0, left = blocks(0);
  int worker = 0, first_worker = 0, used = 0, longest = 0;
  bool any_cut = false;
  WorkerRecord record{0, 0, -1, 0, 0, 0, 0, 0, {}};
  // One step is one piece, or the end of a worker. Selects rather than branches: the lanes of a warp walk different
  // budgets.
  while (unit < units) {
    const int room = budget - used - costs.piece;
    const bool fits = left <= room || worker == shape.workers - 1 || (used == 0 && shape.never_split);
    int cut = room < left - costs.min_piece ? room : left - costs.min_piece;
    cut = shape.never_split || cut < costs.min_piece ? 0 : cut;
    const int take = fits ? left : cut;
    if (!fits && take == 0 && used == 0) {  // a fresh worker has no room for a unit that is too small to cut
      budget = left + costs.piece;
      continue;
    }
    used += take > 0 ? take + costs.piece : (fits ? 1 : 0);
    longest = used > longest ? used : longest;
    left -= take;
    done += take;
    if (take > 0 || fits) {
      record.unit_end = unit;
      record.block_end = done;
      record.end_last = worker;
    }
    if (fits) {
      if (worker != first_worker) {
        record.begin_first = first_worker;
        record.begin_last = worker;
        emit.split(unit, first_worker, worker);
      }
      ++unit;
      done = 0;
      first_worker = worker;
      if (unit < units) left = blocks(unit);
    } else {
      any_cut |= take > 0;
      emit.worker(worker, record);
      ++worker;
      used = 0;
      first_worker = done == 0 ? worker : first_worker;
      record = WorkerRecord{unit, done, unit - 1, 0, worker, worker, worker, 0, {}};
    }
  }
  emit.worker(worker, record);
  for (int w = worker + 1; w < shape.workers; ++w) emit.worker(w, WorkerRecord{0, 0, -1, 0, w, w, w, 0, {}});
  return static_cast<int64_t>(longest) + (any_cut ? costs.split : 0);
}

// The budgets that are tried: from an even share upwards, and the largest unit whole.
ETAP_HD int64_t candidate_budget(const PlanShape &shape, int64_t total_cost, int largest_unit, int candidate) {
  const Costs costs = costs_of(shape.cluster);
  const int idle =
      shape.workers - shape.batch * shape.tiles;  // workers that only a cut can occupy, with a piece of their own
  const int64_t share =
      (total_cost + static_cast<int64_t>(idle > 0 ? idle : 0) * costs.piece + shape.workers - 1) / shape.workers;
  const int64_t even = share > costs.piece + costs.min_piece ? share : costs.piece + costs.min_piece;
  if (candidate == kCandidates - 1) return largest_unit + costs.piece;
  const int64_t step = even / 48 > 0 ? even / 48 : 1;
  return even + candidate * step;
}

}  // namespace etap::sm90
