// The kernels as data, for the host: which tiles there are, for which cache, and who computes them.
#pragma once

#include "sm90/schedule/planner.h"

namespace etap::sm90 {

enum class Family { token_split, dv_split, rows_on_m, e4m3_split };  // called as their files in kernels/

struct CatalogRow {
  Family family;
  const char *name;
  int tile_rows;
  bool e4m3() const { return family == Family::e4m3_split; }
};

constexpr CatalogRow kCatalog[] = {
#define KERNEL(family, rows) {Family::family, #family, rows},
#include "sm90/catalog.def"
#undef KERNEL
};

// The kernel for tiles of so many rows; nullptr: none is built.
inline const CatalogRow *find_row(bool e4m3, int tile_rows) {
  for (const CatalogRow &row : kCatalog) {
    if (row.e4m3() == e4m3 && row.tile_rows == tile_rows) return &row;
  }
  return nullptr;
}

// The most rows of a tile that one CTA takes.
inline int most_rows(bool e4m3) {
  int most = 0;
  for (const CatalogRow &row : kCatalog) {
    if (row.e4m3() == e4m3 && ctas_of_tile(row.tile_rows) == 1 && row.tile_rows > most) most = row.tile_rows;
  }
  return most;
}

}  // namespace etap::sm90
