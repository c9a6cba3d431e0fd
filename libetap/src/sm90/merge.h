#pragma once

#include <cuda_runtime_api.h>

#include "etap.h"

namespace etap::sm90 {
cudaError_t launch_merge(const etap_merge_args &args);
}
