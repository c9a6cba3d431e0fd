// Division by a number that is known before a kernel runs: a multiplication and a shift, where an integer division is a
// chain of some twenty instructions.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace etap::sm90 {

// n / d for 0 <= n < 2^31: floor(n m / 2^(31 + l)) with l = ceil(log2 d) and m = ceil(2^(31 + l) / d), since
// m d - 2^(31 + l) < 2^l (Granlund and Montgomery, "Division by invariant integers using multiplication").
struct Divisor {
  int value;
  uint32_t multiplier;
  int shift;

  Divisor() = default;
  ETAP_HD explicit Divisor(int d) : value(d), multiplier(0), shift(31) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
  }
  ETAP_HD operator int() const { return value; }
};
ETAP_HD int operator/(int n, const Divisor &d) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.multiplier >> d.shift);
}

}  // namespace etap::sm90
