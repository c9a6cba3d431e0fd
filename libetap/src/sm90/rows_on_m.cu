#include "instances.cuh"
#include "rows_on_m.cuh"

namespace etap::sm90 {
namespace {
template <typename T, int D_LATENT, int D_ROPE, KvCopy COPY>
struct Family {
  using K = RowsOnM<T, D_LATENT, D_ROPE, COPY>;
  static Kernel entry() {
    return Kernel{reinterpret_cast<const void *>(&rows_on_m_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};
}  // namespace

Kernel rows_on_m(int q_dtype, int d_latent, int d_rope, KvCopy copy) {
  return find_16_bit<Family>(q_dtype, d_latent, d_rope, copy);
}
}  // namespace etap::sm90
