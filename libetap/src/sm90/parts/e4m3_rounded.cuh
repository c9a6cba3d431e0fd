// Operands of FP8 tensor cores, whose queries and probabilities are rounded to E4M3.
//
//     Q        a row times the power of two that brings its largest value below 448
//     P^T      up to 2^8
//     V^T      bytes of the cache, transposed in registers: a thread of m64k32's A holds rows g = lane / 4 and g + 8 of
//              its warp's 16, and of each the k slots 4q .. 4q + 3 and 16 + 4q .. 16 + 4q + 3, q = lane % 4
//
// Which token a k slot means is free as long as P^T and V^T agree, and which value of d a row means as long as the end
// of the piece knows. Slot 16 h + 4 q + b is token 16 h + token_of_quad(q) + 2 (b % 2) + 8 (b / 2) of the block; row g
// (and g + 8) of tiles 2 v and 2 v + 1 are values 0 and 2 (1 and 3) of four next to each other, from 128 v + 32 warp +
// 4 g on. So a warp's 4-byte loads touch all 32 banks, and the two tokens of a thread of S^T are two bytes of one word
// of P^T.
//
// Q and P^T lie in boxes of 128 bytes a row with 128-byte swizzle: Q in the first half of the row, where load_query put
// twice as many bytes, P^T of one block in the first and of the next in the second.
#pragma once

#include "sm90/parts/e4m3_operand.cuh"

namespace etap::sm90 {

__device__ __forceinline__ uint32_t token_of_quad(uint32_t quad) { return (quad & 1) * 4 + (quad >> 1); }

// A thread's P of tokens 16 warp + g and + 8.
template <int N>
struct RoundedProbabilities {
  uint32_t pairs[N / 4];  // of columns 8 j + 2 quad and the next: the tokens' bytes

  __device__ __forceinline__ void set(int j, const float (&first)[2], const float (&second)[2]) {
    pairs[2 * j] = to_e4m3(first[0], second[0]);
    pairs[2 * j + 1] = to_e4m3(first[1], second[1]);
  }
  // P^T to shared memory. Threads g and g ^ 2 hold the bytes of a word: one writes the first column, the other the
  // second.
  __device__ __forceinline__ void store(uint32_t p_at) const {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = lane / 4, quad = lane % 4;
    const bool second = group & 2;
    const uint32_t row = 2 * quad + second, quad_of_token = (group & 1) * 2 + (group >> 2);
    const uint32_t at = (p_at + row * 128 + quad_of_token * 4) ^ ((warp ^ row) << 4);
    uint32_t mine[N / 16], others[N / 16];  // of j and j + 1
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      const uint32_t columns[2] = {__byte_perm(pairs[4 * i], pairs[4 * i + 2], 0x5410),
                                   __byte_perm(pairs[4 * i + 1], pairs[4 * i + 3], 0x5410)};
      mine[i] = second ? columns[1] : columns[0];
      others[i] = __shfl_xor_sync(0xffffffffu, second ? columns[0] : columns[1], 8);
    }
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      store_shared_4(at + 2 * i * (8 * 128), __byte_perm(mine[i], others[i], second ? 0x1504 : 0x5140));
      store_shared_4(at + (2 * i + 1) * (8 * 128), __byte_perm(mine[i], others[i], second ? 0x3726 : 0x7362));
    }
    fence_proxy_async();
  }
};

// A thread's part of 128 values of d of a block's V: four of them, of 16 tokens. D: values of d that a warpgroup has.
template <int D>
struct ValueWords {
  static constexpr int WORDS = D / 128, STEP = 128;
  uint32_t word[4][4];  // [h][b]

  // The first of the thread's values of d; the next four are STEP on.
  __device__ __forceinline__ static uint32_t first_d(uint32_t thread) {
    return thread / 32 * 32 + thread % 32 / 4 * 4;
  }
  __device__ __forceinline__ static uint32_t box(uint32_t thread) { return first_d(thread) / 64; }
  // In the box, of the tokens with even b.
  __device__ __forceinline__ static uint32_t offset(uint32_t thread) {
    const uint32_t d = first_d(thread) % 64;
    return fp8_chunk_offset(token_of_quad(thread % 4), d / 16) + d % 16;
  }
  // From the thread's place in the box.
  __device__ __forceinline__ void load(uint32_t even) {
    const uint32_t odd = (even ^ 16) + 2 * 64;  // two tokens on: the next chunk of a pair
#pragma unroll
    for (int h = 0; h < 4; ++h) {
#pragma unroll
      for (int b = 0; b < 4; ++b) word[h][b] = load_shared_4((b % 2 == 0 ? even : odd) + (16 * h + b / 2 * 8) * 64);
    }
  }
  // A of tile 2 v (even: 0) or 2 v + 1: [k32 step].
  __device__ __forceinline__ void transpose(int odd, uint32_t (&a)[2][4]) const {
    const uint32_t which = odd ? 0x7362 : 0x5140;
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const uint32_t first = __byte_perm(word[h][0], word[h][1], which),
                     second = __byte_perm(word[h][2], word[h][3], which);
      a[h / 2][h % 2 * 2] = __byte_perm(first, second, 0x5410);
      a[h / 2][h % 2 * 2 + 1] = __byte_perm(first, second, 0x7632);
    }
  }
};

// Queries, as load_query leaves them, to E4M3 in place; and what turns a row's products into logits in units of log2
// (query_to_half says how). A row with an infinity or a NaN is all NaN.
template <int N, int BOXES>
__device__ __forceinline__ void query_to_e4m3(bool bf16, char *q, float scale_log2, float *logit_scale) {
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
    uint32_t most = 0;  // the largest magnitudes, as bits
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      const float4 raw = load_shared_float4(chunk_at(box, mine));
      most = max_u16x2(most, __float_as_uint(raw.x) & 0x7fff7fff);
      most = max_u16x2(most, __float_as_uint(raw.y) & 0x7fff7fff);
      most = max_u16x2(most, __float_as_uint(raw.z) & 0x7fff7fff);
      most = max_u16x2(most, __float_as_uint(raw.w) & 0x7fff7fff);
    }
#pragma unroll
    for (int delta = 4; delta > 0; delta /= 2) most = max_u16x2(most, __shfl_xor_sync(0xffffffffu, most, delta));
    const float largest = value_of(max_u16x2(most, most >> 16));
    // 2^(8 - exponent of the largest), or half of that where it would be above 448; within what a float and its inverse
    // can hold.
    const int exponent = min(max(__float_as_int(largest) >> 23, 16), 254);
    float up = __int_as_float((262 - exponent) << 23), down = __int_as_float((exponent - 8) << 23);
    if (largest * up > 448.f) up *= 0.5f, down *= 2.f;
    up = largest < INFINITY ? copysignf(up, scale_log2) : NAN;
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      const float4 raw = load_shared_float4(chunk_at(box, mine));
      const uint32_t words[4] = {__float_as_uint(raw.x), __float_as_uint(raw.y), __float_as_uint(raw.z),
                                 __float_as_uint(raw.w)};
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = to_e4m3(value_of(words[i]) * up, value_of(words[i] >> 16) * up);
      __syncwarp();  // all of the box has been read
      store_shared_8(chunk_at(box, mine / 2) + mine % 2 * 8, __byte_perm(pairs[0], pairs[1], 0x5410),
                     __byte_perm(pairs[2], pairs[3], 0x5410));
    }
    if (mine == 0) logit_scale[n] = fmaxf(fabsf(scale_log2) * down, kLeastScale);
  }
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}

}  // namespace etap::sm90
