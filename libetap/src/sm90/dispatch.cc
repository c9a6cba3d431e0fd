#include "dispatch.h"

#include <algorithm>
#include <cstdio>

namespace etap::sm90 {
namespace {

constexpr int kWalkCycles = 200;  // what bringing a block to one tile more costs, though it comes from L2

int tiles_of(int rows, int tile) { return (rows + tile - 1) / tile; }

// Tiles that walk the same blocks side by side read KV from memory once. As many as leave no SM idle, of equal cost the
// most.
int team_of(const etap_problem &problem, int tiles, int sms) {
  const int64_t all_q = static_cast<int64_t>(problem.batch) * problem.max_query_len;
  // Where most sequences have fewer query tokens than the longest, most CTAs of a team would have no rows.
  if ((problem.flags & ETAP_RAGGED) != 0 && problem.total_q < all_q / 4 * 3) return 1;
  int best = 1;
  double best_waste = 1e30;
  for (int team = 1; team <= std::min({tiles, sms, kMaxTeam}); ++team) {
    const double busy = sms / team * team, walked = static_cast<double>(tiles_of(tiles, team)) * team;
    const double read = tiles_of(tiles, team);  // times that KV comes from memory
    const double waste = walked / tiles * sms / busy + 0.5 * read;
    if (waste <= best_waste) best = team, best_waste = waste;
  }
  return best;
}

}  // namespace

const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, Choice *choice, etap_decision *decision) {
  const int rows = problem.num_heads * problem.max_query_len;
  // Candidates are the catalogue's rows; what counts is what a block of KV costs all tiles.
  const CatalogRow *best = nullptr;
  bool format_known = false;
  int64_t best_cost = 0;
  for (const CatalogRow &row : kCatalog) {
    const Variant *variant = find_variant(row, problem);
    if (variant == nullptr) continue;
    format_known = true;
    if (problem.force_tile > 0 && row.tile_rows != problem.force_tile) continue;
    const int64_t cost = int64_t{tiles_of(rows, row.tile_rows)} * (row.block_cycles + kWalkCycles);
    if (best != nullptr && cost >= best_cost) continue;
    best = &row;
    best_cost = cost;
    choice->variant = static_cast<int>(variant - row.variants);
  }
  if (!format_known) {
    return "kv_format has group scales; the CUDA device takes it with q_dtype ETAP_BF16 and (d_latent, d_rope) = (512, "
           "64) only";
  }
  if (best == nullptr)
    return "force_tile is too large: the CUDA device has tiles of 8 to 64 rows in steps of 8, to 32 with an FP8 cache";
  const int tiles = tiles_of(rows, best->tile_rows);
  if (static_cast<int64_t>(problem.batch) * tiles > INT32_MAX / 2) return "batch times row tiles exceeds 2^30";
  const int sms = std::min({problem.num_sms > 0 ? problem.num_sms : limits.num_sms, limits.num_sms, kMaxTeams});
  choice->row = best;
  choice->team = team_of(problem, tiles, sms);
  const int teams = sms / choice->team;

  decision->tile_rows = best->tile_rows;
  decision->num_tiles = tiles;
  decision->cluster_size = 1;
  decision->num_workers = teams * choice->team;
  decision->max_splits = problem.flags & ETAP_BATCH_INVARIANT ? kInvariantParts : teams;
  std::snprintf(decision->kernel, sizeof decision->kernel, "sm90_%s_%s%s_n%d",
                problem.q_dtype == ETAP_BF16 ? "bf16" : "fp16", kv_format_of(problem).e4m3 ? "e4m3_" : "",
                best->name + (best->family == Family::fp8_split ? 4 : 0), best->tile_rows);
  std::snprintf(decision->reason, sizeof decision->reason,
                "%d query rows (%d heads x %d tokens) in %d tile(s) of N = %d: O^T %s; %d team(s) of %d CTA(s) on %d SMs "
                "share the KV blocks evenly",
                rows, problem.num_heads, problem.max_query_len, tiles, best->tile_rows,
                takes_blocks_in_turn(best->family) ? "fits one warpgroup, so two take KV blocks in turn"
                                                   : "needs two warpgroups, so each takes half of V's dims",
                teams, choice->team, sms);
  return nullptr;
}

PlanShape plan_shape(const etap_problem &problem, const DeviceLimits &limits, const etap_decision &decision,
                     const Choice &choice) {
  PlanShape shape{};
  shape.batch = problem.batch;
  shape.team = choice.team;
  shape.groups = tiles_of(decision.num_tiles, choice.team);
  shape.group_rows = choice.team * decision.tile_rows;
  shape.num_heads = problem.num_heads;
  shape.max_query_len = problem.max_query_len;
  shape.teams = decision.num_workers / choice.team;
  shape.least_piece = 2;
  const float bytes_a_cycle = 0.93f * limits.memory_bytes / (limits.sm_mhz * 1e6f);
  const KvFormat &format = kv_format_of(problem);
  shape.block_cycles = choice.row->block_cycles;
  shape.memory_cycles = static_cast<float>(kBlockTokens * format.element_bytes *
                                           row_elements(format, problem.d_latent, problem.d_rope)) /
                        bytes_a_cycle;
  constexpr float kL2BytesACycle = 2500.f;
  shape.merge_cycles = 2.f * 4.f * static_cast<float>(problem.d_latent * shape.group_rows) / kL2BytesACycle;
  shape.causal = (problem.flags & ETAP_CAUSAL) != 0;
  shape.invariant = (problem.flags & ETAP_BATCH_INVARIANT) != 0;
  // FNV-1a over all that the schedule depends on but the lengths.
  uint32_t id = 2166136261u;
  for (const int field : {shape.batch, shape.groups, shape.group_rows, choice.team, shape.num_heads,
                          shape.max_query_len, shape.teams, static_cast<int>(shape.causal),
                          static_cast<int>(shape.invariant), problem.flags, problem.d_latent}) {
    for (int byte = 0; byte < 4; ++byte) id = (id ^ ((static_cast<uint32_t>(field) >> (8 * byte)) & 0xff)) * 16777619u;
  }
  shape.id = id;
  return shape;
}

}  // namespace etap::sm90
