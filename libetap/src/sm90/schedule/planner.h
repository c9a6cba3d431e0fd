// The schedule of a step: which CTAs compute which KV blocks of which sequence.
//
// A *tile* is what one CTA computes at a time: up to tile_rows query rows of one sequence. Tiles of a sequence that walk
// the same KV blocks side by side are a *group*, the CTAs that do so a *team*: the second tile finds its KV in L2. A
// *unit* is one group of one sequence; units stand in a row, and every team takes a contiguous piece of that row:
//
//     unit 0            unit 1      unit 2                 unit 3
//     |--------------|  |-------|  |---------------------|  |-----|
//     '--- team 0 ---''---- team 1 ----''---- team 2 ---''- team 3 -'
//
// so a unit is cut only where a team's share ends, and a team has at most two cut units: its first and its last. Each
// piece of a cut unit leaves a partial result in a slot of its own, 2 t for what team t continues and 2 t + 1 for what
// it begins and others continue, and the CTAs that share a unit merge its rows (merge.cuh).
//
// Where to cut: a unit costs its blocks and a fixed part (query load, pipeline fill and drain), and shares are even: the
// prefix sums of the costs are searched for k / teams of the total. Even shares are not always best - 64 equal sequences
// on 132 SMs want 128 teams, and short ends had better not be cut off - so each warp tries one number of teams and one
// length below which ends are not cut off, a lane a team, and the cheapest outcome counts.
//
// In batch-invariant mode a unit is cut into parts at places that depend on its own length alone (part_blocks), shares
// end at such places, and each part has a slot, so that its bits don't depend on its neighbours.
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
constexpr int kMaxTeams = 144;  // the multiprocessors of a whole GH100; what is sold has fewer
constexpr int kCandidates = 16;
constexpr int kInvariantParts = 32;  // the most parts of a unit in batch-invariant mode

struct PlanShape {
  int batch;
  int team;        // CTAs of a team, tiles of a group
  int groups;      // of tiles, of one sequence
  int group_rows;  // query rows of a group: team * tile_rows
  int num_heads;
  int max_query_len;
  int teams;
  int least_piece;  // blocks; at least 2, so that no two shares end at the same place within a unit
  int block_cycles;      // of one CTA, for a block whose data are there
  float memory_cycles;   // of the whole card, to bring a block of KV
  float merge_cycles;    // to write and merge a partial result
  uint32_t id;      // of this shape: tells a workspace that another plan, or none, has written
  bool causal;
  bool invariant;
};

struct alignas(16) SequenceRecord {
  int length;   // KV tokens
  int q_begin;  // first row of q
  int q_len;    // query tokens
  int reserved;
};

// A team's share: units unit_begin .. unit_end (inclusive; none when unit_begin > unit_end), from block_begin of the
// first to block_end of the last.
struct alignas(16) TeamRecord {
  int unit_begin, block_begin, unit_end, block_end;
  int begin_first, begin_last;  // the teams that share unit_begin
  int end_last;  // the last team that shares unit_end, when that is another unit (its first is this one)
  uint32_t id;   // PlanShape::id
  SequenceRecord first_sequence;  // of unit_begin: one dependent load less before the first byte of KV
};

ETAP_HD int blocks_of(int tokens) { return tokens / kBlockTokens + (tokens % kBlockTokens > 0); }

// KV tokens that rows row_begin .. row_begin + rows - 1 of a sequence can see: all of them, or, causal, those up to the
// last row's query token.
ETAP_HD int visible_tokens(int length, int q_len, int row_begin, int rows, int num_heads, bool causal) {
  const int all_rows = q_len * num_heads;
  if (length <= 0 || row_begin >= all_rows) return 0;
  if (!causal) return length;
  const int row_last = (row_begin + rows < all_rows ? row_begin + rows : all_rows) - 1;
  const int tokens = length - q_len + row_last / num_heads + 1;
  return tokens > 0 ? tokens : 0;
}

// Batch-invariant mode: blocks of a part of a unit of `blocks` blocks.
ETAP_HD int part_blocks(int blocks) {
  const int even = (blocks + kInvariantParts - 1) / kInvariantParts, least = blocks > 128 ? 16 : 8;
  return even > least ? even : least;
}
ETAP_HD int parts_of(int blocks) {
  return blocks > 0 ? (blocks + part_blocks(blocks) - 1) / part_blocks(blocks) : 1;
}

// Costs in block times of one CTA.
constexpr int kPieceCost = 2;  // fixed part of a piece: queries, filling and draining the pipeline

ETAP_HD int64_t unit_cost(int blocks) { return blocks > 0 ? int64_t{blocks} + kPieceCost : 1; }

// A place in the row of units: `done` blocks into `unit`; with 0 at its beginning.
struct Place {
  int unit, done;
};

// How a candidate cuts.
struct Candidate {
  double share;   // of a team in the costs but the first unit's fixed part: each team pays one for what it continues
  int teams;      // that get a share
  int least_end;  // an end of fewer blocks is not cut off
};
ETAP_HD Candidate candidate_of(const PlanShape &shape, int64_t units, int64_t total_cost, int index) {
  // Ends of 1, 2, 4, 8 blocks, of 1/8, 1/4, 1/2 of a share, of any length. Shares of at least one piece; of all teams, or of as many as make whole multiples: of the units, or the fewest that
  // take as many whole units as all of them would.
  const int64_t most = (total_cost - kPieceCost) / shape.least_piece;
  const int64_t teams = most < 1 ? 1 : most < shape.teams ? most : shape.teams;
  const int64_t each = (units + teams - 1) / teams;
  const int64_t whole = units <= teams ? teams / units * units : (units + each - 1) / each;
  constexpr int64_t kNever = 0x3fffffff;
  const int64_t share = total_cost / teams;
  const int which = index / 2;
  int64_t least = which < 4 ? int64_t{1} << which : which < 7 ? share >> (7 - which) : kNever;
  least = least < shape.least_piece ? shape.least_piece : least < kNever ? least : kNever;
  const int taken = static_cast<int>(index % 2 == 0 ? teams : whole);
  return Candidate{static_cast<double>(total_cost - kPieceCost) / taken, taken, static_cast<int>(least)};
}

// Where the share of the candidate's team `team` ends. cost_before(u): cost of the units before u, u = 0 .. units;
// blocks(u): of unit u.
template <typename CostBefore, typename Blocks>
ETAP_HD Place share_end(const PlanShape &shape, const Candidate &candidate, int units, int team,
                        const CostBefore &cost_before, const Blocks &blocks) {
  if (team + 1 >= candidate.teams) return Place{units, 0};
  const int64_t at = kPieceCost + static_cast<int64_t>(candidate.share * (team + 1));
  int low = 0, high = units - 1;  // the last unit that begins at `at` or before
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    const bool before = cost_before(middle) <= at;
    low = before ? middle : low;
    high = before ? high : middle - 1;
  }
  const int n = blocks(low);
  const int64_t into = at - cost_before(low) - kPieceCost;
  int done = into < 0 ? 0 : into < n ? static_cast<int>(into) : n;
  if (shape.invariant) {
    const int part = part_blocks(n);
    done = (done + part / 2) / part * part;
  } else if (candidate.least_end > n / 2) {
    done = done < n - done ? 0 : n;  // too short to be cut: to the nearer edge
  } else if (done < candidate.least_end) {
    done = 0;
  } else if (n - done < candidate.least_end) {
    done = n;
  }
  return done >= n ? Place{low + 1, 0} : Place{low, done};
}

// What a share costs its team.
template <typename CostBefore>
ETAP_HD int64_t share_cost(const Place &begin, const Place &end, const CostBefore &cost_before) {
  const int64_t last = end.done > 0 ? end.done + kPieceCost : 0;
  if (begin.done == 0) return cost_before(end.unit) - cost_before(begin.unit) + last;
  if (begin.unit == end.unit) return end.done - begin.done + (end.done > begin.done ? kPieceCost : 0);
  return cost_before(end.unit) - cost_before(begin.unit) - begin.done + last;
}

// Cycles that a step takes when its longest share costs `longest`, in which `ends` shares end within a unit. Where the
// memory is the limit, shares need not be even.
ETAP_HD float step_cycles(const PlanShape &shape, int64_t total_blocks, int64_t longest, int ends) {
  constexpr float kMergeCycles = 4000.f;  // of waiting for the last part and the first loads
  const float memory = static_cast<float>(total_blocks) * shape.memory_cycles;
  const float sm = static_cast<float>(longest) * static_cast<float>(shape.block_cycles);
  // Towards the end fewer and fewer CTAs ask for memory, so shares may not be as uneven as the sum allows.
  const float work = sm > memory ? sm : memory + 0.25f * (sm - 0.6f * memory > 0.f ? sm - 0.6f * memory : 0.f);
  return work + (ends > 0 ? kMergeCycles + static_cast<float>(ends) * shape.merge_cycles : 0.f);
}

// A team's record, all but its first sequence. end_of(team): where its share ends.
template <typename Blocks, typename EndOf>
ETAP_HD TeamRecord record_of(const PlanShape &shape, const Blocks &blocks, const EndOf &end_of, int team) {
  const Place begin = team > 0 ? end_of(team - 1) : Place{0, 0}, end = end_of(team);
  TeamRecord record{0, 0, -1, 0, team, team, team, shape.id, {}};
  if (begin.unit == end.unit && begin.done == end.done) return record;
  record.unit_begin = begin.unit;
  record.block_begin = begin.done;
  record.unit_end = end.done > 0 ? end.unit : end.unit - 1;
  record.block_end = end.done > 0 ? end.done : blocks(record.unit_end);
  // The first team whose share ends behind a place; the last one's ends behind all.
  const auto first_behind = [&](int unit, int done) {
    int low = 0, high = shape.teams - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      const Place e = end_of(middle);
      const bool behind = e.unit > unit || (e.unit == unit && e.done > done);
      low = behind ? low : middle + 1;
      high = behind ? middle : high;
    }
    return low;
  };
  constexpr int kWhole = 0x7fffffff;
  if (begin.done > 0) record.begin_first = first_behind(begin.unit, 0);
  if (record.unit_end > record.unit_begin) {
    if (end.done > 0) record.end_last = first_behind(end.unit, kWhole);
  } else if (end.done > 0) {
    record.begin_last = first_behind(begin.unit, kWhole);
  }
  return record;
}

// A piece of a team's share: blocks of one unit.
struct Piece {
  int block_begin, block_end;
  int share_end;  // block_end, or more where the team has further parts of the unit
  int part;       // of the unit,
  int first_part; // the team's first one,
  int parts;      // and all that there are; 1: the unit is not cut
  int slot, next_slot, slot_step;  // of part 0, of part 1, from there on
  int counter;    // of the unit's parts that are there
};
ETAP_HD int slot_of(const Piece &piece, int part) {
  return part == 0 ? piece.slot : piece.next_slot + (part - 1) * piece.slot_step;
}
// The piece of `unit` that begins at block_begin. unit_blocks: blocks of the unit.
ETAP_HD Piece piece_of(const TeamRecord &r, int team, int unit, int block_begin, int unit_blocks, bool invariant) {
  const bool is_begin = unit == r.unit_begin, is_end = unit == r.unit_end;
  Piece piece;
  piece.block_begin = block_begin;
  piece.share_end = piece.block_end = is_end ? r.block_end : unit_blocks;
  if (invariant) {
    const int part = part_blocks(unit_blocks);
    piece.block_end = block_begin + part < piece.share_end ? block_begin + part : piece.share_end;
    piece.part = block_begin / part;
    piece.first_part = is_begin ? r.block_begin / part : 0;
    piece.parts = parts_of(unit_blocks);
    piece.slot = unit * kInvariantParts;
    piece.next_slot = piece.slot + 1;
    piece.slot_step = 1;
    piece.counter = unit;
  } else {
    const int first = is_begin ? r.begin_first : team, last = is_begin ? r.begin_last : is_end ? r.end_last : team;
    piece.part = piece.first_part = team - first;
    piece.parts = last - first + 1;
    piece.slot = 2 * first + 1;
    piece.next_slot = 2 * (first + 1);
    piece.slot_step = 2;
    piece.counter = first;
  }
  return piece;
}

}  // namespace etap::sm90
