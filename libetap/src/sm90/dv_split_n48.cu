#include "dv_split.cuh"
#include "instances.cuh"

namespace etap::sm90 {
namespace {
template <typename T, int D_LATENT, int D_ROPE, KvCopy COPY>
struct Family {
  using K = DvSplit<T, 48, D_LATENT, D_ROPE, COPY>;
  static Kernel entry() {
    return Kernel{reinterpret_cast<const void *>(&dv_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};
}  // namespace

Kernel dv_split_n48(int q_dtype, int d_latent, int d_rope, KvCopy copy) {
  return find_16_bit<Family>(q_dtype, d_latent, d_rope, copy);
}
}  // namespace etap::sm90
