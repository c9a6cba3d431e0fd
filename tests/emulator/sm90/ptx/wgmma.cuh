// libetap/src/sm90/ptx/wgmma.cuh for the emulator.
#pragma once

#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {

inline void wgmma_fence() {}
inline void wgmma_commit() { ::emulator::commit_products(); }
template <int PENDING>
inline void wgmma_wait() {
  ::emulator::wait_for_products(PENDING);
}
inline void wgmma_wait_until(int pending) { ::emulator::wait_for_products(pending); }

inline uint64_t descriptor(uint32_t low) { return static_cast<uint64_t>((1024u >> 4) | (1u << 30)) << 32 | low; }
inline uint64_t descriptor_of_64_bytes(uint32_t low) {
  return static_cast<uint64_t>((512u >> 4) | (2u << 30)) << 32 | low;
}
inline uint64_t descriptor_across(uint32_t low, int box_bytes) {
  return descriptor(low | static_cast<uint32_t>(box_bytes >> 4) << 16);
}

// Products are computed late: what the compiler has of the accumulators must be in memory then.
template <typename T, int COUNT>
inline void wgmma_fence_registers(T (&values)[COUNT]) {
  asm volatile("" : : "r"(values) : "memory");
}

template <typename T>
constexpr ::emulator::Product::Type type_of() {
  return std::is_same_v<T, __half> ? ::emulator::Product::fp16 : ::emulator::Product::bf16;
}

template <typename T, int N>
struct Wgmma {
  template <bool TRANSPOSE_A>
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    ::emulator::multiply(type_of<T>(), N, nullptr, a, TRANSPOSE_A, b, false, accumulate, d);
  }
  static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    ::emulator::multiply(type_of<T>(), N, a, 0, false, b, false, accumulate, d);
  }
};
template <int N>
struct WgmmaE4m3 {
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    ::emulator::multiply(::emulator::Product::e4m3, N, nullptr, a, false, b, false, accumulate, d);
  }
  static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    ::emulator::multiply(::emulator::Product::e4m3, N, a, 0, false, b, false, accumulate, d);
  }
};
template <typename T, int N>
struct WgmmaTransposedB {
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    ::emulator::multiply(type_of<T>(), N, nullptr, a, false, b, true, accumulate, d);
  }
  static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    ::emulator::multiply(type_of<T>(), N, a, 0, false, b, true, accumulate, d);
  }
};

}  // namespace etap::sm90
