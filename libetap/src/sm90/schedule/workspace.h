// What lies where in the workspace of the CUDA device.
//
//     header | team records | sequence records | costs of units | merge tasks | statistics | partial results
//
// A partial result is [group_rows][d_latent] floats, rows of a group one after the other whatever kernel wrote them, so
// that pieces of different kernels can be merged; its statistics are the maximum (log2) and the sum of each row.
#pragma once

#include <cstddef>

#include "planner.h"

namespace etap::sm90 {

struct PlanHeader {
  uint32_t id;  // PlanShape::id
  int tasks;    // of the merge
};

struct Workspace {
  size_t header, teams, sequences, costs, tasks, stats, partials, bytes;  // offsets, and the total
};

ETAP_HD int64_t slots_of(const PlanShape &shape) {
  return shape.invariant ? int64_t{shape.batch} * shape.groups * kInvariantParts : int64_t{2} * shape.teams;
}

inline Workspace workspace_layout(const PlanShape &shape, int d_latent) {
  const auto aligned = [](size_t n) { return (n + 255) / 256 * 256; };
  const size_t units = static_cast<size_t>(shape.batch) * shape.groups;
  const size_t rows = static_cast<size_t>(slots_of(shape)) * shape.group_rows;
  Workspace w;
  w.header = 0;
  w.teams = aligned(sizeof(PlanHeader));
  w.sequences = w.teams + aligned(sizeof(TeamRecord) * shape.teams);
  w.costs = w.sequences + aligned(sizeof(SequenceRecord) * (static_cast<size_t>(shape.batch) + 1));
  w.tasks = w.costs + aligned(sizeof(int64_t) * (units + 1));
  w.stats = w.tasks + aligned(sizeof(MergeTask) * static_cast<size_t>(most_merge_tasks(shape)));
  w.partials = w.stats + aligned(2 * sizeof(float) * rows);
  w.bytes = w.partials + aligned(sizeof(float) * d_latent * rows);
  return w;
}

}  // namespace etap::sm90
