// The host side of the CUDA device, its dispatch and its planner, behind plain C for test_dispatch.py and
// test_planner.py.
#include <vector>

#include "../../libetap/src/sm90/dispatch.h"
#include "../../libetap/src/sm90/schedule/workspace.h"

using namespace etap::sm90;

namespace {

// Cost of the units before each, as the plan kernel sums them up.
std::vector<int64_t> costs_before(const int *blocks, int units) {
  std::vector<int64_t> before(1, 0);
  for (int unit = 0; unit < units; ++unit) before.push_back(before.back() + unit_cost(blocks[unit]));
  return before;
}

}  // namespace

extern "C" {

const char *shim_dispatch(const etap_problem *problem, const DeviceLimits *limits, etap_decision *decision, int *team) {
  Choice choice{};
  const char *why = dispatch(*problem, *limits, &choice, decision);
  *team = choice.team;
  return why;
}

int shim_block_tokens() { return kBlockTokens; }
int shim_candidates() { return kCandidates; }
int shim_piece_cost() { return kPieceCost; }
int shim_part_blocks(int blocks) { return part_blocks(blocks); }
int shim_parts(int blocks) { return parts_of(blocks); }
int64_t shim_slots(const PlanShape *shape) { return slots_of(*shape); }
int64_t shim_most_merge_tasks(const PlanShape *shape) { return most_merge_tasks(*shape); }
int shim_merge_tasks(int parts, int rows, int d_latent) { return merge_tasks(parts, rows, d_latent); }

int shim_visible_tokens(int length, int q_len, int row_begin, int rows, int num_heads, bool causal) {
  return visible_tokens(length, q_len, row_begin, rows, num_heads, causal);
}

// The records of a candidate; returns the cost of its longest share.
int64_t shim_records(const PlanShape *shape, const int *blocks, int candidate, TeamRecord *records) {
  const int units = shape->batch * shape->groups;
  const std::vector<int64_t> sums = costs_before(blocks, units);
  const auto before = [&sums](int unit) { return sums[static_cast<size_t>(unit)]; };
  const auto count = [blocks](int unit) { return blocks[unit]; };
  const Candidate how = candidate_of(*shape, units, before(units), candidate);
  std::vector<Place> ends;
  int64_t longest = 0;
  for (int team = 0; team < shape->teams; ++team) {
    ends.push_back(share_end(*shape, how, units, team, before, count));
    const Place begin = team > 0 ? ends[static_cast<size_t>(team) - 1] : Place{0, 0};
    const int64_t cost = share_cost(begin, ends.back(), before);
    longest = cost > longest ? cost : longest;
  }
  const auto end_of = [&ends](int team) { return ends[static_cast<size_t>(team)]; };
  for (int team = 0; team < shape->teams; ++team) records[team] = record_of(*shape, count, end_of, team);
  return longest;
}

// The last team of the unit that `team` begins and does not end.
int shim_last_team(const PlanShape *shape, const TeamRecord *records, const int *blocks, int team) {
  const auto end_of = [&](int t) {
    while (records[t].unit_begin > records[t].unit_end) --t;
    const TeamRecord &r = records[t];
    return r.block_end < blocks[r.unit_end] ? Place{r.unit_end, r.block_end} : Place{r.unit_end + 1, 0};
  };
  return last_team_of_unit(*shape, end_of, team);
}

// out: {block_begin, block_end, share_end, slot}
void shim_piece(const TeamRecord *records, int team, int unit, int block_begin, int unit_blocks, bool invariant,
                int *out) {
  const Piece piece = piece_of(records[team], team, unit, block_begin, unit_blocks, invariant);
  out[0] = piece.block_begin;
  out[1] = piece.block_end;
  out[2] = piece.share_end;
  out[3] = piece.slot;
}

}  // extern "C"
