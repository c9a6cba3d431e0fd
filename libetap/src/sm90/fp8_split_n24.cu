#include "fp8_split.cuh"
#include "instances.cuh"

namespace etap::sm90 {
namespace {
template <typename, int D_LATENT, int D_ROPE, KvCopy>
struct Family {
  using K = Fp8Split<24, D_LATENT, D_ROPE>;
  static Kernel entry() {
    return Kernel{reinterpret_cast<const void *>(&fp8_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};
}  // namespace

Kernel fp8_split_n24(int, int d_latent, int d_rope, KvCopy) {
  return find_dimensions<Family, __half, KvCopy::kE4m3>(d_latent, d_rope);
}
}  // namespace etap::sm90
