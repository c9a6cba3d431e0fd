// Partial results over disjoint sets of KV tokens become one: the kernel of etap_merge.
#pragma once

#include <cstdint>

#include "etap.h"
#include "sm90/kernel.h"

namespace etap::sm90 {

constexpr int kMergedByCta = 4;  // results: a warp each

// For (etap_merge_args), of an etap_dtype.
Kernel merge_kernel(int dtype);
inline int64_t merge_ctas(const etap_merge_args &args) {
  return (static_cast<int64_t>(args.rows) * args.num_heads + kMergedByCta - 1) / kMergedByCta;
}

}  // namespace etap::sm90
