// The kernels as data: one entry for each instantiation, found by what a problem needs.
#pragma once

#include <cstdint>

#include "etap.h"

namespace etap::sm90 {

struct Kernel {
  const void *function;  // nullptr: no such kernel
  int threads;
  int shared_bytes;
};

// gather: pages of fewer than eight tokens.
Kernel token_split_n8(int q_dtype, int d_latent, int d_rope, bool gather);
Kernel token_split_n16(int q_dtype, int d_latent, int d_rope, bool gather);
Kernel token_split_n24(int q_dtype, int d_latent, int d_rope, bool gather);
Kernel token_split_n32(int q_dtype, int d_latent, int d_rope, bool gather);

}  // namespace etap::sm90
