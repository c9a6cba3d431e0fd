// Which kernels exist. Everything else follows from here: what the build instantiates (the Makefile reads the rows below,
// instance.cu the variants), what dispatch may choose, and how a chosen kernel is found.
//
// Host and device; no CUDA.
#pragma once

#include "../formats.h"

namespace etap::sm90 {

// Families, one file of kernels/ each, and their tiles: query rows, and SM cycles that a KV block takes when its data are
// there (docs/kernels.md). One translation unit a row.
#define ETAP_SM90_TILES(X) \
  X(token_split, 8, 2200)  \
  X(token_split, 16, 2290) \
  X(token_split, 24, 2500) \
  X(dv_split, 32, 3740)    \
  X(dv_split, 40, 3810)    \
  X(dv_split, 48, 3880)    \
  X(dv_split, 56, 3950)    \
  X(dv_split, 64, 4020)    \
  X(fp8_split, 8, 2050)    \
  X(fp8_split, 16, 2240)   \
  X(fp8_split, 24, 2600)   \
  X(fp8_split, 32, 2900)

// How KV blocks get into shared memory.
enum class KvCopy {
  kBoxes,   // through the copy engine
  kGather,  // 16 bytes at a time: pages too small for it
  kEither   // decided at run time
};

// What a family is built for, beside its tiles.
struct Variant {
  int q_dtype;  // etap_dtype; -1: either, decided at run time
  int kv_format;
  int d_latent, d_rope;
  KvCopy copy;
};

inline constexpr Variant k16BitVariants[] = {
    {ETAP_BF16, ETAP_KV_BF16, 512, 64, KvCopy::kBoxes},  {ETAP_BF16, ETAP_KV_BF16, 512, 64, KvCopy::kGather},
    {ETAP_BF16, ETAP_KV_BF16, 512, 0, KvCopy::kBoxes},   {ETAP_BF16, ETAP_KV_BF16, 512, 0, KvCopy::kGather},
    {ETAP_BF16, ETAP_KV_BF16, 256, 64, KvCopy::kBoxes},  {ETAP_BF16, ETAP_KV_BF16, 256, 64, KvCopy::kGather},
    {ETAP_FP16, ETAP_KV_FP16, 512, 64, KvCopy::kBoxes},  {ETAP_FP16, ETAP_KV_FP16, 512, 64, KvCopy::kGather},
    {ETAP_FP16, ETAP_KV_FP16, 512, 0, KvCopy::kBoxes},   {ETAP_FP16, ETAP_KV_FP16, 512, 0, KvCopy::kGather},
    {ETAP_FP16, ETAP_KV_FP16, 256, 64, KvCopy::kBoxes},  {ETAP_FP16, ETAP_KV_FP16, 256, 64, KvCopy::kGather},
};
inline constexpr Variant kE4m3Variants[] = {
    {-1, ETAP_KV_E4M3, 512, 64, KvCopy::kEither},
    {-1, ETAP_KV_E4M3, 512, 0, KvCopy::kEither},
    {-1, ETAP_KV_E4M3, 256, 64, KvCopy::kEither},
    {ETAP_BF16, ETAP_KV_E4M3_GROUP, 512, 64, KvCopy::kEither},
    {ETAP_BF16, ETAP_KV_E4M3_656, 512, 64, KvCopy::kEither},
};
#define ETAP_SM90_VARIANTS_token_split k16BitVariants
#define ETAP_SM90_VARIANTS_dv_split k16BitVariants
#define ETAP_SM90_VARIANTS_rows_on_m k16BitVariants
#define ETAP_SM90_VARIANTS_fp8_split kE4m3Variants

enum class Family { token_split, dv_split, rows_on_m, fp8_split };

// Families whose two warpgroups take KV blocks in turn: a piece of one block leaves one idle.
constexpr bool takes_blocks_in_turn(Family family) { return family != Family::dv_split; }

struct CatalogRow {
  Family family;
  const char *name;
  int tile_rows;
  int block_cycles;
  const Variant *variants;
  int num_variants;
};
inline constexpr CatalogRow kCatalog[] = {
#define ETAP_ROW(family, tile, cycles)                       \
  {Family::family, #family, tile, cycles, ETAP_SM90_VARIANTS_##family, \
   static_cast<int>(sizeof(ETAP_SM90_VARIANTS_##family) / sizeof(Variant))},
    ETAP_SM90_TILES(ETAP_ROW)
#undef ETAP_ROW
};

// Pages of fewer tokens are gathered: more copies than one for 32 rows of 128 bytes are too many for the copy engine at
// an H200's speed, and boxes of E4M3 hold half as much.
constexpr int kSmallestBoxPage = 32, kSmallestE4m3BoxPage = 8;
constexpr bool gathers(const etap_problem &p) {
  return p.page_size < (kv_format_of(p).e4m3 ? kSmallestE4m3BoxPage : kSmallestBoxPage);
}

// The row's variant for a problem, or nullptr.
constexpr const Variant *find_variant(const CatalogRow &row, const etap_problem &p) {
  for (int i = 0; i < row.num_variants; ++i) {
    const Variant &v = row.variants[i];
    const bool copies = v.copy == KvCopy::kEither || (v.copy == KvCopy::kGather) == gathers(p);
    if (v.kv_format == p.kv_format && (v.q_dtype < 0 || v.q_dtype == p.q_dtype) && v.d_latent == p.d_latent &&
        v.d_rope == p.d_rope && copies)
      return &v;
  }
  return nullptr;
}

struct Kernel {
  const void *function;  // nullptr: no such kernel
  int threads;
  int shared_bytes;
};

// instance.cu: the kernel of a row for its variant `index`.
#define ETAP_DECLARE(family, tile, cycles) Kernel family##_n##tile(int index);
ETAP_SM90_TILES(ETAP_DECLARE)
#undef ETAP_DECLARE

}  // namespace etap::sm90
