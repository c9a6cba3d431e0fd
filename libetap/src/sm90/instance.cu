// A family of kernels at one tile size: make builds this file for each line of catalog.def, with
// ETAP_FAMILY=token_split and ETAP_ROWS=8, say. The family's header defines a class of its name with
//
//     template <typename T, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY> static Kernel instance();
//
// T: the type of what is multiplied, FP16 with an FP8 cache whatever the queries' is.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "etap.h"
#include "sm90/catalog.h"
#include "sm90/kernel.h"

#include ETAP_FAMILY_HEADER

#define ETAP_JOINED(family, rows) family##_n##rows
#define ETAP_FINDER(family, rows) ETAP_JOINED(family, rows)

namespace etap::sm90 {
namespace {

template <typename T, KvCopy COPY>
Kernel of_widths(int d_latent, int d_rope) {
#define WIDTHS(latent, rope) \
  if (d_latent == latent && d_rope == rope) return ETAP_FAMILY::instance<T, ETAP_ROWS, latent, rope, COPY>();
#include "widths.def"
#undef WIDTHS
  return Kernel{};
}

template <KvCopy COPY>
Kernel of_type(int q_dtype, int d_latent, int d_rope) {
  return q_dtype == ETAP_BF16 ? of_widths<__nv_bfloat16, COPY>(d_latent, d_rope)
                              : of_widths<__half, COPY>(d_latent, d_rope);
}

}  // namespace

Kernel ETAP_FINDER(ETAP_FAMILY, ETAP_ROWS)(int q_dtype, int d_latent, int d_rope, KvCopy copy) {
  constexpr CatalogRow row{Family::ETAP_FAMILY, "", ETAP_ROWS};
  if constexpr (!row.takes_e4m3()) {
    if (copy == KvCopy::kTma) return of_type<KvCopy::kTma>(q_dtype, d_latent, d_rope);
    if (copy == KvCopy::kGather) return of_type<KvCopy::kGather>(q_dtype, d_latent, d_rope);
  }
  if constexpr (row.takes_e4m3()) {
    if (copy == KvCopy::kE4m3) return of_widths<__half, KvCopy::kE4m3>(d_latent, d_rope);
    if (d_latent != 512) return Kernel{};
    if (copy == KvCopy::kE4m3Group && d_rope == 64)
      return ETAP_FAMILY::instance<__half, ETAP_ROWS, 512, 64, KvCopy::kE4m3Group>();
    if (copy == KvCopy::kE4m3_656 && d_rope == 64)
      return ETAP_FAMILY::instance<__half, ETAP_ROWS, 512, 64, KvCopy::kE4m3_656>();
    if constexpr (row.takes_528()) {
      if (copy == KvCopy::kE4m3_656 && d_rope == 0)
        return ETAP_FAMILY::instance<__half, ETAP_ROWS, 512, 0, KvCopy::kE4m3_656>();
    }
  }
  return Kernel{};
}

}  // namespace etap::sm90
