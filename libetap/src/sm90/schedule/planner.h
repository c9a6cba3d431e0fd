// The schedule of a step: which worker computes which KV blocks of which sequence.
//
// A *unit* is one tile of query rows of one sequence; it has to walk the KV blocks (64 tokens) that its rows can see.
// A *worker* is a cluster of CTAs, or, where the lengths make that better, each CTA of the clusters by itself. Units
// stand in a row, and every worker takes a contiguous piece of that row:
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
// all - so a warp tries 32 budgets, one a lane, and keeps the one whose longest worker is shortest. Half of the lanes
// try single CTAs where those may be workers. A try is a walk over the units, one after the other; the records of CTAs
// are made from its outcome by a thread each.
//
// In batch-invariant mode a unit is cut at places that its own length decides, into *chunks*, and a worker, a single
// CTA, takes a contiguous piece of the row of chunks. What a unit's bits come from is then the same in every batch.
//
// Everything here runs on the host too, where tests compare it with a brute-force model.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace etap::sm90 {

constexpr int kBlockTokens = 64;
constexpr int kCandidates = 32;
constexpr int kMaxWorkers = 144;  // the multiprocessors of a whole GH100; what is sold has fewer

struct PlanShape {
  int batch;
  int tiles;      // row tiles a sequence
  int tile_rows;  // N
  int num_heads;
  int max_query_len;
  int workers;
  int cluster;  // CTAs a worker
  bool causal;
  int chunks_log2;  // batch-invariant mode: log2 of the chunks that a unit may have; else -1
  int topk;         // > 0: lengths count slots of lists, all of them where there are no lengths
  int singles;      // CTAs of all clusters, where each may be a worker of its own; else 0
};
// The plan in which they are.
ETAP_HD PlanShape of_singles(PlanShape shape) {
  shape.workers = shape.singles;
  shape.cluster = 1;
  return shape;
}

// What there is to do in all units.
struct Work {
  int64_t blocks;
  int units, empty;  // that have blocks, and that have none
  int largest;       // unit, in blocks
};

struct alignas(16) SequenceRecord {
  int length;   // KV tokens
  int q_begin;  // first row of q; of a prefix that sequences share (prefixes.h): ~place in the list of rows
  int q_len;    // query tokens
  int table;    // the column of its row of the block table where it begins; of a shared prefix: the row
};
ETAP_HD bool is_prefix(const SequenceRecord &s) { return s.q_begin < 0; }
ETAP_HD bool is_behind_prefix(const SequenceRecord &s) { return !is_prefix(s) && s.table > 0; }

// Of each CTA that is launched, what its worker does: units unit_begin .. unit_end (inclusive; none when unit_begin >
// unit_end), from block_begin of the first to block_end of the last. In batch-invariant mode units are chunks, whole
// ones, chunk c of unit u numbered (u << numbers_log2) + c, so that there are numbers for as many as any unit has;
// those that a unit does not have are empty.
struct alignas(16) WorkerRecord {
  int unit_begin, block_begin, unit_end, block_end;
  int begin_first, begin_last;  // the workers that share unit_begin
  int end_last;  // the last worker that shares unit_end, when that is another unit (its first is this one)
  int single;    // 1: the worker is this CTA, not its cluster
  int numbers_log2;
  SequenceRecord first_sequence;  // of unit_begin: one dependent load less before the first byte of KV
};

// A unit whose results are added up when all pieces are there (merge_pieces.cu): it was cut in a plan that is made for
// single CTAs alone, or its sequence stands behind a prefix that others share.
struct alignas(16) MergedUnit {
  int unit;
  int first_worker, last_worker;  // that share it; in batch-invariant mode its chunks' numbers
  int prefix_row;                 // of its sequence's first row in the prefix's tile; -1: it has none
  int prefix_first, prefix_last;  // the workers that share the prefix's unit
  int reserved[2];
};
// All of a plan's, in the workspace before them.
struct alignas(16) MergeList {
  int units, most_pieces;
  int tiles, tile_rows;  // of the plan
  int rows;              // of a unit, at most
  int reserved[3];
};

struct Piece {
  int block_begin, block_end;
  int first_worker, last_worker;  // that share the unit
  int slot;                       // of its partial result, if several do
};

// slots_log2: of a worker's slots. In batch-invariant mode each chunk has one, of its number: 0.
ETAP_HD int slot_of(int worker, int first_worker, int slots_log2 = 1) {
  return (worker << slots_log2) + (worker == first_worker ? slots_log2 : 0);
}

ETAP_HD Piece piece_of(const WorkerRecord &w, int worker, int unit, int unit_blocks) {
  const bool is_begin = unit == w.unit_begin, is_end = unit == w.unit_end;
  Piece p;
  p.block_begin = is_begin ? w.block_begin : 0;
  p.block_end = is_end ? w.block_end : unit_blocks;
  p.first_worker = is_begin ? w.begin_first : worker;
  p.last_worker = is_begin ? w.begin_last : (is_end ? w.end_last : worker);
  p.slot = slot_of(worker, p.first_worker);
  return p;
}

// KV tokens that tile `tile` of a sequence can see: all of them, or, causal, those up to the tile's last query token.
template <typename Heads>  // int or Divisor
ETAP_HD int visible_tokens(int length, int q_len, int tile, int tile_rows, const Heads &num_heads, bool causal) {
  const int rows = q_len * num_heads, row_begin = tile * tile_rows;
  if (length <= 0 || row_begin >= rows) return 0;
  if (!causal) return length;
  const int row_last = (row_begin + tile_rows < rows ? row_begin + tile_rows : rows) - 1;
  const int tokens = length - q_len + row_last / num_heads + 1;
  return tokens > 0 ? tokens : 0;
}
ETAP_HD int blocks_of(int tokens) { return tokens / kBlockTokens + (tokens % kBlockTokens > 0); }

// Costs in blocks of the whole worker, whose CTAs walk `cluster` blocks at a time.
struct Costs {
  int piece;      // fixed part of a piece
  int min_piece;  // a cut leaves at least that much on both sides
  int split;      // what one cut anywhere adds to the step: partial results travel through L2
};
ETAP_HD Costs costs_of(int cluster) { return Costs{7 * cluster, cluster, 3 * cluster}; }
ETAP_HD int64_t total_cost(const PlanShape &shape, const Work &work) {
  return work.blocks + static_cast<int64_t>(work.units) * costs_of(shape.cluster).piece + work.empty;
}
// What single CTAs pay beyond that where units are cut, since the last of them to arrive merges alone: at least, and
// one more for so many pieces of the largest unit.
constexpr int kSinglesMerge = 1, kSinglesPieces = 4;

// Where a worker's share of the row of units ends: `done` blocks into `unit`. With 0 it ends with the unit before.
struct ShareEnd {
  int unit, done;
};

// Fills workers in order up to `budget`; the last one takes whatever is left. set_end(worker, end) gets where each
// worker's share ends. Returns the cost of the outcome: the longest worker, and the price of cutting if any unit was
// cut. LONG_UNITS: the same outcome, sooner where units fill many workers, later where they don't.
template <bool LONG_UNITS, typename Blocks, typename SetEnd>
ETAP_HD int64_t assign(const PlanShape &shape, const Blocks &blocks, int64_t wanted_budget, const SetEnd &set_end) {
  const Costs costs = costs_of(shape.cluster);
  const int units = shape.batch * shape.tiles, last = shape.workers - 1;
  const auto cut_of = [&](int left, int room) {
    const int cut = room < left - costs.min_piece ? room : left - costs.min_piece;
    return cut < costs.min_piece ? 0 : cut;
  };
  int budget = wanted_budget < 0x3fffffff ? static_cast<int>(wanted_budget) : 0x3fffffff;
  int unit = 0, done = 0, left = blocks(0), worker = 0, used = 0, longest = 0;
  bool any_cut = false;
  // One step is one piece. Selects rather than branches, and what this worker and a fresh one could take side by side:
  // the lanes of a warp walk different budgets, and a step is as long as its longest chain of instructions.
  while (unit < units) {
    // A long unit fills fresh workers one after the other. How many is a division, where each would be a step.
    if (const int share = budget - costs.piece;
        LONG_UNITS && used == 0 && share >= costs.min_piece && left - costs.min_piece >= 2 * share) {
      int full = (left - costs.min_piece) / share;
      full = full < last - worker ? full : last - worker;
      left -= full * share;
      for (; full > 0; --full) {
        done += share;
        set_end(worker++, ShareEnd{unit, done});
        any_cut = true;
        longest = budget > longest ? budget : longest;
      }
    }
    const int next = blocks(unit + 1 < units ? unit + 1 : unit);
    const int room = budget - used - costs.piece, fresh_room = budget - costs.piece;
    const bool stay_fits = left <= room || worker == last;
    const bool fresh_fits = left <= fresh_room || worker + 1 == last;
    const int stay_cut = cut_of(left, room), fresh_cut = cut_of(left, fresh_room);

    const bool move = !stay_fits && stay_cut == 0 && used > 0;  // nothing of the unit has room here
    if (move) set_end(worker, ShareEnd{unit, done});
    worker += move;
    used = move ? 0 : used;
    const int cut = move ? fresh_cut : stay_cut;
    bool fits = move ? fresh_fits : stay_fits;
    const bool grow = !fits && cut == 0;  // a fresh worker has no room for a unit that is too small to cut
    budget = grow ? left + costs.piece : budget;
    fits |= grow;

    const int take = fits ? left : cut;
    used += take > 0 ? take + costs.piece : 1;
    longest = used > longest ? used : longest;
    if (!fits) set_end(worker, ShareEnd{unit, done + take});
    any_cut |= !fits;
    worker += !fits;
    used = fits ? used : 0;
    unit += fits;
    done = fits ? 0 : done + take;
    left = fits ? next : left - take;
  }
  for (; worker < shape.workers; ++worker) set_end(worker, ShareEnd{units, 0});
  return static_cast<int64_t>(longest) + (any_cut ? costs.split : 0);
}

// The first worker whose share ends behind a place; the last one's ends behind all. With kWhole the last worker that
// shares the unit, with 0 the first. end_of(worker): what `assign` told.
constexpr int kWhole = 0x7fffffff;
template <typename EndOf>
ETAP_HD int first_behind(const PlanShape &shape, const EndOf &end_of, int unit, int done) {
  int low = 0, high = shape.workers - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    const ShareEnd e = end_of(middle);
    const bool behind = e.unit > unit || (e.unit == unit && e.done > done);
    low = behind ? low : middle + 1;
    high = behind ? middle : high;
  }
  return low;
}

// A worker's record, all but its first sequence.
template <typename Blocks, typename EndOf>
ETAP_HD WorkerRecord record_of(const PlanShape &shape, const Blocks &blocks, const EndOf &end_of, int worker) {
  const ShareEnd begin = worker > 0 ? end_of(worker - 1) : ShareEnd{0, 0}, end = end_of(worker);
  WorkerRecord record{0, 0, -1, 0, worker, worker, worker, 0, 0, {}};
  if (begin.unit == end.unit && begin.done == end.done) return record;
  record.unit_begin = begin.unit;
  record.block_begin = begin.done;
  record.unit_end = end.done > 0 ? end.unit : end.unit - 1;
  record.block_end = end.done > 0 ? end.done : blocks(record.unit_end);
  record.begin_first = first_behind(shape, end_of, begin.unit, 0);
  record.begin_last = first_behind(shape, end_of, begin.unit, kWhole);
  record.end_last = first_behind(shape, end_of, record.unit_end, kWhole);
  return record;
}

// Is this the first of several workers that share the unit in which its share ends?
template <typename EndOf>
ETAP_HD bool begins_cut_unit(const EndOf &end_of, int worker) {
  const ShareEnd end = end_of(worker), begin = worker > 0 ? end_of(worker - 1) : ShareEnd{0, 0};
  return end.done > 0 && (begin.unit != end.unit || begin.done == 0);
}

// The budgets that are tried: from an even share upwards, and, as the last of so many, the largest unit whole.
ETAP_HD int64_t candidate_budget(const PlanShape &shape, const Work &work, int candidate, int candidates) {
  const Costs costs = costs_of(shape.cluster);
  const int idle =
      shape.workers - shape.batch * shape.tiles;  // workers that only a cut can occupy, with a piece of their own
  const int64_t share =
      (total_cost(shape, work) + static_cast<int64_t>(idle > 0 ? idle : 0) * costs.piece + shape.workers - 1) /
      shape.workers;
  const int64_t even = share > costs.piece + costs.min_piece ? share : costs.piece + costs.min_piece;
  if (candidate == candidates - 1) return work.largest + costs.piece;
  const int64_t step = even / 48 > 0 ? even / 48 : 1;
  return even + candidate * step;
}

// The cost of a plan of single CTAs that has come to `cost` with such a budget, beside those of clusters.
ETAP_HD int64_t cost_of_singles(const PlanShape &shape, const Work &work, int64_t cost, int64_t budget) {
  return shape.cluster * (cost + kSinglesMerge + work.largest / (kSinglesPieces * budget));
}

// Whether no budget can be better than a worker for each unit: there are enough, and the longest unit takes no longer
// than an even share and what cutting costs. Then nothing is walked.
ETAP_HD bool each_has_a_worker(const PlanShape &shape, const Work &work) {
  if (shape.batch * shape.tiles > shape.workers) return false;
  const int64_t cost = work.largest + costs_of(shape.cluster).piece;
  if (candidate_budget(shape, work, 0, kCandidates) + costs_of(shape.cluster).split < cost) return false;
  if (shape.singles == 0) return true;
  const PlanShape singles = of_singles(shape);
  const int64_t budget = candidate_budget(singles, work, 0, kCandidates);
  return cost_of_singles(shape, work, budget + costs_of(1).split, budget) >= cost;
}
ETAP_HD ShareEnd end_of_own_unit(const PlanShape &shape, int worker) {
  const int units = shape.batch * shape.tiles;
  return ShareEnd{worker < units ? worker + 1 : units, 0};
}

// Whether units fill four workers each on average. Where only a few do, lanes that divide wait for those that step.
ETAP_HD bool has_long_units(const PlanShape &shape) { return shape.batch * shape.tiles <= shape.workers / 4; }

// ---- Batch-invariant mode ----

// Blocks of each of a unit's chunks but the last: at least 8, since a piece of a full card costs some two beside its
// own (docs/tuning-log.md), and 16 as long as no more chunks are needed for it than there are.
ETAP_HD int chunk_blocks(int unit_blocks, int chunks_log2) {
  const int even = (unit_blocks + (1 << chunks_log2) - 1) >> chunks_log2, eighth = (unit_blocks + 7) / 8;
  const int usual = eighth < 8 ? 8 : eighth < 16 ? eighth : 16;
  return even > usual ? even : usual;
}
ETAP_HD int chunks_of(int unit_blocks, int chunks_log2) {
  const int size = chunk_blocks(unit_blocks, chunks_log2);
  return (unit_blocks + size - 1) / size;
}
// How many numbers a unit needs, where none has more than `most` chunks.
ETAP_HD int numbers_log2_of(int most) {
  int log2 = 0;
  while (1 << log2 < most) ++log2;
  return log2;
}
// By its number. What the unit does not have begins at its end or behind it.
ETAP_HD Piece chunk_piece(int number, int unit_blocks, int chunks_log2, int numbers_log2) {
  const int size = chunk_blocks(unit_blocks, chunks_log2), begin = (number & ((1 << numbers_log2) - 1)) * size;
  const int end = begin + size < unit_blocks ? begin + size : unit_blocks;
  return Piece{begin, end, 0, unit_blocks > size, number};
}

// Of all chunks of a unit.
ETAP_HD int cost_of_chunks(int unit_blocks, int chunks_log2) {
  return unit_blocks > 0 ? unit_blocks + chunks_of(unit_blocks, chunks_log2) * costs_of(1).piece : 1;
}

struct ChunkPlace {
  int unit, chunk;
};

// Where worker `worker`'s share ends: its last chunk is the last to begin before so much of the cost of all. Units are
// added up in groups of group_units; cost_before(group): of all groups before it.
template <typename Blocks, typename CostBefore>
ETAP_HD ChunkPlace end_of_share(const PlanShape &shape, const Blocks &blocks, int groups, int group_units,
                                const CostBefore &cost_before, int64_t all, int worker) {
  const int64_t cost = (all * (worker + 1) + shape.workers - 1) / shape.workers;
  int low = 0, high = groups - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const bool before = cost_before(middle) < cost;
    low = before ? middle : low;
    high = before ? high : middle - 1;
  }
  int64_t left = cost - cost_before(low);
  int unit = low * group_units;
  const auto of_unit = [&] { return cost_of_chunks(blocks(unit), shape.chunks_log2); };
  while (left > of_unit()) {
    left -= of_unit();
    ++unit;
  }
  const int of_chunk = chunk_blocks(blocks(unit), shape.chunks_log2) + costs_of(1).piece;
  return ChunkPlace{unit, (static_cast<int>(left) - 1) / of_chunk};
}

// A worker's record, all but its first sequence. end_of(worker): the last chunk of its share.
template <typename Blocks, typename EndOf>
ETAP_HD WorkerRecord record_of_chunks(const PlanShape &shape, const Blocks &blocks, const EndOf &end_of, int worker,
                                      int numbers_log2) {
  const auto number_of = [&](const ChunkPlace &place) { return (place.unit << numbers_log2) + place.chunk; };
  ChunkPlace begin{0, 0};
  if (worker > 0) {
    begin = end_of(worker - 1);
    const bool last = begin.chunk + 1 >= chunks_of(blocks(begin.unit), shape.chunks_log2);
    begin = last ? ChunkPlace{begin.unit + 1, 0} : ChunkPlace{begin.unit, begin.chunk + 1};
  }
  const ChunkPlace end = end_of(worker);
  return WorkerRecord{number_of(begin), 0, number_of(end), blocks(end.unit), worker, worker, worker, 0,
                      numbers_log2,     {}};
}

}  // namespace etap::sm90
