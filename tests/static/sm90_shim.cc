// The host side of the CUDA device, its dispatch and its planner, behind plain C for test_dispatch.py and
// test_planner.py.
#include <vector>

#include "sm90/dispatch.h"
#include "sm90/schedule/planner.h"

using namespace etap::sm90;

extern "C" {

const char *shim_dispatch(const etap_problem *problem, const DeviceLimits *limits, etap_decision *decision) {
  return dispatch(*problem, *limits, decision);
}

int shim_block_tokens() { return kBlockTokens; }
int shim_candidates() { return kCandidates; }

// out: {piece, min_piece, split}
void shim_costs(int cluster, int *out) {
  const Costs costs = costs_of(cluster);
  out[0] = costs.piece;
  out[1] = costs.min_piece;
  out[2] = costs.split;
}

int shim_visible_tokens(int length, int q_len, int tile, int tile_rows, int num_heads, bool causal) {
  return visible_tokens(length, q_len, tile, tile_rows, num_heads, causal);
}

int64_t shim_candidate_budget(const PlanShape *shape, int64_t total_cost, int largest_unit, int candidate) {
  return candidate_budget(*shape, total_cost, largest_unit, candidate);
}

// Cost of the outcome; `workers` may be null.
int64_t shim_assign(const PlanShape *shape, const int *blocks, int64_t budget, WorkerRecord *workers) {
  const auto count = [blocks](int unit) { return blocks[unit]; };
  std::vector<ShareEnd> ends(static_cast<size_t>(shape->workers));
  const auto end_of = [&ends](int worker) -> ShareEnd & { return ends[static_cast<size_t>(worker)]; };
  const int64_t cost = assign(*shape, count, budget, [&](int worker, const ShareEnd &end) { end_of(worker) = end; });
  for (int w = 0; workers != nullptr && w < shape->workers; ++w) workers[w] = record_of(*shape, count, end_of, w);
  return cost;
}

// out: {block_begin, block_end, first_worker, last_worker, slot}
void shim_piece(const WorkerRecord *workers, int worker, int unit, int unit_blocks, int *out) {
  const Piece piece = piece_of(workers[worker], worker, unit, unit_blocks);
  out[0] = piece.block_begin;
  out[1] = piece.block_end;
  out[2] = piece.first_worker;
  out[3] = piece.last_worker;
  out[4] = slot_of(worker, piece.first_worker);
}

}  // extern "C"
