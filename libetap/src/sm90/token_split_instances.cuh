// What every token_split_n*.cu instantiates: BF16 and FP16 at the three families of dimensions.
#pragma once

#include "kernels.h"
#include "token_split.cuh"

namespace etap::sm90 {

template <typename T, int N, int D_LATENT, int D_ROPE>
Kernel token_split_entry(bool gather) {
  const auto entry = [](auto kernel) {
    using K = decltype(kernel);
    return Kernel{reinterpret_cast<const void *>(&token_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  };
  return gather ? entry(TokenSplit<T, N, D_LATENT, D_ROPE, true>{}) : entry(TokenSplit<T, N, D_LATENT, D_ROPE, false>{});
}

template <typename T, int N>
Kernel token_split_find(int d_latent, int d_rope, bool gather) {
  if (d_latent == 512 && d_rope == 64) return token_split_entry<T, N, 512, 64>(gather);
  if (d_latent == 512 && d_rope == 0) return token_split_entry<T, N, 512, 0>(gather);
  if (d_latent == 256 && d_rope == 64) return token_split_entry<T, N, 256, 64>(gather);
  return Kernel{};
}

template <int N>
Kernel token_split_find(int q_dtype, int d_latent, int d_rope, bool gather) {
  return q_dtype == ETAP_BF16 ? token_split_find<__nv_bfloat16, N>(d_latent, d_rope, gather)
                              : token_split_find<__half, N>(d_latent, d_rope, gather);
}

}  // namespace etap::sm90
