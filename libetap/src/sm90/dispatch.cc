#include "sm90/dispatch.h"

#include <algorithm>
#include <cstdio>

#include "kv_format.h"
#include "shared_prefixes.h"
#include "sm90/catalog.h"

namespace etap::sm90 {
namespace {

constexpr int kBusyTileRows = 48;  // tiles from here on are bound by the SM, not by the memory
constexpr int kMaxCluster = 8;     // portable cluster sizes end there
constexpr int kMostSinglesOf = 3;  // CTAs of clusters that the plan may take for single ones
constexpr int kRowsOnM = 64;       // rows of a tile where they are WGMMA's M, and the most of any tile
constexpr int kMostChunks = 128;   // of a sequence's tiles together, in batch-invariant mode
// Rows of a tile whose O^T fits one warpgroup, so that two take blocks in turn.
constexpr int kMostTokenSplit = 32, kMostE4m3Split = 24;

// Of a block with rows on M that was E4M3 (docs/tuning-log.md, H200, as what follows).
constexpr int kWidenedCycles = 4100;
// Of shared prefixes alone: what token_split takes for a block that L2 serves, beyond its tensor cores and shared
// memory; and 6 us, what the merge adds to a step.
constexpr int kTokenSplitRest = 160;
constexpr int kMergeCycles = 11400;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
int sms_of(const etap_problem &problem, const DeviceLimits &limits) {
  return problem.num_sms > 0 ? std::min(problem.num_sms, limits.num_sms) : limits.num_sms;
}

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
// FP8 with KV on M is bound by instructions, since each byte is converted twice, or by the tensor cores; with rows on M
// by how E4M3 becomes FP16.
int e4m3_cycles(const etap_problem &p, const DeviceLimits &limits, int tile) {
  if (tile == kRowsOnM) return std::max(kWidenedCycles, rows_on_m_cycles(p, limits).total());
  return std::max(tensor_cycles(p, limits, tile), tile <= kMostE4m3Split ? 2176 + 4 * tile : 2150 + 43 * tile / 2);
}

// Units over the SMs of a card, by the size of the clusters that are workers.
struct Spread {
  const DeviceLimits &limits;
  Family family;
  bool e4m3;
  int tile, tiles, sms;
  int64_t units;

  int workers(int cluster) const { return std::min({sms / cluster, limits.max_clusters[cluster], kMaxWorkers}); }
  // SMs that work when units are cut evenly, in `most_parts` at most.
  int64_t busy_sms(int cluster, int64_t most_parts) const {
    return cluster * units * std::min(workers(cluster) / units, most_parts);
  }
  // Has each of so many parts of a unit a worker, and so much of the card work?
  bool keeps_busy(int cluster, int percent, int64_t parts = 1) const {
    return parts * units <= workers(cluster) && 100 * parts * cluster * units >= percent * static_cast<int64_t>(sms);
  }
  // The largest cluster that leaves units whole, and keeps so much of the card busy; 1: none does.
  int largest_whole(int percent) const {
    int cluster = kMaxCluster;
    while (cluster > 1 && !keeps_busy(cluster, percent)) --cluster;
    return cluster;
  }
};

// FP8 keeps SMs busier than the memory, so it wants nearly all of them: clusters that leave each unit whole, or pairs
// that cut it in two, if they keep enough busy; else single CTAs, since more parts take a cluster 5 us to merge, and
// merge_pieces.cu 3. 16 x 1K: 14.5 us on pairs, 12.1 on single CTAs; 40 x 4K 42.5 and 38.5; 28 x 4K 27.0 on fours, 30.4
// on pairs; 32 x 8K 50.2 on pairs, 53.0 on single CTAs.
int cluster_of_e4m3(const Spread &s) {
  constexpr int kEnough = 83;
  const int cluster = s.largest_whole(kEnough), eights = s.workers(kMaxCluster);
  if (cluster > 1) return cluster;
  if (s.keeps_busy(2, kEnough, 2)) return 2;
  // A few units are cut in two or more by eights, and 9 to 13 left whole, with half of the SMs busy: less than all, but
  // short contexts gain more by it than long ones lose. 12 x 2K: 12.8 us, 15.9 on single CTAs; 12 x 32K 75 and 69.4.
  const bool eights_will_do = 2 * s.units <= eights || 2 * kMaxCluster * s.units > s.sms;
  return s.units <= eights && eights_will_do ? kMaxCluster : 1;
}

// Where the memory is the limit a unit should be one worker's, so clusters are as large as leaves a worker for each.
int cluster_of_16bit(const Spread &s) {
  // 24 rows and more take a cluster longer to merge than merge_pieces.cu. 32 rows, 4 x 1K: 10.5 us on eights, 10.5 on
  // single CTAs; 4 x 4K 18.1 and 16.3; 8 x 4K 23.5 on sixes, 20.9; but 12 x 4K 24.6 and 26.6. (16 rows, 1 x 4K: 9.4 and
  // 8.7, but 1 x 1K 7.8 and 8.3.)
  if (s.family == Family::token_split && s.tile > 16 && s.units <= 8) return 1;
  int cluster = s.largest_whole(0);
  // Eight to eleven units are too many to be cut in two by the 15 clusters of eight, and too few to keep most SMs busy
  // uncut: the largest cluster that does one or the other. 8 x 8K: 29.4 us on eights, 27.8 on sixes.
  const auto most_sms_busy = [&](int c) { return 10 * s.busy_sms(c, s.workers(c)) >= 7 * s.sms; };
  for (int c = cluster; cluster == kMaxCluster && c > 1 && !most_sms_busy(cluster); --c) {
    if (most_sms_busy(c)) cluster = c;
  }
  // 39 clusters of 3 are 117 of 132 SMs. 32 x 8K: 81.5 us on threes, 78.8 on pairs, two of them for each unit.
  if (cluster == 3 && s.workers(2) >= 2 * s.units) cluster = 2;
  // Large tiles keep their SMs busier than the memory, so there a unit had better be cut in two than SMs stand idle.
  for (int c = cluster - 1; s.tile >= kBusyTileRows && c >= 1; --c) {
    if (s.busy_sms(c, 2) > s.busy_sms(cluster, 2)) cluster = c;
  }
  return cluster;
}

// What was fastest, over contexts: those are not known here (docs/tuning-log.md, every cluster size).
int choose_cluster(const Spread &s) {
  // Half of the card or less: clusters would stand close together, and share few ways to the memory. 66 SMs, 16 x 16K:
  // 111.5 us on fours, 89.2 on single CTAs.
  if (!s.e4m3 && 2 * s.sms <= s.limits.num_sms) return 1;
  switch (s.family) {
    case Family::rows_on_m:
    case Family::e4m3_rows_on_m:
    case Family::e4m3_dv_split:
      // 64 rows of a unit that is not cut are merged by a cluster in 6 us; cut units by merge_pieces.cu in 6, and then
      // all SMs work. Clusters, where they keep enough of them busy: nearly all where the SM is the limit (a second
      // tile, FP8). 64 x 4K: 87.7 us on pairs, 94.2 on single CTAs; 32 x 8K 96.7 on threes, 89.3; 16 x 16K 90.3 on
      // sixes, 88.4.
      return s.largest_whole(s.tiles > 1 || s.e4m3 ? 90 : 80);
    case Family::e4m3_split:
      return cluster_of_e4m3(s);
    case Family::token_split:
    case Family::dv_split:
      break;
  }
  return cluster_of_16bit(s);
}

// CTAs that may be workers of their own where the plan, which sees the lengths, finds that better: those of small
// clusters, which are chosen so that a unit of a usual length is not cut. Uneven lengths are cut anyhow, and single
// CTAs cost less then. 64 x 2K to 8K, 64 heads: 129.8 us on pairs, 121.2 on single CTAs; 64 x 2K 51.9 and 57.9.
int singles_of(const etap_problem &problem, const etap_decision &decision) {
  const int cluster = decision.cluster_size;
  const bool may = cluster > 1 && cluster <= kMostSinglesOf && problem.force_cluster == 0;
  return may ? decision.num_workers * cluster : 0;
}

// In batch-invariant mode, of the chunks that a unit may have; else -1. Each has a slot in the workspace, so large
// tiles have fewer, lists no more than they need, and many tiles, which occupy as many SMs, share what a sequence may
// have: 8 MB where the output is BF16.
int chunks_log2_of(const etap_problem &problem, int tile, int tiles) {
  if ((problem.flags & ETAP_BATCH_INVARIANT) == 0) return -1;
  int log2 = tile <= kMostTokenSplit ? 5 : 4;
  const auto half_will_do = [&] {
    const bool short_lists = problem.topk > 0 && chunks_of(blocks_of(problem.topk), log2) <= 1 << (log2 - 1);
    return short_lists || int64_t{tiles} << log2 > kMostChunks;
  };
  while (log2 > 0 && half_will_do()) --log2;
  return log2;
}

}  // namespace

const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, etap_decision *decision) {
  const KvFormat &format = kv_format(problem);
  const bool no_rope_in_row = problem.kv_format == ETAP_KV_E4M3_528;
  if (format.scales != GroupScales::kNone &&
      (problem.q_dtype != ETAP_BF16 || problem.d_latent != 512 || (problem.d_rope != 64 && !no_rope_in_row))) {
    return "kv_format has group scales; the CUDA device takes it with q_dtype ETAP_BF16 and (d_latent, d_rope) = (512, "
           "64) only, or (512, 0) with ETAP_KV_E4M3_528";
  }
  const int rows = problem.num_heads * problem.max_query_len;
  const auto tiles_of = [&](int most) { return (rows + most - 1) / most; };
  // What a KV block costs with KV on M, and with rows on M.
  int64_t transposed = INT64_MAX;
  int transposed_tile = kRowsOnM;
  if (format.e4m3) {
    for (const CatalogRow &row : kCatalog) {
      if (!row.takes_e4m3() || row.tile_rows == kRowsOnM || (no_rope_in_row && !row.takes_528())) continue;
      const int64_t cycles = int64_t{tiles_of(row.tile_rows)} * e4m3_cycles(problem, limits, row.tile_rows);
      // Of two alike the larger: more tiles read KV again, if only through L2.
      if (cycles < transposed || (cycles == transposed && row.tile_rows > transposed_tile)) {
        transposed = cycles;
        transposed_tile = row.tile_rows;
      }
    }
  } else {
    transposed_tile = round_up((rows + tiles_of(kRowsOnM) - 1) / tiles_of(kRowsOnM), 8);
    transposed = int64_t{tiles_of(kRowsOnM)} * transposed_cycles(problem, limits, transposed_tile).total();
  }
  const int64_t on_m = int64_t{tiles_of(kRowsOnM)} * (format.e4m3 ? e4m3_cycles(problem, limits, kRowsOnM)
                                                                  : rows_on_m_cycles(problem, limits).total());
  // 16-bit KV with 32 rows and fewer: O^T fits one warpgroup, and what is padded to 64 is not worth it.
  const bool choose_on_m =
      transposed_tile == kRowsOnM || ((format.e4m3 || rows > kMostTokenSplit) && on_m < transposed);
  const int tile = problem.force_tile > 0 ? problem.force_tile : choose_on_m ? kRowsOnM : transposed_tile;
  const CatalogRow *const kernel = find_row(format.e4m3, tile);
  if (kernel == nullptr || (no_rope_in_row && !kernel->takes_528()))
    return "force_tile is none of the tiles that there are: the CUDA device has 8 to 64 rows in steps of 8, with an "
           "FP8 cache 8, 16, 24, 32, 48 and 64, with ETAP_KV_E4M3_528 32, 48 and 64";
  const int tiles = (rows + tile - 1) / tile;
  const int64_t units = static_cast<int64_t>(problem.batch) * tiles;
  const int chunks_log2 = chunks_log2_of(problem, tile, tiles);
  if (units << std::max(chunks_log2, 0) > INT32_MAX / 2)
    return "batch times row tiles exceeds 2^30, with ETAP_BATCH_INVARIANT and times the chunks of a tile";
  const int sms = sms_of(problem, limits);

  const Spread spread{limits, kernel->family, format.e4m3, tile, tiles, sms, units};
  int cluster = 1;  // in batch-invariant mode, as a cluster's size decides the order of summation
  if (chunks_log2 < 0) {
    cluster = problem.force_cluster > 0 ? problem.force_cluster : choose_cluster(spread);
    if (problem.force_cluster > 0 && spread.workers(cluster) < 1)
      return "force_cluster is more than the SMs that num_sms allows";
  }
  while (cluster > 1 && spread.workers(cluster) < 1) --cluster;
  const int workers = std::max(1, spread.workers(cluster));

  decision->tile_rows = tile;
  decision->num_tiles = tiles;
  decision->cluster_size = cluster;
  decision->num_workers = workers;
  decision->max_splits = chunks_log2 >= 0 ? 1 << chunks_log2 : std::max(workers, singles_of(problem, *decision));
  std::snprintf(decision->kernel, sizeof decision->kernel, "sm90_%s_%s_n%d",
                problem.q_dtype == ETAP_BF16 ? "bf16" : "fp16", kernel->name, tile);
  explain(decision, "%d query rows (%d heads x %d tokens) in %d tile(s) of %d: ", rows, problem.num_heads,
          problem.max_query_len, tiles, tile);
  if (kernel->family == Family::dv_split || kernel->family == Family::e4m3_dv_split) {
    explain(decision, "O^T needs two warpgroups, so each takes half of V's dims");
  } else if (tile == kRowsOnM) {
    explain(decision, "rows on M, because a KV block takes %lld cycles so, and %lld transposed",
            static_cast<long long>(on_m), static_cast<long long>(transposed));
  } else {
    explain(decision, "O^T fits one warpgroup, so two take KV blocks in turn");
  }
  explain(decision, "; %lld unit(s) on %d SMs: %d cluster(s) of %d", static_cast<long long>(units), sms, workers,
          cluster);
  if (chunks_log2 >= 0) {
    explain(decision, "; a unit is cut into at most %d chunk(s)", decision->max_splits);
  } else if (singles_of(problem, *decision) > 0) {
    explain(decision, ", or single CTAs");
  }
  decision->max_sharers = max_sharers(problem, kPrefixRows);
  tell_of_sharers(problem, decision);
  return nullptr;
}

PlanShape plan_shape(const etap_problem &problem, const etap_decision &decision) {
  PlanShape shape;
  shape.batch = problem.batch;
  shape.tiles = decision.num_tiles;
  shape.tile_rows = decision.tile_rows;
  shape.num_heads = problem.num_heads;
  shape.max_query_len = problem.max_query_len;
  shape.workers = decision.num_workers;
  shape.cluster = decision.cluster_size;
  shape.causal = (problem.flags & ETAP_CAUSAL) != 0;
  shape.chunks_log2 = chunks_log2_of(problem, decision.tile_rows, decision.num_tiles);
  shape.topk = problem.topk;
  shape.singles = singles_of(problem, decision);
  return shape;
}

SharingCosts sharing_costs(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits) {
  const KvFormat &format = kv_format(problem);
  const int scales = format.scales == GroupScales::kBeside ? problem.d_latent / 128 * 4 : 0;
  const int sms = sms_of(problem, limits);
  const int64_t block_bytes = int64_t{kBlockTokens} * (kv_row_bytes(problem) + scales) * sms;
  const int memory = static_cast<int>(block_bytes / limits.bytes_per_cycle);
  const int on_m = format.e4m3 ? e4m3_cycles(problem, limits, kPrefixRows) : rows_on_m_cycles(problem, limits).total();
  const auto usual = [&](Family family) {
    switch (family) {
      case Family::token_split: {
        const BlockCycles cycles = transposed_cycles(problem, limits, decision.tile_rows);
        return std::max(cycles.tensor, cycles.shared) + kTokenSplitRest;
      }
      case Family::dv_split:
        return transposed_cycles(problem, limits, decision.tile_rows).total();
      case Family::e4m3_split:
      case Family::e4m3_dv_split:
        return e4m3_cycles(problem, limits, decision.tile_rows);
      case Family::rows_on_m:
      case Family::e4m3_rows_on_m:
        break;
    }
    return on_m;
  };
  SharingCosts costs;
  costs.usual = decision.num_tiles * usual(find_row(format.e4m3, decision.tile_rows)->family);
  costs.together = on_m;
  costs.usual_own = std::max(costs.usual, memory);
  costs.together_own = std::max(costs.together, memory);
  costs.merge = kMergeCycles;
  costs.sms = sms;
  return costs;
}

namespace {

// Of a problem's plan, but of so many workers.
WorkspaceShape workspace_shape(const etap_problem &problem, const etap_decision &decision, int workers, int cluster,
                               int singles) {
  WorkspaceShape shape{};
  shape.batch = problem.batch;
  shape.tiles = decision.num_tiles;
  shape.tile_rows = decision.tile_rows;
  shape.d_latent = problem.d_latent;
  shape.workers = workers;
  shape.cluster = cluster;
  shape.singles = singles;
  shape.chunks_log2 = chunks_log2_of(problem, decision.tile_rows, decision.num_tiles);
  shape.narrow = travels_narrow(problem);
  return shape;
}
// With what shared prefixes add, where so many sequences are looked through.
WorkspaceShape with_sharers(WorkspaceShape shape, const etap_problem &problem, int sharers, int workers) {
  const int64_t rows = problem.flags & ETAP_RAGGED
                           ? problem.total_q
                           : std::min<int64_t>(problem.total_q, int64_t{sharers} * problem.max_query_len);
  shape.sharing_workers = workers;
  shape.sharers = sharers;
  shape.results = rows * problem.num_heads;
  return shape;
}

}  // namespace

Workspace workspace_of(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits) {
  const WorkspaceShape shape =
      workspace_shape(problem, decision, decision.num_workers, decision.cluster_size, singles_of(problem, decision));
  if (decision.max_sharers <= 1) return workspace_layout(shape);
  const int workers = std::min({sms_of(problem, limits), limits.max_clusters[1], kMaxWorkers});
  return workspace_layout(with_sharers(shape, problem, problem.batch, workers));
}

// For as many workers as the device has multiprocessors, whatever the cluster: a larger batch gets smaller clusters and
// more workers, and its workspace must not be smaller for it. Nor where it is too large for prefixes to be looked for.
size_t most_workspace_bytes(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits) {
  const int workers = std::max(sms_of(problem, limits), decision.num_workers);
  const WorkspaceShape shape = workspace_shape(problem, decision, workers, kMaxCluster, 0);
  if (!(problem.flags & ETAP_SHARED_PREFIXES) || sharers_of_tile(problem, kPrefixRows) < 2)
    return workspace_layout(shape).bytes;
  return workspace_layout(with_sharers(shape, problem, std::min(problem.batch, kMaxSharers), workers)).bytes;
}

}  // namespace etap::sm90
