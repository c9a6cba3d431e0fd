#pragma once

#include "etap.h"
#include "sm90/kernel.h"

namespace etap::sm90 {

// The kernel that merges the pieces of units after a decode kernel whose workers are single CTAs, as (DecodeParams, the
// plan's MergeList); its function is nullptr where d_latent has none. narrow: DecodeParams::narrow. much:
// is there likely to be much to merge? It has more threads then.
Kernel merge_pieces_kernel(int d_latent, bool narrow, bool much);

// Fewer units than half of the workers are cut, whatever lengths are usual, and of large tiles there is much to merge.
// In batch-invariant mode the batch has no say in it: two kernels need not round alike.
inline bool merges_much(const etap_problem &problem, const etap_decision &decision) {
  const bool most_are_cut = (problem.flags & ETAP_BATCH_INVARIANT) != 0 ||
                            2 * int64_t{problem.batch} * decision.num_tiles <= decision.num_workers;
  return decision.tile_rows >= 32 && most_are_cut;
}

// Does it follow the decode kernel? Clusters merge by themselves, and so do CTAs of theirs that are single workers.
inline bool merges_pieces(const etap_decision &decision) {
  return (decision.cluster_size == 1 && decision.max_splits > 1) || decision.max_sharers > 1;
}

}  // namespace etap::sm90
