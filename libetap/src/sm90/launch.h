// From arguments to launches: parameters, tensor maps, kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "../device.h"
#include "dispatch.h"

namespace etap::sm90 {

constexpr int kMaxDevices = 64;

// A status for a CUDA error, with a message: "CUDA failed while DOING: ..".
etap_status cuda_failed(cudaError_t error, const char *doing);

// On the current device, which is the plan's.
etap_status launch_plan_update(const etap_plan &plan, const DeviceLimits &limits, const Choice &choice,
                               const etap_plan_args &args);
etap_status launch_run(const etap_plan &plan, const DeviceLimits &limits, const Choice &choice,
                       const etap_run_args &args);

}  // namespace etap::sm90
