// Decode for tiles of 64 query rows: the query rows on WGMMA's M, the KV context on its N, as most kernels have it.
// With this many rows nothing is padded, and P goes from registers into the second product.
//
//            dims ->                                64 tokens                            dims of V
//         .-----------.                            .----------.        .----------.     .------------.
//      64 | Q (shared | x K^T [dims, 64 tokens] =  | S        |  -->   | P (regi- |  x  | K again,   |  =  O [64, dims]
//    rows | memory)   |                            |          | softm. | sters)   |     | read MN-   |
//         '-----------'                            '----------'        '----------'     | major      |
//                                                                                       '------------'
//
//   warpgroup 0      producer: boxes [64 tokens x 64 dims], two blocks in flight, each in parts that are given back on
//                    their own: the left half of V's dims, the right one, the rope part. A warp for each half of a
//                    slot. An FP8 cache becomes FP16 on the way (e4m3_widen.cuh), by warpgroup 3, too
//   warpgroup 1, 2   L and R: each has O of half of V's dims in registers, and takes every other block's QK and softmax
//
//     L:  QK 0 | softmax 0 | PV 0 left |               PV 1 left | QK 2 | ..
//     R:          QK 1    | PV 0 right beside softmax 1 | PV 1 right | QK 3 | ..
//
// Reason for the shape. A block is 2176 cycles of the tensor cores, and 64 rows are where shared memory would need more
// than that with KV on M: there V^T comes from shared memory once for each 64 rows, here P comes out of registers and V
// once for each 256 dims. O [64, 512] fills the registers of two warpgroups. They lend each other P through shared
// memory, so that QK and softmax are done once, and one's softmax runs beside the other's products.
//
// E4M3 fits FP16 exactly, and so do BF16 queries once their rows are multiplied by a power of two: the products are
// those of the values in the cache. Group scales round them (e4m3_widen.cuh).
//
// Both add the blocks in order, so the maximum is a chain m(0), m(1), ..: P(n) comes with m(n), and with factors where
// the maximum moved by more than 2^8 (softmax.cuh).
#pragma once

#include <type_traits>

#include "sm90/kernel.h"
#include "sm90/parts/e4m3_operand.cuh"
#include "sm90/parts/e4m3_widen.cuh"
#include "sm90/parts/kv_pages.cuh"
#include "sm90/parts/shared_memory.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

template <typename T_, int D_LATENT_, int D_ROPE_, KvCopy COPY_>
struct RowsOnM {
  using T = T_;
  static constexpr int ROWS = 64, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr KvCopy COPY = COPY_;
  static constexpr bool E4M3 = is_e4m3(COPY), SCALED = E4M3 && COPY != KvCopy::kE4m3;  // group scales
  static_assert(D_LATENT % 128 == 0 && (D_ROPE == 0 || D_ROPE == 64));

  static constexpr int PRODUCERS = E4M3 ? 2 : 1;  // warpgroups
  static constexpr int THREADS = 256 + 128 * PRODUCERS;
  static constexpr int MATH_REGISTERS = E4M3                   ? 192
                                        : COPY == KvCopy::kTma ? 224
                                                               : 216,
                       PRODUCER_REGISTERS = ((E4M3 ? 512 : 504) - 2 * MATH_REGISTERS) / PRODUCERS;
  // Warps that store FP16, or the threads of the one that gathers.
  static constexpr int FULL_ARRIVALS = E4M3 ? 8 : COPY == KvCopy::kTma ? 1 : 32;
  // Dims of V a product: with 512 threads ptxas has registers for 128, before it looks at setmaxnreg.
  static constexpr int PV_DIMS = E4M3 ? 128 : D_LATENT_ / 2;
  static constexpr int LATENT_BOXES = D_LATENT / 64, HALF_BOXES = LATENT_BOXES / 2, HALF = D_LATENT / 2;
  static constexpr bool ROPE = D_ROPE > 0;
  static constexpr int BOXES = LATENT_BOXES + ROPE;
  enum : int { kRope = 2 };  // of a block's parts: the left half of V's dims, the right one, the rope part
  static constexpr int ROW_BYTES =
      COPY == KvCopy::kE4m3_656 ? D_LATENT + 16 + 2 * D_ROPE : (D_LATENT + D_ROPE) * (E4M3 ? 1 : 2);
  static constexpr int BOX_BYTES = kBlockTokens * 128;

  using X = Exchange<ROWS, D_LATENT, 8>;

  struct Shared {
    char q[BOXES][BOX_BYTES];
    union {
      char kv[2][BOXES][BOX_BYTES];  // of even and odd blocks
      char exchange[X::BYTES];       // at the end of a piece
    };
    char p_even[BOX_BYTES];  // P of even blocks; that of odd ones lies where their rope part was
    char p_odd[ROPE ? 16 : BOX_BYTES];
    float factors[2][ROWS], maxima[2][ROWS];  // that come with P
    float sums[ROWS];
    float logit_scale[E4M3 ? ROWS : 1];      // of the rows of Q, which are multiplied by a power of two
    int8_t exponents[2][SCALED ? ROWS : 1];  // of two, of the tokens of both slots (E4m3Widener)
    RowInfo rows[ROWS];
    WorkerRecord record;
    PieceEnd end;
    int moved[2][4];                   // did a maximum of the warp's rows move?
    const int32_t *list;               // of the piece, and its slots
    int list_end, block_end, step;     // step: from a block of this CTA to the next
    uint32_t holes[2][4][2];           // of a warp's block: bit t is set where the list has no token t
    uint64_t full[2][3], empty[2][3];  // of both slots; empty: of their parts
    uint64_t keys_done, p_ready[2][2], ring_free, parts_ready, parts_read;
  };
  static constexpr int SHARED_BYTES = sizeof(Shared);
  static_assert(SHARED_BYTES <= kSharedLimit);

  // The order in which a block's boxes come: those that are given back first, first.
  __device__ static constexpr int box_at(int slot, int nth) {
    if (ROPE && (slot == 0 || SCALED)) {
      if (nth == 0) return LATENT_BOXES;
      --nth;
    }
    return nth == LATENT_BOXES ? nth : slot == 0 ? nth : (nth + HALF_BOXES) % LATENT_BOXES;
  }
  __device__ static constexpr int part_of(int box) { return box / HALF_BOXES; }
  // What a box comes under: its part, or three as they follow each other, where warps write them.
  __device__ static constexpr int full_of(int slot, int nth) { return E4M3 ? nth / 3 : part_of(box_at(slot, nth)); }
  __device__ static constexpr bool begins_full(int slot, int nth) {
    return nth == 0 || full_of(slot, nth) != full_of(slot, nth - 1);
  }
  __device__ static constexpr bool ends_full(int slot, int nth) {
    return nth == BOXES - 1 || begins_full(slot, nth + 1);
  }
};

enum : int { kBarrierRows = 2 };  // named barriers 2 and 3, one a math warpgroup

// Warpgroup W (0: L, 1: R) at work on one piece.
template <typename K, int W>
struct RowsOnMMath {
  using T = typename K::T;
  static constexpr int O_VALUES = K::HALF / 2;

  const DecodeParams &p;
  typename K::Shared &shared;
  const PieceContext &context;
  uint32_t &parity;  // bits 0 and 1: of the slots' next use
  float (&O)[O_VALUES];
  float (&m)[2], (&l)[2];  // of rows `row` and `row` + 8
  float S[32];

  // Worked out again where it is needed: registers are scarce.
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp() { return threadIdx.x / 32 % 4; }
  __device__ __forceinline__ static int row() { return warp() * 16 + lane() / 4; }

  __device__ __forceinline__ uint32_t p_at(int slot) const {
    return smem_address(slot == 0 ? shared.p_even : K::ROPE ? shared.kv[1][K::LATENT_BOXES] : shared.p_odd);
  }
  // For a descriptor: 14 bits. In a cluster the upper bits of an address tell the CTA, and would lie where
  // descriptor_across says how far the next boxes are.
  __device__ __forceinline__ static uint32_t low(uint32_t address) {
    return __shfl_sync(0xffffffffu, (address >> 4) & 0x3fff, 0);
  }
  __device__ __forceinline__ void release(int slot, int part) const {
    if (lane() == 0) mbarrier_arrive(smem_address(&shared.empty[slot][part]));
  }
  __device__ __forceinline__ void scale(float f0, float f1) {
#pragma unroll
    for (int i = 0; i < O_VALUES; i += 4) {
      O[i] *= f0;
      O[i + 1] *= f0;
      O[i + 2] *= f1;
      O[i + 3] *= f1;
    }
  }
  // V beyond a sequence's end may be anything, and 0 x NaN is NaN: this half of the block's dims. Who gathers has left
  // zeros.
  __device__ __forceinline__ void clear_tail(int slot, int tokens) const {
    if constexpr (K::COPY != KvCopy::kTma) return;
    if (tokens >= kBlockTokens) return;
#pragma unroll 1
    for (int t = tokens + warp(); t < kBlockTokens; t += 4) {
      for (int i = lane(); i < K::HALF_BOXES * 8; i += 32) {
        *reinterpret_cast<uint4 *>(shared.kv[slot][W * K::HALF_BOXES + i / 8] + t * 128 + i % 8 * 16) =
            make_uint4(0, 0, 0, 0);
      }
    }
    fence_proxy_async();
    named_barrier(kBarrierRows + W, 128);
  }
  __device__ __forceinline__ int tokens_of(int block) const { return context.kv_end - block * kBlockTokens; }

  // O += P V of 16 tokens, whose V begins at `v_low`. P: a descriptor or registers.
  template <typename P>
  __device__ __forceinline__ void add_values(const P &tokens, uint32_t v_low) {
#pragma unroll
    for (int i = 0; i < K::HALF / K::PV_DIMS; ++i) {
      float (&part)[K::PV_DIMS / 2] = *reinterpret_cast<float (*)[K::PV_DIMS / 2]>(&O[i * K::PV_DIMS / 2]);
      const uint32_t at = v_low + i * K::PV_DIMS / 64 * (K::BOX_BYTES >> 4);
      WgmmaTransposedB<T, K::PV_DIMS>::mma(part, tokens, descriptor_across(at, K::BOX_BYTES), true);
    }
  }

  // Begins O += P V of the block, whose P is the other warpgroup's.
  __device__ __forceinline__ void begin_other(int block) {
    constexpr int slot = 1 - W;
    wgmma_wait<0>();  // beside a QK in flight ptxas would serialise what may touch O
    if constexpr (W == 1) wgmma_fence_registers(S);
    mbarrier_wait(smem_address(&shared.p_ready[slot][0]), parity >> slot & 1);
    if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
    if (shared.moved[slot][warp()]) {
      const float f0 = shared.factors[slot][row()], f1 = shared.factors[slot][row() + 8];
      m[0] = shared.maxima[slot][row()];
      m[1] = shared.maxima[slot][row() + 8];
      l[0] *= f0;
      l[1] *= f1;
      wgmma_fence_registers(O);
      scale(f0, f1);
    }
    clear_tail(slot, tokens_of(block));
    __syncwarp();
    const uint32_t p_low = low(p_at(slot)), v_low = low(smem_address(shared.kv[slot][W * K::HALF_BOXES]));
    wgmma_fence_registers(O);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k == 2) {
        mbarrier_wait(smem_address(&shared.p_ready[slot][1]), parity >> slot & 1);
        __syncwarp();
        wgmma_fence();
      }
      add_values(descriptor(p_low + 2 * k), v_low + 128 * k);
    }
    wgmma_commit();
  }
  // Waits also where none was begun, and for what is newer: else ptxas, which can't see that O is never read in flight,
  // serialises all products.
  __device__ __forceinline__ void end_other(bool begun) {
    wgmma_wait<0>();
    if (!begun) return;
    release(1 - W, W);
    if constexpr (W == 0 && K::ROPE) release(1, K::kRope);  // that held P
    parity ^= 2u >> W;
  }

  // Of the block, before its products: it is on its way then.
  __device__ __forceinline__ void find_holes(int block) {
    const int place = block * kBlockTokens + lane();
    const uint32_t low = __ballot_sync(0xffffffffu, is_hole(shared.list, place, shared.list_end));
    const uint32_t high = __ballot_sync(0xffffffffu, is_hole(shared.list, place + 32, shared.list_end));
    if (lane() == 0) {
      shared.holes[W][warp()][0] = low;
      shared.holes[W][warp()][1] = high;
    }
    __syncwarp();
  }

  // S = Q K^T of a block. `other`: O += P V of the block before is in flight. `next`: R has the block after it, and its
  // turn comes when L's products are on their way: side by side both would end late, and both softmaxes beside nothing.
  __device__ __forceinline__ void multiply_keys(bool other, bool next) {
    if constexpr (W == 1) mbarrier_wait(smem_address(&shared.keys_done), parity >> W & 1);
    const uint32_t q_low = low(smem_address(shared.q)), k_low = low(smem_address(shared.kv[W]));
#pragma unroll
    for (int nth = 0; nth < K::BOXES; ++nth) {
      if (K::begins_full(W, nth)) {
        mbarrier_wait(smem_address(&shared.full[W][K::full_of(W, nth)]), parity >> W & 1);
        if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
      }
      // At full speed QK takes all of shared memory's bandwidth: what pauses there are is for who writes FP16.
      if (K::E4M3 || K::begins_full(W, nth) || (W == 0 && nth == 1)) wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t at = K::box_at(W, nth) * (K::BOX_BYTES >> 4) + 2 * k;
        Wgmma<T, 64>::template mma<false>(S, descriptor(q_low + at), descriptor(k_low + at), nth + k > 0);
      }
      if (K::E4M3 || nth == 0 || nth == K::BOXES - 1) wgmma_commit();
      if (W == 0 && nth == 0) end_other(other);
    }
    if (W == 0 && next && lane() == 0) mbarrier_arrive(smem_address(&shared.keys_done));
  }

  // P of the block and its maxima, for both warpgroups, then O += P V of the own half. R: while O += P V of the block
  // before is in flight.
  __device__ __forceinline__ void softmax_and_values(int block) {
    if constexpr (W == 0 && K::ROPE && !K::SCALED) release(0, K::kRope);
    float scale0 = K::E4M3 ? shared.logit_scale[row()] : p.scale_log2,
          scale1 = K::E4M3 ? shared.logit_scale[row() + 8] : p.scale_log2;
    // With group scales a token's K and V are multiplied by 2^-exponent. The logits take both powers: K's, so that they
    // are right, and V's, so that P is V's factor; its own sum leaves that out.
    const auto exponent_of = [&](int j) { return shared.exponents[W][8 * (j / 2) + 2 * (lane() % 4) + j % 2]; };
    if constexpr (K::SCALED) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int exponent = exponent_of(j);
        const float up = __int_as_float((127 + exponent) << 23), plus = static_cast<float>(exponent);
        S[4 * (j / 2) + j % 2] = S[4 * (j / 2) + j % 2] * (up * scale0) + plus;
        S[4 * (j / 2) + j % 2 + 2] = S[4 * (j / 2) + j % 2 + 2] * (up * scale1) + plus;
      }
      scale0 = scale1 = 1.f;
    } else {
      // S stays as it is: the scale goes into the subtraction of the maximum. It must be positive for that; where it is
      // 0, what is masked must stay so.
      if (scale0 < 0.f) {
#pragma unroll
        for (float &s : S) s = -s;
      }
      scale0 = fmaxf(fabsf(scale0), kLeastScale);
      scale1 = fmaxf(fabsf(scale1), kLeastScale);
    }
    const int first_token = block * kBlockTokens;
    if (first_token + kBlockTokens > context.first_limit) {
      const int limit0 = shared.rows[row()].limit - first_token, limit1 = shared.rows[row() + 8].limit - first_token;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = 8 * (i / 4) + 2 * (lane() % 4) + i % 2;
        if (token >= (i % 4 < 2 ? limit0 : limit1)) S[i] = -INFINITY;
      }
      if (p.tree_mask != nullptr) {
        // A lane asks for 32 tokens of one of the warp's rows.
        const RowInfo &asked = shared.rows[warp() * 16 + lane() % 16];
        const uint32_t mine = seen_drafts(p, asked, first_token + lane() / 16 * 32 - context.first_limit,
                                          asked.limit - context.first_limit);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2, r = i % 2;
          const uint32_t seen = __shfl_sync(0xffffffffu, mine, 16 * half + 8 * r + lane() / 4) >> (2 * (lane() % 4));
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (!(seen >> (8 * (j / 2) + j % 2) & 1)) S[16 * half + 4 * (j / 2) + 2 * r + j % 2] = -INFINITY;
          }
        }
      }
    }
    if (K::COPY != KvCopy::kTma && p.lists) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t holes = shared.holes[W][warp()][half] >> (2 * (lane() % 4));
        if (holes == 0) continue;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (holes >> (8 * (i / 4) + i % 2) & 1) S[16 * half + i] = -INFINITY;
        }
      }
    }
    float a0 = S[0], a1 = S[2];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      a0 = fmaxf(a0, fmaxf(S[4 * j], S[4 * j + 1]));
      a1 = fmaxf(a1, fmaxf(S[4 * j + 2], S[4 * j + 3]));
    }
    a0 *= scale0;
    a1 *= scale1;
    const bool moved = __any_sync(0xffffffffu, a0 > m[0] + kSlack || a1 > m[1] + kSlack);
    if (moved) {
      float f0 = 1.f, f1 = 1.f;
      a0 = fmaxf(a0, __shfl_xor_sync(0xffffffffu, a0, 1));
      a1 = fmaxf(a1, __shfl_xor_sync(0xffffffffu, a1, 1));
      a0 = fmaxf(a0, __shfl_xor_sync(0xffffffffu, a0, 2));
      a1 = fmaxf(a1, __shfl_xor_sync(0xffffffffu, a1, 2));
      if (a0 > m[0] + kSlack) {
        f0 = exp2_approx(m[0] - a0);
        m[0] = a0;
      }
      if (a1 > m[1] + kSlack) {
        f1 = exp2_approx(m[1] - a1);
        m[1] = a1;
      }
      l[0] *= f0;
      l[1] *= f1;
      if (lane() % 4 == 0) {
        shared.factors[W][row()] = f0;
        shared.factors[W][row() + 8] = f1;
        shared.maxima[W][row()] = m[0];
        shared.maxima[W][row() + 8] = m[1];
      }
    }
    if (lane() == 0) shared.moved[W][warp()] = moved;
    // P of odd blocks goes where all four warps have read the rope part.
    if constexpr (W == 1 && K::ROPE) named_barrier(kBarrierRows + W, 128);
    const int thread = opaque(static_cast<int>(threadIdx.x)) % 128, p_row = thread / 32 * 16 + thread % 16;
    const uint32_t to = p_at(W) + p_row * 128;
    uint32_t P[16];
    float s[4] = {0.f, 0.f, 0.f, 0.f};
    // Half of the tokens after the other: the other warpgroup waits for them.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 4 * half; j < 4 * half + 4; ++j) {
        const float a = exp2_approx(fmaf(S[4 * j], scale0, -m[0]));
        const float b = exp2_approx(fmaf(S[4 * j + 1], scale0, -m[0]));
        const float c = exp2_approx(fmaf(S[4 * j + 2], scale1, -m[1]));
        const float d = exp2_approx(fmaf(S[4 * j + 3], scale1, -m[1]));
        if constexpr (K::SCALED) {
          const float first = __int_as_float((127 - exponent_of(2 * j)) << 23),
                      second = __int_as_float((127 - exponent_of(2 * j + 1)) << 23);
          s[0] += a * first;
          s[0] += b * second;
          s[2] += c * first;
          s[2] += d * second;
        } else {
          s[0] += a;
          s[1] += b;
          s[2] += c;
          s[3] += d;
        }
        P[2 * j] = pack2<T>(a, b);
        P[2 * j + 1] = pack2<T>(c, d);
      }
#pragma unroll
      for (int k = 2 * half; k < 2 * half + 2; ++k) {
        store_matrix_x4(to + (((2 * k + thread / 16 % 2) ^ (p_row % 8)) << 4), P[4 * k], P[4 * k + 1], P[4 * k + 2],
                        P[4 * k + 3]);
      }
      fence_proxy_async();
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(smem_address(&shared.p_ready[W][half]));
    }
    l[0] += s[0] + s[1];
    l[1] += s[2] + s[3];
    if constexpr (W == 0 && K::ROPE && K::SCALED) release(0, K::kRope);  // all lanes have read the exponents
    if constexpr (W == 1) end_other(true);
    if (moved) {  // the factors are read again: registers are scarce
      wgmma_fence_registers(O);
      scale(shared.factors[W][row()], shared.factors[W][row() + 8]);
    }
    clear_tail(W, tokens_of(block));
    __syncwarp();
    const uint32_t v_low = low(smem_address(shared.kv[W][W * K::HALF_BOXES]));
    wgmma_fence_registers(O);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t fragment[4] = {P[4 * k], P[4 * k + 1], P[4 * k + 2], P[4 * k + 3]};
      add_values(fragment, v_low + 128 * k);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_registers(O);
    release(W, W);
    parity ^= 1u << W;
  }
};

// This thread's sums of P V into the exchange, and those of P with their maxima. wg 0: L, 1: R.
template <typename K>
__device__ __forceinline__ void leave_rows(typename K::Shared &shared, int wg, const float (&O)[K::HALF / 2],
                                           const float (&m)[2], const float (&l)[2]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float sums[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums[r] = l[r] + __shfl_xor_sync(0xffffffffu, l[r], 1);
    sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], 2);
    if (wg == 0 && lane % 4 == 0) {
      shared.sums[row + 8 * r] = sums[r];
      shared.maxima[0][row + 8 * r] = m[r];
    }
  }
  named_barrier<kBarrierConsumers, kConsumers>();  // nobody reads the ring any more
  float *const values = reinterpret_cast<float *>(shared.exchange) + row * K::X::ROW + wg * K::HALF + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < K::HALF / 2; i += 2)
    *reinterpret_cast<float2 *>(values + i / 2 % 2 * 8 * K::X::ROW + i / 4 * 8) = make_float2(O[i], O[i + 1]);
  if (wg == 1 && lane % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) shared.sums[row + 8 * r] += sums[r];
  }
}

// What both warpgroups do stands here once: instructions that are met for the first time cost 20 cycles each.
template <typename K>
__device__ __forceinline__ void rows_on_m_math(const DecodeParams &p, typename K::Shared &shared) {
  // Registers are scarce. Beside the slots' parities bit 2 has that of the pieces done, bit 3 says whether one is, and
  // the rest counts units.
  uint32_t parity = 0;
  for (;; parity += 16) {
    const Pieces pieces(p, shared.record, static_cast<int>(parity >> 4));
    if (pieces.done()) break;
    const PieceContext context = pieces.context(K::ROWS);
    if (context.rows <= 0) continue;
    if (threadIdx.x == 128) {
      shared.list = context.table;
      shared.list_end = context.kv_end;
      shared.block_end = context.piece.block_end;
      shared.step = context.ctas;
    }
    load_query<typename K::T, K::ROWS, K::D_LATENT, K::D_ROPE>(p, context, smem_address(shared.q), shared.rows,
                                                               &shared.end);
    if constexpr (K::E4M3) {
      // A BF16 rope part has no scale: there the tensor's goes into the rest of Q.
      constexpr bool kLatentOnly = K::COPY == KvCopy::kE4m3_656 && K::ROPE;
      const float scale = tensor_scale(p);
      query_to_half<K::ROWS, K::BOXES, false, false>(p.q_bf16, shared.q[0], p.scale_log2 * (kLatentOnly ? 1.f : scale),
                                                     shared.logit_scale, kLatentOnly ? scale : 1.f);
    }
    float O[K::HALF / 2], m[2] = {kNoMaximum, kNoMaximum}, l[2] = {context.first_sum(), context.first_sum()};
#pragma unroll
    for (float &o : O) o = 0.f;
    int block = context.first_block();
    const int piece_end = context.piece.block_end, ctas = context.ctas;
    // From shared memory where registers are scarce.
    const auto next = [&](int nth) { return nth + (K::E4M3 ? shared.step : ctas); };
    const auto exists = [&](int nth) { return nth < (K::E4M3 ? shared.block_end : piece_end); };
    const auto warpgroup = [] { return __shfl_sync(0xffffffffu, opaque(static_cast<int>(threadIdx.x)) / 128 - 1, 0); };
    if (warpgroup() == 0) {
      RowsOnMMath<K, 0> math{p, shared, context, parity, O, m, l, {}};
      bool other = false;
      for (; exists(block); block = next(next(block))) {
        if (K::COPY != KvCopy::kTma && p.lists) math.find_holes(block);
        math.multiply_keys(other, exists(next(block)));
        wgmma_wait<0>();
        wgmma_fence_registers(math.S);
        math.softmax_and_values(block);
        other = exists(next(block));
        if (other) math.begin_other(next(block));
      }
      math.end_other(other);
    } else {
      RowsOnMMath<K, 1> math{p, shared, context, parity, O, m, l, {}};
      // The last block of the other warpgroup.
      const auto last = [&] { return block - (next(block) - block); };
      for (block = next(block); exists(block); block = next(next(block))) {
        if (K::COPY != KvCopy::kTma && p.lists) math.find_holes(block);
        math.multiply_keys(false, false);
        math.begin_other(last());
        math.softmax_and_values(block);
      }
      const bool other = exists(last());
      if (other) math.begin_other(last());
      math.end_other(other);
    }
    wgmma_fence_registers(O);
    leave_rows<K>(shared, warpgroup(), O, m, l);
    const typename K::X exchange{smem_address(shared.exchange),    smem_address(shared.maxima[0]),
                                 smem_address(shared.sums),        smem_address(&shared.parts_ready),
                                 smem_address(&shared.parts_read), &shared.end};
    finish_piece(p, exchange, shared.rows, K::E4M3 ? tensor_scale(p) : 1.f, parity >> 2 & 3);
    // The ring is free again once every CTA has read its part, the tables of rows and of the end once all warps are
    // here.
    if (shared.end.ctas > 1) mbarrier_wait_cluster(smem_address(&shared.parts_read), parity >> 2 & 1);
    named_barrier<kBarrierConsumers, kConsumers>();
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&shared.ring_free));
    parity = (parity ^ 4) | 8;
  }
  fill_spare_rows(p, K::D_LATENT);
}

// The producers of FP8 rows, all eight warps. Registers are scarce: parities are bits of one.
template <typename K>
__device__ __forceinline__ void rows_on_m_widener(const DecodeParams &p, typename K::Shared &shared) {
  uint32_t parity = 7;  // of slot 0, slot 1 and the ring: fresh, they are empty
  for (int nth = 0;; ++nth) {
    const Pieces pieces(p, shared.record, nth);
    if (pieces.done()) break;
    const PieceContext context = pieces.context(K::ROWS);
    if (context.rows <= 0) continue;
    E4m3Widener<K> widener{p,
                           shared,
                           context.table,
                           context.kv_end,
                           16 * context.piece.block_end + context.ctas,
                           context.first_block(),
                           {},
                           {},
                           {},
                           {},
                           {}};
    widener.begin();
    mbarrier_wait(smem_address(&shared.ring_free), parity >> 2);
    parity ^= 4;
    while (widener.exists()) {
      widener.template bring_block<0>(parity & 1);
      parity ^= 1;
      if (!widener.exists()) break;
      widener.template bring_block<1>(parity >> 1 & 1);
      parity ^= 2;
    }
  }
}

// The producers of what the copy engine brings: a warp for each half of a slot, so that none waits for another's boxes,
// and what is known of a block is worked out before its boxes are given back. The rope part goes with the left half.
template <typename K>
__device__ __forceinline__ void rows_on_m_loader(const DecodeParams &p, typename K::Shared &shared) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), slot = warp / 2, half = warp % 2;
  uint32_t parity = 1, pieces_done = 0;  // fresh boxes are empty
  for (Pieces pieces(p, shared.record); !pieces.done(); pieces.next()) {
    const PieceContext context = pieces.context(K::ROWS);
    if (context.rows <= 0) continue;
    const int step = context.ctas, first = context.first_block() + slot * step;
    KvPages pages(p, context, first, 2 * step);
    if (pieces_done > 0) mbarrier_wait(smem_address(&shared.ring_free), (pieces_done - 1) & 1);
    ++pieces_done;
    for (int block = first; block < context.piece.block_end; block += 2 * step) {
      pages.advance(block);
      const int row = pages.row_in_page(block), down_count = pages.boxes_down(context.kv_end - block * kBlockTokens);
      const auto bring = [&](int part, auto boxes) {
        const int first_box = part * K::HALF_BOXES;
        const uint32_t full = smem_address(&shared.full[slot][part]);
        mbarrier_wait(smem_address(&shared.empty[slot][part]), parity);
        pages.template load<boxes.value, 128>(
            p, row, down_count, boxes.value, smem_address(shared.kv[slot][0]) + first_box * K::BOX_BYTES,
            [&](int i) { return (first_box + i) * 64; }, full);
        if (threadIdx.x % 32 == 0)
          mbarrier_expect_tx(full, static_cast<uint32_t>(boxes.value * down_count) << (pages.rows_log2 + 7));
      };
      const auto rope = [&] {
        if (K::ROPE && half == 0) bring(K::kRope, std::integral_constant<int, 1>{});
      };
      if (slot == 0) rope();
      bring(half, std::integral_constant<int, K::HALF_BOXES>{});
      if (slot == 1) rope();
      parity ^= 1;
    }
  }
}

// The producers of rows, as those: each warp gathers all 64 for its half of a slot.
template <typename K>
__device__ __forceinline__ void rows_on_m_gatherer(const DecodeParams &p, typename K::Shared &shared) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), slot = warp / 2, half = warp % 2;
  // Of the boxes and the ring: fresh, they are empty.
  uint32_t parity = 1, ring_parity = 1;
  for (int nth = 0;; ++nth) {
    const Pieces pieces(p, shared.record, nth);
    if (pieces.done()) break;
    const PieceContext context = pieces.context(K::ROWS);
    if (context.rows <= 0) continue;
    const int step = 2 * context.ctas, first = context.first_block() + slot * context.ctas;
    GatherLanes rows;
    rows.fetch(p, context.table, first, context.kv_end);
    mbarrier_wait(smem_address(&shared.ring_free), ring_parity);
    ring_parity ^= 1;
    for (int block = first; block < context.piece.block_end; block += step) {
      rows.resolve(p, block, context.kv_end);
      rows.fetch(p, context.table, block + step, context.kv_end);
      const auto bring = [&](int part, auto boxes) {
        const int first_box = part * K::HALF_BOXES;
        mbarrier_wait(smem_address(&shared.empty[slot][part]), parity);
        rows.template copy<boxes.value>(smem_address(shared.kv[slot][0]) + first_box * K::BOX_BYTES, first_box * 128);
        copy_async_arrive(smem_address(&shared.full[slot][part]));
      };
      const auto rope = [&] {
        if (K::ROPE && half == 0) bring(K::kRope, std::integral_constant<int, 1>{});
      };
      if (slot == 0) rope();
      bring(half, std::integral_constant<int, K::HALF_BOXES>{});
      if (slot == 1) rope();
      parity ^= 1;
    }
  }
}

template <typename K>
__device__ __forceinline__ void rows_on_m_producer(const DecodeParams &p, typename K::Shared &shared) {
  if constexpr (K::E4M3) {
    rows_on_m_widener<K>(p, shared);
  } else if constexpr (K::COPY == KvCopy::kTma) {
    rows_on_m_loader<K>(p, shared);
  } else {
    rows_on_m_gatherer<K>(p, shared);
  }
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) rows_on_m_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(shared_raw);
  if (p.second && Pieces(p, p.records[cta_index()]).done()) {  // nothing is shared
    allow_next_kernel();
    wait_for_previous_kernel();
    return;
  }
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x < 6) {
    mbarrier_init(smem_address(&shared.full[0][threadIdx.x]), K::FULL_ARRIVALS);
    mbarrier_init(smem_address(&shared.empty[0][threadIdx.x]), 4);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&shared.keys_done), 4);
    for (int i = 0; i < 4; ++i) mbarrier_init(smem_address(&shared.p_ready[i / 2][i % 2]), 4);
    mbarrier_init(smem_address(&shared.ring_free), 8);
    mbarrier_init(smem_address(&shared.parts_ready), 8 * cluster_size());
    mbarrier_init(smem_address(&shared.parts_read), 8 * cluster_size());
    if (K::COPY == KvCopy::kTma && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  begin_kernel(p, shared.record);

  if (warpgroup == 0 || warpgroup == 3) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    rows_on_m_producer<K>(p, shared);
  } else {
    set_registers_more<K::MATH_REGISTERS>();
    rows_on_m_math<K>(p, shared);
  }
  if (p.second) wait_for_previous_kernel();
}

struct rows_on_m {
  template <typename T, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = RowsOnM<T, D_LATENT, D_ROPE, COPY>;
    static_assert(ROWS == K::ROWS);
    return {reinterpret_cast<const void *>(&rows_on_m_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
