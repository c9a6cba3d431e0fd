// Turns a kernel's type into an entry of kernels.h, for each type, family of dimensions and kind of copy.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace etap::sm90 {

// Family<T, D_LATENT, D_ROPE, COPY>::entry() instantiates one kernel.
template <template <typename, int, int, KvCopy> class Family, typename T, KvCopy COPY>
Kernel find_dimensions(int d_latent, int d_rope) {
  if (d_latent == 512 && d_rope == 64) return Family<T, 512, 64, COPY>::entry();
  if (d_latent == 512 && d_rope == 0) return Family<T, 512, 0, COPY>::entry();
  if (d_latent == 256 && d_rope == 64) return Family<T, 256, 64, COPY>::entry();
  return Kernel{};
}

template <template <typename, int, int, KvCopy> class Family, KvCopy COPY>
Kernel find_type(int q_dtype, int d_latent, int d_rope) {
  return q_dtype == ETAP_BF16 ? find_dimensions<Family, __nv_bfloat16, COPY>(d_latent, d_rope)
                              : find_dimensions<Family, __half, COPY>(d_latent, d_rope);
}

template <template <typename, int, int, KvCopy> class Family>
Kernel find_16_bit(int q_dtype, int d_latent, int d_rope, KvCopy copy) {
  if (copy == KvCopy::kTma) return find_type<Family, KvCopy::kTma>(q_dtype, d_latent, d_rope);
  if (copy == KvCopy::kGather) return find_type<Family, KvCopy::kGather>(q_dtype, d_latent, d_rope);
  return Kernel{};
}

// FP8 kernels don't depend on the queries' type.
template <template <typename, int, int, KvCopy> class Family>
Kernel find_e4m3(int d_latent, int d_rope, KvCopy copy) {
  if (copy == KvCopy::kE4m3) return find_dimensions<Family, __half, KvCopy::kE4m3>(d_latent, d_rope);
  if (d_latent != 512 || d_rope != 64) return Kernel{};
  if (copy == KvCopy::kE4m3Group) return Family<__half, 512, 64, KvCopy::kE4m3Group>::entry();
  if (copy == KvCopy::kE4m3_656) return Family<__half, 512, 64, KvCopy::kE4m3_656>::entry();
  return Kernel{};
}

}  // namespace etap::sm90
