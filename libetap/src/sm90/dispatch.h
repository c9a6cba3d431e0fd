// Which kernel, tile, cluster and number of workers a problem gets, and why. Host only, no CUDA calls: tests run it
// anywhere.
#pragma once

#include "etap.h"
#include "sm90/kv_copy.h"
#include "sm90/schedule/planner.h"

namespace etap::sm90 {

struct DeviceLimits {
  int num_sms;
  int flop_per_cycle;   // of an SM's tensor cores, 16-bit: 4096; an H20's 1024
  int max_clusters[9];  // [c]: clusters of c CTAs that run at a time (GPCs have an uneven number of SMs); [0] is not
                        // used
};

// Fills everything of *decision but its size. Returns nullptr, or a sentence that says what is not supported.
const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, etap_decision *decision);

KvCopy kv_copy(const etap_problem &problem);

PlanShape plan_shape(const etap_problem &problem, const etap_decision &decision);

}  // namespace etap::sm90
