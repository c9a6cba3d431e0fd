// The kernels of one row of the catalogue. Built once for each row, with ETAP_FAMILY, ETAP_TILE and ETAP_KERNEL_HEADER
// defined (Makefile).
#include <utility>

#include "catalog.h"
#include ETAP_KERNEL_HEADER

#define ETAP_PASTE(a, b) a##b
#define ETAP_EXPAND_PASTE(a, b) ETAP_PASTE(a, b)
#define ETAP_INSTANCE(family, tile) ETAP_EXPAND_PASTE(ETAP_EXPAND_PASTE(family, _n), tile)

namespace etap::sm90 {
namespace {

constexpr auto &kVariants = ETAP_EXPAND_PASTE(ETAP_SM90_VARIANTS_, ETAP_FAMILY);

// Each kernel header has NAME_entry<TILE, VARIANT>().
template <std::size_t... I>
Kernel find(int index, std::index_sequence<I...>) {
  Kernel found{};
  const auto take = [&](std::size_t i, Kernel (*entry)()) {
    if (static_cast<std::size_t>(index) == i) found = entry();
  };
  (take(I, &ETAP_EXPAND_PASTE(ETAP_FAMILY, _entry) < ETAP_TILE, kVariants[I].q_dtype, kVariants[I].kv_format,
        kVariants[I].d_latent, kVariants[I].d_rope, kVariants[I].copy >),
   ...);
  return found;
}

}  // namespace

Kernel ETAP_INSTANCE(ETAP_FAMILY, ETAP_TILE)(int index) {
  return find(index, std::make_index_sequence<sizeof(kVariants) / sizeof(Variant)>());
}

}  // namespace etap::sm90
