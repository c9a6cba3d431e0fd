// Partial results on their way to whoever adds them up: a row's sums of P V, the maximum that they refer to, and its
// sum of P.
//
// Where the output is BF16 they go through L2 as FP16, which has three bits more: 64 rows are 64 KB a CTA then. A row
// is divided by the power of two 2^e that brings its largest value to 2^14 .. 2^15, its sum of P too, and e is added to
// its maximum, so (maximum, sum, values) mean what they meant. The error is 2^-11 of a value at most, beside BF16's
// 2^-8. Outputs in FP16 and FP32 keep partial results in FP32, and so do clusters: what they exchange is not L2's.
#pragma once

#include "sm90/params.h"
#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {

constexpr float kNoMaximum = -1e30f;  // below every logit, finite: exp2(-inf - m) is 0, not NaN

// A row's result, or a part of it: the sum of P V of 4 x QUADS values against the maximum `top`, and the sum of P.
template <int QUADS = 1>
struct Merged {
  float top, sum;
  float4 value[QUADS];
};
template <int QUADS>
__device__ __forceinline__ Merged<QUADS> nothing_merged() {
  Merged<QUADS> m{kNoMaximum, 0.f, {}};
#pragma unroll
  for (float4 &v : m.value) v = make_float4(0.f, 0.f, 0.f, 0.f);
  return m;
}

// Rounded alike in every kernel: which product is fused with the sum is not left to the compiler.
__device__ __forceinline__ float weighted(float x, float a, float y, float b) { return fmaf(x, a, __fmul_rn(y, b)); }
__device__ __forceinline__ float4 weighted(const float4 &x, float a, const float4 &y, float b) {
  return make_float4(weighted(x.x, a, y.x, b), weighted(x.y, a, y.y, b), weighted(x.z, a, y.z, b),
                     weighted(x.w, a, y.w, b));
}
template <int QUADS>
__device__ __forceinline__ Merged<QUADS> sum_of(const Merged<QUADS> &x, const Merged<QUADS> &y) {
  const float top = fmaxf(x.top, y.top), a = exp2_approx(x.top - top), b = exp2_approx(y.top - top);
  Merged<QUADS> m{top, weighted(x.sum, a, y.sum, b), {}};
#pragma unroll
  for (int q = 0; q < QUADS; ++q) m.value[q] = weighted(x.value[q], a, y.value[q], b);
  return m;
}

// Four values as they travel: a float4, or in FP16 a uint2.
__device__ __forceinline__ uint2 narrow(const float4 &v, float scale) {
  return make_uint2(pack2<__half>(v.x * scale, v.y * scale), pack2<__half>(v.z * scale, v.w * scale));
}
__device__ __forceinline__ float4 widen(const uint2 &v) {
  const float2 low = unpack_half2(v.x), high = unpack_half2(v.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ float4 widen(const float4 &v) { return v; }

// Of a row that a warp holds: e, by which it is divided. Infinities and NaN don't count.
template <int COUNT>
__device__ __forceinline__ int row_exponent(const float4 (&values)[COUNT]) {
  // Twice the bits and 2^24: exponents begin at 1, and those of infinities and NaN at 0.
  const auto order = [](float x) { return 2 * __float_as_uint(x) + 0x1000000u; };
  unsigned largest = 0;
#pragma unroll
  for (const float4 &v : values) largest = max(largest, max(max(order(v.x), order(v.y)), max(order(v.z), order(v.w))));
  const int exponent = static_cast<int>(__reduce_max_sync(0xffffffffu, largest) >> 24);
  return exponent <= 1 ? 0 : max(exponent - (1 + 127 + 14), -90);  // 1: nothing but zeros
}
__device__ __forceinline__ float two_to(int exponent) { return __int_as_float((127 + exponent) << 23); }

// What a warp's row is multiplied by to travel; `stats`, its maximum and sum of P, change with it where they are `its`.
template <int COUNT>
__device__ __forceinline__ float narrowing(const float4 (&values)[COUNT], float2 &stats, bool its) {
  const int exponent = row_exponent(values);
  const float by = two_to(-exponent);
  if (its) stats = make_float2(stats.x + static_cast<float>(exponent), stats.y * by);
  return by;
}
// As it travels.
template <int COUNT>
__device__ __forceinline__ void as_they_travel(const float4 (&values)[COUNT], float2 &stats, uint2 (&out)[COUNT]) {
  const float by = narrowing(values, stats, true);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) out[i] = narrow(values[i], by);
}
template <int COUNT>
__device__ __forceinline__ void as_they_travel(const float4 (&values)[COUNT], float2 &, float4 (&out)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) out[i] = values[i];
}

__device__ __forceinline__ void add_weighted(float4 &total, float w, const float4 &v) {
  total = make_float4(fmaf(w, v.x, total.x), fmaf(w, v.y, total.y), fmaf(w, v.z, total.z), fmaf(w, v.w, total.w));
}

// Merges, for ITEMS rows, PARTS (a power of two) parts of a row, of which `count` exist. stats(item, part) is a part's
// maximum and sum, value(item, part) its sums of P V; beyond the last part they may be any part's. All loads are in
// flight at once.
template <int PARTS, int ITEMS, typename Stats, typename Value>
__device__ __forceinline__ void merge_parts(int count, Stats &&stats, Value &&value, Merged<> (&merged)[ITEMS]) {
  const int mine = threadIdx.x % PARTS;
  float2 part[ITEMS];
  float4 values[ITEMS][PARTS];
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    part[item] = stats(item, mine);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) values[item][i] = value(item, i);
  }
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    float top = mine < count ? part[item].x : kNoMaximum;
#pragma unroll
    for (int delta = PARTS / 2; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, delta));
    const float weight = mine < count ? exp2_approx(part[item].x - top) : 0.f;
    float sum = mine < count ? part[item].y * weight : 0.f;
#pragma unroll
    for (int delta = PARTS / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    merged[item] = Merged<>{top, sum, {make_float4(0.f, 0.f, 0.f, 0.f)}};
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
      add_weighted(merged[item].value[0], __shfl_sync(0xffffffffu, weight, i), values[item][i]);
  }
}

}  // namespace etap::sm90
