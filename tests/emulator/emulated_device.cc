// The CUDA device's dispatch, planner and kernels on the emulator, in the CPU device's place: a library of these
// objects computes with the SM90 kernels whatever asks for the CPU device.
#include <algorithm>
#include <cmath>
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
#include "sm90/prefix_pass.h"
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
  return plan.decision.max_sharers > 1
             ? prefix_pass(plan, kLimits, layout_of(plan.problem, plan.decision).bytes)
             : PrefixPass{};
}
size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision) {
  const etap_plan plan{problem, decision, 0, nullptr};
  return std::max(layout_of(problem, decision).bytes, pass_of(plan).layout.bytes);
}

template <typename T>
T *at(void *workspace, size_t offset) {
  return reinterpret_cast<T *>(static_cast<char *>(workspace) + offset);
}

// As plan.cu, one unit after the other. q_end: rows of q in use.
void write_plan(const PlanShape &shape, const std::vector<SequenceRecord> &records, int q_end, const Workspace &layout,
                void *workspace) {
  SequenceRecord *const sequences = at<SequenceRecord>(workspace, layout.sequences);
  WorkerRecord *const workers = at<WorkerRecord>(workspace, layout.workers);
  std::memset(at<char>(workspace, layout.counters), 0, sizeof(int) * shape.workers * shape.cluster);
  std::copy(records.begin(), records.end(), sequences);
  sequences[shape.batch] = SequenceRecord{0, q_end, 0, 0};
  std::vector<int> blocks;
  int64_t total = 0;
  int largest = 0;
  for (const SequenceRecord &s : records) {
    for (int t = 0; t < shape.tiles; ++t) {
      const int n = blocks_of(visible_tokens(s.length, s.q_len, t, shape.tile_rows, shape.num_heads, shape.causal));
      blocks.push_back(n);
      total += n > 0 ? n + costs_of(shape.cluster).piece : 1;
      largest = std::max(largest, n);
    }
  }
  blocks.push_back(0);  // where there is no unit it is read, too
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
}

// Finds groups, plans the pass over their prefixes, and lets their members begin behind them.
void plan_prefixes(const etap_plan &plan, const etap_plan_args &args, const PrefixPass &pass,
                   std::vector<SequenceRecord> *records) {
  const etap_problem &problem = plan.problem;
  const PrefixWorkspace &w = pass.layout;
  const int tile_rows = pass.plan.decision.tile_rows;
  std::fill_n(at<float>(args.workspace, w.lse), w.lse_count, -INFINITY);
  const std::vector<SequenceRecord> whole = *records;
  std::vector<PrefixLink> links(whole.size());
  std::vector<StarMember> members(whole.size());
  std::vector<SequenceRecord> prefixes;
  etap_shared found = ETAP_INIT(etap_shared);
  const auto of = [](auto &list, int i) -> auto & { return list[static_cast<size_t>(i)]; };
  find_groups(
      problem.batch, problem.page_size, tile_rows,
      [&](int b) {
        return shareable_pages(of(whole, b).length, of(whole, b).q_len, problem.flags, problem.page_size,
                               table_tokens(args, problem.page_size));
      },
      [&](int b) { return args.block_table + b * args.block_table_stride; },
      [&](int b) { return of(whole, b).q_len * problem.num_heads; }, links.data(), members.data(),
      [&](int begin, int end, int tokens) {
        int32_t *const q_rows = at<int32_t>(args.workspace, w.q_rows) + found.groups * tile_rows;
        int query_tokens = 0;
        for (int i = begin; i < end; ++i) {
          const int b = of(members, i).sequence;
          for (int q = 0; q < of(whole, b).q_len; ++q) q_rows[query_tokens++] = of(whole, b).q_begin + q;
          of(*records, b) = behind_prefix(of(whole, b), tokens, problem.page_size);
        }
        prefixes.push_back(
            prefix_record(found.groups, tokens, query_tokens, of(members, begin).sequence, tile_rows));
        ++found.groups;
        found.sequences += end - begin;
        found.tokens += static_cast<int64_t>(end - begin - 1) * tokens;
      });
  PlanShape shape = plan_shape(pass.plan.problem, pass.plan.decision);
  shape.batch = found.groups;
  write_plan(shape, prefixes, 0, w.workspace, at<char>(args.workspace, w.pass));
  *at<etap_shared>(args.workspace, w.found) = found;
}

etap_status plan(const etap_plan &plan, const etap_plan_args &args) {
  const PlanShape shape = plan_shape(plan.problem, plan.decision);
  std::vector<SequenceRecord> records;
  for (int b = 0; b < shape.batch; ++b) {
    int length = args.cache_seqlens != nullptr ? args.cache_seqlens[b] : shape.topk;
    if (shape.topk > 0 && static_cast<unsigned>(length) > static_cast<unsigned>(shape.topk)) length = shape.topk + 1;
    SequenceRecord s{length, b * shape.max_query_len, shape.max_query_len, 0};
    if (args.cu_seqlens_q != nullptr) {
      s.q_begin = args.cu_seqlens_q[b];
      s.q_len = std::min(args.cu_seqlens_q[b + 1] - s.q_begin, shape.max_query_len);
    }
    records.push_back(s);
  }
  if (plan.decision.max_sharers > 1) plan_prefixes(plan, args, pass_of(plan), &records);
  const int q_end = args.cu_seqlens_q != nullptr ? args.cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len;
  write_plan(shape, records, q_end, layout_of(plan.problem, plan.decision), args.workspace);
  return ETAP_OK;
}

etap_status shared(const etap_plan &plan, const void *workspace, void *, etap_shared *shared) {
  if (plan.decision.max_sharers > 1)
    *shared = *at<const etap_shared>(const_cast<void *>(workspace), pass_of(plan).layout.found);
  return ETAP_OK;
}

// One launch. set(&params): what else the kernel is to be told.
template <typename Set>
etap_status launch(const etap_plan &plan, const etap_run_args &args, const Workspace &layout, const Set &set) {
  static uint32_t seed = std::getenv("ETAP_EMULATOR_SEED") != nullptr
                             ? static_cast<uint32_t>(std::strtoul(std::getenv("ETAP_EMULATOR_SEED"), nullptr, 10))
                             : 1;
  const etap_problem &problem = plan.problem;
  const CatalogRow *const row = find_row(kv_format(problem).e4m3, plan.decision.tile_rows);
  const Kernel kernel = kFind[row - kCatalog](problem.q_dtype, problem.d_latent, problem.d_rope, kv_copy(problem));
  if (kernel.function == nullptr) return fail(ETAP_INTERNAL_ERROR, "no kernel %s was built", plan.decision.kernel);
  DecodeParams p = decode_params(plan, args, layout);
  set(&p);
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

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  const Workspace layout = layout_of(plan.problem, plan.decision);
  if (plan.decision.max_sharers <= 1) return launch(plan, args, layout, [](DecodeParams *) {});
  const PrefixPass pass = pass_of(plan);
  const etap_status status = launch(pass.plan, prefix_args(pass, args), pass.layout.workspace,
                                    [&](DecodeParams *p) { set_prefix_pass(pass, args, p); });
  if (status != ETAP_OK) return status;
  return launch(plan, args, layout, [&](DecodeParams *p) { set_prefix_results(pass, args, p); });
}

etap_status merge(const etap_merge_args &) { return fail(ETAP_UNSUPPORTED, "merging is not emulated"); }

}  // namespace
}  // namespace sm90

const etap_device cpu_device = {sm90::count, sm90::describe, sm90::decide, sm90::workspace_bytes,
                                sm90::plan,  sm90::shared,   sm90::run,    sm90::merge};

}  // namespace etap
