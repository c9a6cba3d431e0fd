#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "sm90/dispatch.h"

namespace etap::sm90 {

// Enqueues the plan kernel; where sequences may share prefixes the search for them before it.
cudaError_t launch_plan(const etap_plan &plan, const etap_plan_args &args, const Workspace &layout,
                        const DeviceLimits &limits);

}  // namespace etap::sm90
