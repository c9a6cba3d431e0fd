#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>
#include <climits>

#include "kv_format.h"
#include "sm90/catalog.h"
#include "sm90/launch.h"
#include "sm90/params.h"

namespace etap::sm90 {

#define KERNEL(family, rows) FindKernel family##_n##rows;
#include "sm90/catalog.def"
#undef KERNEL

etap_status cuda_failed(cudaError_t error, const char *doing) {
  cudaGetLastError();  // a launch error must not surprise the caller's next CUDA call
  return fail(ETAP_CUDA_ERROR, "CUDA failed while %s: %s (%s)", doing, cudaGetErrorString(error),
              cudaGetErrorName(error));
}

namespace {

// Of the rows of kCatalog.
constexpr FindKernel *kFind[] = {
#define KERNEL(family, rows) family##_n##rows,
#include "sm90/catalog.def"
#undef KERNEL
};

KvCopy copy_of(const etap_problem &problem) {
  const KvFormat &format = kv_format(problem);
  if (!format.e4m3) return problem.page_size < 8 ? KvCopy::kGather : KvCopy::kTma;
  switch (format.scales) {
    case GroupScales::kNone:
      return KvCopy::kE4m3;
    case GroupScales::kBeside:
      return KvCopy::kE4m3Group;
    case GroupScales::kInRow:
      break;
  }
  return KvCopy::kE4m3_656;
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
  const bool fp8 = kv_format(problem).e4m3;
  const cuuint64_t value_bytes = static_cast<cuuint64_t>(kv_format(problem).element_bytes);
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(kv_row_bytes(problem)) / value_bytes,
                              static_cast<cuuint64_t>(problem.page_size), pages};
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

}  // namespace

Kernel kernel_for(const etap_problem &problem, int tile_rows) {
  const CatalogRow *const row = find_row(kv_format(problem).e4m3, tile_rows);
  return row == nullptr ? Kernel{}
                        : kFind[row - kCatalog](problem.q_dtype, problem.d_latent, problem.d_rope, copy_of(problem));
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

etap_status launch_decode(const etap_plan &plan, const etap_run_args &args, const Workspace &layout) {
  const etap_problem &problem = plan.problem;
  const Kernel kernel = kernel_for(problem, plan.decision.tile_rows);
  if (kernel.function == nullptr) return fail(ETAP_INTERNAL_ERROR, "no kernel %s was built", plan.decision.kernel);
  if (const etap_status status = allow_shared_memory(kernel, problem.device_index)) return status;

  DecodeParams p{};
  if (problem.page_size >= 8 && args.kv_cache != nullptr) {
    if (const etap_status status = encode_kv_map(problem, args, &p.kv_map)) return status;
  }
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
  const int64_t kv_bytes = kv_format(problem).element_bytes;
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

}  // namespace etap::sm90
