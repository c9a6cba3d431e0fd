#include "token_split_instances.cuh"

namespace etap::sm90 {
Kernel token_split_n32(int q_dtype, int d_latent, int d_rope, bool gather) {
  return token_split_find<32>(q_dtype, d_latent, d_rope, gather);
}
}  // namespace etap::sm90
