// The kernels as data: one entry for each instantiation, found by what a problem needs.
#pragma once

#include <cstdint>

#include "etap.h"
#include "kv_copy.h"

namespace etap::sm90 {

struct Kernel {
  const void *function;  // nullptr: no such kernel
  int threads;
  int shared_bytes;
};

using FindKernel = Kernel(int q_dtype, int d_latent, int d_rope, KvCopy copy);
FindKernel token_split_n8, token_split_n16, token_split_n24;        // token_split.cuh
FindKernel dv_split_n32, dv_split_n40, dv_split_n48, dv_split_n56;  // dv_split.cuh
FindKernel rows_on_m;                                               // rows_on_m.cuh: tiles of 64 rows

FindKernel fp8_split_n8, fp8_split_n16, fp8_split_n24, fp8_split_n32;  // fp8_split.cuh

}  // namespace etap::sm90
