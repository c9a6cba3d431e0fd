// The kernels as data, for the host: which tiles there are, for which cache, and who computes them.
#pragma once

namespace etap::sm90 {

enum class Family { token_split, dv_split, rows_on_m, e4m3_split, e4m3_dv_split };  // called as their files in kernels/

struct CatalogRow {
  Family family;
  const char *name;
  int tile_rows;
  constexpr bool e4m3_alone() const { return family == Family::e4m3_split || family == Family::e4m3_dv_split; }
  constexpr bool takes_e4m3() const { return e4m3_alone(); }
  constexpr bool takes_16bit() const { return !e4m3_alone(); }
  constexpr bool takes_528() const { return takes_e4m3() && family != Family::e4m3_split; }  // rows of 528 bytes
  constexpr bool takes(bool e4m3) const { return e4m3 ? takes_e4m3() : takes_16bit(); }
};

inline constexpr CatalogRow kCatalog[] = {
#define KERNEL(family, rows) {Family::family, #family, rows},
#include "sm90/catalog.def"
#undef KERNEL
};

// The kernel for tiles of so many rows; nullptr: none is built.
inline const CatalogRow *find_row(bool e4m3, int tile_rows) {
  for (const CatalogRow &row : kCatalog) {
    if (row.takes(e4m3) && row.tile_rows == tile_rows) return &row;
  }
  return nullptr;
}

}  // namespace etap::sm90
