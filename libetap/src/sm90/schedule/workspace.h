// What lies where in the workspace of the CUDA device.
//
//     records of CTAs | sequence records | unit blocks | counters | units to merge | partial results
//
// and where sequences may share prefixes (prefixes.h), before the partial results
//
//     records of CTAs of the plan with groups | links | list of rows | what was found | kept results
//
// One of both plans has work, so they have all else in common; and the records of CTAs too where one kernel serves
// both.
#pragma once

#include <algorithm>
#include <cstddef>

#include "sm90/schedule/planner.h"
#include "sm90/schedule/prefixes.h"

namespace etap::sm90 {

struct WorkspaceShape {
  int batch, tiles, tile_rows, d_latent, workers, cluster, singles;
  int chunks_log2;  // as PlanShape's
  bool narrow;      // as DecodeParams'
  // Where prefixes may be shared, else 0: single CTAs of that plan, sequences that are looked through, rows of q and
  // heads.
  int sharing_workers, sharers;
  int64_t results;
};

struct Workspace {
  size_t records, sequences, unit_blocks, counters, merges;  // offsets
  size_t sharing_records, links, q_rows, found, kept;
  size_t partials, bytes;  // the total
  WorkspaceShape shape;
  bool shares() const { return shape.sharers > 0; }
  bool sharing_kernel() const { return sharing_records != records; }  // is there one for groups alone?
};

// What lies at an offset.
template <typename T>
T *at(void *workspace, size_t offset) {
  return reinterpret_cast<T *>(static_cast<char *>(workspace) + offset);
}

// Do the partial results of single CTAs travel as FP16 (parts/partial.cuh)?
inline bool travels_narrow(const etap_problem &problem) { return problem.out_dtype == ETAP_BF16; }
// Floats of a row's sums as single CTAs leave them: FP16 takes half.
constexpr ETAP_HD int row_floats(int d_latent, bool narrow) { return narrow ? d_latent / 2 : d_latent; }
// Floats of one partial result: O^T of a tile, and the maximum and sum of its rows once for each CTA of the cluster.
ETAP_HD size_t partial_floats(int tile_rows, int of_row, int cluster) {
  return static_cast<size_t>(tile_rows) * (of_row + 2 * cluster);
}

inline Workspace workspace_layout(const WorkspaceShape &s) {
  Workspace w{};
  w.shape = s;
  const auto take = [&w](size_t size, int64_t count) {
    const size_t begin = w.bytes;
    w.bytes += (size * static_cast<size_t>(count) + 255) / 256 * 256;
    return begin;
  };
  const int groups = s.sharers / 2;
  const int64_t units = int64_t{s.batch} * s.tiles;
  const int64_t chunks = s.chunks_log2 > 0 ? units << s.chunks_log2 : 0;
  const size_t of_chunk = partial_floats(s.tile_rows, row_floats(s.d_latent, s.narrow), 1);
  const size_t of_workers = 2 * std::max({s.workers * partial_floats(s.tile_rows, s.d_latent, s.cluster),
                                          s.singles * partial_floats(s.tile_rows, s.d_latent, 1),
                                          s.sharing_workers * partial_floats(kPrefixRows, s.d_latent, 1)});
  w.records = take(sizeof(WorkerRecord), s.workers * s.cluster);
  w.sequences = take(sizeof(SequenceRecord), int64_t{s.batch} + 1 + groups);
  w.unit_blocks = take(sizeof(int), units);
  w.counters = take(sizeof(int), std::max(s.workers * s.cluster, s.sharing_workers));
  const int64_t cut = chunks > 0 ? units : std::max(s.workers, s.sharing_workers);
  w.merges = take(sizeof(MergedUnit), 1 + cut + s.sharers);  // after a MergeList
  static_assert(sizeof(MergeList) == sizeof(MergedUnit));
  const bool one_kernel =
      !w.shares() || (s.tile_rows == kPrefixRows && s.tiles == 1 && s.cluster == 1 && s.workers == s.sharing_workers);
  w.sharing_records = one_kernel ? w.records : take(sizeof(WorkerRecord), s.sharing_workers);
  w.links = take(sizeof(PrefixLink), s.sharers);
  w.q_rows = take(sizeof(int32_t), groups * kPrefixRows);
  w.found = take(sizeof(etap_shared), s.sharers > 0);
  w.kept = take(sizeof(float) * 2 * static_cast<size_t>(kept_floats(s.d_latent)), s.results);
  w.partials = chunks > 0 ? take(sizeof(float) * of_chunk, chunks) : take(sizeof(float) * of_workers, 1);
  return w;
}

}  // namespace etap::sm90
