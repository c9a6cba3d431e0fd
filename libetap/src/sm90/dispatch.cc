#include "dispatch.h"

#include <algorithm>
#include <cstdio>

namespace etap::sm90 {
namespace {

constexpr int kTokenSplitRows = 32;  // the most rows of a tile
constexpr int kMaxCluster = 8;       // portable cluster sizes end there

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, etap_decision *decision) {
  if (problem.kv_format != ETAP_KV_BF16 && problem.kv_format != ETAP_KV_FP16) {
    return "kv_format is an FP8 format, which the CUDA device does not support yet; use ETAP_KV_BF16 or ETAP_KV_FP16";
  }
  const int rows = problem.num_heads * problem.max_query_len;
  const int most = kTokenSplitRows;
  const int tile = problem.force_tile > 0 ? problem.force_tile : round_up((rows + (rows + most - 1) / most - 1) / ((rows + most - 1) / most), 8);
  if (tile > most || tile % 8 != 0) return "force_tile must be a multiple of 8 up to 32";
  const int tiles = (rows + tile - 1) / tile;
  const int64_t units = static_cast<int64_t>(problem.batch) * tiles;
  if (units > INT32_MAX / 2) return "batch times row tiles exceeds 2^30";
  const int sms = std::min(problem.num_sms > 0 ? problem.num_sms : limits.num_sms, limits.num_sms);

  // A unit should be one worker's, so clusters are as large as leaves a worker for each unit. In batch-invariant mode the
  // cluster, whose size decides the order of summation, is the same for every batch.
  const auto workers_of = [&](int cluster) { return std::min(sms / cluster, limits.max_clusters[cluster]); };
  int cluster = problem.force_cluster > 0 ? problem.force_cluster : kMaxCluster;
  if (problem.force_cluster == 0 && !(problem.flags & ETAP_BATCH_INVARIANT)) {
    while (cluster > 1 && units > workers_of(cluster)) --cluster;
  }
  while (cluster > 1 && workers_of(cluster) < 1) --cluster;
  const int workers = std::max(1, workers_of(cluster));

  decision->tile_rows = tile;
  decision->num_tiles = tiles;
  decision->cluster_size = cluster;
  decision->num_workers = workers;
  decision->max_splits = problem.flags & ETAP_BATCH_INVARIANT ? 1 : workers;
  std::snprintf(decision->kernel, sizeof decision->kernel, "sm90_%s_token_split_n%d", problem.q_dtype == ETAP_BF16 ? "bf16" : "fp16", tile);
  std::snprintf(decision->reason, sizeof decision->reason,
                "%d query rows (%d heads x %d tokens) in %d tile(s) of N = %d: O^T of one warpgroup fits its registers, so KV blocks are split "
                "by tokens; %lld unit(s) on %d SMs: %d cluster(s) of %d",
                rows, problem.num_heads, problem.max_query_len, tiles, tile, static_cast<long long>(units), sms, workers, cluster);
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
  shape.never_split = (problem.flags & ETAP_BATCH_INVARIANT) != 0;
  return shape;
}

}  // namespace etap::sm90
