// out = sum_p 2^(lse_p - lse) parts_p over partial results of disjoint KV ranges: one warp a row and head, bound by
// memory. Where all parts but one are empty, that one's values are copied.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/merge.h"
#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {
namespace {

template <typename T>
__global__ void __launch_bounds__(32 * kMergedByCta) merge_results(const __grid_constant__ etap_merge_args a) {
  const int64_t result = static_cast<int64_t>(blockIdx.x) * kMergedByCta + threadIdx.x / 32;
  if (result >= static_cast<int64_t>(a.rows) * a.num_heads) return;
  const int64_t row = result / a.num_heads, head = result % a.num_heads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float to_log2 = a.lse_base == ETAP_LSE_BASE_2 ? 1.f : 1.4426950408889634f;
  const float *part_lse = a.parts_lse + row * a.parts_lse_row_stride + head * a.parts_lse_head_stride;
  const T *part = static_cast<const T *>(a.parts) + row * a.parts_row_stride + head * a.parts_head_stride;
  T *out = static_cast<T *>(a.out) + row * a.out_row_stride + head * a.out_head_stride;

  // Differences before any change of base: large log-sum-exps would lose them to rounding.
  float top = -INFINITY;
  for (int p = 0; p < a.num_parts; ++p) top = fmaxf(top, part_lse[p * a.parts_lse_part_stride]);
  const float reference = top == -INFINITY ? 0.f : top;
  const auto weight = [&](float lse) { return exp2f((lse - reference) * to_log2); };
  float sum = 0.f;
  for (int p = 0; p < a.num_parts; ++p) sum += weight(part_lse[p * a.parts_lse_part_stride]);
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;

  for (int d = lane; d < a.d; d += 32) {
    float value = 0.f;
    for (int p = 0; p < a.num_parts; ++p) {
      const float lse = part_lse[p * a.parts_lse_part_stride];
      if (lse == -INFINITY) continue;  // an empty part's values mean nothing
      value += weight(lse) * inverse * static_cast<float>(part[p * a.parts_part_stride + d]);
    }
    out[d] = static_cast<T>(value);
  }
  if (lane == 0 && a.lse != nullptr) {
    const float from_log2 = a.lse_base == ETAP_LSE_BASE_2 ? 1.f : 0.6931471805599453f;
    a.lse[row * a.lse_row_stride + head * a.lse_head_stride] = sum == 0.f ? -INFINITY : top + log2f(sum) * from_log2;
  }
}

template <typename T>
Kernel kernel_of() {
  return {reinterpret_cast<const void *>(&merge_results<T>), 32 * kMergedByCta, 0};
}

}  // namespace

Kernel merge_kernel(int dtype) {
  switch (dtype) {
    case ETAP_BF16:
      return kernel_of<__nv_bfloat16>();
    case ETAP_FP16:
      return kernel_of<__half>();
    default:
      return kernel_of<float>();
  }
}

}  // namespace etap::sm90
