// The launch of a decode kernel: a call's arguments become its parameters, a tensor map and a configuration.
#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "sm90/catalog.h"
#include "sm90/kernel.h"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

constexpr int kMaxDevices = 64;

etap_status cuda_failed(cudaError_t error, const char *doing);

// The instance for a problem; its function is nullptr where none was built.
Kernel kernel_for(const etap_problem &problem, const CatalogRow *row);

cudaLaunchConfig_t launch_config(const Kernel &kernel, int clusters, int cluster, cudaStream_t stream,
                                 cudaLaunchAttribute (&attributes)[2]);

// On the current device, which is the plan's.
etap_status launch_decode(const etap_plan &plan, const etap_run_args &args, const Workspace &layout);
// On the current device.
etap_status launch_merge(const etap_merge_args &args);

}  // namespace etap::sm90
