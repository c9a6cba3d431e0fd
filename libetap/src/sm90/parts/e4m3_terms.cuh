// Numbers as two E4M3 terms, x = hi + lo / 16, for FP8 tensor cores: eight significant bits, which is all that BF16
// has.
//
//     hi = E4M3(x), lo = E4M3(16 (x - hi))         x up to 448; exact from 2^-6 on, to 2^-13 below
//
// and the operands that are made of them:
//
//     Q        rows n (hi) and N + n (lo), a row scaled by the power of two that brings its largest value below 448
//     P^T      the same rows, in the order of tokens that V^T has
//     V^T      bytes of the cache, transposed in registers: a thread of m64k32's A holds rows g = lane / 4 and g + 8 of
//     its
//              warp's 16, and of each the k slots 4q .. 4q + 3 and 16 + 4q .. 16 + 4q + 3, q = lane % 4
//
// Which token a k slot means is free as long as P^T and V^T agree, and which value of d a row means as long as the end
// of the piece knows. Slot 16 h + 4 q + b is token 16 h + token_of_quad(q) + 2 (b % 2) + 8 (b / 2) of the block; row g
// (and g + 8) of tiles 2 v and 2 v + 1 are values 0 and 2 (1 and 3) of four next to each other, from 128 v + 32 warp +
// 4 g on. So a warp's 4-byte loads touch all 32 banks, and the two tokens of a thread of S^T are two bytes of one word
// of P^T.
//
// Everything lies in boxes of 64 bytes a row with 64-byte swizzle (fp8_chunk_offset), as the KV block does.
#pragma once

#include "sm90/parts/e4m3_operand.cuh"

namespace etap::sm90 {

constexpr float kTermScale = 16.f;
constexpr int kTermLift = 4;  // P is 2^4 at the running maximum, 2^8 before that moves

// The terms of two values: hi in the lower half, lo in the upper.
__device__ __forceinline__ uint32_t to_terms(float a, float b) {
  const uint32_t hi = to_e4m3(a, b);
  const float2 kept = from_e4m3(hi);
  return hi | to_e4m3((a - kept.x) * kTermScale, (b - kept.y) * kTermScale) << 16;
}

__device__ __forceinline__ int token_of_quad(int quad) { return (quad & 1) * 4 + (quad >> 1); }

// P^T of a thread's tokens 16 warp + g and + 8 and its columns, p[2 j + e] = {first token, second}, as two terms to
// shared memory at p_at: [2N rows][64 slots]. Threads g and g ^ 2 hold the bytes of a word: one writes column 2 quad,
// the other 2 quad + 1.
template <int N>
__device__ __forceinline__ void store_terms(const float2 (&p)[N / 4], uint32_t p_at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = lane / 4, quad = lane % 4;
  const bool second = group & 2;
  const uint32_t hi_bytes = second ? 0x1504 : 0x5140, lo_bytes = second ? 0x3726 : 0x7362;
  const int quad_of_token = (group & 1) * 2 + (group >> 2);
  const uint32_t at = p_at + (2 * quad + second) * 64 + ((warp ^ quad) << 4) + quad_of_token * 4;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const uint32_t x0 = to_terms(p[2 * j].x, p[2 * j].y), x1 = to_terms(p[2 * j + 1].x, p[2 * j + 1].y);
    const uint32_t mine = second ? x1 : x0, other = __shfl_xor_sync(0xffffffffu, second ? x0 : x1, 8);
    store_shared_4(at + j * 512, __byte_perm(mine, other, hi_bytes));
    store_shared_4(at + j * 512 + N * 64, __byte_perm(mine, other, lo_bytes));
  }
}

// A thread's part of 128 values of d of a block's V: four of them, of 16 tokens.
struct ValueWords {
  uint32_t word[4][4];  // [h][b]

  // In a box: of the tokens with even b. The warp's half of it.
  __device__ __forceinline__ static uint32_t offset(int thread) {
    const int lane = thread % 32, warp = thread / 32, group = lane / 4;
    return fp8_chunk_offset(token_of_quad(lane % 4), warp % 2 * 2 + group / 4) + group % 4 * 4;
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
  // A of tiles 2 v and 2 v + 1: [tile][k32 step].
  __device__ __forceinline__ void transpose(uint32_t (&a)[2][2][4]) const {
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const uint32_t low[2] = {__byte_perm(word[h][0], word[h][1], 0x5140),
                               __byte_perm(word[h][2], word[h][3], 0x5140)};
      const uint32_t high[2] = {__byte_perm(word[h][0], word[h][1], 0x7362),
                                __byte_perm(word[h][2], word[h][3], 0x7362)};
      const int at = h % 2 * 2;
      a[0][h / 2][at] = __byte_perm(low[0], low[1], 0x5410);
      a[0][h / 2][at + 1] = __byte_perm(low[0], low[1], 0x7632);
      a[1][h / 2][at] = __byte_perm(high[0], high[1], 0x5410);
      a[1][h / 2][at + 1] = __byte_perm(high[0], high[1], 0x7632);
    }
  }
};

// The BF16 rope part of 656-byte rows as A of m64k16, the rows in the order of tokens (RopeBytes has another).
struct RopeRows : RopeBytes {
  __device__ __forceinline__ static uint32_t offset(int thread) {
    const int lane = thread % 32, chunk = lane % 4 + kFirstChunk;
    return chunk / 4 * kFp8BoxBytes + fp8_chunk_offset(16 * (thread / 32) + lane / 4, chunk % 4);
  }
};

// 16 bytes of q, zeros where there is no such row; of rows that are not aligned two bytes at a time.
__device__ __forceinline__ uint4 load_query_16(const uint16_t *from, bool exists, bool aligned) {
  if (!exists) return make_uint4(0, 0, 0, 0);
  if (aligned) return __ldg(reinterpret_cast<const uint4 *>(from));
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __ldg(from + 2 * i) | static_cast<uint32_t>(__ldg(from + 2 * i + 1)) << 16;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// BF16 queries of a piece as two terms in boxes [2N rows, 64 bytes], zeros past the tile's end; ROPE_BF16: the rope
// part as it is, a box [N rows, 64 values] with 128-byte swizzle behind them, in the order of RopeBytes. And what
// load_query leaves beside them, and what turns a row's products into logits in units of log2. A row with an infinity
// or a NaN is all NaN. A warp takes every eighth row. Ends with a barrier over the consumers; WGMMA may read Q after
// it.
template <int N, int D_LATENT, int D_ROPE, bool ROPE_BF16>
__device__ __forceinline__ void load_query_terms(const DecodeParams &p, const PieceContext &c, uint32_t q_at,
                                                 RowInfo *row_info, PieceEnd *end, float scale_log2,
                                                 float *logit_scale) {
  constexpr int CHUNKS = (D_LATENT + D_ROPE) / 8, A_LANE = (CHUNKS + 31) / 32;  // chunks of eight values
  constexpr int BOX_BYTES = 2 * N * 64;
  if (threadIdx.x == 128) *end = PieceEnd{c.rows, c.piece.first_worker, c.piece.last_worker, 0};
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int n = warp; n < N; n += 8) {
    const bool exists = n < c.rows;
    const int row = exists ? c.row_begin + n : 0;
    const int token = row / p.num_heads, head = row - token * p.num_heads;
    const int64_t q_row = c.sequence.q_begin + token;
    const uint16_t *const latent =
        static_cast<const uint16_t *>(p.q_nope) + q_row * p.q_nope_row_stride + head * p.q_nope_head_stride;
    const uint16_t *const rope =
        static_cast<const uint16_t *>(p.q_rope) + q_row * p.q_rope_row_stride + head * p.q_rope_head_stride;
    uint4 raw[A_LANE];
#pragma unroll
    for (int i = 0; i < A_LANE; ++i) {
      const int chunk = lane + 32 * i;
      raw[i] = load_query_16(chunk < D_LATENT / 8 ? latent + chunk * 8 : rope + (chunk - D_LATENT / 8) * 8,
                             exists && chunk < CHUNKS, p.q_vectors);
    }
    float value[A_LANE][8];
    float largest = 0.f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < A_LANE; ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        value[i][2 * w] = __uint_as_float(words[w] << 16);
        value[i][2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
      }
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        largest = fmaxf(largest, fabsf(value[i][w]));
        finite &= fabsf(value[i][w]) < INFINITY;
      }
    }
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, delta));
    finite = __all_sync(0xffffffffu, finite);
    // 2^(8 - exponent of the largest), or half of that where it would be above 448; within what a float and its inverse
    // can hold.
    const int exponent = min(max(__float_as_int(largest) >> 23, 16), 254);
    float up = __int_as_float((262 - exponent) << 23), down = __int_as_float((exponent - 8) << 23);
    if (largest * up > 448.f) up *= 0.5f, down *= 2.f;
    if (!finite) up = NAN;
#pragma unroll
    for (int i = 0; i < A_LANE; ++i) {
      const int chunk = lane + 32 * i;
      if (chunk >= CHUNKS) break;
      if (ROPE_BF16 && chunk >= D_LATENT / 8) {
        // Value 32 y + 8 x + 2 w becomes 32 y + 8 w + 2 x. Its power of two is the terms'.
        const int y = (chunk - D_LATENT / 8) / 4, x = chunk % 4;
        const uint32_t to = q_at + D_LATENT / 64 * BOX_BYTES + n * 128 + x * 4;
#pragma unroll
        for (int w = 0; w < 4; ++w)
          store_shared_4(to + (((4 * y + w) ^ (n & 7)) << 4),
                         pack2<__nv_bfloat16>(value[i][2 * w] * up, value[i][2 * w + 1] * up));
      } else {
        uint32_t terms[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) terms[w] = to_terms(value[i][2 * w] * up, value[i][2 * w + 1] * up);
        const uint32_t to = q_at + chunk / 8 * BOX_BYTES + fp8_chunk_offset(n, chunk % 8 / 2) + chunk % 2 * 8;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          store_shared_4(to + 4 * w, __byte_perm(terms[2 * w], terms[2 * w + 1], 0x5410));
          store_shared_4(to + 4 * w + N * 64, __byte_perm(terms[2 * w], terms[2 * w + 1], 0x7632));
        }
      }
    }
    if (lane == 0) {
      logit_scale[n] = scale_log2 * down;
      const int seen = p.causal ? c.sequence.length - c.sequence.q_len + token + 1 : c.sequence.length;
      row_info[n] = RowInfo{static_cast<int>(q_row), head, exists ? seen : 0};
    }
  }
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}

}  // namespace etap::sm90
