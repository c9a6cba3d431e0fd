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
#include "sm90/merge.h"
#include "sm90/merge_pieces.h"
#include "sm90/prefix_pass.h"
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
constexpr DeviceLimits kLimits = {6, 4096, {0, 6, 3, 2, 1, 1, 1, 0, 0}};

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
// The pass over shared prefixes; its plan has max_sharers 0 where there is none.
PrefixPass pass_of(const etap_plan &plan) {
  return plan.decision.max_sharers > 1 ? prefix_pass(plan, kLimits, layout_of(plan.problem, plan.decision).bytes)
                                       : PrefixPass{};
}
size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision) {
  const etap_plan plan{problem, decision, 0, nullptr};
  const size_t bytes = std::max(layout_of(problem, decision).bytes, pass_of(plan).layout.bytes);
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
  const PrefixPass pass = pass_of(plan);
  uint32_t seed = 0;
  try {
    launch_plans(plan, args, layout_of(plan.problem, plan.decision), plan.decision.max_sharers > 1 ? &pass : nullptr,
                 [&seed](auto kernel, int ctas, const auto &...arguments) {
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
  if (plan.decision.max_sharers > 1)
    *shared = *at<const etap_shared>(const_cast<void *>(workspace), pass_of(plan).layout.found);
  return ETAP_OK;
}

// One pass. q_rows: of that over shared prefixes, else nullptr.
etap_status launch(const etap_plan &plan, const etap_run_args &args, const Workspace &layout, const int32_t *q_rows) {
  const etap_problem &problem = plan.problem;
  const CatalogRow *const row = find_row(kv_format(problem).e4m3, plan.decision.tile_rows);
  const Kernel kernel = kFind[row - kCatalog](problem.q_dtype, problem.d_latent, problem.d_rope, kv_copy(problem));
  if (kernel.function == nullptr) return fail(ETAP_INTERNAL_ERROR, "no kernel %s was built", plan.decision.kernel);
  DecodeParams p = decode_params(plan, args, layout);
  p.q_rows = q_rows;
  EmulatedMap map{static_cast<const char *>(args.kv_cache), kv_boxes(problem, args)};
  std::memcpy(&p.kv_map, &map, sizeof map);
  const auto function = reinterpret_cast<void (*)(const DecodeParams)>(const_cast<void *>(kernel.function));
  uint32_t seed = 0;
  try {
    // Workers in any order: the parts of a unit may arrive in any.
    std::vector<uint32_t> workers(static_cast<size_t>(plan.decision.num_workers));
    for (uint32_t w = 0; w < workers.size(); ++w) workers[w] = w;
    std::mt19937 random(next_seed());
    std::shuffle(workers.begin(), workers.end(), random);
    for (const uint32_t w : workers) {
      seed = next_seed();
      emulator::run_cluster(w, static_cast<uint32_t>(plan.decision.num_workers),
                            static_cast<uint32_t>(plan.decision.cluster_size), kernel.threads, seed,
                            [&] { function(p); });
    }
    if (merges_pieces(plan.decision)) {
      const Kernel merge = merge_pieces_kernel(problem.d_latent);
      const auto merge_function =
          reinterpret_cast<void (*)(const DecodeParams, int, int)>(const_cast<void *>(merge.function));
      for (const uint32_t w : workers) {
        seed = next_seed();
        emulator::run_cluster(w, static_cast<uint32_t>(workers.size()), 1, merge.threads, seed,
                              [&] { merge_function(p, plan.decision.tile_rows, plan.decision.num_workers); });
      }
    }
  } catch (const std::exception &failed) {
    return fail(ETAP_INTERNAL_ERROR, "%s, seed %u: %s", plan.decision.kernel, seed, failed.what());
  }
  return ETAP_OK;
}

etap_status launch_merge(const MergeParams &merge) {
  const Kernel kernel = merge_kernel(merge);
  const auto function = reinterpret_cast<void (*)(const MergeParams)>(const_cast<void *>(kernel.function));
  const uint32_t ctas = static_cast<uint32_t>(merge_ctas(merge));
  uint32_t seed = 0;
  try {
    for (uint32_t cta = 0; cta < ctas; ++cta) {
      seed = next_seed();
      emulator::run_cluster(cta, ctas, 1, kernel.threads, seed, [&] { function(merge); });
    }
  } catch (const std::exception &failed) {
    return fail(ETAP_INTERNAL_ERROR, "a merge, seed %u: %s", seed, failed.what());
  }
  return ETAP_OK;
}

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  const Workspace layout = layout_of(plan.problem, plan.decision);
  if (plan.decision.max_sharers <= 1) return launch(plan, args, layout, nullptr);
  const PrefixPass pass = pass_of(plan);
  etap_status status = launch(pass.plan, prefix_args(pass, args), pass.layout.workspace, prefix_q_rows(pass, args));
  if (status == ETAP_OK) status = launch(pass.behind, args_behind(pass, args), layout, nullptr);
  return status == ETAP_OK ? launch_merge(merge_of_passes(pass, plan, args)) : status;
}

etap_status merge(const etap_merge_args &args) { return launch_merge(merge_params(args)); }

}  // namespace
}  // namespace sm90

const etap_device cpu_device = {sm90::count, sm90::describe, sm90::decide, sm90::workspace_bytes,
                                sm90::plan,  sm90::shared,   sm90::run,    sm90::merge};

}  // namespace etap
