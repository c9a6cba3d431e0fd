#include "sm90/schedule/plan.h"
#include "sm90/schedule/plan_kernels.cuh"

namespace etap::sm90 {

cudaError_t launch_plan(const etap_plan &plan, const etap_plan_args &args, const Workspace &layout,
                        const DeviceLimits &limits) {
  launch_plans(plan, args, layout, sharing_costs(plan.problem, plan.decision, limits),
               [&args](auto kernel, int ctas, bool waits, const auto &...arguments) {
                 cudaLaunchAttribute attribute{};
                 attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
                 attribute.val.programmaticStreamSerializationAllowed = waits;
                 cudaLaunchConfig_t config = {};
                 config.gridDim = dim3(static_cast<unsigned>(ctas));
                 config.blockDim = dim3(kThreads);
                 config.stream = static_cast<cudaStream_t>(args.stream);
                 config.attrs = &attribute;
                 config.numAttrs = 1;
                 cudaLaunchKernelEx(&config, kernel, arguments...);
               });
  return cudaGetLastError();
}

}  // namespace etap::sm90
