// A CTA's shared memory as a struct: the size of its ring, and the addresses of what lies in it.
#pragma once

#include <cstddef>

#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {

constexpr int kSharedLimit = 232448;  // bytes that a CTA can have

// Slots of a ring, MOST at most, that fit beside everything else: SHARED<n> is all that a CTA has with n of them.
template <template <int> class SHARED, int MOST, int LIMIT = kSharedLimit>
constexpr int slots_that_fit() {
  if constexpr (sizeof(SHARED<MOST>) <= LIMIT) {
    return MOST;
  } else {
    return slots_that_fit<SHARED, MOST - 1, LIMIT>();
  }
}

// Of an array's element: in 32 bits, where smem_address(&array[i]) counts in 64.
template <typename T, int N>
__device__ __forceinline__ uint32_t smem_address(const T (&array)[N], int i) {
  return smem_address(array) + i * static_cast<int>(sizeof(T));
}

// Of a ring's slot.
struct SlotBarriers {
  static constexpr int kBytes = 16, kEmpty = 8;  // where the next slot's are, and `empty` beside `full`
  uint64_t full, empty;
};
static_assert(sizeof(SlotBarriers) == SlotBarriers::kBytes && offsetof(SlotBarriers, empty) == SlotBarriers::kEmpty);

}  // namespace etap::sm90
