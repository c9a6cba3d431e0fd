// The kernels as data, for the host: which tiles there are, for which cache, and who computes them.
#pragma once

#include "kv_format.h"

namespace etap::sm90 {

enum class Family { token_split, dv_split, rows_on_m, e4m3_split, e4m3_dv_split, e4m3_fast };  // called as their files in kernels/

struct CatalogRow {
  Family family;
  const char *name;
  int tile_rows;
  constexpr bool e4m3_alone() const { return family >= Family::e4m3_split; }
  constexpr bool takes_e4m3() const { return e4m3_alone() || family == Family::rows_on_m; }
  constexpr bool takes_16bit() const { return !e4m3_alone(); }
  constexpr bool takes_528() const { return family == Family::rows_on_m || family == Family::e4m3_dv_split; }
  bool takes(const etap_problem &problem) const {
    const KvFormat &format = kv_format(problem);
    if (!format.e4m3) return takes_16bit();
    if (family == Family::e4m3_fast && (!(problem.flags & ETAP_FP8_FAST) || format.scales != GroupScales::kNone))
      return false;
    return takes_e4m3() && (problem.kv_format != ETAP_KV_E4M3_528 || takes_528());
  }
};

inline constexpr CatalogRow kCatalog[] = {
#define KERNEL(family, rows) {Family::family, #family, rows},
#include "sm90/catalog.def"
#undef KERNEL
};

// The kernel for tiles of so many rows; nullptr: none is built.
inline const CatalogRow *find_row(const etap_problem &problem, int tile_rows) {
  for (const CatalogRow &row : kCatalog) {
    if (row.takes(problem) && row.tile_rows == tile_rows) return &row;
  }
  return nullptr;
}
// The one that computes prefixes which sequences share.
inline const CatalogRow *find_prefix_row() {
  for (const CatalogRow &row : kCatalog) {
    if (row.family == Family::rows_on_m) return &row;
  }
  return nullptr;
}

}  // namespace etap::sm90
