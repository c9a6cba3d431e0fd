// The host side of the CUDA device, its dispatch and its planner, and the search for shared prefixes, behind plain C
// for test_dispatch.py, test_planner.py and test_shared_prefixes.py.
#include <algorithm>
#include <vector>

#include "shared_prefixes.h"
#include "sm90/dispatch.h"
#include "sm90/schedule/planner.h"

using namespace etap;
using namespace etap::sm90;

extern "C" {

const char *shim_dispatch(const etap_problem *problem, const DeviceLimits *limits, etap_decision *decision) {
  return dispatch(*problem, *limits, decision);
}

void shim_sharing_costs(const etap_problem *problem, const etap_decision *decision, const DeviceLimits *limits,
                        SharingCosts *costs) {
  *costs = sharing_costs(*problem, *decision, *limits);
}
int64_t shim_gain(const SharingCosts *costs, int members, int blocks) { return costs->gain(members, blocks); }
bool shim_pay(const SharingCosts *costs, int64_t gained, int64_t shared, int64_t own) {
  return costs->pay(gained, shared, own);
}

// out: {bytes that a plan uses, bytes that it is given, single CTAs of the plan with groups}
void shim_workspace(const etap_problem *problem, const etap_decision *decision, const DeviceLimits *limits,
                    int64_t *out) {
  const Workspace layout = workspace_of(*problem, *decision, *limits);
  out[0] = static_cast<int64_t>(layout.bytes);
  out[1] = static_cast<int64_t>(most_workspace_bytes(*problem, *decision, *limits));
  out[2] = layout.shape.sharing_workers;
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

int64_t shim_candidate_budget(const PlanShape *shape, const Work *work, int candidate, int candidates) {
  return candidate_budget(*shape, *work, candidate, candidates);
}
int64_t shim_cost_of_singles(const PlanShape *shape, const Work *work, int64_t cost, int64_t budget) {
  return cost_of_singles(*shape, *work, cost, budget);
}

// Cost of the outcome; `workers` may be null.
int64_t shim_assign(const PlanShape *shape, const int *blocks, int64_t budget, WorkerRecord *workers) {
  const auto count = [blocks](int unit) { return blocks[unit]; };
  std::vector<ShareEnd> ends(static_cast<size_t>(shape->workers));
  const auto end_of = [&ends](int worker) -> ShareEnd & { return ends[static_cast<size_t>(worker)]; };
  const int64_t cost =
      assign<false>(*shape, count, budget, [&](int worker, const ShareEnd &end) { end_of(worker) = end; });
  for (int w = 0; workers != nullptr && w < shape->workers; ++w) workers[w] = record_of(*shape, count, end_of, w);
  return cost;
}

bool shim_each_has_a_worker(const PlanShape *shape, const Work *work) { return each_has_a_worker(*shape, *work); }

// Whether both walks come to the same cost and shares.
bool shim_walks_agree(const PlanShape *shape, const int *blocks, int64_t budget) {
  const auto count = [blocks](int unit) { return blocks[unit]; };
  std::vector<ShareEnd> ends[2];
  const auto setter = [&](int walk) {
    ends[walk].assign(static_cast<size_t>(shape->workers), {-1, -1});
    return [&ends, walk](int worker, const ShareEnd &end) { ends[walk].at(static_cast<size_t>(worker)) = end; };
  };
  const bool same_cost =
      assign<false>(*shape, count, budget, setter(0)) == assign<true>(*shape, count, budget, setter(1));
  return same_cost &&
         std::equal(ends[0].begin(), ends[0].end(), ends[1].begin(),
                    [](const ShareEnd &x, const ShareEnd &y) { return x.unit == y.unit && x.done == y.done; });
}

// cuts: {unit, first worker, last worker} of each unit that is cut. Returns how many there are.
int shim_cuts(const PlanShape *shape, const int *blocks, int64_t budget, int *cuts) {
  std::vector<ShareEnd> ends(static_cast<size_t>(shape->workers));
  const auto end_of = [&ends](int worker) -> ShareEnd & { return ends[static_cast<size_t>(worker)]; };
  assign<false>(
      *shape, [blocks](int unit) { return blocks[unit]; }, budget,
      [&](int worker, const ShareEnd &end) { end_of(worker) = end; });
  int count = 0;
  for (int w = 0; w < shape->workers; ++w) {
    if (!begins_cut_unit(end_of, w)) continue;
    int *const cut = cuts + 3 * count++;
    cut[0] = end_of(w).unit;
    cut[1] = first_behind(*shape, end_of, cut[0], 0);
    cut[2] = first_behind(*shape, end_of, cut[0], kWhole);
  }
  return count;
}

// out: {block_begin, block_end, first_worker, last_worker, slot}
void shim_piece(const WorkerRecord *workers, int worker, int unit, int unit_blocks, int *out) {
  const Piece piece = piece_of(workers[worker], worker, unit, unit_blocks);
  out[0] = piece.block_begin;
  out[1] = piece.block_end;
  out[2] = piece.first_worker;
  out[3] = piece.last_worker;
  out[4] = piece.slot;
}

// Of batch-invariant mode. out: {block_begin, block_end, slot, whether the unit has several}
void shim_chunk(int number, int unit_blocks, int chunks_log2, int numbers_log2, int *out) {
  const Piece piece = chunk_piece(number, unit_blocks, chunks_log2, numbers_log2);
  out[0] = piece.block_begin;
  out[1] = piece.block_end;
  out[2] = piece.slot;
  out[3] = piece.first_worker != piece.last_worker;
}
int shim_chunks(int unit_blocks, int chunks_log2) { return chunks_of(unit_blocks, chunks_log2); }
int shim_cost_of_chunks(int unit_blocks, int chunks_log2) { return cost_of_chunks(unit_blocks, chunks_log2); }

// As the plan kernel does it with so many threads, each of which adds up a group of units.
void shim_chunk_records(const PlanShape *shape, const int *blocks, int threads, WorkerRecord *workers) {
  const auto count = [blocks](int unit) { return blocks[unit]; };
  const int units = shape->batch * shape->tiles, group_units = (units + threads - 1) / threads;
  std::vector<int64_t> before(static_cast<size_t>(threads));
  int64_t all = 0;
  for (int unit = 0; unit < threads * group_units; ++unit) {
    if (unit % group_units == 0) before[static_cast<size_t>(unit / group_units)] = all;
    if (unit < units) all += cost_of_chunks(blocks[unit], shape->chunks_log2);
  }
  const auto end_of = [&](int worker) {
    return end_of_share(
        *shape, count, threads, group_units, [&](int group) { return before[static_cast<size_t>(group)]; }, all,
        worker);
  };
  int most = 0;
  for (int unit = 0; unit < units; ++unit) most = std::max(most, chunks_of(blocks[unit], shape->chunks_log2));
  const int numbers_log2 = numbers_log2_of(most);
  for (int w = 0; w < shape->workers; ++w) workers[w] = record_of_chunks(*shape, count, end_of, w, numbers_log2);
}

// groups: [count][2 + max_rows], tokens and members' number, then the members. Returns how many groups there are.
int shim_find_groups(int count, int page_size, int max_rows, int flags, const int *lengths, const int *query_counts,
                     int num_heads, const int *table, int columns, int *groups) {
  std::vector<PrefixLink> links(static_cast<size_t>(count));
  std::vector<StarMember> members(static_cast<size_t>(count));
  int found = 0;
  find_groups(
      count, page_size, max_rows,
      [&](int b) {
        return shareable_pages(lengths[b], query_counts[b], flags, page_size,
                               static_cast<int64_t>(columns) * page_size);
      },
      [&](int b) { return table + static_cast<int64_t>(b) * columns; },
      [&](int b) { return query_counts[b] * num_heads; }, links.data(), members.data(),
      [&](int begin, int end, int tokens) {
        int *const group = groups + found++ * (2 + max_rows);
        group[0] = tokens;
        group[1] = end - begin;
        for (int i = begin; i < end; ++i) group[2 + i - begin] = members[static_cast<size_t>(i)].sequence;
      });
  return found;
}

}  // extern "C"
