// Prefixes that sequences share (../../shared_prefixes.h) on the CUDA device: two passes instead of one.
//
//     the table            pass 1: a sequence for each group,      pass 2: the batch, as without the flag,
//                          rows of all members in one tile         each sequence behind its prefix
//     0  p p p p a a       p p p p  x  rows of 0, 2, 3             0  a a
//     1  b b b                                                     1  b b b
//     2  p p p p c                                                 2  c
//     3  p p p p d d d                                             3  d d d
//
// Both leave out and lse in the workspace, in FP32 and at the rows of q, and are then merged as etap_merge would
// (merge.cu); what a row has no prefix of has an lse of -inf, from the plan. Both are the kernels that there are; pass
// 1 reads queries through a list of rows, pass 2 begins in a later column of the table. Where nothing is shared pass 1
// has no sequences.
//
// In the workspace, behind that of pass 2:
//
//     links | list of rows | what was found | lse of pass 1, 2 | out of pass 1, 2 | the workspace of pass 1
#pragma once

#include <algorithm>

#include "shared_prefixes.h"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

constexpr int kMaxGroups = kMaxSharers / 2;

struct PrefixWorkspace {
  size_t links, q_rows, found, lse, out, pass;  // offsets in the whole workspace
  size_t bytes;                                 // its end
  int64_t rows;                                 // of out and lse
  int64_t results;                              // rows x heads
  Workspace workspace;                          // of pass 1, from `pass` on
};

// begin: where the workspace of pass 2 ends. A batch that is too large to be looked through needs no less than others.
inline PrefixWorkspace prefix_workspace(const etap_problem &problem, size_t begin, int tile_rows, int workers,
                                        int cluster) {
  const auto aligned = [](size_t n) { return (n + 255) / 256 * 256; };
  const int sharers = std::min(problem.batch, kMaxSharers);
  const int64_t most_rows = static_cast<int64_t>(sharers) * problem.max_query_len;
  PrefixWorkspace w;
  // Of a ragged batch rows past the last sequence, too.
  w.rows = problem.flags & ETAP_RAGGED ? problem.total_q : std::min<int64_t>(problem.total_q, most_rows);
  w.results = w.rows * problem.num_heads;
  w.links = begin;
  w.q_rows = w.links + aligned(sizeof(PrefixLink) * static_cast<size_t>(sharers));
  w.found = w.q_rows + aligned(sizeof(int32_t) * static_cast<size_t>(kMaxGroups * tile_rows));
  w.lse = w.found + aligned(sizeof(etap_shared));
  w.out = w.lse + aligned(sizeof(float) * 2 * static_cast<size_t>(w.results));
  w.pass = w.out + aligned(sizeof(float) * 2 * static_cast<size_t>(w.results) * static_cast<size_t>(problem.d_latent));
  w.workspace = workspace_layout(kMaxGroups, 1, tile_rows, problem.d_latent, workers, cluster);
  w.bytes = w.pass + w.workspace.bytes;
  return w;
}

// Of pass 1: the sequence of a group. first: the member whose table is read.
ETAP_HD SequenceRecord prefix_record(int group, int tokens, int query_tokens, int first, int tile_rows) {
  return SequenceRecord{tokens, group * tile_rows, query_tokens, first};
}
// Of pass 2: a sequence behind its prefix of so many tokens, which are whole pages.
ETAP_HD SequenceRecord behind_prefix(const SequenceRecord &s, int tokens, int page_size) {
  return SequenceRecord{s.length - tokens, s.q_begin, s.q_len, tokens / page_size};
}

}  // namespace etap::sm90
