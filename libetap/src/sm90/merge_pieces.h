#pragma once

#include "etap.h"
#include "sm90/kernel.h"

namespace etap::sm90 {

// The kernel that merges the pieces of units after a decode kernel whose workers are single CTAs, as (DecodeParams, the
// plan's MergeList); its function is nullptr where d_latent has none. It has more threads where much is to be merged.
Kernel merge_pieces_kernel(const etap_problem &problem, const etap_decision &decision);

// Does it follow the decode kernel? Clusters merge by themselves, and so do CTAs of theirs that are single workers.
inline bool merges_pieces(const etap_decision &decision) {
  return (decision.cluster_size == 1 && decision.max_splits > 1) || decision.max_sharers > 1;
}

}  // namespace etap::sm90
