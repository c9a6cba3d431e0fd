#pragma once

#include <cuda_runtime_api.h>

#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

// Enqueues the plan kernel. cache_seqlens [batch]; cu_seqlens_q [batch + 1] or nullptr for max_query_len rows each.
cudaError_t launch_plan(const PlanShape &shape, const int32_t *cache_seqlens, const int32_t *cu_seqlens_q,
                        const Workspace &layout, char *workspace, cudaStream_t stream);

}  // namespace etap::sm90
