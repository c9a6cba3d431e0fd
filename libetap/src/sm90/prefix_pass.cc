#include "sm90/prefix_pass.h"

namespace etap::sm90 {

PrefixPass prefix_pass(const etap_plan &plan, const DeviceLimits &limits, size_t begin) {
  PrefixPass pass{};
  pass.plan = plan;
  pass.plan.problem = prefix_problem(plan.problem);
  pass.plan.decision = {};
  // What the device takes of the problem it takes of the pass: the same cache, in the largest tiles that there are.
  dispatch(pass.plan.problem, limits, &pass.plan.decision);
  const etap_decision &d = pass.plan.decision;
  pass.layout = prefix_workspace(plan.problem, begin, d.tile_rows, d.num_workers, d.cluster_size);
  return pass;
}

etap_run_args prefix_args(const PrefixPass &pass, const etap_run_args &args) {
  const etap_problem &p = pass.plan.problem;
  etap_run_args own = args;
  own.out = at<void>(args.workspace, pass.layout.out);
  own.out_head_stride = p.d_latent;
  own.out_row_stride = static_cast<int64_t>(p.num_heads) * p.d_latent;
  own.lse = at<float>(args.workspace, pass.layout.lse);
  own.lse_head_stride = 1;
  own.lse_row_stride = p.num_heads;
  own.lse_base = ETAP_LSE_BASE_2;
  own.empty_lse = ETAP_EMPTY_LSE_MINUS_INF;
  own.workspace = at<void>(args.workspace, pass.layout.pass);
  return own;
}

void set_prefix_pass(const PrefixPass &pass, const etap_run_args &args, DecodeParams *params) {
  params->q_rows = at<const int32_t>(args.workspace, pass.layout.q_rows);
}

void set_prefix_results(const PrefixPass &pass, const etap_run_args &args, DecodeParams *params) {
  params->prefix_out = at<const float>(args.workspace, pass.layout.out);
  params->prefix_lse = at<const float>(args.workspace, pass.layout.lse);
}

}  // namespace etap::sm90
