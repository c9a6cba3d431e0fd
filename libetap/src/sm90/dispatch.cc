#include "sm90/dispatch.h"

#include <algorithm>
#include <cstdio>

#include "kv_format.h"
#include "sm90/catalog.h"

namespace etap::sm90 {
namespace {

constexpr int kBusyTileRows = 48;  // tiles from here on are bound by the SM, not by the memory
constexpr int kMaxCluster = 8;     // portable cluster sizes end there
constexpr int kRowsOnM = 64;       // rows of a CTA where they are WGMMA's M
constexpr int kPairRows = 128;     // of a tile of two CTAs

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Cycles that an SM takes for a 64-token block of one tile. Tensor cores and shared memory (128 bytes a cycle; A, B and
// the block's own bytes) work side by side; barriers, softmax and issue come on top, as measured on an H200
// (docs/tuning-log.md).
struct BlockCycles {
  int tensor, shared, rest;
  int total() const { return std::max(tensor, shared) + rest; }
};
int tensor_cycles(const etap_problem &p, const DeviceLimits &limits, int rows) {
  return 2 * kBlockTokens * (2 * p.d_latent + p.d_rope) * rows / limits.flop_per_cycle;
}
int fill_cycles(const etap_problem &p) { return (p.d_latent + p.d_rope) * 2 * kBlockTokens / 128; }
// KV on M: each of d / 16 + d_latent / 16 instructions reads 64 x 16 values of KV and 16 x N of the other operand.
BlockCycles transposed_cycles(const etap_problem &p, const DeviceLimits &limits, int tile) {
  const int instructions = (2 * p.d_latent + p.d_rope) / 16;
  return {tensor_cycles(p, limits, tile), instructions * (16 + tile / 4) + fill_cycles(p), 1300};
}
// Rows on M: QK reads Q and K for each 16 dims, PV only V.
BlockCycles rows_on_m_cycles(const etap_problem &p, const DeviceLimits &limits) {
  const int qk = (p.d_latent + p.d_rope) / 16 * 32, pv = p.d_latent;
  return {tensor_cycles(p, limits, kRowsOnM), qk + pv + fill_cycles(p), 600};
}

}  // namespace

const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, etap_decision *decision) {
  if (problem.flags & ETAP_TREE_MASK)
    return "flags has ETAP_TREE_MASK; the CUDA device has no tree masks yet, the CPU device has";
  const KvFormat &format = kv_format(problem);
  if (format.scales != GroupScales::kNone &&
      (problem.q_dtype != ETAP_BF16 || problem.d_latent != 512 || problem.d_rope != 64)) {
    return "kv_format has group scales; the CUDA device takes it with q_dtype ETAP_BF16 and (d_latent, d_rope) = (512, "
           "64) only";
  }
  const int rows = problem.num_heads * problem.max_query_len;
  const int most = most_rows(format.e4m3), fewest_tiles = (rows + most - 1) / most;
  int tile = problem.force_tile > 0 ? problem.force_tile : round_up((rows + fewest_tiles - 1) / fewest_tiles, 8);
  const CatalogRow *kernel = find_row(format.e4m3, tile);
  if (kernel == nullptr) {
    return "force_tile is none of the CUDA device's tiles: 8 to 64 rows in steps of 8, and 128; with an FP8 cache 8 to "
           "32";
  }
  // Padding a tile to 64 rows on M costs less than sharing O^T out among warpgroups, where the tensor cores are fast.
  if (kernel->family == Family::dv_split && problem.force_tile == 0 &&
      rows_on_m_cycles(problem, limits).total() < transposed_cycles(problem, limits, tile).total()) {
    tile = kRowsOnM;
    kernel = find_row(false, tile);
  }
  const auto tiles_of = [&](int tile_rows) { return (rows + tile_rows - 1) / tile_rows; };
  const auto units_of = [&](int tile_rows) { return static_cast<int64_t>(problem.batch) * tiles_of(tile_rows); };
  if (units_of(tile) > INT32_MAX / 2) return "batch times row tiles exceeds 2^30";
  const int sms = std::min(problem.num_sms > 0 ? problem.num_sms : limits.num_sms, limits.num_sms);

  // A unit should be one worker's, so clusters are as large as leaves a worker for each unit. In batch-invariant mode
  // the cluster, whose size decides the order of summation, is the same for every batch.
  const auto workers_of = [&](int cluster) {
    return std::min({sms / cluster, limits.max_clusters[cluster], kMaxWorkers});
  };
  // The library's own choice for tiles of so many rows.
  const auto cluster_of = [&](int tile_rows) {
    const int64_t units = units_of(tile_rows);
    const int step = ctas_of_tile(tile_rows);
    int cluster = kMaxCluster;
    if (problem.flags & ETAP_BATCH_INVARIANT) return cluster;
    // SMs that work when units are cut evenly, in `most_parts` at most.
    const auto busy_sms = [&](int c, int64_t most_parts) {
      return c * units * std::min(workers_of(c) / units, most_parts);
    };
    // FP8 keeps SMs busier than the memory, so it wants all of them, and clusters of six are three quarters: on an H200
    // pairs took 19 % less for 16 sequences of 64K tokens, 13 % less for 16K, 5 % more for 4K (with a slower
    // conversion, docs/tuning-log.md).
    if (format.e4m3 && units > kMaxCluster) cluster = 2;
    while (cluster > step && units > workers_of(cluster)) cluster -= step;
    // Eight to eleven units are too many to be cut in two by the 15 clusters of eight, and too few to keep most SMs
    // busy uncut: the largest cluster that does one or the other. 8 x 8K: 29.4 us on eights, 27.8 on sixes.
    const auto most_sms_busy = [&](int c) { return 10 * busy_sms(c, workers_of(c)) >= 7 * sms; };
    for (int c = cluster; cluster == kMaxCluster && c > step && !most_sms_busy(cluster); c -= step) {
      if (most_sms_busy(c)) cluster = c;
    }
    // 39 clusters of 3 are 117 of 132 SMs. 32 x 8K: 81.5 us on threes, 78.8 on pairs, two of them for each unit.
    if (cluster == 3 && workers_of(2) >= 2 * units) cluster = 2;
    // Large tiles keep their SMs busier than the memory, so there a unit had better be cut in two than SMs stand idle;
    // in four where two CTAs take a block together.
    for (int c = cluster - step; tile_rows >= kBusyTileRows && c >= step; c -= step) {
      if (busy_sms(c, 2 * step) > busy_sms(cluster, 2 * step)) cluster = c;
    }
    return cluster;
  };
  // Two tiles of a sequence become one of two CTAs, which read KV once: but where there are so few units that a cluster
  // of single CTAs walks more blocks at a time than four pairs would, and where the last pair would have half its rows.
  const bool boxes = kv_copy(problem) == KvCopy::kTma;
  if (kernel->family == Family::rows_on_m && problem.force_tile == 0 && boxes && tiles_of(kRowsOnM) % 2 == 0 &&
      !(problem.flags & ETAP_BATCH_INVARIANT) && problem.force_cluster % 2 == 0 && workers_of(2) > 0 &&
      cluster_of(kRowsOnM) <= kMaxCluster / 2) {
    tile = kPairRows;
    kernel = find_row(false, tile);
  }
  const int ctas = ctas_of_tile(tile), tiles = tiles_of(tile);
  if (ctas > 1 && !boxes)
    return "force_tile is 128, which takes pages of 8 tokens or more and no lists of slots: KV comes in boxes";
  if (ctas > 1 && problem.force_cluster % 2 != 0)
    return "force_cluster is odd; tiles of 128 rows are computed by pairs of CTAs";
  if (ctas > 1 && workers_of(ctas) < 1) return "num_sms is 1; tiles of 128 rows are computed by pairs of CTAs";
  int cluster = problem.force_cluster > 0 ? problem.force_cluster : cluster_of(tile);
  if (problem.force_cluster > 0 && workers_of(cluster) < 1)
    return "force_cluster is more than the SMs that num_sms allows";
  while (cluster > ctas && workers_of(cluster) < 1) cluster -= ctas;
  const int workers = std::max(1, workers_of(cluster));

  decision->tile_rows = tile;
  decision->num_tiles = tiles;
  decision->cluster_size = cluster;
  decision->num_workers = workers;
  decision->max_splits = problem.flags & ETAP_BATCH_INVARIANT ? 1 : workers;
  std::snprintf(decision->kernel, sizeof decision->kernel, "sm90_%s_%s_n%d",
                problem.q_dtype == ETAP_BF16 ? "bf16" : "fp16", kernel->name, tile);
  char why[112] = "O^T fits one warpgroup, so two take KV blocks in turn";
  if (kernel->family == Family::dv_split)
    std::snprintf(why, sizeof why, "O^T needs two warpgroups, so each takes half of V's dims");
  if (kernel->family == Family::rows_on_m)
    std::snprintf(why, sizeof why, "rows on M, because a KV block takes %d cycles so, and %d transposed%s",
                  rows_on_m_cycles(problem, limits).total(), transposed_cycles(problem, limits, tile / ctas).total(),
                  ctas > 1 ? ", 64 in each CTA of a pair" : "");
  std::snprintf(
      decision->reason, sizeof decision->reason,
      "%d query rows (%d heads x %d tokens) in %d tile(s) of %d: %s; %lld unit(s) on %d SMs: %d cluster(s) of %d", rows,
      problem.num_heads, problem.max_query_len, tiles, tile, why, static_cast<long long>(units_of(tile)), sms, workers,
      cluster);
  return nullptr;
}

KvCopy kv_copy(const etap_problem &problem) {
  const KvFormat &format = kv_format(problem);
  if (!format.e4m3) return problem.page_size < 8 || problem.topk > 0 ? KvCopy::kGather : KvCopy::kTma;
  switch (format.scales) {
    case GroupScales::kNone:
      return KvCopy::kE4m3;
    case GroupScales::kBeside:
      return KvCopy::kE4m3Group;
    case GroupScales::kInRow:
      break;
  }
  return KvCopy::kE4m3_656;
}

PlanShape plan_shape(const etap_problem &problem, const etap_decision &decision) {
  PlanShape shape;
  shape.batch = problem.batch;
  shape.tiles = decision.num_tiles;
  shape.tile_rows = decision.tile_rows;
  shape.num_heads = problem.num_heads;
  shape.max_query_len = problem.max_query_len;
  shape.workers = decision.num_workers;
  shape.cluster = decision.cluster_size / ctas_of_tile(decision.tile_rows);
  shape.causal = (problem.flags & ETAP_CAUSAL) != 0;
  shape.never_split = (problem.flags & ETAP_BATCH_INVARIANT) != 0;
  shape.topk = problem.topk;
  return shape;
}

}  // namespace etap::sm90
