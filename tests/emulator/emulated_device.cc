// The CUDA device's dispatch, planner and kernels on the emulator, in the CPU device's place: a library of these
// objects computes with the SM90 kernels whatever asks for the CPU device.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "device.h"
#include "kv_format.h"
#include "machine.h"
#include "sm90/catalog.h"
#include "sm90/decode_params.h"
#include "sm90/dispatch.h"
#include "sm90/kernel.h"
#include "sm90/ptx/ptx.cuh"
#include "sm90/schedule/workspace.h"

namespace etap {
namespace sm90 {

// Of the kernels that the Makefile builds for the emulator.
#define KERNEL(family, rows) FindKernel family##_n##rows __attribute__((weak));
#include "sm90/catalog.def"
#undef KERNEL

namespace {

constexpr FindKernel *kFind[] = {
#define KERNEL(family, rows) family##_n##rows,
#include "sm90/catalog.def"
#undef KERNEL
};

// A small card: few workers, so that short sequences are cut among them.
constexpr DeviceLimits kLimits = {8, 4096, {0, 8, 4, 2, 2, 1, 1, 1, 1}};

int32_t count() { return 1; }

etap_status describe(int32_t, etap_device_info *info) {
  std::snprintf(info->name, sizeof info->name, "SM90 emulator");
  info->num_sms = kLimits.num_sms;
  info->compute_major = 9;
  info->usable = 1;
  return ETAP_OK;
}

etap_status decide(const etap_problem &problem, etap_decision *decision) {
  if (const char *why = dispatch(problem, kLimits, decision)) return fail(ETAP_UNSUPPORTED, "%s", why);
  const CatalogRow *const row = find_row(kv_format(problem).e4m3, decision->tile_rows);
  if (kFind[row - kCatalog] == nullptr)
    return fail(ETAP_UNSUPPORTED, "%s is not built for the emulator", decision->kernel);
  return ETAP_OK;
}

Workspace layout_of(const etap_problem &problem, const etap_decision &decision) {
  return workspace_layout(problem.batch, decision.num_tiles, decision.tile_rows, problem.d_latent, decision.num_workers,
                          decision.cluster_size);
}
size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision) {
  return layout_of(problem, decision).bytes;
}

// As plan.cu, one unit after the other.
etap_status plan(const etap_plan &plan, const etap_plan_args &args) {
  const PlanShape shape = plan_shape(plan.problem, plan.decision);
  const Workspace layout = layout_of(plan.problem, plan.decision);
  char *const workspace = static_cast<char *>(args.workspace);
  SequenceRecord *const sequences = reinterpret_cast<SequenceRecord *>(workspace + layout.sequences);
  WorkerRecord *const workers = reinterpret_cast<WorkerRecord *>(workspace + layout.workers);
  std::memset(workspace + layout.counters, 0, sizeof(int) * plan.decision.num_workers * plan.decision.cluster_size);
  std::vector<int> blocks;
  int64_t total = 0;
  int largest = 0;
  for (int b = 0; b < shape.batch; ++b) {
    int length = args.cache_seqlens != nullptr ? args.cache_seqlens[b] : shape.topk;
    if (shape.topk > 0 && static_cast<unsigned>(length) > static_cast<unsigned>(shape.topk)) length = shape.topk + 1;
    SequenceRecord s{length, b * shape.max_query_len, shape.max_query_len, 0};
    if (args.cu_seqlens_q != nullptr) {
      s.q_begin = args.cu_seqlens_q[b];
      s.q_len = std::min(args.cu_seqlens_q[b + 1] - s.q_begin, shape.max_query_len);
    }
    sequences[b] = s;
    for (int t = 0; t < shape.tiles; ++t) {
      const int n = blocks_of(visible_tokens(s.length, s.q_len, t, shape.tile_rows, shape.num_heads, shape.causal));
      blocks.push_back(n);
      total += n > 0 ? n + costs_of(shape.cluster).piece : 1;
      largest = std::max(largest, n);
    }
  }
  sequences[shape.batch] = SequenceRecord{
      0, args.cu_seqlens_q != nullptr ? args.cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len, 0, 0};
  const auto count = [&](int unit) { return blocks[static_cast<size_t>(unit)]; };
  std::vector<ShareEnd> ends(static_cast<size_t>(shape.workers)), best_ends;
  int64_t best = INT64_MAX;
  for (int candidate = 0; candidate < kCandidates; ++candidate) {
    const int64_t cost = assign(shape, count, candidate_budget(shape, total, largest, candidate),
                                [&](int worker, const ShareEnd &end) { ends[static_cast<size_t>(worker)] = end; });
    if (cost < best) {
      best = cost;
      best_ends = ends;
    }
  }
  for (int w = 0; w < shape.workers; ++w) {
    WorkerRecord record =
        record_of(shape, count, [&](int worker) { return best_ends[static_cast<size_t>(worker)]; }, w);
    if (record.unit_begin <= record.unit_end) record.first_sequence = sequences[record.unit_begin / shape.tiles];
    workers[w] = record;
  }
  return ETAP_OK;
}

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  static uint32_t seed = std::getenv("ETAP_EMULATOR_SEED") != nullptr
                             ? static_cast<uint32_t>(std::strtoul(std::getenv("ETAP_EMULATOR_SEED"), nullptr, 10))
                             : 1;
  const etap_problem &problem = plan.problem;
  const CatalogRow *const row = find_row(kv_format(problem).e4m3, plan.decision.tile_rows);
  const Kernel kernel = kFind[row - kCatalog](problem.q_dtype, problem.d_latent, problem.d_rope, kv_copy(problem));
  if (kernel.function == nullptr) return fail(ETAP_INTERNAL_ERROR, "no kernel %s was built", plan.decision.kernel);
  DecodeParams p = decode_params(plan, args, layout_of(problem, plan.decision));
  EmulatedMap map{static_cast<const char *>(args.kv_cache), kv_boxes(problem, args)};
  std::memcpy(&p.kv_map, &map, sizeof map);
  const auto function = reinterpret_cast<void (*)(const DecodeParams)>(const_cast<void *>(kernel.function));
  try {
    // Workers in any order: the parts of a unit may arrive in any.
    std::vector<uint32_t> workers(static_cast<size_t>(plan.decision.num_workers));
    for (uint32_t w = 0; w < workers.size(); ++w) workers[w] = w;
    std::mt19937 random(seed);
    std::shuffle(workers.begin(), workers.end(), random);
    for (const uint32_t w : workers) {
      emulator::run_cluster(w, static_cast<uint32_t>(plan.decision.num_workers),
                            static_cast<uint32_t>(plan.decision.cluster_size), kernel.threads, seed++,
                            [&] { function(p); });
    }
  } catch (const std::exception &failed) {
    return fail(ETAP_INTERNAL_ERROR, "%s, seed %u: %s", plan.decision.kernel, seed - 1, failed.what());
  }
  return ETAP_OK;
}

etap_status merge(const etap_merge_args &) { return fail(ETAP_UNSUPPORTED, "merging is not emulated"); }

}  // namespace
}  // namespace sm90

const etap_device cpu_device = {sm90::count, sm90::describe, sm90::decide, sm90::workspace_bytes,
                                sm90::plan,  sm90::run,      sm90::merge};

}  // namespace etap
