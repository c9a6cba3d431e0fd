// The formats of a KV row (etap_kv_format) as data: what checks and devices ask of one.
#pragma once

#include "etap.h"

namespace etap {

// Where the factor of each token and 128 latent values stands.
enum class GroupScales {
  kNone,
  kBeside,  // in an array of their own
  kInRow,   // after the latent values; rope values, if there are any, follow in BF16
#ifdef ETAP_MORE_FORMATS
  kAtEnd,  // of the row, as if they stood beside it
#endif
};

struct KvFormat {
  const char *name;   // in the names of kernels
  int element_bytes;  // what strides count
  int row_bytes;      // 0: an element for each of d_latent + d_rope values
  bool e4m3;          // else of the queries' type
  GroupScales scales;
};

inline constexpr KvFormat kFormats[] = {
    {"bf16", 2, 0, false, GroupScales::kNone},         // ETAP_KV_BF16
    {"fp16", 2, 0, false, GroupScales::kNone},         // ETAP_KV_FP16
    {"e4m3", 1, 0, true, GroupScales::kNone},          // ETAP_KV_E4M3
    {"e4m3_group", 1, 0, true, GroupScales::kBeside},  // ETAP_KV_E4M3_GROUP
    {"e4m3_656", 1, 656, true, GroupScales::kInRow},   // ETAP_KV_E4M3_656
    {"e4m3_528", 1, 528, true, GroupScales::kInRow},   // ETAP_KV_E4M3_528
#ifdef ETAP_MORE_FORMATS
    ETAP_MORE_FORMATS,  // of the tests' builds: tests/emulator/one_more.h
#endif
};
inline constexpr int kNumFormats = sizeof kFormats / sizeof kFormats[0];

inline const KvFormat &kv_format(const etap_problem &problem) { return kFormats[problem.kv_format]; }

inline int kv_row_bytes(const etap_problem &problem) {
  const KvFormat &format = kv_format(problem);
  return format.row_bytes > 0 ? format.row_bytes : format.element_bytes * (problem.d_latent + problem.d_rope);
}

}  // namespace etap
