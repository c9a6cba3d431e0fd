// Partial results over disjoint sets of KV tokens become one: the kernel of etap_merge, which also adds what shared
// prefixes and what follows them have of each row (prefix_pass.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "etap.h"
#include "sm90/kernel.h"

namespace etap::sm90 {

constexpr int kMergedByCta = 4;  // results: a warp each

struct MergeParams {
  etap_merge_args args;    // dtype and lse_base: of out and lse
  int32_t parts_dtype;     // etap_dtype
  int32_t parts_lse_base;  // etap_lse_base
  float empty_lse;         // of results whose parts are all empty
};

inline MergeParams merge_params(const etap_merge_args &args) {
  return MergeParams{args, args.dtype, args.lse_base, -INFINITY};
}

// For (MergeParams); its function is nullptr where there is none: parts have out's type, or FP32.
Kernel merge_kernel(const MergeParams &merge);
inline int64_t merge_ctas(const MergeParams &merge) {
  return (static_cast<int64_t>(merge.args.rows) * merge.args.num_heads + kMergedByCta - 1) / kMergedByCta;
}

}  // namespace etap::sm90
