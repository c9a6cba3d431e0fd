// What a problem can be made of, as data: widths of a head and formats of a KV row. Validation and both devices read it
// here.
#pragma once

#include "etap.h"

namespace etap {

struct HeadDims {
  int d_latent, d_rope;
};
inline constexpr HeadDims kHeadDims[] = {{512, 64}, {512, 0}, {256, 64}};

enum class Scales {
  kNone,    // values are what they are
  kTensor,  // one for the whole cache
  kBeside,  // also one for each token and 128 latent values, in an array of their own
  kInRow    // the same, in the row
};
constexpr int kScaleGroup = 128;  // latent values of a group scale

struct KvFormat {
  etap_kv_format id;
  const char *name;
  int element_bytes;  // what strides count in
  int q_dtype;        // etap_dtype that q must have; -1: either
  Scales scales;
  int row_elements;  // 0: d_latent + d_rope
  bool e4m3;         // latent values
  bool rope_bf16;    // rope values of an E4M3 row
  bool only_512_64;  // the only widths it is defined for
};
inline constexpr KvFormat kKvFormats[] = {
    {ETAP_KV_BF16, "bf16", 2, ETAP_BF16, Scales::kNone, 0, false, false, false},
    {ETAP_KV_FP16, "fp16", 2, ETAP_FP16, Scales::kNone, 0, false, false, false},
    {ETAP_KV_E4M3, "e4m3", 1, -1, Scales::kTensor, 0, true, false, false},
    {ETAP_KV_E4M3_GROUP, "e4m3_group", 1, -1, Scales::kBeside, 0, true, false, false},
    {ETAP_KV_E4M3_656, "e4m3_656", 1, -1, Scales::kInRow, 656, true, true, true},
};

// nullptr for a number that is no format.
constexpr const KvFormat *find_kv_format(int32_t id) {
  for (const KvFormat &format : kKvFormats)
    if (format.id == id) return &format;
  return nullptr;
}
// Of a problem that has been validated.
constexpr const KvFormat &kv_format_of(const etap_problem &problem) { return *find_kv_format(problem.kv_format); }
constexpr int row_elements(const KvFormat &format, int d_latent, int d_rope) {
  return format.row_elements > 0 ? format.row_elements : d_latent + d_rope;
}

}  // namespace etap
