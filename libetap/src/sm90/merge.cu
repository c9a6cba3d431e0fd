// out = sum_p 2^(lse_p - lse) parts_p over partial results of disjoint KV ranges: one warp a row and head, bound by
// memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/merge.h"

namespace etap::sm90 {
namespace {

constexpr int kWarps = 4;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) merge_kernel(const etap_merge_args a) {
  const int64_t result = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (result >= static_cast<int64_t>(a.rows) * a.num_heads) return;
  const int64_t row = result / a.num_heads, head = result % a.num_heads;
  const int lane = threadIdx.x % 32;
  const float to_log2 = a.lse_base == ETAP_LSE_BASE_2 ? 1.f : 1.4426950408889634f;
  const float *part_lse = a.parts_lse + row * a.parts_lse_row_stride + head * a.parts_lse_head_stride;
  const T *part = static_cast<const T *>(a.parts) + row * a.parts_row_stride + head * a.parts_head_stride;
  T *out = static_cast<T *>(a.out) + row * a.out_row_stride + head * a.out_head_stride;

  float top = -INFINITY;
  for (int p = 0; p < a.num_parts; ++p) top = fmaxf(top, part_lse[p * a.parts_lse_part_stride] * to_log2);
  const float reference = top == -INFINITY ? 0.f : top;
  float sum = 0.f;
  for (int p = 0; p < a.num_parts; ++p) sum += exp2f(part_lse[p * a.parts_lse_part_stride] * to_log2 - reference);
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;

  for (int d = lane; d < a.d; d += 32) {
    float value = 0.f;
    for (int p = 0; p < a.num_parts; ++p) {
      const float lse = part_lse[p * a.parts_lse_part_stride];
      if (lse == -INFINITY) continue;  // an empty part's values mean nothing
      value += exp2f(lse * to_log2 - reference) * inverse * static_cast<float>(part[p * a.parts_part_stride + d]);
    }
    out[d] = static_cast<T>(value);
  }
  if (lane == 0 && a.lse != nullptr) {
    a.lse[row * a.lse_row_stride + head * a.lse_head_stride] = sum == 0.f ? -INFINITY : (top + log2f(sum)) / to_log2;
  }
}

}  // namespace

cudaError_t launch_merge(const etap_merge_args &args) {
  const int64_t results = static_cast<int64_t>(args.rows) * args.num_heads;
  if (results == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((results + kWarps - 1) / kWarps);
  cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  switch (args.dtype) {
    case ETAP_BF16:
      merge_kernel<__nv_bfloat16><<<blocks, 32 * kWarps, 0, stream>>>(args);
      break;
    case ETAP_FP16:
      merge_kernel<__half><<<blocks, 32 * kWarps, 0, stream>>>(args);
      break;
    default:
      merge_kernel<float><<<blocks, 32 * kWarps, 0, stream>>>(args);
      break;
  }
  return cudaGetLastError();
}

}  // namespace etap::sm90
