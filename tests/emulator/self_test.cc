// What the emulator must notice: a kernel of a few lines, right and with one thing missing.
#include <exception>
#include <vector>

#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

enum Missing { kNothing, kWaitForCopy, kWaitForProduct, kBarrier, kArrival };

// One warpgroup: the copy engine brings ones, their product is 16 everywhere, and each thread adds up its neighbour's.
static void small_kernel(Missing missing, const char *ones, float *out) {
  extern char shared_raw[];
  const uint32_t base = smem_address(shared_raw), barrier = base + 3 * 8192;
  float *const sums = reinterpret_cast<float *>(shared_raw + 2 * 8192);
  if (threadIdx.x == 0) mbarrier_init(barrier, missing == kArrival ? 2 : 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect_tx(barrier, 2 * 8192);
    bulk_load(base, ones, 2 * 8192, barrier);
  }
  if (missing != kWaitForCopy) mbarrier_wait(barrier, 0);
  float d[4] = {};
  Wgmma<__nv_bfloat16, 8>::mma<false>(d, descriptor(base >> 4), descriptor((base + 8192) >> 4), false);
  wgmma_commit();
  if (missing != kWaitForProduct) wgmma_wait<0>();
  wgmma_fence_registers(d);
  sums[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
  if (missing != kBarrier) named_barrier<1, 128>();
  out[threadIdx.x] = sums[(threadIdx.x + 32) % 128];
}

}  // namespace etap::sm90

// 0: the right result, 1: a wrong one, 2: nobody could go on. `missing` counts in the order of Missing.
extern "C" __attribute__((visibility("default"))) int emulator_self_test(int missing, uint32_t seed) {
  std::vector<char> ones(2 * 8192);
  for (size_t i = 1; i < ones.size(); i += 2) ones[i - 1] = static_cast<char>(0x80), ones[i] = 0x3f;  // BF16
  std::vector<float> out(128);
  try {
    emulator::run_cluster(0, 1, 1, 128, seed, [&] {
      etap::sm90::small_kernel(static_cast<etap::sm90::Missing>(missing), ones.data(), out.data());
    });
  } catch (const std::exception &) {
    return 2;
  }
  for (const float x : out) {
    if (x != 64.f) return 1;
  }
  return 0;
}
