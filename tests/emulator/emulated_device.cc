// The CUDA device's dispatch, planner and kernels on the emulator, in the CPU device's place: a library of these
// objects computes with the SM90 kernels whatever asks for the CPU device.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "device.h"
#include "kv_format.h"
#include "machine.h"
#include "sm90/catalog.h"
#include "sm90/decode_params.h"
#include "sm90/dispatch.h"
#include "sm90/kernel.h"
#include "sm90/merge.h"
#include "sm90/merge_pieces.h"
#include "sm90/ptx/ptx.cuh"
#include "sm90/schedule/plan_kernels.cuh"
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
constexpr DeviceLimits kLimits = {6, 4096, 100, {0, 6, 3, 2, 1, 1, 1, 0, 0}};
// Every group pays, as small batches are to be computed like large ones; unless ETAP_EMULATOR_COSTS asks for the
// card's.
constexpr SharingCosts kEveryGroup = {1, 0, 0, 0, 0, 0};
SharingCosts costs_of(const etap_plan &plan) {
  return std::getenv("ETAP_EMULATOR_COSTS") == nullptr ? kEveryGroup
                                                       : sharing_costs(plan.problem, plan.decision, kLimits);
}

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

size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision) {
  const size_t bytes = workspace_of(problem, decision, kLimits).bytes;
  if (bytes > most_workspace_bytes(problem, decision, kLimits)) std::abort();  // what a caller on a GPU is told
  return bytes;  // just what is used, so that what is written behind it shows
}

uint32_t next_seed() {
  static uint32_t seed = std::getenv("ETAP_EMULATOR_SEED") != nullptr
                             ? static_cast<uint32_t>(std::strtoul(std::getenv("ETAP_EMULATOR_SEED"), nullptr, 10))
                             : 1;
  return seed++;
}

etap_status plan(const etap_plan &plan, const etap_plan_args &args) {
  uint32_t seed = 0;
  try {
    launch_plans(plan, args, workspace_of(plan.problem, plan.decision, kLimits), costs_of(plan),
                 [&seed](auto kernel, int ctas, bool, const auto &...arguments) {
                   for (int cta = 0; cta < ctas; ++cta) {
                     seed = next_seed();
                     emulator::run_cluster(static_cast<uint32_t>(cta), static_cast<uint32_t>(ctas), 1, kThreads, seed,
                                           [&] { kernel(arguments...); });
                   }
                 });
  } catch (const std::exception &failed) {
    return fail(ETAP_INTERNAL_ERROR, "a plan, seed %u: %s", seed, failed.what());
  }
  return ETAP_OK;
}

etap_status shared(const etap_plan &plan, const void *workspace, void *, etap_shared *shared) {
  const Workspace layout = workspace_of(plan.problem, plan.decision, kLimits);
  if (layout.shares()) *shared = *at<const etap_shared>(const_cast<void *>(workspace), layout.found);
  return ETAP_OK;
}

// Clusters in any order: the parts of a unit may arrive in any.
etap_status launch(const char *name, const Kernel &kernel, int clusters, int cluster,
                   const std::function<void()> &function) {
  std::vector<uint32_t> order(static_cast<size_t>(clusters));
  for (uint32_t c = 0; c < order.size(); ++c) order[c] = c;
  std::mt19937 random(next_seed());
  std::shuffle(order.begin(), order.end(), random);
  uint32_t seed = 0;
  try {
    for (const uint32_t c : order) {
      seed = next_seed();
      emulator::run_cluster(c, static_cast<uint32_t>(clusters), static_cast<uint32_t>(cluster), kernel.threads, seed,
                            function);
    }
  } catch (const std::exception &failed) {
    return fail(ETAP_INTERNAL_ERROR, "%s, seed %u: %s", name, seed, failed.what());
  }
  return ETAP_OK;
}

// A kernel's function, which takes these.
template <typename... Arguments>
auto function_of(const Kernel &kernel) {
  return reinterpret_cast<void (*)(Arguments...)>(const_cast<void *>(kernel.function));
}

etap_status launch_decode(const etap_problem &problem, int tile_rows, int workers, int cluster, const DecodeParams &p) {
  const CatalogRow *const row = find_row(kv_format(problem).e4m3, tile_rows);
  const Kernel kernel = kFind[row - kCatalog](problem.q_dtype, problem.d_latent, problem.d_rope, kv_copy(problem));
  if (kernel.function == nullptr) return fail(ETAP_INTERNAL_ERROR, "no kernel %s of %d rows", row->name, tile_rows);
  return launch(row->name, kernel, workers, ctas_of_tile(tile_rows) * cluster, [&] { function_of<const DecodeParams>(kernel)(p); });
}

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  const etap_problem &problem = plan.problem;
  const etap_decision &d = plan.decision;
  const Workspace layout = workspace_of(problem, d, kLimits);
  DecodeParams p = decode_params(plan, args, layout);
  EmulatedMap map{static_cast<const char *>(args.kv_cache), kv_boxes(problem, args)};
  std::memcpy(&p.kv_map, &map, sizeof map);
  if (const etap_status status = launch_decode(problem, d.tile_rows, d.num_workers, d.cluster_size, p)) return status;
  const int sharing_workers = layout.shape.sharing_workers;
  if (layout.sharing_kernel()) {
    const DecodeParams sharing = sharing_params(p, args.workspace, layout);
    if (const etap_status status = launch_decode(problem, kPrefixRows, sharing_workers, 1, sharing)) return status;
  }
  if (!merges_pieces(d)) return ETAP_OK;
  const Kernel merge = merge_pieces_kernel(problem.d_latent, p.narrow, merges_much(problem, d));
  const MergeList *const list = at<const MergeList>(args.workspace, layout.merges);
  return launch("merge_pieces", merge, std::max(d.num_workers, sharing_workers), 1,
                [&] { function_of<const DecodeParams, const MergeList *>(merge)(p, list); });
}

etap_status merge(const etap_merge_args &args) {
  const Kernel kernel = merge_kernel(args.dtype);
  return launch("a merge", kernel, static_cast<int>(merge_ctas(args)), 1,
                [&] { function_of<const etap_merge_args>(kernel)(args); });
}

}  // namespace
}  // namespace sm90

const etap_device cpu_device = {sm90::count, sm90::describe, sm90::decide, sm90::workspace_bytes,
                                sm90::plan,  sm90::shared,   sm90::run,    sm90::merge};

}  // namespace etap
