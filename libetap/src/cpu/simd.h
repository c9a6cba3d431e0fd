// Vectors of floats in GCC's portable vector notation. Included once by each translation unit of kernel.cc, whose
// compiler flags decide the width; everything is inside that unit's namespace ETAP_ISA, so that no function compiled
// for one instruction set can be linked into another's code.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace etap::cpu::ETAP_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

template <typename Vector>
inline Vector load(const void *from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector>
inline void store(void *to, Vector v) {
  memcpy(to, &v, sizeof v);
}

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats as_floats(Words w) { return (Floats)w; }
inline Words as_words(Floats f) { return (Words)f; }

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  typedef Lanes<I...> type;
};
typedef MakeLanes<kWidth>::type AllLanes;

template <int... I>
inline Words powers(Lanes<I...>) {
  return Words{UINT32_C(1) << I...};
}

inline Words lane_bits() { return powers(AllLanes()); }  // 1, 2, 4, ...

// mask ? a : b, where a mask lane is all ones or zero
inline Floats select(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// ---- 16- and 8-bit formats ----

// kWidth integers, zero-extended. GCC takes __builtin_convertvector of narrow integers apart lane by lane.
inline Words words_from_halves(const void *from) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i *>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(from)));
#else
  return __builtin_convertvector(load<Halves>(from), Words);
#endif
}

inline Words words_from_bytes(const void *from) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(static_cast<const __m128i *>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i *>(from)));
#else
  return __builtin_convertvector(load<Bytes>(from), Words);
#endif
}

inline Floats bf16_to_floats(const uint16_t *from) { return as_floats(words_from_halves(from) << 16); }

inline Floats fp16_to_floats(const uint16_t *from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
  // The exponent's bias goes from 15 to 127 by a multiplication, which makes subnormals right as well.
  const Words h = words_from_halves(from);
  const Words magnitude = (h & 0x7fff) << 13;
  const Words special = (Words)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return as_floats(as_words(as_floats(magnitude) * 0x1p112f) | special | ((h & 0x8000) << 16));
#endif
}

inline Floats e4m3_to_floats(const uint8_t *from) {
  // As for FP16, with bias 7. All ones is NaN; there is no infinity.
  const Words b = words_from_bytes(from);
  const Words special = (Words)((b & 0x7f) == 0x7f) & 0x7fc00000;
  return as_floats(as_words(as_floats((b & 0x7f) << 20) * 0x1p120f) | special | ((b & 0x80) << 24));
}

// acc += a * b, lane by lane: one step of a dot product.
inline Floats dot_step(const float *a, const float *b, Floats acc) { return acc + load<Floats>(a) * load<Floats>(b); }

#if defined(__AVX512BF16__)
// The same over 2 * kWidth BF16 values. Their products are exact in FP32; subnormal values count as 0.
inline Floats dot_step(const uint16_t *a, const uint16_t *b, Floats acc) {
  return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

inline Halves floats_to_bf16(Floats f) {
  // Round to nearest, ties to even; NaN stays NaN.
  const Words w = as_words(f);
  const Words rounded = w + 0x7fff + ((w >> 16) & 1);
  const Words nan = (Words)(f != f);
  return __builtin_convertvector(((rounded & ~nan) | ((w | 0x400000) & nan)) >> 16, Halves);
}

inline Halves floats_to_fp16(Floats f) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#else
  const Words w = as_words(f);
  const Words magnitude = w & 0x7fffffff;
  // Normal results: re-bias and round to nearest even in integers. A carry into the exponent is right, up to infinity.
  const Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 leaves the value in the low bits, rounded by the addition.
  const Words subnormal = as_words(as_floats(magnitude) + 0.5f) - 0x3f000000;
  const Words is_small = (Words)(magnitude < 0x38800000);
  const Words is_large = (Words)(magnitude >= 0x47800000);
  const Words is_nan = (Words)(magnitude > 0x7f800000);
  Words h = (subnormal & is_small) | (normal & ~is_small);
  h = (h & ~is_large) | (0x7c00 & is_large);
  h = h | (0x0200 & is_nan);
  return __builtin_convertvector(h | ((w >> 16) & 0x8000), Halves);
#endif
}

// 2^x for x <= 0, to about one unit in the last place; 0 below -126. NaN stays NaN.
inline Floats exp2_nonpositive(Floats x) {
  const Ints inside = x >= -126.0f;
  const Floats y = select(inside, x, broadcast(-126.0f));  // all that follows is defined for every lane
  const Ints whole = __builtin_convertvector(y - 0.5f, Ints);
  const Floats f = y - __builtin_convertvector(whole, Floats);  // in [-0.5, 0.5]
  // Taylor series of exp(f ln 2)
  Floats p = 1.5252734e-5f * f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Floats scaled = as_floats(as_words(p) + ((Words)whole << 23));
  return select(inside, scaled, select(x < -126.0f, Floats{}, x));
}

// ---- Horizontal sums ----

// Lanes of a + lanes of b, `Distance` apart: lanes i and i + Distance of each are added; results of a and b alternate
// in runs of Distance.
template <int Distance, int... I>
inline Floats add_apart(Floats a, Floats b, Lanes<I...>) {
  const Ints low = {((I / Distance) % 2 * kWidth + I - I / Distance % 2 * Distance)...};
  const Ints high = {((I / Distance) % 2 * kWidth + I - I / Distance % 2 * Distance + Distance)...};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Sums the lanes of kWidth vectors at v[0], v[stride], ... : lane i of the result is the sum of the i-th.
template <int Count, int Distance>
inline Floats sum_lanes(const Floats *v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    const Floats a = sum_lanes<Count / 2, Distance / 2>(v);
    const Floats b = sum_lanes<Count / 2, Distance / 2>(v + Count / 2);
    return add_apart<Distance>(a, b, AllLanes());
  }
}

}  // namespace etap::cpu::ETAP_ISA
