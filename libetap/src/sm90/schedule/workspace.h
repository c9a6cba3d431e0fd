// What lies where in the workspace of the CUDA device.
//
//     team records | sequence records | costs of units | counters | flags | statistics | partial results
//
// A partial result is [group_rows][d_latent] floats, rows of a group one after the other whatever kernel wrote them, so
// that pieces of different kernels can be merged; its statistics are the maximum (log2) and the sum of each row.
#pragma once

#include <cstddef>

#include "planner.h"

namespace etap::sm90 {

struct Workspace {
  size_t teams, sequences, costs, counters, flags, stats, partials, bytes;  // offsets, and the total
};

ETAP_HD int64_t slots_of(const PlanShape &shape) {
  return shape.invariant ? int64_t{shape.batch} * shape.groups * kInvariantParts : int64_t{2} * shape.teams;
}
// One a cut unit and tile (merge.cuh).
ETAP_HD int counters_of(const PlanShape &shape) {
  return (shape.invariant ? shape.batch * shape.groups : shape.teams) * shape.team;
}

inline Workspace workspace_layout(const PlanShape &shape, int d_latent) {
  const auto aligned = [](size_t n) { return (n + 255) / 256 * 256; };
  const size_t units = static_cast<size_t>(shape.batch) * shape.groups, slots = static_cast<size_t>(slots_of(shape));
  const size_t rows = slots * shape.group_rows;
  Workspace w;
  w.teams = 0;
  w.sequences = aligned(sizeof(TeamRecord) * shape.teams);
  w.costs = w.sequences + aligned(sizeof(SequenceRecord) * (static_cast<size_t>(shape.batch) + 1));
  w.counters = w.costs + aligned(sizeof(int64_t) * (units + 1));
  w.flags = w.counters + aligned(sizeof(uint64_t) * static_cast<size_t>(counters_of(shape)));
  w.stats = w.flags + aligned(sizeof(uint32_t) * slots * shape.team);
  w.partials = w.stats + aligned(2 * sizeof(float) * rows);
  w.bytes = w.partials + aligned(sizeof(float) * d_latent * rows);
  return w;
}

}  // namespace etap::sm90
