// The kernels as data, for the host: which tiles there are, for which cache, and who computes them.
#pragma once

namespace etap::sm90 {

// Called as their files in kernels/.
enum class Family { token_split, dv_split, rows_on_m, e4m3_split, e4m3_dv_split, e4m3_rows_on_m };

struct CatalogRow {
  Family family;
  const char *name;
  int tile_rows;
  constexpr bool takes_e4m3() const { return family >= Family::e4m3_split; }
  constexpr bool takes_528() const { return family > Family::e4m3_split; }  // rows of 528 bytes
};

inline constexpr CatalogRow kCatalog[] = {
#define KERNEL(family, rows) {Family::family, #family, rows},
#include "sm90/catalog.def"
#undef KERNEL
};

// The kernel for tiles of so many rows; nullptr: none is built.
inline const CatalogRow *find_row(bool e4m3, int tile_rows) {
  for (const CatalogRow &row : kCatalog) {
    if (row.takes_e4m3() == e4m3 && row.tile_rows == tile_rows) return &row;
  }
  return nullptr;
}

}  // namespace etap::sm90
