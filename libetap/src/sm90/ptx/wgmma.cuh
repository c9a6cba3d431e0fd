// WGMMA with FP32 accumulators for every N that a tile can have, BF16 and FP16 (m64nNk16) and E4M3 (m64nNk32), A from
// shared memory or registers. PTX wants every register spelled out, hence the macros.
#pragma once

#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The same for a number that the compiler only knows once a loop is unrolled.
__device__ __forceinline__ void wgmma_wait_until(int pending) {
  switch (pending) {
    case 0:
      return wgmma_wait<0>();
    case 1:
      return wgmma_wait<1>();
    case 2:
      return wgmma_wait<2>();
    case 3:
      return wgmma_wait<3>();
    case 4:
      return wgmma_wait<4>();
    case 5:
      return wgmma_wait<5>();
    case 6:
      return wgmma_wait<6>();
    default:
      return wgmma_wait<7>();
  }
}

// Shared-memory descriptors with 128-byte swizzle. Every operand here is made of boxes [rows, 64 values], 128 bytes a
// row, eight rows 1024 bytes apart: read along the row it is K-major (K tile, Q, P), read across it is MN-major (V^T,
// the K tile again). The high word is the same for all of them (stride 1024 >> 4, swizzle mode 1), the low word is
// address >> 4.
constexpr uint32_t kDescriptorHigh = (1024u >> 4) | (1u << 30);
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  return (static_cast<uint64_t>(kDescriptorHigh) << 32) | low;
}

// Of a K-major operand in boxes [rows, 64 bytes] with 64-byte swizzle, eight rows 512 bytes apart: stride 512 >> 4,
// swizzle mode 2.
__device__ __forceinline__ uint64_t descriptor_of_64_bytes(uint32_t low) {
  return (static_cast<uint64_t>((512u >> 4) | (2u << 30)) << 32) | low;
}

// Of an operand that is read across its boxes' rows and continues in the next boxes, box_bytes further on.
__device__ __forceinline__ uint64_t descriptor_across(uint32_t low, int box_bytes) {
  return descriptor(low | static_cast<uint32_t>(box_bytes >> 4) << 16);
}

// Keeps the compiler from moving accumulator accesses across an asynchronous WGMMA.
template <int COUNT>
__device__ __forceinline__ void wgmma_fence_registers(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for A in registers, whose values had better be there before the fence.
template <int COUNT>
__device__ __forceinline__ void wgmma_fence_registers(uint32_t (&a)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Wgmma<T, N>::mma: d [64, N] = a [64, 16] b [16, N], plus d where `accumulate`. a is a descriptor (TRANSPOSE_A:
// MN-major) or a thread's four registers, b a descriptor.
template <typename T, int N>
struct Wgmma;

// d's registers in the text, and as operands.
#define ETAP_TEXT_8 "%0, %1, %2, %3"
#define ETAP_TEXT_16 ETAP_TEXT_8 ", %4, %5, %6, %7"
#define ETAP_TEXT_24 ETAP_TEXT_16 ", %8, %9, %10, %11"
#define ETAP_TEXT_32 ETAP_TEXT_24 ", %12, %13, %14, %15"
#define ETAP_TEXT_40 ETAP_TEXT_32 ", %16, %17, %18, %19"
#define ETAP_TEXT_48 ETAP_TEXT_40 ", %20, %21, %22, %23"
#define ETAP_TEXT_56 ETAP_TEXT_48 ", %24, %25, %26, %27"
#define ETAP_TEXT_64 ETAP_TEXT_56 ", %28, %29, %30, %31"
#define ETAP_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ETAP_OPERANDS_8 ETAP_FOUR(0)
#define ETAP_OPERANDS_16 ETAP_OPERANDS_8, ETAP_FOUR(4)
#define ETAP_OPERANDS_24 ETAP_OPERANDS_16, ETAP_FOUR(8)
#define ETAP_OPERANDS_32 ETAP_OPERANDS_24, ETAP_FOUR(12)
#define ETAP_OPERANDS_40 ETAP_OPERANDS_32, ETAP_FOUR(16)
#define ETAP_OPERANDS_48 ETAP_OPERANDS_40, ETAP_FOUR(20)
#define ETAP_OPERANDS_56 ETAP_OPERANDS_48, ETAP_FOUR(24)
#define ETAP_OPERANDS_64 ETAP_OPERANDS_56, ETAP_FOUR(28)
// I0 .. I5 number the operands after d.
#define ETAP_WGMMA(T, TYPE, N, I0, I1, I2, I3, I4, I5)                                                       \
  template <>                                                                                                \
  struct Wgmma<T, N> {                                                                                       \
    template <bool TRANSPOSE_A>                                                                              \
    __device__ __forceinline__ static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                                  \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ETAP_TEXT_##N        \
                   "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", 0;\n}\n"                                       \
                   : ETAP_OPERANDS_##N                                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSE_A ? 1 : 0));           \
    }                                                                                                        \
    __device__ __forceinline__ static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                                               bool accumulate) {                                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                                  \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ETAP_TEXT_##N        \
                   "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, 0;\n}\n"                 \
                   : ETAP_OPERANDS_##N                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate))); \
    }                                                                                                        \
  };
#define ETAP_WGMMA_BOTH(N, ...)                     \
  ETAP_WGMMA(__nv_bfloat16, "bf16", N, __VA_ARGS__) \
  ETAP_WGMMA(__half, "f16", N, __VA_ARGS__)
ETAP_WGMMA_BOTH(8, 4, 5, 6, 7, 8, 9)
ETAP_WGMMA_BOTH(16, 8, 9, 10, 11, 12, 13)
ETAP_WGMMA_BOTH(24, 12, 13, 14, 15, 16, 17)
ETAP_WGMMA_BOTH(32, 16, 17, 18, 19, 20, 21)
ETAP_WGMMA_BOTH(40, 20, 21, 22, 23, 24, 25)
ETAP_WGMMA_BOTH(48, 24, 25, 26, 27, 28, 29)
ETAP_WGMMA_BOTH(56, 28, 29, 30, 31, 32, 33)
ETAP_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37)

#undef ETAP_WGMMA_BOTH
#undef ETAP_WGMMA

// WgmmaE4m3<N>::mma: d [64, N] = a [64, 32] b [32, N] of E4M3 values, which are K-major always. Sums keep about 13
// bits, so they had better not be long.
template <int N>
struct WgmmaE4m3;

#define ETAP_WGMMA_E4M3(N, I0, I1, I2, I3, I4, I5)                                                                 \
  template <>                                                                                                      \
  struct WgmmaE4m3<N> {                                                                                            \
    __device__ __forceinline__ static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                                        \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ETAP_TEXT_##N "}, %" #I0 ", %" #I1 \
                                                                                              ", p, 1, 1;\n}\n"    \
                   : ETAP_OPERANDS_##N                                                                             \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                           \
    }                                                                                                              \
    __device__ __forceinline__ static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,              \
                                               bool accumulate) {                                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                                        \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ETAP_TEXT_##N                      \
                   "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1;\n}\n"                          \
                   : ETAP_OPERANDS_##N                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));       \
    }                                                                                                              \
  };
ETAP_WGMMA_E4M3(32, 16, 17, 18, 19, 20, 21)
ETAP_WGMMA_E4M3(48, 24, 25, 26, 27, 28, 29)
ETAP_WGMMA_E4M3(64, 32, 33, 34, 35, 36, 37)
#undef ETAP_WGMMA_E4M3

// WgmmaTransposedB<T, N>::mma: the same with b MN-major, for the widths that half of V has.
template <typename T, int N>
struct WgmmaTransposedB;

#define ETAP_TEXT_128                                                                                           \
  ETAP_TEXT_64                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ETAP_TEXT_256                                                                                            \
  ETAP_TEXT_128                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "  \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
  "%123, %124, %125, %126, %127"
#define ETAP_SIXTEEN(i) ETAP_FOUR(i), ETAP_FOUR(i + 4), ETAP_FOUR(i + 8), ETAP_FOUR(i + 12)
#define ETAP_OPERANDS_128 ETAP_SIXTEEN(0), ETAP_SIXTEEN(16), ETAP_SIXTEEN(32), ETAP_SIXTEEN(48)
#define ETAP_OPERANDS_256 ETAP_OPERANDS_128, ETAP_SIXTEEN(64), ETAP_SIXTEEN(80), ETAP_SIXTEEN(96), ETAP_SIXTEEN(112)
#define ETAP_WGMMA_TRANSPOSED_B(T, TYPE, N, I0, I1, I2, I3, I4, I5)                                          \
  template <>                                                                                                \
  struct WgmmaTransposedB<T, N> {                                                                            \
    __device__ __forceinline__ static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                                  \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ETAP_TEXT_##N        \
                   "}, %" #I0 ", %" #I1 ", p, 1, 1, 0, 1;\n}\n"                                              \
                   : ETAP_OPERANDS_##N                                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                     \
    }                                                                                                        \
    __device__ __forceinline__ static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                                               bool accumulate) {                                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                                  \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ETAP_TEXT_##N        \
                   "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, 1;\n}\n"                 \
                   : ETAP_OPERANDS_##N                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate))); \
    }                                                                                                        \
  };
ETAP_WGMMA_TRANSPOSED_B(__nv_bfloat16, "bf16", 128, 64, 65, 66, 67, 68, 69)
ETAP_WGMMA_TRANSPOSED_B(__nv_bfloat16, "bf16", 256, 128, 129, 130, 131, 132, 133)
ETAP_WGMMA_TRANSPOSED_B(__half, "f16", 128, 64, 65, 66, 67, 68, 69)
ETAP_WGMMA_TRANSPOSED_B(__half, "f16", 256, 128, 129, 130, 131, 132, 133)
#undef ETAP_WGMMA_TRANSPOSED_B

}  // namespace etap::sm90
