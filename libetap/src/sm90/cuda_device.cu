// The CUDA device: finds the GPU, chooses by dispatch.h, encodes the tensor map and launches. No kernel lives here.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <mutex>

#include "../device.h"
#include "dispatch.h"
#include "kernels.h"
#include "merge.h"
#include "params.h"
#include "plan.h"

namespace etap {
namespace sm90 {
namespace {

constexpr int kMaxDevices = 64;

etap_status cuda_failed(cudaError_t error, const char *doing) {
  cudaGetLastError();  // a launch error must not surprise the caller's next CUDA call
  return fail(ETAP_CUDA_ERROR, "CUDA failed while %s: %s (%s)", doing, cudaGetErrorString(error),
              cudaGetErrorName(error));
}

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

bool is_e4m3(const etap_problem &problem) {
  return problem.kv_format != ETAP_KV_BF16 && problem.kv_format != ETAP_KV_FP16;
}

KvCopy copy_of(const etap_problem &problem) {
  switch (problem.kv_format) {
    case ETAP_KV_E4M3:
      return KvCopy::kE4m3;
    case ETAP_KV_E4M3_GROUP:
      return KvCopy::kE4m3Group;
    case ETAP_KV_E4M3_656:
      return KvCopy::kE4m3_656;
    default:
      return problem.page_size < 8 ? KvCopy::kGather : KvCopy::kTma;
  }
}

Kernel kernel_for(const etap_problem &problem, int tile_rows) {
  constexpr FindKernel *fp8_split[] = {fp8_split_n8, fp8_split_n16, fp8_split_n24, fp8_split_n32};
  constexpr FindKernel *token_split[] = {token_split_n8, token_split_n16, token_split_n24};
  constexpr FindKernel *dv_split[] = {dv_split_n32, dv_split_n40, dv_split_n48, dv_split_n56};
  FindKernel *find = rows_on_m;
  switch (family_of(problem, tile_rows)) {
    case Family::kFp8Split:
      find = fp8_split[tile_rows / 8 - 1];
      break;
    case Family::kTokenSplit:
      find = token_split[tile_rows / 8 - 1];
      break;
    case Family::kDvSplit:
      find = dv_split[tile_rows / 8 - 4];
      break;
    case Family::kRowsOnM:
      break;
  }
  return find(problem.q_dtype, problem.d_latent, problem.d_rope, copy_of(problem));
}

cudaLaunchConfig_t launch_config(const Kernel &kernel, int clusters, int cluster, cudaStream_t stream,
                                 cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // the kernel begins with griddepcontrol.wait
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
  config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
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
      const Kernel kernel = token_split_n16(ETAP_BF16, 512, 64, KvCopy::kTma);
      cudaError_t error = current.error();
      if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
      }
      for (int cluster = 1; cluster <= 8 && error == cudaSuccess; ++cluster) {
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t config = launch_config(kernel, info.num_sms / cluster, cluster, nullptr, attributes);
        error = cudaOccupancyMaxActiveClusters(&entry.limits.max_clusters[cluster], kernel.function, &config);
      }
      if (error != cudaSuccess) entry.status = cuda_failed(error, "asking how many clusters run at a time");
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

Workspace layout_of(const etap_problem &problem, const etap_decision &decision) {
  return workspace_layout(problem.batch, decision.num_tiles, decision.tile_rows, problem.d_latent, decision.num_workers,
                          decision.cluster_size);
}

// For as many workers as the device has multiprocessors, whatever the cluster: a larger batch gets smaller clusters and
// more workers, and its workspace must not be smaller for it.
size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision) {
  const DeviceLimits *limits = nullptr;
  if (limits_of(problem.device_index, &limits) != ETAP_OK) return 0;
  const int sms = problem.num_sms > 0 ? std::min(problem.num_sms, limits->num_sms) : limits->num_sms;
  return workspace_layout(problem.batch, decision.num_tiles, decision.tile_rows, problem.d_latent,
                          std::max(sms, decision.num_workers), 8)
      .bytes;
}

etap_status plan(const etap_plan &plan, const etap_plan_args &args) {
  const CurrentDevice current(plan.problem.device_index);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "making the plan's device current");
  const cudaError_t error = launch_plan(plan_shape(plan.problem, plan.decision), args.cache_seqlens, args.cu_seqlens_q,
                                        layout_of(plan.problem, plan.decision), static_cast<char *>(args.workspace),
                                        static_cast<cudaStream_t>(args.stream));
  if (error != cudaSuccess) return cuda_failed(error, "launching the plan kernel");
  return ETAP_OK;
}

// The driver's encoder, fetched at run time so that the library loads where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) !=
        cudaSuccess) {
      cudaGetLastError();
      return PFN_cuTensorMapEncodeTiled_v12000{};
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// KV as [pages, page_size, row], in boxes of 64 values (656-byte rows: bytes) of min(page_size, 64) tokens, swizzled by
// a box's width: 128 bytes, FP8 64. Promotion to 128 bytes: rows of 1152 bytes are 4.5 x 256, and fetching pairs of
// lines costs 7 % of the bandwidth.
etap_status encode_kv_map(const etap_problem &problem, const etap_run_args &args, CUtensorMap *map) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr)
    return fail(ETAP_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer is needed");
  const cuuint64_t pages = args.num_pages > 0 ? static_cast<cuuint64_t>(args.num_pages) : cuuint64_t{1} << 31;
  const int row_values = problem.kv_format == ETAP_KV_E4M3_656 ? 656 : problem.d_latent + problem.d_rope;
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(row_values), static_cast<cuuint64_t>(problem.page_size), pages};
  const bool fp8 = is_e4m3(problem);
  const cuuint64_t value_bytes = fp8 ? 1 : 2;
  // A stride that is never taken must still be a legal one.
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(args.kv_row_stride) * value_bytes,
                   page_bytes = static_cast<cuuint64_t>(args.kv_page_stride) * value_bytes;
  const cuuint64_t strides[2] = {row_bytes > 0 ? row_bytes : dims[0] * value_bytes,
                                 page_bytes > 0 ? page_bytes : dims[0] * value_bytes};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(std::min(problem.page_size, kBlockTokens)), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode(map, fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 3,
             const_cast<void *>(args.kv_cache), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             fp8 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return fail(ETAP_INVALID_ARGUMENT,
                "the KV cache can't be described to the copy engine (driver error %d): kv_page_stride is %lld and "
                "kv_row_stride %lld elements; "
                "allowed: below 2^39",
                static_cast<int>(result), static_cast<long long>(args.kv_page_stride),
                static_cast<long long>(args.kv_row_stride));
  }
  return ETAP_OK;
}

int log2_of(int power_of_two) { return power_of_two <= 1 ? 0 : 1 + log2_of(power_of_two / 2); }

// A kernel's shared memory must be allowed once in each device.
etap_status allow_shared_memory(const Kernel &kernel, int index) {
  struct Entry {
    std::atomic<const void *> function{nullptr};
    std::atomic<uint64_t> devices{0};
  };
  static Entry entries[256];
  const size_t hash = (reinterpret_cast<uintptr_t>(kernel.function) >> 4) % 256;
  const uint64_t bit = uint64_t{1} << (index % kMaxDevices);
  for (size_t i = 0; i < 256; ++i) {
    Entry &entry = entries[(hash + i) % 256];
    const void *known = nullptr;
    if (entry.function.load() == kernel.function || entry.function.compare_exchange_strong(known, kernel.function) ||
        known == kernel.function) {
      if (entry.devices.load() & bit) return ETAP_OK;
      const cudaError_t error =
          cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
      if (error != cudaSuccess) return cuda_failed(error, "allowing a kernel its shared memory");
      entry.devices.fetch_or(bit);
      return ETAP_OK;
    }
  }
  return fail(ETAP_INTERNAL_ERROR, "more than 256 kernels were launched; the table of configured kernels is full");
}

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  const etap_problem &problem = plan.problem;
  const CurrentDevice current(problem.device_index);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "making the plan's device current");
  const Kernel kernel = kernel_for(problem, plan.decision.tile_rows);
  if (kernel.function == nullptr) return fail(ETAP_INTERNAL_ERROR, "no kernel %s was built", plan.decision.kernel);
  if (const etap_status status = allow_shared_memory(kernel, problem.device_index)) return status;

  DecodeParams p{};
  if (problem.page_size >= 8 && args.kv_cache != nullptr) {
    if (const etap_status status = encode_kv_map(problem, args, &p.kv_map)) return status;
  }
  const Workspace layout = layout_of(problem, plan.decision);
  char *const workspace = static_cast<char *>(args.workspace);
  p.workers = reinterpret_cast<const WorkerRecord *>(workspace + layout.workers);
  p.sequences = reinterpret_cast<const SequenceRecord *>(workspace + layout.sequences);
  p.counters = reinterpret_cast<int *>(workspace + layout.counters);
  p.partials = reinterpret_cast<float *>(workspace + layout.partials);
  p.q_bf16 = problem.q_dtype == ETAP_BF16;
  p.q_nope = args.q_nope;
  p.q_rope = args.q_rope;
  p.q_nope_row_stride = args.q_nope_row_stride;
  p.q_nope_head_stride = args.q_nope_head_stride;
  p.q_rope_row_stride = args.q_rope_row_stride;
  p.q_rope_head_stride = args.q_rope_head_stride;
  constexpr int64_t kVector = 8;  // 16 bytes
  p.q_vectors =
      args.q_nope_row_stride % kVector == 0 && args.q_nope_head_stride % kVector == 0 &&
      (problem.d_rope == 0 || (args.q_rope_row_stride % kVector == 0 && args.q_rope_head_stride % kVector == 0));
  p.kv = static_cast<const char *>(args.kv_cache);
  const int64_t kv_bytes = is_e4m3(problem) ? 1 : 2;
  p.kv_page_bytes = args.kv_page_stride * kv_bytes;
  p.kv_row_bytes = args.kv_row_stride * kv_bytes;
  p.num_pages = args.kv_cache == nullptr ? 0u
                : args.num_pages > 0     ? static_cast<uint32_t>(args.num_pages)
                                         : uint32_t{1} << 31;
  p.block_table = args.block_table;
  p.block_table_stride = args.block_table_stride;
  const int64_t columns = args.block_table == nullptr || args.kv_cache == nullptr ? 0
                          : args.block_table_columns > 0                          ? args.block_table_columns
                                                                                  : INT_MAX;
  p.token_limit = columns > INT_MAX / problem.page_size ? INT_MAX : static_cast<int>(columns) * problem.page_size;
  p.kv_scale_ptr = args.kv_scale_ptr;
  p.kv_scale = args.kv_scale == 0.f ? 1.f : args.kv_scale;
  p.kv_group_scales = args.kv_group_scales;
  p.kv_group_scales_page_stride = args.kv_group_scales_page_stride;
  p.kv_group_scales_row_stride = args.kv_group_scales_row_stride;
  p.out = args.out;
  p.out_row_stride = args.out_row_stride;
  p.out_head_stride = args.out_head_stride;
  p.lse = args.lse;
  p.lse_row_stride = args.lse_row_stride;
  p.lse_head_stride = args.lse_head_stride;
  p.scale_log2 = args.softmax_scale * 1.4426950408889634f;
  p.lse_factor = args.lse_base == ETAP_LSE_BASE_2 ? 1.f : 0.6931471805599453f;
  p.empty_lse = args.empty_lse == ETAP_EMPTY_LSE_PLUS_INF ? INFINITY : -INFINITY;
  p.num_heads = problem.num_heads;
  p.batch = problem.batch;
  p.total_q = (problem.flags & ETAP_RAGGED) != 0 ? problem.total_q : 0;
  p.tiles = plan.decision.num_tiles;
  p.page_shift = log2_of(problem.page_size);
  p.out_dtype = problem.out_dtype;
  const int64_t out_bytes = problem.out_dtype == ETAP_FP32 ? 4 : 2;
  p.out_vectors = reinterpret_cast<uintptr_t>(args.out) % (4 * out_bytes) == 0 && args.out_row_stride % 4 == 0 &&
                  args.out_head_stride % 4 == 0;
  p.causal = (problem.flags & ETAP_CAUSAL) != 0;

  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(kernel, plan.decision.num_workers, plan.decision.cluster_size,
                                                  static_cast<cudaStream_t>(args.stream), attributes);
  void *arguments[] = {&p};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel.function, arguments);
  if (error != cudaSuccess) return cuda_failed(error, "launching the decode kernel");
  return ETAP_OK;
}

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
