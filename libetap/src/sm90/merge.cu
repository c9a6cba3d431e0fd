// out = sum_p 2^(lse_p - lse) parts_p over partial results of disjoint KV ranges: one warp a row and head, bound by
// memory. Where all parts but one are empty, that one's values are copied.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/merge.h"
#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {
namespace {

template <typename Part, typename Out>
__global__ void __launch_bounds__(32 * kMergedByCta) merge_results(const __grid_constant__ MergeParams m) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const etap_merge_args &a = m.args;
  const int64_t result = static_cast<int64_t>(blockIdx.x) * kMergedByCta + threadIdx.x / 32;
  if (result >= static_cast<int64_t>(a.rows) * a.num_heads) return;
  const int64_t row = result / a.num_heads, head = result % a.num_heads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float to_log2 = m.parts_lse_base == ETAP_LSE_BASE_2 ? 1.f : 1.4426950408889634f;
  const float *part_lse = a.parts_lse + row * a.parts_lse_row_stride + head * a.parts_lse_head_stride;
  const Part *part = static_cast<const Part *>(a.parts) + row * a.parts_row_stride + head * a.parts_head_stride;
  Out *out = static_cast<Out *>(a.out) + row * a.out_row_stride + head * a.out_head_stride;

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
    out[d] = static_cast<Out>(value);
  }
  if (lane == 0 && a.lse != nullptr) {
    const float from_log2 = a.lse_base == ETAP_LSE_BASE_2 ? 1.f : 0.6931471805599453f;
    const float change = a.lse_base == m.parts_lse_base ? 1.f : from_log2 * to_log2;
    a.lse[row * a.lse_row_stride + head * a.lse_head_stride] =
        sum == 0.f ? m.empty_lse : top * change + log2f(sum) * from_log2;
  }
}

template <typename Out>
Kernel kernel_of(const MergeParams &merge) {
  const void *function = nullptr;
  if (merge.parts_dtype == ETAP_FP32) function = reinterpret_cast<const void *>(&merge_results<float, Out>);
  if (merge.parts_dtype == merge.args.dtype) function = reinterpret_cast<const void *>(&merge_results<Out, Out>);
  return {function, 32 * kMergedByCta, 0};
}

}  // namespace

Kernel merge_kernel(const MergeParams &merge) {
  switch (merge.args.dtype) {
    case ETAP_BF16:
      return kernel_of<__nv_bfloat16>(merge);
    case ETAP_FP16:
      return kernel_of<__half>(merge);
    default:
      return kernel_of<float>(merge);
  }
}

}  // namespace etap::sm90
