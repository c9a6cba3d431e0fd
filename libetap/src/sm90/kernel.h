// An instance of a kernel, as it is launched.
#pragma once

#include "sm90/kv_copy.h"

namespace etap::sm90 {

struct Kernel {
  const void *function;  // nullptr: no such kernel
  int threads;
  int shared_bytes;
};

// What instance.cu defines for each line of catalog.def, as token_split_n8. q_dtype: etap_dtype.
using FindKernel = Kernel(int q_dtype, int d_latent, int d_rope, KvCopy copy);

}  // namespace etap::sm90
