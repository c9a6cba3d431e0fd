// KV rows: where they lie, and their formats as FP32. Included by kernel.cc, in its namespace.
#pragma once

#include "cpu/kernel.h"
#include "cpu/simd.h"
#include "kv_format.h"

namespace etap::cpu::ETAP_ISA {

inline Floats widen_half(int32_t dtype, const void *from) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  return dtype == ETAP_BF16 ? bf16_to_floats(halves) : fp16_to_floats(halves);
}

inline void widen_halves(int32_t dtype, const void *from, int count, float *to) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  if (dtype == ETAP_BF16) {
    for (int i = 0; i < count; i += kWidth) store(to + i, bf16_to_floats(halves + i));
  } else {
    for (int i = 0; i < count; i += kWidth) store(to + i, fp16_to_floats(halves + i));
  }
}

inline void widen_e4m3(const uint8_t *from, int count, float scale, float *to) {
  for (int i = 0; i < count; i += kWidth) store(to + i, e4m3_to_floats(from + i) * scale);
}

// Where a token's KV row lies, and its group scales where they are not within.
struct KvRow {
  const uint8_t *bytes;
  const float *scales;
};

// Whether there is one: a list of slots may have holes.
inline bool has_kv_row(const Tile &tile, int64_t token) {
  return tile.problem->topk == 0 || tile.block_table[token] >= 0;
}

inline KvRow find_kv_row(const Tile &tile, int64_t token) {
  const etap_problem &p = *tile.problem;
  const etap_run_args &a = *tile.args;
  const int64_t slot = p.topk > 0 ? tile.block_table[token] : token;
  const int64_t page = p.topk > 0 ? slot / p.page_size : tile.block_table[slot / p.page_size];
  const int64_t row = slot % p.page_size;
  const int64_t element = page * a.kv_page_stride + row * a.kv_row_stride;
  const int64_t scale = page * a.kv_group_scales_page_stride + row * a.kv_group_scales_row_stride;
  const uint8_t *const bytes = static_cast<const uint8_t *>(a.kv_cache) + element * kv_format(p).element_bytes;
#ifdef ETAP_MORE_FORMATS
  if (kv_format(p).scales == GroupScales::kAtEnd)
    return {bytes, reinterpret_cast<const float *>(bytes + p.d_latent + p.d_rope)};
#endif
  return {bytes, a.kv_group_scales + scale};
}

// Asks for KV rows of tokens [begin, end) to be brought into the L2 cache: pages lie anywhere, and the processor can't
// guess where the next one does.
inline void prefetch_kv_rows(const Tile &tile, int64_t begin, int64_t end) {
  const int bytes = kv_row_bytes(*tile.problem);
  for (int64_t token = begin; token < end; ++token) {
    if (!has_kv_row(tile, token)) continue;
    const uint8_t *row = find_kv_row(tile, token).bytes;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

inline void widen_kv_row(const Tile &tile, int64_t token, float *to) {
  const etap_problem &p = *tile.problem;
  const int width = p.d_latent + p.d_rope;
  const KvRow row = find_kv_row(tile, token);
  const KvFormat &format = kv_format(p);
  if (!format.e4m3) return widen_halves(p.q_dtype, row.bytes, width, to);
  switch (format.scales) {
    case GroupScales::kNone:
      widen_e4m3(row.bytes, width, tile.kv_scale, to);
      break;
    case GroupScales::kBeside:
#ifdef ETAP_MORE_FORMATS
    case GroupScales::kAtEnd:
#endif
      for (int d = 0; d < p.d_latent; d += 128)
        widen_e4m3(row.bytes + d, 128, row.scales[d / 128] * tile.kv_scale, to + d);
      widen_e4m3(row.bytes + p.d_latent, p.d_rope, tile.kv_scale, to + p.d_latent);
      break;
    case GroupScales::kInRow: {
      float scales[4];
      memcpy(scales, row.bytes + 512, sizeof scales);
      for (int d = 0; d < 512; d += 128) widen_e4m3(row.bytes + d, 128, scales[d / 128] * tile.kv_scale, to + d);
      if (p.d_rope > 0) widen_halves(ETAP_BF16, row.bytes + 528, 64, to + 512);
      break;
    }
  }
}

}  // namespace etap::cpu::ETAP_ISA
