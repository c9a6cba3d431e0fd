// Which kernel this processor runs, and on how many threads.
#pragma once

#include "cpu/kernel.h"

namespace etap::cpu {

struct Host {
  const Kernel *kernel;  // nullptr: the environment asks for something impossible, see reason
  int num_threads;
  char reason[256];
};

// Decided once, at first use: the widest instruction set of the processor and one thread for each processor that the
// process may use, unless the environment variables ETAP_CPU_ISA (portable, avx2, avx512, avx512_bf16) and
// ETAP_NUM_THREADS (1 to 1024) say otherwise.
const Host &host();

}  // namespace etap::cpu
