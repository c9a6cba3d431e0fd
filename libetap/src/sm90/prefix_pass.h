// The passes of a call whose sequences may share prefixes (schedule/prefixes.h), for the host. No CUDA calls: the
// emulator of tests/emulator takes it too.
#pragma once

#include "device.h"
#include "sm90/dispatch.h"
#include "sm90/merge.h"
#include "sm90/params.h"
#include "sm90/schedule/prefixes.h"

namespace etap::sm90 {

struct PrefixPass {
  etap_plan plan;    // of the pass over prefixes, which has a workspace of its own
  etap_plan behind;  // of the pass over what follows: the caller's, with an output in FP32
  PrefixWorkspace layout;
};

// Enough for any plan of a problem whose batch, total_q and num_sms are no larger.
size_t most_workspace_bytes(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits);

// Of a plan whose max_sharers is above 1. begin: where its own workspace ends.
PrefixPass prefix_pass(const etap_plan &plan, const DeviceLimits &limits, size_t begin);

// The caller's arguments for each pass, and for the merge of both.
etap_run_args prefix_args(const PrefixPass &pass, const etap_run_args &args);
etap_run_args args_behind(const PrefixPass &pass, const etap_run_args &args);
MergeParams merge_of_passes(const PrefixPass &pass, const etap_plan &plan, const etap_run_args &args);

// The rows of q of the pass over prefixes, of which its kernels are told beside their arguments.
inline const int32_t *prefix_q_rows(const PrefixPass &pass, const etap_run_args &args) {
  return at<const int32_t>(args.workspace, pass.layout.q_rows);
}

}  // namespace etap::sm90
