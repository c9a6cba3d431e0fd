// The pass over prefixes that sequences share (schedule/prefixes.h), for the host: a plan, a workspace and a call of
// its own. No CUDA calls: the emulator of tests/emulator takes it too.
#pragma once

#include "device.h"
#include "sm90/dispatch.h"
#include "sm90/params.h"
#include "sm90/schedule/prefixes.h"

namespace etap::sm90 {

struct PrefixPass {
  etap_plan plan;
  PrefixWorkspace layout;
};

// Of a plan whose max_sharers is above 1. begin: where its own workspace ends.
PrefixPass prefix_pass(const etap_plan &plan, const DeviceLimits &limits, size_t begin);

// A call's arguments for the pass.
etap_run_args prefix_args(const PrefixPass &pass, const etap_run_args &args);

// Tells a pass's kernel what only it needs.
void set_prefix_pass(const PrefixPass &pass, const etap_run_args &args, DecodeParams *params);
// And the kernel that comes after it. args: the caller's.
void set_prefix_results(const PrefixPass &pass, const etap_run_args &args, DecodeParams *params);

}  // namespace etap::sm90
