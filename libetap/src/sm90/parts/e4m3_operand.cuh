// FP8 rows as the A operand of WGMMA, from shared memory through registers, E4M3 to FP16 on the way (exact).
//
// A thread of m64k16's A holds rows g = lane / 4 and g + 8 of its warp's 16, and of each the k slots 2q, 2q + 1, 2q + 8
// and 2q + 9, q = lane % 4. Which dim or token a slot or a row means is free as long as the other operand, or whoever
// reads the result, agrees. That freedom makes every load 16 bytes wide and free of bank conflicts:
//
//     K [tokens, dims]     A thread loads 16 bytes of one token's row; they feed four k16 steps. Q is stored with the
//                          same permutation of dims (load_query_half).
//     V^T [dims, tokens]   A thread loads 16 bytes - 16 values of d - of four tokens; pairs of tokens are interleaved,
//                          and feed the rows g and g + 8 of eight m64 tiles. O^T's rows are put back in order where
//                          they are written.
//
//     group scales         K's multiply the FP32 products of a group. V's become FP16 factors of its fragments
//                          (TokenScale): a thread's values of d are of one group.
//
// A KV block lies in boxes of 64 tokens x 64 bytes with 64-byte swizzle: 16-byte chunk c of token t is at chunk
// c ^ (t / 2 % 4). Rows of S^T, k slots of P^T and tokens are in the same order in both products (token_of_slot):
// eight lanes then touch all eight 16-byte banks, whether they hold two tokens and four chunks (K) or four tokens and
// two chunks (V).
#pragma once

#include "sm90/parts/piece.cuh"

namespace etap::sm90 {

constexpr int kFp8BoxBytes = kBlockTokens * 64;

// Which of eight tokens is k slot 0 .. 7 of P^T, and row 0 .. 7 of S^T: 0, 3, 1, 2, 4, 7, 5, 6.
__device__ __forceinline__ uint32_t token_of_slot(uint32_t slot) {
  return (slot & 4) | (slot & 1) << 1 | ((slot ^ slot >> 1) & 1);
}
__device__ __forceinline__ uint32_t fp8_chunk_offset(uint32_t token, uint32_t chunk) {
  return token * 64 + ((chunk ^ (token / 2 % 4)) << 4);
}

// `thread` below is 0 to 127, of the warpgroup; unsigned, which saves the instructions that a negative one would need.

// The A operands of COUNT WGMMAs.
template <int COUNT>
using Fragments = uint32_t[COUNT][4];

// A thread's part of a box of K: 16 values of two tokens, four k16 steps.
struct KeyBytes {
  uint4 row[2];

  __device__ __forceinline__ static uint32_t offset(uint32_t thread) {
    const uint32_t lane = thread % 32, warp = thread / 32;
    return fp8_chunk_offset(16 * warp + token_of_slot(lane / 4), lane % 4);
  }
  __device__ __forceinline__ void load(const char *box) {
    row[0] = *reinterpret_cast<const uint4 *>(box);
    row[1] = *reinterpret_cast<const uint4 *>(box + 8 * 64);
  }
  // k16 steps `first` .. first + COUNT - 1.
  template <int COUNT>
  __device__ __forceinline__ void convert(int first, Fragments<COUNT> &a) const {
    const uint32_t words[4][2] = {
        {row[0].x, row[1].x}, {row[0].y, row[1].y}, {row[0].z, row[1].z}, {row[0].w, row[1].w}};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      e4m3_to_half(words[first + i][0], a[i][0], a[i][2]);
      e4m3_to_half(words[first + i][1], a[i][1], a[i][3]);
    }
  }
};

// The BF16 rope part of 656-byte rows, bytes 528 to 655, in the same boxes: a thread loads 16 bytes - 8 values - of two
// tokens, which feed two k16 steps as they are. Two of these make the 64 values.
struct RopeBytes {
  static constexpr int kFirstChunk = 1;  // after the scales
  uint4 row[2];

  __device__ __forceinline__ static uint32_t offset(uint32_t thread) {
    const uint32_t lane = thread % 32, warp = thread / 32, chunk = lane % 4 + kFirstChunk;
    return chunk / 4 * kFp8BoxBytes + fp8_chunk_offset(16 * warp + token_of_slot(lane / 4), chunk % 4);
  }
  // half 0 or 1; `box` is the first of the three that hold scales and rope part.
  __device__ __forceinline__ void load(const char *box, int half) {
    row[0] = *reinterpret_cast<const uint4 *>(box + half * kFp8BoxBytes);
    row[1] = *reinterpret_cast<const uint4 *>(box + half * kFp8BoxBytes + 8 * 64);
  }
  __device__ __forceinline__ void fragments(uint32_t (&first)[4], uint32_t (&second)[4]) const {
    first[0] = row[0].x, first[1] = row[1].x, first[2] = row[0].y, first[3] = row[1].y;
    second[0] = row[0].z, second[1] = row[1].z, second[2] = row[0].w, second[3] = row[1].w;
  }
  // The first step's, or the second's.
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    uint32_t other[4];
    step == 0 ? fragments(a, other) : fragments(other, a);
  }
};

// A token's scale of one group as the product of 2^exponent, which is the same for all of its groups, and a factor
// below 1 in FP16: then V's values times the factor fit FP16, and the exponent goes into the logit.
struct TokenScale {
  float exponent;
  float inverse;  // 2^-exponent

  // Powers below 2^-99 are not needed beside those that are, and a sum of P takes `inverse`.
  __device__ __forceinline__ explicit TokenScale(float4 scales) {
    const float largest = fmaxf(fmaxf(fabsf(scales.x), fabsf(scales.y)), fmaxf(fabsf(scales.z), fabsf(scales.w)));
    const int biased = min(max(__float_as_int(largest) >> 23, 27), 252);
    exponent = static_cast<float>(biased - 126);
    inverse = __int_as_float((253 - biased) << 23);
  }
  // 2^exponent and the exponent again, from `inverse`.
  __device__ __forceinline__ static float power_of(float inverse) {
    return __int_as_float((254 << 23) - __float_as_int(inverse));
  }
  __device__ __forceinline__ static float exponent_of(float inverse) {
    return static_cast<float>(127 - (__float_as_int(inverse) >> 23));
  }
};

// Factors of [groups][64 slots of P^T] in shared memory, those that a thread needs for 16 tokens next to each other.
constexpr int kFactorsBytes = 4 * kBlockTokens * 2;
__device__ __forceinline__ int factor_offset(int group, int slot) {
  return (group * kBlockTokens + slot / 16 * 16 + slot % 8 / 2 * 4 + slot % 16 / 8 * 2 + slot % 2) * 2;
}

// A thread's part of 16 tokens of V: D_LATENT / 32 values of four tokens. Each value feeds a row of an m64 tile.
template <int D_LATENT>
struct ValueBytes {
  static constexpr int WORDS = D_LATENT / 128, BYTES = 4 * WORDS;
  static_assert(WORDS == 4 || WORDS == 2 || WORDS == 1);
  uint32_t word[4][WORDS];

  // The first of the thread's values of d.
  __device__ __forceinline__ static uint32_t first_d(uint32_t thread) { return thread / 4 * BYTES; }
  __device__ __forceinline__ static uint32_t box(uint32_t thread) { return first_d(thread) / 64; }
  // In the box; of the first and third token (odd = 0), of the second and fourth (odd = 1).
  __device__ __forceinline__ static uint32_t offset(uint32_t thread, uint32_t odd) {
    const uint32_t d = first_d(thread);
    return fp8_chunk_offset(token_of_slot(thread % 4 * 2 + odd), d % 64 / 16) + d % 16;
  }
  __device__ __forceinline__ void load(const char *even, const char *odd) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char *const from = (i % 2 == 0 ? even : odd) + i / 2 * (8 * 64);
      if constexpr (WORDS == 4) {
        const uint4 v = *reinterpret_cast<const uint4 *>(from);
        word[i][0] = v.x, word[i][1] = v.y, word[i][2] = v.z, word[i][3] = v.w;
      } else if constexpr (WORDS == 2) {
        const uint2 v = *reinterpret_cast<const uint2 *>(from);
        word[i][0] = v.x, word[i][1] = v.y;
      } else {
        word[i][0] = *reinterpret_cast<const uint32_t *>(from);
      }
    }
  }
  // Tiles `first` .. first + COUNT - 1: row g of tile t is the thread's value 2 t, row g + 8 value 2 t + 1.
  template <int COUNT>
  __device__ __forceinline__ void convert(int first, Fragments<COUNT> &a) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int tile = first + i;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t interleaved =
            __byte_perm(word[2 * pair][tile / 2], word[2 * pair + 1][tile / 2], tile % 2 == 0 ? 0x5140 : 0x7362);
        e4m3_to_half(interleaved, a[i][2 * pair], a[i][2 * pair + 1]);
      }
    }
  }
};

// Fragments of V times the factors of the thread's first two tokens and last two.
template <int COUNT>
__device__ __forceinline__ void scale_fragments(Fragments<COUNT> &a, uint2 factors) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    multiply_half2(a[i][0], factors.x);
    multiply_half2(a[i][1], factors.x);
    multiply_half2(a[i][2], factors.y);
    multiply_half2(a[i][3], factors.y);
  }
}

constexpr float kLeastScale = 0x1p-100f;  // no logit is seen of it

// Queries, as load_query leaves them, to FP16 in place, PERMUTED: with their dims in the order of KeyBytes; and what
// turns a row's products into logits in units of log2: it is positive, the sign goes into Q, and where it is 0 what is
// masked must stay so. ROPE_BF16: the last box stays BF16, in the order of RopeBytes.
// Every row is scaled by the power of two that brings its largest value just below 2^16, where FP16 ends: nothing is
// rounded but values under 2^-32 of the largest. Not PERMUTED: all boxes but the last are multiplied by latent_scale
// first. Ends with a barrier over the consumers; WGMMA may read Q after it.
//
// A warp takes four rows at a time, and eight lanes a row's box: all that is read lies in banks of its own where the
// rows are every other of eight, by the swizzle.
template <int N, int BOXES, bool ROPE_BF16, bool PERMUTED>
__device__ __forceinline__ void query_to_half(bool bf16, char *q, float scale_log2, float *logit_scale,
                                              float latent_scale = 1.f) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32, mine = lane % 8;
  const auto value_of = [&](uint32_t bits) {  // of the lower 16
    return bf16 ? __uint_as_float(bits << 16) : unpack_half2(bits).x;
  };
#pragma unroll 1
  for (int rows = warp; rows < N / 4; rows += 8) {
    const int n = rows / 2 * 8 + rows % 2 + lane / 8 * 2;
    const auto chunk_at = [&](int box, int chunk) {
      return smem_address(q) + box * (N * 128) + n * 128 + ((chunk ^ (n & 7)) << 4);
    };
    // Largest magnitudes: as bits, of the latent part and of the last box.
    uint32_t most[2] = {0, 0};
    float4 own[PERMUTED ? 1 : BOXES];
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      const float4 raw = load_shared_float4(chunk_at(box, mine));
      own[PERMUTED ? 0 : box] = raw;
      uint32_t &m = most[box == BOXES - 1];
      m = max_u16x2(m, __float_as_uint(raw.x) & 0x7fff7fff);
      m = max_u16x2(m, __float_as_uint(raw.y) & 0x7fff7fff);
      m = max_u16x2(m, __float_as_uint(raw.z) & 0x7fff7fff);
      m = max_u16x2(m, __float_as_uint(raw.w) & 0x7fff7fff);
    }
    const auto larger_of = [&](uint32_t m) { return value_of(max_u16x2(m, m >> 16)); };
    float largest = fmaxf(larger_of(most[0]) * fabsf(latent_scale), larger_of(most[1]));
#pragma unroll
    for (int delta = 4; delta > 0; delta /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, delta));
    // 2^(15 - exponent of the largest), within what a float and its inverse can hold.
    const int exponent = max(__float_as_int(largest) >> 23, 16);
    const float down = __int_as_float((exponent - 15) << 23);
    const float up = copysignf(__int_as_float((269 - exponent) << 23), scale_log2);
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      const bool rope = ROPE_BF16 && box == BOXES - 1;
      const float by = PERMUTED || box == BOXES - 1 ? up : up * latent_scale;
      const float4 kept = own[PERMUTED ? 0 : box];
      const float words[4] = {kept.x, kept.y, kept.z, kept.w};
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // PERMUTED: value 2 w of chunk c, value 16 x + 4 step + 2 h of a box, becomes value 16 step + 8 h + 2 x. BF16:
        // value 32 y + 8 x + 4 step + 2 h becomes 32 y + 16 step + 8 h + 2 x.
        const uint32_t from = chunk_at(box, rope ? mine / 4 * 4 + i : 2 * i + mine / 4) + mine % 4 * 4;
        const uint32_t word = __float_as_uint(PERMUTED ? load_shared_float(from) : words[i]);
        const float first = value_of(word) * by, second = value_of(word >> 16) * by;
        out[i] = rope ? pack2<__nv_bfloat16>(first, second) : pack2<__half>(first, second);
      }
      if (PERMUTED) __syncwarp();  // all of the box has been read
      store_shared_16(chunk_at(box, mine), out);
    }
    if (mine == 0) logit_scale[n] = fmaxf(fabsf(scale_log2) * down, kLeastScale);
  }
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}

}  // namespace etap::sm90
