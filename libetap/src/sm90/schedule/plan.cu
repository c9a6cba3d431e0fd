#include "sm90/schedule/plan.h"
#include "sm90/schedule/plan_kernels.cuh"

namespace etap::sm90 {

cudaError_t launch_plan(const etap_plan &plan, const etap_plan_args &args, const Workspace &layout,
                        const PrefixPass *prefixes) {
  const cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  launch_plans(plan, args, layout, prefixes, [stream](auto kernel, int ctas, const auto &...arguments) {
    kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(arguments...);
  });
  return cudaGetLastError();
}

}  // namespace etap::sm90
