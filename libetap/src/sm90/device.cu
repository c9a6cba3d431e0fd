// The CUDA device: finds the GPU, chooses by dispatch.h, plans and launches. No kernel lives here.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "device.h"
#include "sm90/dispatch.h"
#include "sm90/launch.h"
#include "sm90/schedule/plan.h"

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
    if (entry.status == ETAP_OK) {
      const CurrentDevice current(index);
      entry.limits.num_sms = info.num_sms;
      // What tells them apart is the name alone.
      const bool h20 = std::strstr(info.name, "H20") != nullptr && std::strstr(info.name, "H200") == nullptr;
      entry.limits.flop_per_cycle = h20 ? 1024 : 4096;
      cudaError_t error = current.error();
      int memory_khz = 0, bus_bits = 0, khz = 0;
      const auto ask = [&](int *value, cudaDeviceAttr attribute) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
      };
      ask(&memory_khz, cudaDevAttrMemoryClockRate);  // two values a cycle and wire
      ask(&bus_bits, cudaDevAttrGlobalMemoryBusWidth);
      ask(&khz, cudaDevAttrClockRate);
      // A copy reaches 15/16 of what the wires carry. Where that is not known no prefix pays.
      const int64_t carried = khz > 0 ? int64_t{memory_khz} * (bus_bits / 4) / khz : 0;
      entry.limits.bytes_per_cycle = static_cast<int>(std::max<int64_t>(1, carried * 15 / 16));
      etap_problem usual{};
      usual.q_dtype = ETAP_BF16, usual.kv_format = ETAP_KV_BF16;
      usual.d_latent = 512, usual.d_rope = 64, usual.page_size = kBlockTokens;
      const Kernel kernel = kernel_for(usual, find_row(usual, 16));
      if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
      }
      for (int cluster = 1; cluster <= 8 && error == cudaSuccess; ++cluster) {
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t config = launch_config(kernel, info.num_sms / cluster, cluster, nullptr, attributes);
        error = cudaOccupancyMaxActiveClusters(&entry.limits.max_clusters[cluster], kernel.function, &config);
      }
      if (error != cudaSuccess) entry.status = cuda_failed(error, "asking for the limits of a device");
    }
    if (entry.status != ETAP_OK) std::snprintf(entry.message, sizeof entry.message, "%s", etap_last_message());
  });
  if (entry.status != ETAP_OK) return fail(entry.status, "%s", entry.message);
  *limits = &entry.limits;
  return ETAP_OK;
}

etap_status decide(const etap_problem &problem, etap_decision *decision) {
  const DeviceLimits *limits = nullptr;
  if (const etap_status status = limits_of(problem.device_index, &limits)) return status;
  if (const char *why = dispatch(problem, *limits, decision)) return fail(ETAP_UNSUPPORTED, "%s", why);
  return ETAP_OK;
}

// Calls body(limits) with the plan's device current.
template <typename Body>
etap_status on_device_of(const etap_plan &plan, Body &&body) {
  const CurrentDevice current(plan.problem.device_index);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "making the plan's device current");
  const DeviceLimits *limits = nullptr;
  if (const etap_status status = limits_of(plan.problem.device_index, &limits)) return status;
  return body(*limits);
}

size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision) {
  const DeviceLimits *limits = nullptr;
  if (limits_of(problem.device_index, &limits) != ETAP_OK) return 0;
  return most_workspace_bytes(problem, decision, *limits);
}

etap_status plan(const etap_plan &plan, const etap_plan_args &args) {
  return on_device_of(plan, [&](const DeviceLimits &limits) {
    const cudaError_t error = launch_plan(plan, args, workspace_of(plan.problem, plan.decision, limits), limits);
    return error == cudaSuccess ? ETAP_OK : cuda_failed(error, "launching the plan kernel");
  });
}

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  return on_device_of(plan, [&](const DeviceLimits &limits) {
    return launch_decode(plan, args, workspace_of(plan.problem, plan.decision, limits));
  });
}

etap_status shared(const etap_plan &plan, const void *workspace, void *stream, etap_shared *shared) {
  return on_device_of(plan, [&](const DeviceLimits &limits) {
    const Workspace layout = workspace_of(plan.problem, plan.decision, limits);
    if (!layout.shares()) return ETAP_OK;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (const cudaError_t error = cudaStreamIsCapturing(on, &capture))
      return cuda_failed(error, "asking whether the stream is captured");
    if (capture != cudaStreamCaptureStatusNone)
      return fail(ETAP_UNSUPPORTED, "stream %p is being captured; allowed: a stream that can be waited for", stream);
    cudaError_t error = cudaMemcpyAsync(shared, static_cast<const char *>(workspace) + layout.found, sizeof *shared,
                                        cudaMemcpyDeviceToHost, on);
    if (error == cudaSuccess) error = cudaStreamSynchronize(on);
    return error == cudaSuccess ? ETAP_OK : cuda_failed(error, "reading what was shared");
  });
}

etap_status merge(const etap_merge_args &args) {
  const CurrentDevice current(args.device_index);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "making the merge's device current");
  return launch_merge(args);
}

}  // namespace
}  // namespace sm90

const etap_device cuda_device = {sm90::device_count, sm90::describe, sm90::decide, sm90::workspace_bytes,
                                 sm90::plan,         sm90::shared,   sm90::run,    sm90::merge};

}  // namespace etap
