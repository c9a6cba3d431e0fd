// Which kernel, tile, cluster, number of workers and workspace a problem gets, and why. Host only, no CUDA calls: tests
// run it anywhere.
#pragma once

#include "etap.h"
#include "sm90/schedule/planner.h"
#include "sm90/schedule/prefixes.h"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

struct DeviceLimits {
  int num_sms;
  int flop_per_cycle;   // of an SM's tensor cores, 16-bit: 4096; an H20's 1024
  int bytes_per_cycle;  // that the memory brings all SMs together
  int max_clusters[9];  // [c]: clusters of c CTAs that run at a time (GPCs have an uneven number of SMs); [0] is not
                        // used
};

// Fills everything of *decision but its size. Returns nullptr, or a sentence that says what is not supported.
const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, etap_decision *decision);

PlanShape plan_shape(const etap_problem &problem, const etap_decision &decision);

SharingCosts sharing_costs(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits);

Workspace workspace_of(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits);
// Enough for any plan of a problem whose batch, total_q and num_sms are no larger.
size_t most_workspace_bytes(const etap_problem &problem, const etap_decision &decision, const DeviceLimits &limits);

}  // namespace etap::sm90
