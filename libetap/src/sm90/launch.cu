#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>

#include "kv_format.h"
#include "sm90/catalog.h"
#include "sm90/decode_params.h"
#include "sm90/launch.h"
#include "sm90/merge.h"
#include "sm90/merge_pieces.h"

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

// Promotion to 128 bytes: rows of 1152 bytes are 4.5 x 256, and fetching pairs of lines costs 7 % of the bandwidth.
etap_status encode_kv_map(const etap_problem &problem, const etap_run_args &args, CUtensorMap *map) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr)
    return fail(ETAP_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer is needed");
  const KvBoxes kv = kv_boxes(problem, args);
  const cuuint64_t dims[3] = {kv.dims[0], kv.dims[1], kv.dims[2]}, strides[2] = {kv.strides[0], kv.strides[1]};
  const cuuint32_t box[3] = {kv.box[0], kv.box[1], 1}, steps[3] = {1, 1, 1};
  const bool bytes = kv.value_bytes == 1;
  const CUresult result =
      encode(map, bytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 3,
             const_cast<void *>(args.kv_cache), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             bytes ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
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
                        : kFind[row - kCatalog](problem.q_dtype, problem.d_latent, problem.d_rope, kv_copy(problem));
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

namespace {

// Behind kernels of this library.
template <typename... Arguments>
etap_status launch(const char *doing, const Kernel &kernel, int clusters, int cluster, void *stream,
                   const Arguments &...arguments) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config =
      launch_config(kernel, clusters, cluster, static_cast<cudaStream_t>(stream), attributes);
  const void *addresses[] = {&arguments...};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel.function, const_cast<void **>(addresses));
  return error == cudaSuccess ? ETAP_OK : cuda_failed(error, doing);
}

etap_status launch_kernel(const etap_problem &problem, int tile_rows, int workers, int cluster, const DecodeParams &p,
                          void *stream) {
  const Kernel kernel = kernel_for(problem, tile_rows);
  if (kernel.function == nullptr)
    return fail(ETAP_INTERNAL_ERROR, "no kernel with tiles of %d rows was built", tile_rows);
  if (const etap_status status = allow_shared_memory(kernel, problem.device_index)) return status;
  return launch("launching the decode kernel", kernel, workers, ctas_of_tile(tile_rows) * cluster, stream, p);
}

}  // namespace

// Each kernel has waited for the one before it when it ends, so the last one need not wait for the first.
etap_status launch_decode(const etap_plan &plan, const etap_run_args &args, const Workspace &layout) {
  const etap_problem &problem = plan.problem;
  const etap_decision &d = plan.decision;
  DecodeParams p = decode_params(plan, args, layout);
  if (problem.page_size >= 8 && problem.topk == 0 && args.kv_cache != nullptr) {
    if (const etap_status status = encode_kv_map(problem, args, &p.kv_map)) return status;
  }
  if (const etap_status status = launch_kernel(problem, d.tile_rows, d.num_workers, d.cluster_size, p, args.stream))
    return status;
  if (layout.sharing_kernel()) {
    if (const etap_status status = launch_kernel(problem, kPrefixRows, layout.shape.sharing_workers, 1,
                                                 sharing_params(p, args.workspace, layout), args.stream))
      return status;
  }
  if (!merges_pieces(d)) return ETAP_OK;
  return launch("launching the kernel that merges pieces",
                merge_pieces_kernel(problem.d_latent, p.narrow, merges_much(problem, d)),
                std::max(ctas_of_tile(d.tile_rows) * d.num_workers, layout.shape.sharing_workers), 1, args.stream, p,
                at<const MergeList>(args.workspace, layout.merges));
}

etap_status launch_merge(const etap_merge_args &args) {
  if (merge_ctas(args) == 0) return ETAP_OK;
  const Kernel kernel = merge_kernel(args.dtype);
  etap_merge_args copy = args;
  void *arguments[] = {&copy};
  const cudaError_t error = cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(merge_ctas(args))),
                                             dim3(static_cast<unsigned>(kernel.threads)), arguments, 0,
                                             static_cast<cudaStream_t>(args.stream));
  return error == cudaSuccess ? ETAP_OK : cuda_failed(error, "launching the merge kernel");
}

}  // namespace etap::sm90
