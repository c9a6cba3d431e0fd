#include <cstdio>
#include <cuda_runtime.h>
#include "sm90/ptx/wgmma.cuh"
using namespace etap::sm90;
__device__ __forceinline__ uint32_t low_of(uint32_t address) { return __shfl_sync(0xffffffffu, (address >> 4) & 0x3fff, 0); }
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ONE(a,b) "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " a ", " b ", 1, 1, 1, 0, 0;\n"
__device__ __forceinline__ void four(float (&d)[32], uint32_t a, uint32_t b) {
  const uint64_t A0 = descriptor(a), A1 = descriptor(a + 2), A2 = descriptor(a + 4), A3 = descriptor(a + 6), B0 = descriptor(b), B1 = descriptor(b + 2), B2 = descriptor(b + 4), B3 = descriptor(b + 6);
  asm volatile(ONE("%32","%33") ONE("%34","%35") ONE("%36","%37") ONE("%38","%39")
   : F4(0),F4(4),F4(8),F4(12),F4(16),F4(20),F4(24),F4(28) : "l"(A0),"l"(B0),"l"(A1),"l"(B1),"l"(A2),"l"(B2),"l"(A3),"l"(B3));
}
template <int STYLE> __global__ void __launch_bounds__(256, 1) k(long long *out, float *sink, int rounds) {
  extern __shared__ __align__(1024) char sm[];
  for (int i = threadIdx.x; i < 220 * 1024 / 4; i += blockDim.x) reinterpret_cast<int *>(sm)[i] = 0;
  __syncthreads();
  float S[32];
  for (int i = 0; i < 32; ++i) S[i] = 0;
  const int wg = threadIdx.x / 128;
  const uint32_t q = low_of(smem_address(sm)), kk = low_of(smem_address(sm) + 73728 * (1 + wg));
  const uint64_t Q = descriptor(q), KK = descriptor(kk);
  const long long t0 = clock64();
  for (int r = 0; r < rounds; ++r) {
    wgmma_fence_registers(S);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < 9; ++box) {
      if (STYLE == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<__nv_bfloat16, 64>::template mma<false>(S, descriptor(q + box * 512 + 2 * k), descriptor(kk + box * 512 + 2 * k), true);
      } else if (STYLE == 2) {
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<__nv_bfloat16, 64>::template mma<false>(S, descriptor(q), descriptor(kk), true);
      } else if (STYLE == 3) {
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<__nv_bfloat16, 64>::template mma<false>(S, Q + (box * 512 + 2 * k), KK + (box * 512 + 2 * k), true);
      } else four(S, q + box * 512, kk + box * 512);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_registers(S);
  }
  const long long t1 = clock64();
  if (threadIdx.x == 0) out[blockIdx.x] = t1 - t0;
  float s = 0; for (int i = 0; i < 32; ++i) s += S[i];
  sink[threadIdx.x] = s;
}
template <int STYLE> void go(int threads) {
  long long *out; float *sink; cudaMalloc(&out, 8 * 132); cudaMalloc(&sink, 4096);
  cudaFuncSetAttribute(k<STYLE>, cudaFuncAttributeMaxDynamicSharedMemorySize, 222 * 1024);
  for (int i = 0; i < 2; ++i) k<STYLE><<<132, threads, 221 * 1024>>>(out, sink, 1000);
  long long h; cudaMemcpy(&h, out, 8, cudaMemcpyDeviceToHost);
  printf("style %d, %d warpgroups: %.1f cycles a QK (%s)\n", STYLE, threads / 128, h / 1000., cudaGetErrorString(cudaGetLastError()));
}
int main() { go<2>(128); go<2>(256); go<3>(128); go<3>(256);  go<0>(128); go<1>(128); go<0>(256); go<1>(256); }
