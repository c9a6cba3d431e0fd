#pragma once

#include "catalog.h"

namespace etap::sm90 {

// The kernel that merges partial results of rows of d_latent values. Its argument is the decode kernel's.
Kernel merge_partials(int d_latent);

}  // namespace etap::sm90
