// Which kernel, tile and teams a problem gets, and why. Host only, no CUDA calls: tests run it anywhere.
#pragma once

#include "catalog.h"
#include "schedule/planner.h"

namespace etap::sm90 {

// What dispatch needs to know of a card.
struct DeviceLimits {
  int num_sms;
  float sm_mhz;        // highest clock
  float memory_bytes;  // a second, as the memory's clock and width have it
};

constexpr int kMaxTeam = 8;

struct Choice {
  const CatalogRow *row;
  int variant;  // of row->variants
  int team;     // CTAs that walk the same KV blocks, a tile each
};

// Fills *choice, and everything of *decision but its size. Returns nullptr, or a sentence that says what is not
// supported.
const char *dispatch(const etap_problem &problem, const DeviceLimits &limits, Choice *choice, etap_decision *decision);

PlanShape plan_shape(const etap_problem &problem, const DeviceLimits &limits, const etap_decision &decision,
                     const Choice &choice);

}  // namespace etap::sm90
