#include "sm90/prefix_pass.h"

#include <algorithm>

namespace etap::sm90 {
namespace {

// The results of pass 0, over prefixes, or 1, over what follows: dense, FP32, base 2.
etap_run_args into_workspace(const PrefixPass &pass, const etap_run_args &args, int nth) {
  const etap_problem &p = pass.behind.problem;
  const PrefixWorkspace &w = pass.layout;
  etap_run_args own = args;
  own.out = at<float>(args.workspace, w.out) + nth * w.results * p.d_latent;
  own.out_head_stride = p.d_latent;
  own.out_row_stride = static_cast<int64_t>(p.num_heads) * p.d_latent;
  own.lse = at<float>(args.workspace, w.lse) + nth * w.results;
  own.lse_head_stride = 1;
  own.lse_row_stride = p.num_heads;
  own.lse_base = ETAP_LSE_BASE_2;
  own.empty_lse = ETAP_EMPTY_LSE_MINUS_INF;
  return own;
}

}  // namespace

PrefixPass prefix_pass(const etap_plan &plan, const DeviceLimits &limits, size_t begin) {
  PrefixPass pass{};
  pass.behind = plan;
  pass.behind.problem.out_dtype = ETAP_FP32;
  pass.plan = plan;
  pass.plan.problem = prefix_problem(plan.problem);
  pass.plan.decision = {};
  // What the device takes of the problem it takes of the pass: the same cache, in the largest tiles that there are.
  dispatch(pass.plan.problem, limits, &pass.plan.decision);
  const etap_decision &d = pass.plan.decision;
  pass.layout = prefix_workspace(plan.problem, begin, d.tile_rows, d.num_workers, d.cluster_size);
  return pass;
}

// For as many workers as the device has multiprocessors, whatever the cluster: a larger batch gets smaller clusters and
// more workers, and its workspace must not be smaller for it. Nor where it is too large for prefixes to be looked for.
size_t most_workspace_bytes(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits) {
  const int sms = problem.num_sms > 0 ? std::min(problem.num_sms, limits.num_sms) : limits.num_sms;
  const int workers = std::max(sms, decision.num_workers);
  const size_t bytes =
      workspace_layout(problem.batch, decision.num_tiles, decision.tile_rows, problem.d_latent, workers, 8).bytes;
  if (!(problem.flags & ETAP_SHARED_PREFIXES) || sharers_of_tile(problem, kPrefixRows) < 2) return bytes;
  return prefix_workspace(problem, bytes, kPrefixRows, workers, 8).bytes;
}

etap_run_args prefix_args(const PrefixPass &pass, const etap_run_args &args) {
  etap_run_args own = into_workspace(pass, args, 0);
  own.workspace = at<void>(args.workspace, pass.layout.pass);
  return own;
}

etap_run_args args_behind(const PrefixPass &pass, const etap_run_args &args) { return into_workspace(pass, args, 1); }

MergeParams merge_of_passes(const PrefixPass &pass, const etap_plan &plan, const etap_run_args &args) {
  const etap_run_args parts = into_workspace(pass, args, 0);
  const PrefixWorkspace &w = pass.layout;
  etap_merge_args merge{};
  merge.num_parts = 2;
  merge.rows = static_cast<int32_t>(w.rows);
  merge.num_heads = plan.problem.num_heads;
  merge.d = plan.problem.d_latent;
  merge.dtype = plan.problem.out_dtype;
  merge.lse_base = args.lse_base;
  merge.parts = parts.out;
  merge.parts_part_stride = w.results * merge.d;
  merge.parts_row_stride = parts.out_row_stride;
  merge.parts_head_stride = parts.out_head_stride;
  merge.parts_lse = parts.lse;
  merge.parts_lse_part_stride = w.results;
  merge.parts_lse_row_stride = parts.lse_row_stride;
  merge.parts_lse_head_stride = parts.lse_head_stride;
  merge.out = args.out;
  merge.out_row_stride = args.out_row_stride;
  merge.out_head_stride = args.out_head_stride;
  merge.lse = args.lse;
  merge.lse_row_stride = args.lse_row_stride;
  merge.lse_head_stride = args.lse_head_stride;
  merge.stream = args.stream;
  return MergeParams{merge, ETAP_FP32, ETAP_LSE_BASE_2,
                     args.empty_lse == ETAP_EMPTY_LSE_PLUS_INF ? INFINITY : -INFINITY};
}

}  // namespace etap::sm90
