// libetap/src/sm90/ptx/ptx.cuh for the emulator: the same functions, and of CUDA C++ what the kernels use beside them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"
#include "sm90/decode_params.h"

#undef __device__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __align__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n)
#define threadIdx (::emulator::Index{::emulator::here().thread})
#define blockIdx \
  (::emulator::Index{::emulator::machine().worker * ::emulator::machine().cluster_size + ::emulator::here().cta->rank})
#define gridDim (::emulator::machine().grid)

namespace etap::sm90 {

// ---- CUDA C++ -------------------------------------------------------------------------------------------------------

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) >= sizeof(From) || sizeof(From) == 8);
  To to{};
  std::memcpy(static_cast<void *>(&to), &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __log2f(float x) { return std::log2(x); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
template <typename T>
T __ldg(const T *p) {
  return *p;
}
template <typename T>
T __ldcg(const T *p) {
  return *p;
}
template <typename T>
void __stcg(T *p, T v) {
  *p = v;
}
template <typename T>
T __shfl_sync(uint32_t, T value, int lane) {
  return bits_as<T>(::emulator::exchange(bits_as<uint64_t>(value))[lane % 32]);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by) {
  const int lane = ::emulator::here().thread % 32;
  return __shfl_sync(mask, value, lane < by ? lane : lane - by);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return bits_as<T>(::emulator::exchange(bits_as<uint64_t>(value))[(::emulator::here().thread % 32) ^ mask]);
}
inline uint32_t __ballot_sync(uint32_t, bool mine) {
  const uint64_t *const all = ::emulator::exchange(mine);
  uint32_t ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<uint32_t>(all[i] != 0) << i;
  return ballot;
}
inline bool __any_sync(uint32_t mask, bool mine) { return __ballot_sync(mask, mine) != 0; }
inline bool __all_sync(uint32_t mask, bool mine) { return !__any_sync(mask, !mine); }
inline void __syncwarp() { ::emulator::exchange(0); }
inline void __syncthreads() {
  ::emulator::Cta &cta = *::emulator::here().cta;
  ::emulator::meet(cta.barriers[0], static_cast<int>(cta.warps.size()) * 32, "__syncthreads");
}

inline bool __syncthreads_or(bool mine) {
  ::emulator::Cta &cta = *::emulator::here().cta;
  return ::emulator::meet(cta.barriers[0], static_cast<int>(cta.warps.size()) * 32, "__syncthreads_or", mine);
}
inline int __syncthreads_count(bool mine) {
  static int count;
  __syncthreads();
  if (::emulator::here().thread == 0) count = 0;
  __syncthreads();
  count += mine;
  __syncthreads();
  const int all = count;
  __syncthreads();
  return all;
}
inline int __reduce_min_sync(uint32_t, int mine) {
  const uint64_t *const all = ::emulator::exchange(static_cast<uint32_t>(mine));
  int least = mine;
  for (int i = 0; i < 32; ++i) least = min(least, static_cast<int>(static_cast<uint32_t>(all[i])));
  return least;
}
inline int __reduce_max_sync(uint32_t mask, int mine) { return ~__reduce_min_sync(mask, ~mine); }
inline unsigned __reduce_max_sync(uint32_t mask, unsigned mine) {
  return static_cast<unsigned>(__reduce_max_sync(mask, static_cast<int>(mine ^ 0x80000000u))) ^ 0x80000000u;
}
template <typename T>
void atomicMin(T *at, T value) {
  if (value < *at) *at = value;
}
template <typename T>
void atomicMax(T *at, T value) {
  if (value > *at) *at = value;
}
template <typename T>
T atomicAdd(T *at, T value) {
  const T was = *at;
  *at += value;
  return was;
}

// ---- ptx.cuh --------------------------------------------------------------------------------------------------------

inline uint32_t smem_address(const void *pointer) { return ::emulator::address_of(pointer); }
extern char shared_raw[];  // as the kernels declare it
template <typename T>
T &in_shared_memory(uint32_t address) {
  return *reinterpret_cast<T *>(shared_raw + address - smem_address(shared_raw));
}

inline void mbarrier_init(uint32_t barrier, uint32_t count) { ::emulator::mbarrier_init(barrier, count); }
inline void mbarrier_init_fence() {}
inline void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  ::emulator::mbarrier_arrive(::emulator::shared_at(barrier), static_cast<int>(bytes));
}
inline void mbarrier_arrive(uint32_t barrier) { ::emulator::mbarrier_arrive(::emulator::shared_at(barrier)); }
inline void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  ::emulator::mbarrier_arrive(::emulator::shared_at(barrier, rank));
}
inline void mbarrier_arrive_cluster_relaxed(uint32_t barrier, uint32_t rank) { mbarrier_arrive_cluster(barrier, rank); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  const char *const at = ::emulator::shared_at(barrier);
  ::emulator::wait_until("an mbarrier", [at, parity] { return ::emulator::mbarrier_passed(at, parity); });
}
inline bool mbarrier_passed(uint32_t barrier, uint32_t parity) {
  return ::emulator::mbarrier_passed(::emulator::shared_at(barrier), parity);
}
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

inline void named_barrier(int id, int threads) {
  ::emulator::meet(::emulator::here().cta->barriers[id], threads, "a named barrier");
}
template <int ID, int THREADS>
inline void named_barrier() {
  named_barrier(ID, THREADS);
}
inline bool named_barrier_any(int id, int threads, bool predicate) {
  return ::emulator::meet(::emulator::here().cta->barriers[id], threads, "a named barrier", predicate);
}
inline void fence_proxy_async() {}
inline void cluster_arrive_relaxed() { ++::emulator::machine().cluster_arrivals; }
inline void cluster_wait() {
  ::emulator::wait_until("its cluster",
                         [] { return ::emulator::machine().cluster_arrivals == ::emulator::machine().fibers.size(); });
}
inline uint32_t cluster_size() { return ::emulator::machine().cluster_size; }
inline uint32_t cluster_rank() { return ::emulator::here().cta->rank; }
inline int opaque(int value) { return value; }
inline int cta_index() { return static_cast<int>(blockIdx.x); }
inline int cluster_index() { return static_cast<int>(::emulator::machine().worker); }
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
template <int REGISTERS>
inline void set_registers_more() {}
template <int REGISTERS>
inline void set_registers_fewer() {}

// What stands in the place of CUtensorMap's secrets.
struct EmulatedMap {
  const char *base;
  KvBoxes kv;
};
inline void tma_load_3d(uint32_t dst, const CUtensorMap *map, int x, int y, int z, uint32_t barrier) {
  EmulatedMap m;
  std::memcpy(&m, map, sizeof m);
  char *const memory = ::emulator::here().cta->memory, *const bar = ::emulator::shared_at(barrier);
  ::emulator::copy_later([=] {
    const uint32_t value_bytes = static_cast<uint32_t>(m.kv.value_bytes), width = m.kv.box[0] * value_bytes;
    for (uint32_t row = 0; row < m.kv.box[1]; ++row) {
      for (uint32_t i = 0; i < m.kv.box[0]; ++i) {
        char *const to =
            memory + ::emulator::swizzled(dst + row * width + i * value_bytes, width) - ::emulator::kWindow;
        const uint64_t xi = static_cast<uint64_t>(x) + i, yi = static_cast<uint64_t>(y) + row,
                       zi = static_cast<uint64_t>(z);
        if (xi < m.kv.dims[0] && yi < m.kv.dims[1] && zi < m.kv.dims[2]) {
          std::memcpy(to, m.base + zi * m.kv.strides[1] + yi * m.kv.strides[0] + xi * value_bytes, value_bytes);
        } else {
          std::memset(to, 0, value_bytes);
        }
      }
    }
    ::emulator::mbarrier_complete(bar, static_cast<int>(m.kv.box[1] * width));
  });
}
inline void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t barrier) {
  char *const to = ::emulator::shared_at(dst), *const bar = ::emulator::shared_at(barrier);
  ::emulator::copy_later([=] {
    std::memcpy(to, src, bytes);
    ::emulator::mbarrier_complete(bar, static_cast<int>(bytes));
  });
}
inline void tma_prefetch_map(const CUtensorMap *) {}
inline bool elect_one() { return threadIdx.x % 32 == 0; }

inline void copy_async(uint32_t dst, const void *src, bool valid, size_t bytes) {
  char *const to = ::emulator::shared_at(dst);
  ::emulator::here().copies.push_back([=] {
    if (valid) {
      std::memcpy(to, src, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  });
}
inline void copy_async_16(uint32_t dst, const void *src, bool valid) { copy_async(dst, src, valid, 16); }
inline void copy_async_16(uint32_t dst, const void *src) { copy_async(dst, src, true, 16); }
inline void copy_async_4(uint32_t dst, const void *src, bool valid) { copy_async(dst, src, valid, 4); }
inline void copy_async_wait_all() {
  for (const auto &copy : ::emulator::here().copies) copy();
  ::emulator::here().copies.clear();
}
inline void copy_async_arrive(uint32_t barrier) {
  char *const bar = ::emulator::shared_at(barrier);
  ::emulator::copy_later([copies = std::move(::emulator::here().copies), bar] {
    for (const auto &copy : copies) copy();
    ::emulator::mbarrier_arrive(bar);
  });
  ::emulator::here().copies.clear();
}
inline float load_cluster_float(uint32_t address, uint32_t rank) {
  float v;
  std::memcpy(&v, ::emulator::shared_at(address, rank), 4);
  return v;
}
template <typename T>
T load_ahead(const T *from) {
  return *from;
}
inline void prefetch_l2(const void *line) {
  // Of memory that may be read.
  static volatile char seen;
  seen = *static_cast<const char *>(line);
  static_cast<void>(seen);
}
inline uint4 load_stream_16(const void *from, bool valid) {
  uint4 v{0, 0, 0, 0};
  if (valid) std::memcpy(&v, from, 16);
  return v;
}
inline float4 load_shared_float4(uint32_t address) {
  float4 v;
  std::memcpy(&v, ::emulator::shared_at(address), 16);
  return v;
}
inline float load_shared_float(uint32_t address) {
  float v;
  std::memcpy(&v, ::emulator::shared_at(address), 4);
  return v;
}
inline float4 load_cluster_float4(uint32_t address, uint32_t rank) {
  float4 v;
  std::memcpy(&v, ::emulator::shared_at(address, rank), 16);
  return v;
}
inline void store_shared_16(uint32_t address, const uint32_t (&words)[4]) {
  std::memcpy(::emulator::shared_at(address), words, 16);
}
inline void store_shared_float4(uint32_t address, const float4 &v) {
  std::memcpy(::emulator::shared_at(address), &v, 16);
}
inline void store_shared_float(uint32_t address, float value) {
  std::memcpy(::emulator::shared_at(address), &value, 4);
}

// A matrix of 8 x 8 values of 16 bits, of which lane i holds two of row i / 4 and names the line for row (TRANSPOSED:
// column) i % 8 of matrix i / 8.
template <int COUNT, bool TRANSPOSED>
inline void store_matrices(uint32_t address, const uint32_t (&words)[4]) {
  uint32_t addresses[32], values[4][32];
  for (int i = 0; i < 32; ++i) addresses[i] = 0;
  const uint64_t *all = ::emulator::exchange(address);
  for (int i = 0; i < 32; ++i) addresses[i] = static_cast<uint32_t>(all[i]);
  for (int m = 0; m < COUNT; ++m) {
    all = ::emulator::exchange(words[m]);
    for (int i = 0; i < 32; ++i) values[m][i] = static_cast<uint32_t>(all[i]);
  }
  if (::emulator::here().thread % 32 == 0) {
    for (int m = 0; m < COUNT; ++m) {
      for (int row = 0; row < 8; ++row) {
        for (int column = 0; column < 8; ++column) {
          const uint16_t v = static_cast<uint16_t>(values[m][row * 4 + column / 2] >> column % 2 * 16);
          const int line = TRANSPOSED ? column : row, at = TRANSPOSED ? row : column;
          std::memcpy(::emulator::shared_at(addresses[8 * m + line] + 2 * at), &v, 2);
        }
      }
    }
  }
  __syncwarp();
}
inline void load_matrix_x4(uint32_t address, uint32_t (&words)[4]) {
  uint32_t addresses[32];
  const uint64_t *const all = ::emulator::exchange(address);
  for (int i = 0; i < 32; ++i) addresses[i] = static_cast<uint32_t>(all[i]);
  const int lane = ::emulator::here().thread % 32;
  for (int m = 0; m < 4; ++m)
    std::memcpy(&words[m], ::emulator::shared_at(addresses[8 * m + lane / 4] + lane % 4 * 4), 4);
  __syncwarp();
}
inline void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices<4, false>(address, {a, b, c, d});
}
inline void store_matrix_x4_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices<4, true>(address, {a, b, c, d});
}
inline void store_matrix_x2_transposed(uint32_t address, uint32_t a, uint32_t b) {
  store_matrices<2, true>(address, {a, b, 0, 0});
}

inline int count_arrival(int *counter) { return (*counter)++; }
inline int arrivals_so_far(const int *counter) { return *counter; }

inline float exp2_approx(float x) { return std::exp2(x); }
template <typename T>
inline uint32_t pack2(float lo, float hi) {
  const T pair[2] = {T(lo), T(hi)};
  return bits_as<uint32_t>(*reinterpret_cast<const uint32_t *>(pair));
}

inline float e4m3_value(uint32_t byte) {
  __nv_fp8_e4m3 v;
  v.__x = static_cast<__nv_fp8_storage_t>(byte);
  return static_cast<float>(v);
}
inline void e4m3_to_half(uint32_t e4m3, uint32_t &low, uint32_t &high) {
  low = pack2<__half>(e4m3_value(e4m3 & 0xff), e4m3_value(e4m3 >> 8 & 0xff));
  high = pack2<__half>(e4m3_value(e4m3 >> 16 & 0xff), e4m3_value(e4m3 >> 24));
}
inline float2 unpack_half2(uint32_t pair) { return __half22float2(bits_as<__half2>(pair)); }
inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return (a > b ? a : b) >> 16 << 16 | ((a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff);
}
inline void multiply_half2(uint32_t &pair, uint32_t by) {
  const float2 a = __half22float2(*reinterpret_cast<const __half2 *>(&pair)),
               b = __half22float2(*reinterpret_cast<const __half2 *>(&by));
  pair = pack2<__half>(a.x * b.x, a.y * b.y);
}

}  // namespace etap::sm90
