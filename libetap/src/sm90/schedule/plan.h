#pragma once

#include <cuda_runtime_api.h>

#include "sm90/prefix_pass.h"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

// Enqueues the plan kernel; with a pass over shared prefixes (else nullptr) the search for them before it, and a plan
// of both passes.
cudaError_t launch_plan(const etap_plan &plan, const etap_plan_args &args, const Workspace &layout,
                        const PrefixPass *prefixes);

}  // namespace etap::sm90
