#include "instances.cuh"
#include "token_split.cuh"

namespace etap::sm90 {
namespace {
template <typename T, int D_LATENT, int D_ROPE, KvCopy COPY>
struct Family {
  using K = TokenSplit<T, 24, D_LATENT, D_ROPE, COPY>;
  static Kernel entry() {
    return Kernel{reinterpret_cast<const void *>(&token_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};
}  // namespace

Kernel token_split_n24(int q_dtype, int d_latent, int d_rope, KvCopy copy) {
  return find_16_bit<Family>(q_dtype, d_latent, d_rope, copy);
}
}  // namespace etap::sm90
