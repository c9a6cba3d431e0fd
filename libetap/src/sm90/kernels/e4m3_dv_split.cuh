// Decode of FP8 caches for tiles of 25 to 48 query rows: the KV context on WGMMA's M and the query rows on its N. Bytes
// become FP16 on their way through registers into the A operand (e4m3_operand.cuh).
//
//     KV block in shared memory                               S^T [64 tokens, N] = K Q^T      every other block's
//     boxes of 64 tokens x 64 bytes   --16-byte loads-->      softmax, P^T to shared memory
//     (copy engine or cp.async)         E4M3 -> FP16          O^T [256, N] += V^T P^T         every block's
//
//   warpgroup 0      producer (e4m3_ring.cuh): four blocks and more are on their way
//   warpgroup 1, 2   L and R: each has O^T of half of V's dims in registers, and takes every other block's QK and
//   softmax
//
//     L:  QK 0 | softmax 0 | PV 0 |      | QK 2  | softmax 2 | PV 1 | PV 2 | QK 4 ..
//     R:  QK 1        | softmax 1 | PV 0 | PV 1 | QK 3       | softmax 3 | PV 2 | PV 3 ..
//
// Reason for the shape. O^T [512, N] fills the registers of two warpgroups, so each byte of V is converted once, by the
// warpgroup whose half it is in, and each byte of K once, by the one whose turn it is. As bytes a block is 36 KB, where
// rows_on_m.cuh has room for two of FP16, and shared memory brings it to the warps once for each product.
//
// What bounds it: a WGMMA with A in registers holds its warp up until the tensor cores have taken A, so conversions run
// beside the other warpgroup's products only, and so does all of the softmax. 2840 cycles a block with 32 rows and 3190
// with 48, of which 1660 and 2050 are without softmax and barriers. With 64 rows it is 3760 (rows on M: 4100), but
// slower than those with group scales and on short contexts (docs/tuning-log.md).
//
// The chain: the maxima run through all blocks, so L's softmax of a block must know R's of the block before. That keeps
// the two a softmax apart.
//
// Group scales, one for each token and 128 dims, become FP16 factors below 1 of the fragments of K and V, and powers of
// two (TokenScale). S^T takes its token's power before the rope part, which has no scale, is added; the logits take it
// for V, so that P^T stays within FP16 whatever the scales. The sum of P leaves it out.
#pragma once

#include <type_traits>

#include "sm90/kernel.h"
#include "sm90/parts/e4m3_operand.cuh"
#include "sm90/parts/e4m3_ring.cuh"
#include "sm90/parts/shared_memory.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

// What the loop over KV blocks needs of a piece, in shared memory. Blocks are counted through all pieces of the CTA.
struct Fp8Blocks {
  int nth, next_unit;  // pieces before this one; where the next begins to look
  int begin, end;      // of the count
  int first_block;     // the block of the sequence that the first of these is
  int step;            // to the next
  int kv_end;          // PieceContext's, as what follows
  int first_limit;
  float first_sum;
  float latent_scale;  // beside the groups' scales
  const int32_t *list;
};

template <int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY>
struct E4m3DvSplit {
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_, HALF = D_LATENT / 2;
  static constexpr bool SCALED = COPY != KvCopy::kE4m3;                       // group scales, from
  static constexpr bool SCALES_BESIDE = COPY == KvCopy::kE4m3Group;           // an array of their own, or
  static constexpr bool ROPE_BF16 = COPY == KvCopy::kE4m3_656 && D_ROPE > 0;  // the row, with BF16 rope values
  static_assert(!SCALED || D_LATENT == 512);
  static_assert(N % 8 == 0 && N <= 64 && D_LATENT % 256 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 512, KEYS_WARPGROUP = 3;
  static constexpr int VALUES_REGISTERS = 176, PRODUCER_REGISTERS = 48,
                       KEYS_REGISTERS = 512 - PRODUCER_REGISTERS - 2 * VALUES_REGISTERS;
  static constexpr bool FEW_REGISTERS = true;                          // the producers
  static constexpr int TILES = D_LATENT / 64, HALF_TILES = TILES / 2;  // m64 tiles of O^T
  static constexpr int Q_BOXES = (D_LATENT + D_ROPE) / 64;             // of 64 values
  // A KV block is boxes of 64 bytes a token, 4 KB each. Where there are group scales those of the rope part, beside
  // which the scales may lie, come first.
  static constexpr int ROW_BYTES = COPY == KvCopy::kE4m3_656 ? D_LATENT + 16 + 2 * D_ROPE : D_LATENT + D_ROPE;
  static constexpr int BOXES = (ROW_BYTES + 63) / 64, FIRST_BOXES = SCALED ? BOXES - TILES : 0;
  __device__ static int column_of(int box) { return (box < FIRST_BOXES ? box + TILES : box - FIRST_BOXES) * 64; }
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES;
  static constexpr int QK_CHUNKS = FIRST_BOXES / CHUNK_BOXES;  // that PV has nothing of
  // WGMMAs whose A operands are converted while those of the last batch are multiplied, and boxes of K that are read
  // ahead, as registers allow.
  static constexpr int BATCH = 2, PV_BATCH = N > 32 ? 2 : 4, KEY_BOXES = 2;
  static constexpr int MAX_SLOTS = 16;
  using X = Exchange<N, D_LATENT>;

  using Slot = E4m3Slot<CHUNK_BOXES, SCALES_BESIDE>;
  // What P^T of an even or odd block comes with.
  struct alignas(16) Step {
    char v_factors[SCALED ? kFactorsBytes : 8];
    alignas(16) float factors[N];  // of the sums, where a maximum moved
    uint64_t p_ready, p_free;
    int moved;  // did a maximum?
  };
  template <int SLOTS_>
  struct SharedOf {
    union {
      Slot ring[SLOTS_];
      char exchange[X::BYTES];  // at the end of a piece
    };
    char q[Q_BOXES][N * 128];
    char p[2][N * 128];  // P^T of even and odd blocks
    Step steps[2];
    alignas(16) float inverse[SCALED ? kBlockTokens : 4];  // TokenScale's, of the block in S^T
    alignas(16) float columns[N / 2][2][2];  // of two columns: logit_scale, and the maxima that exponents refer to
    float sums[4][N];                        // of each warp, at the end of a piece; maxima while a maximum moves
    float logit_scale[N], top[N], sum[N];    // top and sum: at the end of a piece
    RowInfo rows[N];
    SlotBarriers slots[MAX_SLOTS];
    uint64_t ring_free, parts_ready, parts_read, q_ready, sums_ready;
    WorkerRecord record;
    PieceEnd end;
    Fp8Blocks piece;
  };
  static constexpr int RINGS = 1, SLOTS = slots_that_fit<SharedOf, MAX_SLOTS>(), RING_SLOTS = SLOTS;
  using Shared = SharedOf<SLOTS>;
  static constexpr int SHARED_BYTES = sizeof(Shared), SLOT_BYTES = sizeof(Slot);
  static constexpr int SCALES_AT = CHUNK_BOXES * kFp8BoxBytes;  // in a slot
  static constexpr int SLOTS_AT = offsetof(Shared, slots), RING_FREE_AT = offsetof(Shared, ring_free),
                       PARTS_READY_AT = offsetof(Shared, parts_ready), PARTS_READ_AT = offsetof(Shared, parts_read);
  static_assert(RING_SLOTS > 2 * CHUNKS && X::BYTES <= sizeof(Slot) * SLOTS && SHARED_BYTES <= kSharedLimit);
};

enum : int { kBarrierDvFp8 = 2 };  // named barrier of QK's warpgroup

// What the math warpgroups have.
template <typename K>
struct E4m3DvSplitRole {
  static constexpr int N = K::N;
  const DecodeParams &p;
  typename K::Shared &shared;

  // Worked out again where it is needed: registers are scarce.
  __device__ __forceinline__ static uint32_t thread() { return static_cast<uint32_t>(opaque(threadIdx.x)) % 128; }
  __device__ __forceinline__ static uint32_t lane() { return thread() % 32; }
  __device__ __forceinline__ static uint32_t column(int i) { return 8 * (i / 2) + 2 * (threadIdx.x % 4) + i % 2; }
  // Of the thread's columns 8 j + 2 quad and the next.
  __device__ __forceinline__ static float2 pair(const float (&of_columns)[N], int j) {
    return *reinterpret_cast<const float2 *>(of_columns + column(2 * j));
  }
  __device__ __forceinline__ typename K::Step &step(int nth) const { return shared.steps[nth & 1]; }
  __device__ __forceinline__ uint32_t base() const { return smem_address(reinterpret_cast<const char *>(&shared)); }
  __device__ __forceinline__ E4m3Barriers<K> barriers() const { return {base()}; }
  // Where the nth block's chunk is.
  __device__ __forceinline__ static uint32_t slot_of(int nth, int chunk) {
    return static_cast<uint32_t>(nth * K::CHUNKS + chunk) % K::RING_SLOTS;
  }
  __device__ __forceinline__ char *slot(int nth, int chunk) const {
    return shared.ring[0].boxes[0] + slot_of(nth, chunk) * K::SLOT_BYTES;
  }
  __device__ __forceinline__ void wait_for_chunk(int nth, int chunk) const {
    const uint32_t lap = static_cast<uint32_t>(nth * K::CHUNKS + chunk) / K::RING_SLOTS;
    mbarrier_wait(barriers().full(slot_of(nth, chunk)), lap & 1);
  }
  __device__ __forceinline__ void give_back(int nth, int chunk) const {
    mbarrier_arrive(barriers().empty(slot_of(nth, chunk)));
  }
  __device__ __forceinline__ int block_of(int nth) const {
    return shared.piece.first_block + (nth - shared.piece.begin) * shared.piece.step;
  }
  __device__ __forceinline__ int tokens_of(int nth) const { return shared.piece.kv_end - block_of(nth) * kBlockTokens; }
};

// Warpgroup 3.
template <typename K>
struct E4m3DvSplitKeys : E4m3DvSplitRole<K> {
  using Role = E4m3DvSplitRole<K>;
  using Role::N, Role::p, Role::shared, Role::thread, Role::lane, Role::column, Role::pair, Role::step, Role::slot,
      Role::wait_for_chunk, Role::give_back;
  using Softmax = ColumnSoftmax<__half, K::N>;

  float S[K::N / 2];
  float l[K::N / 4];  // of column(i)

  // In a block: the thread's first row of S^T; the second is 8 tokens on.
  __device__ __forceinline__ static uint32_t first_token() {
    const uint32_t t = thread();
    return t / 32 * 16 + token_of_slot(t % 32 / 4);
  }
  struct Columns {
    float scale[2], top[2];
  };
  __device__ __forceinline__ Columns columns(int j) const {
    const float4 both = *reinterpret_cast<const float4 *>(shared.columns[column(2 * j) / 2]);
    return {{both.x, both.y}, {both.z, both.w}};
  }

  // V beyond a sequence's end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked.
  __device__ __forceinline__ void clear_tail(int nth) const {
    const int tokens = this->tokens_of(nth);
    if (tokens >= kBlockTokens) return;
#pragma unroll
    for (int c = 0; c < K::CHUNKS; ++c) wait_for_chunk(nth, c);
    for (uint32_t r = tokens + thread() / 32; r < kBlockTokens; r += 4) {
#pragma unroll
      for (int c = 0; c < K::CHUNKS; ++c) {
        if (lane() < K::CHUNK_BOXES * 4) {
          *reinterpret_cast<uint4 *>(slot(nth, c) + lane() / 4 * kFp8BoxBytes + r * 64 + lane() % 4 * 16) =
              make_uint4(0, 0, 0, 0);
        }
      }
    }
    named_barrier(kBarrierDvFp8, 128);
  }

  // The group scales of the thread's first token; the second's are kSecondScales further on.
  static constexpr int kSecondScales = K::SCALES_BESIDE ? 8 * 4 : 8 * 16;
  __device__ __forceinline__ const float *scales_of(int nth) const {
    const uint32_t token = first_token();
    return reinterpret_cast<const float *>(slot(nth, 0) +
                                           (K::SCALES_BESIDE ? K::SCALES_AT + token * 16 : fp8_chunk_offset(token, 0)));
  }
  // S^T in true units, times what K was divided by.
  __device__ __forceinline__ void restore_scale() {
    const float *const inverse = shared.inverse + first_token();
    const float first = TokenScale::power_of(inverse[0]) * shared.piece.latent_scale,
                second = TokenScale::power_of(inverse[8]) * shared.piece.latent_scale;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      S[4 * j] *= first;
      S[4 * j + 1] *= first;
      S[4 * j + 2] *= second;
      S[4 * j + 3] *= second;
    }
  }

  // S^T = K Q^T: while a batch is multiplied, the next one is converted. `meanwhile` is done while the last is.
  template <typename Meanwhile>
  __device__ __forceinline__ void multiply_keys(int nth, Meanwhile meanwhile) {
    constexpr int LATENT_STEPS = K::D_LATENT / 16, STEPS = LATENT_STEPS + K::D_ROPE / 16, GROUP_STEPS = 128 / 16,
                  KEY_BOXES = K::KEY_BOXES;
    const uint32_t q_low = __shfl_sync(0xffffffffu, smem_address(shared.q) >> 4, 0);
    Fragments<K::BATCH> a[2];
    KeyBytes key[KEY_BOXES];
    [[maybe_unused]] uint32_t factors = 0;  // of a group: the first token's, the second's
    const uint32_t key_offset = KeyBytes::offset(thread());
    // Of K's boxes, the rope part last.
    const auto load_key = [&](int of_row) {
      if (of_row >= STEPS / 4 || (K::ROPE_BF16 && of_row == K::TILES)) return;
      const int box = K::SCALED && of_row == K::TILES ? 0 : K::FIRST_BOXES + of_row, chunk = box / K::CHUNK_BOXES;
      if (of_row == 0 || (box % K::CHUNK_BOXES == 0 && box > 0)) wait_for_chunk(nth, chunk);
      key[of_row % KEY_BOXES].load(slot(nth, chunk) + box % K::CHUNK_BOXES * kFp8BoxBytes + key_offset);
    };
    if constexpr (K::SCALED) {
      wait_for_chunk(nth, 0);
      const float *const scales = scales_of(nth);
      const TokenScale first(*reinterpret_cast<const float4 *>(scales)),
          second(*reinterpret_cast<const float4 *>(scales + kSecondScales));
      if (lane() % 4 == 0) {
        shared.inverse[first_token()] = first.inverse;
        shared.inverse[first_token() + 8] = second.inverse;
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < KEY_BOXES; ++i) load_key(i);
#pragma unroll
    for (int s = 0; s < STEPS; s += K::BATCH) {
      const int buffer = s / K::BATCH % 2, of_row = s / 4;
      const bool rope = s >= LATENT_STEPS;
      if (K::SCALED && s == LATENT_STEPS) {
        wgmma_wait<0>();
        wgmma_fence_registers(S);
        restore_scale();  // the rope part has none
      } else if (s >= 2 * K::BATCH) {
        wgmma_wait<1>();
      }
      if (K::ROPE_BF16 && rope) {
#pragma unroll
        for (int i = 0; i < K::BATCH; ++i) {
          RopeBytes bytes;
          bytes.load(slot(nth, 0) + RopeBytes::offset(thread()), (s + i) % 4 / 2);
          bytes.fragment((s + i) % 2, a[buffer][i]);
        }
      } else {
        key[of_row % KEY_BOXES].convert(s % 4, a[buffer]);
        if (K::SCALED && !rope) {
          if (s % GROUP_STEPS == 0) {
            const float *const scales = scales_of(nth) + s / GROUP_STEPS, *const inverse =
                                                                              shared.inverse + first_token();
            factors = pack2<__half>(scales[0] * inverse[0], scales[kSecondScales] * inverse[8]);
          }
          const uint32_t first = __byte_perm(factors, 0, 0x1010), second = __byte_perm(factors, 0, 0x3232);
#pragma unroll
          for (int i = 0; i < K::BATCH; ++i) {
            multiply_half2(a[buffer][i][0], first);
            multiply_half2(a[buffer][i][1], second);
            multiply_half2(a[buffer][i][2], first);
            multiply_half2(a[buffer][i][3], second);
          }
        }
      }
      if (s % 4 + K::BATCH == 4) load_key(of_row + KEY_BOXES);
      if (s == 0 || (K::SCALED && s == LATENT_STEPS)) wgmma_fence_registers(S);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < K::BATCH; ++i) {
        const uint64_t q = descriptor(q_low + of_row * (N * 128 >> 4) + 2 * (s % 4 + i));
        if (K::ROPE_BF16 && rope) {
          Wgmma<__nv_bfloat16, N>::mma(S, a[buffer][i], q, true);
        } else {
          Wgmma<__half, N>::mma(S, a[buffer][i], q, s + i > 0);
        }
      }
      wgmma_commit();
    }
    meanwhile();
    wgmma_wait<0>();
    wgmma_fence_registers(S);
    if constexpr (K::SCALED && K::D_ROPE == 0) restore_scale();
  }

  // Of S^T, in units of log2 where K::SCALED, else of logit_scale: moves the maxima of those columns, and only those
  // (a row's bits must not depend on its neighbours), that are exceeded by more than the slack.
  __device__ __forceinline__ void move_maxima(float (&factors)[N]) {
    const uint32_t t = thread();
    Softmax::store_maxima(S, shared.sums[t / 32]);
    named_barrier(kBarrierDvFp8, 128);
    if (t < N) {
      const float (&maxima)[4][N] = shared.sums;
      const float largest = fmaxf(fmaxf(maxima[0][t], maxima[1][t]), fmaxf(maxima[2][t], maxima[3][t]));
      const float top = K::SCALED ? largest : largest * shared.columns[t / 2][0][t % 2];
      float &before = shared.columns[t / 2][1][t % 2];
      const bool moves = top > before + kSlack;
      factors[t] = moves ? exp2_approx(before - top) : 1.f;
      if (moves) before = top;
    }
    named_barrier(kBarrierDvFp8, 128);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 factor = pair(factors, j);
      l[2 * j] *= factor.x;
      l[2 * j + 1] *= factor.y;
    }
  }

  // P^T of a block.
  __device__ __forceinline__ void softmax(int nth) {
    float weights[2] = {1.f, 1.f};
    if constexpr (K::SCALED) {
      weights[0] = shared.inverse[first_token()];
      weights[1] = shared.inverse[first_token() + 8];
      const float first = TokenScale::exponent_of(weights[0]), second = TokenScale::exponent_of(weights[1]);
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const Columns c = columns(j);
        S[4 * j] = S[4 * j] * c.scale[0] + first;
        S[4 * j + 1] = S[4 * j + 1] * c.scale[1] + first;
        S[4 * j + 2] = S[4 * j + 2] * c.scale[0] + second;
        S[4 * j + 3] = S[4 * j + 3] * c.scale[1] + second;
      }
    }
    const int first = this->block_of(nth) * kBlockTokens, place = first + static_cast<int>(first_token());
    // The vote tells ptxas that a warp stays together: else it makes PV's descriptors in ordinary registers.
    if (__any_sync(0xffffffffu, first + kBlockTokens > shared.piece.first_limit))
      Softmax::mask(p, S, place, shared.piece.first_limit, shared.rows);
    if (p.lists) {
      Softmax::mask_holes(S, is_hole(shared.piece.list, place, shared.piece.kv_end),
                          is_hole(shared.piece.list, place + 8, shared.piece.kv_end));
    }
    float above[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Columns c = columns(j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s = fmaxf(S[4 * j + e], S[4 * j + 2 + e]);
        above[e] = fmaxf(above[e], K::SCALED ? s - c.top[e] : fmaf(s, c.scale[e], -c.top[e]));
      }
    }
    const bool moved = named_barrier_any(kBarrierDvFp8, 128, fmaxf(above[0], above[1]) > kSlack);
    if (moved) move_maxima(step(nth).factors);
    if (thread() == 0) step(nth).moved = moved;
    if constexpr (K::SCALED) {
      const uint32_t t = thread(), quad = t % 4;
      const float *const scales = scales_of(nth);
      __half *const to = reinterpret_cast<__half *>(
          step(nth).v_factors + factor_offset(static_cast<int>(quad), static_cast<int>(t / 32 * 16 + t % 32 / 4)));
      to[0] = __float2half(scales[quad] * weights[0]);
      to[2] = __float2half(scales[kSecondScales + quad] * weights[1]);
    }
    uint32_t P[N / 4];
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Columns c_of_j = columns(j);
      const float scale0 = K::SCALED ? 1.f : c_of_j.scale[0], scale1 = K::SCALED ? 1.f : c_of_j.scale[1];
      const float a = exp2_approx(fmaf(S[4 * j], scale0, -c_of_j.top[0])),
                  b = exp2_approx(fmaf(S[4 * j + 1], scale1, -c_of_j.top[1]));
      const float c = exp2_approx(fmaf(S[4 * j + 2], scale0, -c_of_j.top[0])),
                  d = exp2_approx(fmaf(S[4 * j + 3], scale1, -c_of_j.top[1]));
      if constexpr (K::SCALED) {
        l[2 * j] += a * weights[0] + c * weights[1];
        l[2 * j + 1] += b * weights[0] + d * weights[1];
      } else {
        l[2 * j] += a + c;
        l[2 * j + 1] += b + d;
      }
      P[2 * j] = pack2<__half>(a, b);
      P[2 * j + 1] = pack2<__half>(c, d);
    }
    Softmax::store(P, smem_address(shared.p[nth & 1]));
    __syncwarp();
    if (lane() == 0) {
      mbarrier_arrive(smem_address(&step(nth).p_ready));
      if constexpr (K::QK_CHUNKS > 0) {  // for both warpgroups of PV, which do not read it
        give_back(nth, 0);
        give_back(nth, 0);
      }
    }
  }

  __device__ __forceinline__ void run() {
    uint32_t pieces_done = 0;
    for (Pieces pieces(p, shared.record); !pieces.done(); pieces.next()) {
      if (pieces.context(N).rows <= 0) continue;
      mbarrier_wait(smem_address(&shared.q_ready), pieces_done++ & 1);
#pragma unroll
      for (float &sum : l) sum = shared.piece.first_sum;
      for (int nth = shared.piece.begin; nth < shared.piece.end; ++nth) {
        clear_tail(nth);
        // P^T and what comes with it: PV of the last but one is done.
        multiply_keys(nth, [&] { mbarrier_wait(smem_address(&step(nth).p_free), (nth >> 1 & 1) ^ 1); });
        softmax(opaque(nth));  // what is known of the block is worked out again, as registers are scarce
      }
      Softmax::reduce_groups(l);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        if (lane() < 4) shared.sums[thread() / 32][column(i)] = l[i];
      }
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(smem_address(&shared.sums_ready));
    }
  }
};

// Warpgroups 1 and 2 (wg 0: L, 1: R). The same code for both.
template <typename K>
struct E4m3DvSplitValues : E4m3DvSplitRole<K> {
  using Role = E4m3DvSplitRole<K>;
  using Role::N, Role::p, Role::shared, Role::thread, Role::lane, Role::column, Role::pair, Role::step, Role::slot,
      Role::wait_for_chunk, Role::give_back;
  using Values = ValueBytes<K::HALF>;

  const int wg;
  float (&O)[K::HALF_TILES][K::N / 2];

  // Where the thread's values of a block's first tokens are: those of 16 tokens on are 1024 bytes on.
  struct ValuesAt {
    const char *even, *odd;
  };
  // In a block's ring slots, whatever the block.
  struct ValuesPlace {
    int chunk;
    uint32_t even, odd;  // in the chunk
  };
  __device__ __forceinline__ ValuesPlace values_place() const {
    const uint32_t t = thread(), box = K::FIRST_BOXES + wg * K::HALF_TILES + Values::box(t),
                   in_chunk = box % K::CHUNK_BOXES * kFp8BoxBytes;
    return {static_cast<int>(box / K::CHUNK_BOXES), in_chunk + Values::offset(t, 0), in_chunk + Values::offset(t, 1)};
  }
  __device__ __forceinline__ ValuesAt values_at(int nth, const ValuesPlace &place) const {
    const char *const chunk = slot(nth, place.chunk);
    return {chunk + place.even, chunk + place.odd};
  }
  __device__ __forceinline__ void rescale(const float (&factors)[N]) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 factor = pair(factors, j);
#pragma unroll
      for (int i = 0; i < K::HALF_TILES; ++i) {
        O[i][4 * j] *= factor.x;
        O[i][4 * j + 1] *= factor.y;
        O[i][4 * j + 2] *= factor.x;
        O[i][4 * j + 3] *= factor.y;
      }
    }
  }
  // O^T += V^T P^T of a block.
  __device__ __forceinline__ void add_values(int nth) {
    constexpr int BATCH = K::HALF_TILES % K::PV_BATCH == 0 ? K::PV_BATCH : K::HALF_TILES;
    const ValuesPlace place = values_place();
    const ValuesAt from = values_at(nth, place);
    Values value;
    const auto wait_for_p = [&] { mbarrier_wait(smem_address(&step(nth).p_ready), nth >> 1 & 1); };
    if (this->tokens_of(nth) < kBlockTokens) {
      wait_for_p();  // the tail has been cleared
    } else {
      wait_for_chunk(nth, place.chunk);
    }
    __syncwarp();
    value.load(from.even, from.odd);
    const uint32_t p_low = __shfl_sync(0xffffffffu, smem_address(shared.p[nth & 1]) >> 4, 0);
    wait_for_p();
    if (step(nth).moved) rescale(step(nth).factors);
    // A thread's values of d are of one group.
    [[maybe_unused]] const char *const v_factors =
        step(nth).v_factors + factor_offset(static_cast<int>((wg * K::HALF + Values::first_d(thread())) / 128),
                                       static_cast<int>(thread() % 4 * 2));
    Fragments<BATCH> a[2];
#pragma unroll
    for (int i = 0; i < K::HALF_TILES; ++i) wgmma_fence_registers(O[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      [[maybe_unused]] uint2 factor;
      if constexpr (K::SCALED) factor = *reinterpret_cast<const uint2 *>(v_factors + k * factor_offset(0, 16));
#pragma unroll
      for (int i = 0; i < K::HALF_TILES; i += BATCH) {
        const int batch = (k * K::HALF_TILES + i) / BATCH;
        if (batch >= 2) wgmma_wait<1>();
        value.convert(i, a[batch % 2]);
        if constexpr (K::SCALED) scale_fragments(a[batch % 2], factor);
        if (i + BATCH == K::HALF_TILES && k < 3)
          value.load(from.even + (k + 1) * (16 * 64), from.odd + (k + 1) * (16 * 64));
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < BATCH; ++j)
          Wgmma<__half, N>::mma(O[i + j], a[batch % 2][j], descriptor(p_low + 2 * k), true);
        wgmma_commit();
      }
    }
    __syncwarp();  // all of the block has been read
    if (lane() == 0) {
#pragma unroll
      for (int c = K::QK_CHUNKS; c < K::CHUNKS; ++c) give_back(nth, c);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < K::HALF_TILES; ++i) wgmma_fence_registers(O[i]);
    if (lane() == 0) mbarrier_arrive(smem_address(&step(nth).p_free));
  }
};

template <typename K>
__device__ __forceinline__ void e4m3_dv_split_math(const DecodeParams &p, typename K::Shared &shared, int wg) {
  using Math = E4m3DvSplitValues<K>;
  constexpr int N = K::N;
  // Registers are scarce: what counts pieces stands in shared memory.
  for (int unit = 0;;) {
    const Pieces pieces(p, shared.record, unit);
    if (pieces.done()) break;
    const PieceContext context = pieces.context(N);
    if (context.rows <= 0) {
      ++unit;
      continue;
    }
    const int consumer = opaque(static_cast<int>(threadIdx.x)) - 128;
    if (consumer == 0) {
      const int first = context.first_block(), step = context.ctas;
      const int count = max(0, (context.piece.block_end - first + step - 1) / step);
      Fp8Blocks &piece = shared.piece;
      ++piece.nth;
      piece.begin = piece.end;
      piece.end += count;
      piece.first_block = first;
      piece.step = step;
      piece.kv_end = context.kv_end;
      piece.first_limit = context.first_limit;
      piece.first_sum = context.first_sum();
      piece.latent_scale = K::ROPE_BF16 ? tensor_scale(p) : 1.f;
      piece.list = context.table;
    }
    load_query<uint16_t, N, K::D_LATENT, K::D_ROPE>(p, context, smem_address(shared.q), shared.rows, &shared.end);
    // The scale of a tensor is not the BF16 rope part's.
    query_to_half<N, K::Q_BOXES, K::ROPE_BF16, true>(
        p.q_bf16, shared.q[0], p.scale_log2 * (K::ROPE_BF16 ? 1.f : tensor_scale(p)), shared.logit_scale);
    if (consumer < N) {
      shared.columns[consumer / 2][0][consumer % 2] = shared.logit_scale[consumer];
      shared.columns[consumer / 2][1][consumer % 2] = kNoMaximum;
    }
    if (consumer == 0) shared.piece.next_unit = unit + 1;
    named_barrier<kBarrierConsumers, kConsumers>();

    if (consumer == 0) mbarrier_arrive(smem_address(&shared.q_ready));
    float O[K::HALF_TILES][N / 2];
#pragma unroll
    for (int t = 0; t < K::HALF_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
    Math math{{p, shared}, wg, O};
    for (int nth = shared.piece.begin; nth < shared.piece.end; ++nth) math.add_values(opaque(nth));

    // ---- the end of the piece -------------------------------------------------------------------------------------
    const uint32_t t = Math::thread(), lane = Math::lane(), quad = lane % 4;
    mbarrier_wait(smem_address(&shared.sums_ready), shared.piece.nth & 1);
    named_barrier<kBarrierConsumers, kConsumers>();  // nobody reads the ring any more
    float *const values =
        reinterpret_cast<float *>(shared.exchange) + 2 * quad * K::X::ROW + wg * K::HALF + Math::Values::first_d(t);
#pragma unroll
    for (int v = 0; v < Math::Values::WORDS; ++v) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int c = 4 * (i / 2) + i % 2;
        *reinterpret_cast<float4 *>(values + (8 * (i / 2) + i % 2) * K::X::ROW + 4 * v) =
            make_float4(O[2 * v][c], O[2 * v][c + 2], O[2 * v + 1][c], O[2 * v + 1][c + 2]);
      }
    }
    if (wg == 0 && t < N) {
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) total += shared.sums[i][t];
      shared.sum[t] = total;
      shared.top[t] = shared.columns[t / 2][1][t % 2];
    }
    const typename K::X exchange{smem_address(shared.exchange),    smem_address(shared.top),
                                 smem_address(shared.sum),         smem_address(&shared.parts_ready),
                                 smem_address(&shared.parts_read), &shared.end};
    finish_piece(p, exchange, shared.rows, tensor_scale(p), shared.piece.nth);
    // The ring is free again once every CTA has read its part, the tables of rows and of the end once all warps are
    // here.
    if (shared.end.ctas > 1) mbarrier_wait_cluster(smem_address(&shared.parts_read), shared.piece.nth & 1);
    unit = shared.piece.next_unit;
    named_barrier<kBarrierConsumers, kConsumers>();
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&shared.ring_free));
  }
  fill_spare_rows(p, K::D_LATENT);
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) e4m3_dv_split_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(shared_raw);
  const E4m3Barriers<K> barriers{smem_address(shared_raw)};
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x < K::SLOTS) {
    // All threads of a warp announce scales, which they copy, beside the one that announces the boxes.
    mbarrier_init(barriers.full(threadIdx.x), gathers(p) ? 128 : K::SCALES_BESIDE ? 33 : 1);
    mbarrier_init(barriers.empty(threadIdx.x), 8);
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem_address(&shared.steps[i].p_ready), 4);
      mbarrier_init(smem_address(&shared.steps[i].p_free), 8);
    }
    shared.piece.end = 0;
    shared.piece.nth = -1;
    mbarrier_init(smem_address(&shared.q_ready), 1);
    mbarrier_init(smem_address(&shared.sums_ready), 4);
    mbarrier_init(barriers.ring_free(), 8);
    mbarrier_init(barriers.parts_ready(), 8 * cluster_size());
    mbarrier_init(barriers.parts_read(), 8 * cluster_size());
    if (!gathers(p) && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  begin_kernel(p, shared.record);

  if (warpgroup == 0) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    fill_e4m3_rings<K>(p, shared.record, barriers.base);
  } else if (warpgroup == K::KEYS_WARPGROUP) {
    if constexpr (K::KEYS_REGISTERS > 128) {
      set_registers_more<K::KEYS_REGISTERS>();
    } else {
      set_registers_fewer<K::KEYS_REGISTERS>();
    }
    E4m3DvSplitKeys<K>{{p, shared}, {}, {}}.run();
  } else {
    set_registers_more<K::VALUES_REGISTERS>();
    e4m3_dv_split_math<K>(p, shared, warpgroup - 1);
  }
}

struct e4m3_dv_split {
  template <typename, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = E4m3DvSplit<ROWS, D_LATENT, D_ROPE, COPY>;
    return {reinterpret_cast<const void *>(&e4m3_dv_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
