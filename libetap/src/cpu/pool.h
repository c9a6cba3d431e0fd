// A few parked threads that help the calling thread through a loop.
#pragma once

#include <stdint.h>

namespace etap::cpu {

// Calls body(context, item, worker) for every item in [0, num_items), on at most num_threads threads with distinct
// workers in [0, num_threads), and returns when all are done. The calling thread is one of them. The body runs in the
// default floating-point environment, so that a caller's rounding mode or flushing of subnormals changes no bits.
//
// Threads are made when first asked for and parked between calls. One call at a time has their help; a call made
// meanwhile from another thread, or where threads can't be had, runs on its own thread alone. After a fork the child
// makes its own. Nothing is ever freed: the pool lives as long as the process.
void parallel_for(int64_t num_items, int num_threads, void (*body)(void *context, int64_t item, int worker),
                  void *context);

}  // namespace etap::cpu
