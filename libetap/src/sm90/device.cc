// The CUDA device: finds the GPU and chooses by dispatch.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>

#include "../device.h"
#include "launch.h"
#include "merge.h"
#include "schedule/workspace.h"

namespace etap {
namespace sm90 {
namespace {

// Makes a device current for a scope, and restores the caller's.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != index) {
      error_ = cudaSetDevice(index);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice &) = delete;
  CurrentDevice &operator=(const CurrentDevice &) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

int32_t device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

etap_status describe(int32_t index, etap_device_info *info) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    std::snprintf(info->reason, sizeof info->reason, "no CUDA device: %s",
                  error == cudaSuccess ? "the driver reports none" : cudaGetErrorString(error));
    if (index == 0) return ETAP_OK;
    return fail(ETAP_NO_DEVICE, "device_index is %d, but there is no CUDA device", index);
  }
  if (index < 0 || index >= count) {
    return fail(ETAP_NO_DEVICE, "device_index is %d; allowed: 0 to %d, the CUDA devices that this process sees", index,
                count - 1);
  }
  cudaDeviceProp properties;
  if (const cudaError_t e = cudaGetDeviceProperties(&properties, index))
    return cuda_failed(e, "reading the properties of a device");
  std::snprintf(info->name, sizeof info->name, "%.*s", static_cast<int>(sizeof info->name) - 1, properties.name);
  info->num_sms = properties.multiProcessorCount;
  info->compute_major = properties.major;
  info->compute_minor = properties.minor;
  info->l2_bytes = properties.l2CacheSize;
  info->usable = properties.major == 9 && properties.minor == 0;
  if (!info->usable) {
    std::snprintf(info->reason, sizeof info->reason,
                  "%.*s has compute capability %d.%d; the kernels use instructions that only 9.0 (H20, H100, H200) has",
                  100, properties.name, properties.major, properties.minor);
  }
  return ETAP_OK;
}

// What dispatch needs to know of a device: asked once, then remembered.
etap_status limits_of(int index, const DeviceLimits **limits) {
  struct Entry {
    std::once_flag once;
    DeviceLimits limits{};
    etap_status status = ETAP_OK;
    char message[512] = "";
  };
  static Entry entries[kMaxDevices];
  if (index < 0 || index >= kMaxDevices)
    return fail(ETAP_NO_DEVICE, "device_index is %d; allowed: 0 to %d", index, kMaxDevices - 1);
  Entry &entry = entries[index];
  std::call_once(entry.once, [&] {
    etap_device_info info{};
    info.size = sizeof info;
    entry.status = describe(index, &info);
    if (entry.status == ETAP_OK && !info.usable)
      entry.status = fail(ETAP_NO_DEVICE, "device %d can't be used: %s", index, info.reason);
    entry.limits.num_sms = info.num_sms;
    int sm_khz = 0, memory_khz = 0, memory_bits = 0;
    if (entry.status == ETAP_OK && (cudaDeviceGetAttribute(&sm_khz, cudaDevAttrClockRate, index) != cudaSuccess ||
                                    cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, index) != cudaSuccess ||
                                    cudaDeviceGetAttribute(&memory_bits, cudaDevAttrGlobalMemoryBusWidth, index) !=
                                        cudaSuccess))
      entry.status = cuda_failed(cudaGetLastError(), "reading the clocks of a device");
    entry.limits.sm_mhz = static_cast<float>(sm_khz) / 1e3f;
    entry.limits.memory_bytes = 2.f * 1e3f * static_cast<float>(memory_khz) * static_cast<float>(memory_bits) / 8.f;
    if (entry.status != ETAP_OK) std::snprintf(entry.message, sizeof entry.message, "%s", etap_last_message());
  });
  if (entry.status != ETAP_OK) return fail(entry.status, "%s", entry.message);
  *limits = &entry.limits;
  return ETAP_OK;
}

etap_status decide(const etap_problem &problem, Choice *choice, etap_decision *decision) {
  const DeviceLimits *limits = nullptr;
  if (const etap_status status = limits_of(problem.device_index, &limits)) return status;
  if (const char *why = dispatch(problem, *limits, choice, decision)) return fail(ETAP_UNSUPPORTED, "%s", why);
  return ETAP_OK;
}

// A choice in the plan's three numbers.
void keep(const Choice &choice, int32_t (&kept)[3]) {
  kept[0] = static_cast<int32_t>(choice.row - kCatalog);
  kept[1] = choice.variant;
  kept[2] = choice.team;
}
Choice choice_of(const etap_plan &plan) { return {kCatalog + plan.choice[0], plan.choice[1], plan.choice[2]}; }

etap_status decide(etap_plan *plan) {
  Choice choice;
  if (const etap_status status = decide(plan->problem, &choice, &plan->decision)) return status;
  keep(choice, plan->choice);
  return ETAP_OK;
}

// The size never shrinks when batch, total_q or num_sms grows. These choose the team, so it is the largest of all teams.
size_t workspace_bytes(const etap_plan &plan) {
  const DeviceLimits *limits = nullptr;
  if (limits_of(plan.problem.device_index, &limits) != ETAP_OK) return 0;
  size_t bytes = 0;
  Choice choice = choice_of(plan);
  const int sms = plan.problem.num_sms;
  for (choice.team = 1; choice.team <= std::min(kMaxTeam, plan.decision.num_tiles); ++choice.team) {
    PlanShape shape = plan_shape(plan.problem, *limits, plan.decision, choice);
    shape.teams = (sms + choice.team - 1) / choice.team;
    bytes = std::max(bytes, workspace_layout(shape, plan.problem.d_latent).bytes);
  }
  return bytes;
}

// Calls launch(plan, limits, choice, args) on the plan's device.
template <typename Args>
etap_status on_device(etap_status (*launch)(const etap_plan &, const DeviceLimits &, const Choice &, const Args &),
                      const etap_plan &plan, const Args &args) {
  const DeviceLimits *limits = nullptr;
  if (const etap_status status = limits_of(plan.problem.device_index, &limits)) return status;
  const CurrentDevice current(plan.problem.device_index);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "making the plan's device current");
  return launch(plan, *limits, choice_of(plan), args);
}

etap_status plan(const etap_plan &plan, const etap_plan_args &args) { return on_device(launch_plan_update, plan, args); }

etap_status run(const etap_plan &plan, const etap_run_args &args) { return on_device(launch_run, plan, args); }

etap_status merge(const etap_merge_args &args) {
  const CurrentDevice current(args.device_index);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "making the merge's device current");
  const cudaError_t error = launch_merge(args);
  if (error != cudaSuccess) return cuda_failed(error, "launching the merge kernel");
  return ETAP_OK;
}

}  // namespace
}  // namespace sm90

const etap_device cuda_device = {sm90::device_count, sm90::describe, sm90::decide, sm90::workspace_bytes,
                                 sm90::plan,         sm90::run,      sm90::merge};

}  // namespace etap
