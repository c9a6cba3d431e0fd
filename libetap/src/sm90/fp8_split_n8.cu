#include "fp8_split.cuh"
#include "instances.cuh"

namespace etap::sm90 {
namespace {
template <typename, int D_LATENT, int D_ROPE, KvCopy COPY>
struct Family {
  using K = Fp8Split<8, D_LATENT, D_ROPE, COPY>;
  static Kernel entry() {
    return Kernel{reinterpret_cast<const void *>(&fp8_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};
}  // namespace

Kernel fp8_split_n8(int, int d_latent, int d_rope, KvCopy copy) { return find_e4m3<Family>(d_latent, d_rope, copy); }
}  // namespace etap::sm90
