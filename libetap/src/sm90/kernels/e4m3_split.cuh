// Decode of FP8 caches: the KV context on WGMMA's M and the query rows on its N, as for 16-bit caches, with KV arriving
// as bytes and becoming FP16 on its way through registers into the A operand (e4m3_operand.cuh).
//
//     KV block in shared memory                               S^T [64 tokens, N] = K Q^T
//     boxes of 64 tokens x 64 bytes   --16-byte loads-->      softmax, P^T to shared memory
//     (copy engine or cp.async)         E4M3 -> FP16          O^T [512, N] += V^T P^T      (the same bytes again)
//
// Reason for the shape. Half the bytes leave half the time: a 64-token block takes 2549 cycles of an H100's memory
// time, and nothing else may come near it. With A from registers a WGMMA of N <= 16 takes 13 cycles instead of 20, and
// shared memory holds bytes only: 36 KB a block instead of 72. All products are in FP16: E4M3 fits it exactly,
// BF16 queries too once their rows are scaled by a power of two, and P has three more bits than in BF16.
//
// A tile has up to 24 rows, whose O^T fits one warpgroup's registers (4 N a thread): the two consumer warpgroups take
// KV blocks in turn, as in token_split.cuh, each with a ring of its own. More rows are e4m3_dv_split.cuh's and
// rows_on_m.cuh's.
//
// Group scales, one for each token and 128 dims, differ along S^T's rows and along k of both products, so none can go
// into the end result. QK sums one group at a time, in FP32, and scales the sums. In PV they become factors of V's
// fragments, FP16 below 1, and powers of two that the logits take (TokenScale): P^T stays within FP16 whatever the
// scales, and the maximum is that of P times V's scale. The sum of P leaves the powers out.
//
// Softmax, clusters and the end of a piece are token_split.cuh's (softmax.cuh, piece.cuh).
#pragma once

#include <climits>
#include <type_traits>

#include "sm90/kernel.h"
#include "sm90/parts/e4m3_operand.cuh"
#include "sm90/parts/e4m3_ring.cuh"
#include "sm90/parts/shared_memory.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

// What the loop over KV blocks needs of a piece, in shared memory.
struct Fp8Loop {
  int ctas, kv_end, block_end;
  float latent_scale;  // of the group sums, beside their own scales
  float first_sum;     // PieceContext's
  int first_limit;
  const int32_t *list;
};

template <int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY>
struct E4m3Split {
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr bool SCALED = COPY != KvCopy::kE4m3;              // group scales, from
  static constexpr bool SCALES_BESIDE = COPY == KvCopy::kE4m3Group;  // an array of their own, or
  static constexpr bool ROPE_BF16 = COPY == KvCopy::kE4m3_656;       // the row, with BF16 rope values
  static_assert(!SCALED || (D_LATENT == 512 && D_ROPE == 64));
  static_assert(N % 8 == 0 && N <= 32 && (D_LATENT == 512 || D_LATENT == 256) && D_ROPE % 64 == 0);

  static constexpr int THREADS = 384;
  static constexpr int CONSUMER_REGISTERS = N > 16 ? 224 : SCALED ? 208 : 200;
  // O^T and a group's sums leave so few that what a thread's number gives is worked out again in each block.
  static constexpr bool FEW_REGISTERS = SCALED && N > 16;
  static constexpr int PRODUCER_REGISTERS = 504 - 2 * CONSUMER_REGISTERS;
  static constexpr int TILES = D_LATENT / 64;               // m64 tiles of O^T
  static constexpr int Q_BOXES = (D_LATENT + D_ROPE) / 64;  // of 64 values
  // A KV block is boxes of 64 bytes a token, 4 KB each. Where there are group scales those of the rope part, beside
  // which the scales may lie, come first.
  static constexpr int ROW_BYTES = ROPE_BF16 ? 656 : D_LATENT + D_ROPE;
  static constexpr int BOXES = (ROW_BYTES + 63) / 64, FIRST_BOXES = SCALED ? BOXES - TILES : 0;
  __device__ static int column_of(int box) { return (box < FIRST_BOXES ? box + TILES : box - FIRST_BOXES) * 64; }
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES;
  // WGMMAs whose A operands are converted together, while those of the last batch are multiplied: as many as the
  // registers next to O^T hold twice.
  static constexpr int BATCH = N <= 24 ? 4 : 2;
  static constexpr int MAX_SLOTS = 16;
  using X = Exchange<N, D_LATENT>;

  using Slot = E4m3Slot<CHUNK_BOXES, SCALES_BESIDE>;
  struct Operands {
    char q[Q_BOXES][N * 128];
    char p[4][N * 128];  // P^T, two of each warpgroup
  };
  struct OperandsAndFactors {
    char q[Q_BOXES][N * 128];
    char p[4][N * 128];
    char factors[4][kFactorsBytes];  // of V, beside each P^T
  };
  template <int SLOTS_>
  struct SharedOf {
    Slot ring[SLOTS_];
    union {
      std::conditional_t<SCALED, OperandsAndFactors, Operands> loop;
      char exchange[X::BYTES];  // at the end of a piece
    };
    float sums[2][4][N];   // of each warp; maxima while a maximum moves
    float tops[2][N];      // of the warpgroups: the maxima that exponents refer to
    float top[N], sum[N];  // of the CTA
    float logit_scale[N];
    RowInfo rows[N];
    SlotBarriers slots[MAX_SLOTS];
    uint64_t parts_ready, parts_read;
    WorkerRecord record;
    PieceEnd end;
    Fp8Loop piece;
  };
  // One ring a warpgroup; token_split.cuh says why they don't share one.
  static constexpr int RINGS = 2, SLOTS = slots_that_fit<SharedOf, MAX_SLOTS>() / 2 * 2, RING_SLOTS = SLOTS / 2;
  using Shared = SharedOf<SLOTS>;
  static constexpr int SHARED_BYTES = sizeof(Shared), SLOT_BYTES = sizeof(Slot);
  static constexpr int SCALES_AT = CHUNK_BOXES * kFp8BoxBytes;  // in a slot
  static constexpr int SLOTS_AT = offsetof(Shared, slots), PARTS_READY_AT = offsetof(Shared, parts_ready),
                       PARTS_READ_AT = offsetof(Shared, parts_read);
  static_assert(RING_SLOTS >= CHUNKS && SHARED_BYTES <= kSharedLimit);
};

enum : int { kBarrierFp8 = 2 };  // named barriers 2 and 3, one a warpgroup

template <typename K>
__device__ __forceinline__ int again(int value) {
  return K::FEW_REGISTERS ? opaque(value) : value;
}
// Of the warpgroup.
struct Fp8Thread {
  int index, warp, lane, group, quad;
};
template <typename K>
__device__ __forceinline__ Fp8Thread this_thread() {
  const int index = again<K>(static_cast<int>(threadIdx.x)) % 128, lane = index % 32;
  return {index, index / 32, lane, lane / 4, lane % 4};
}

template <typename K>
__device__ __forceinline__ void e4m3_split_consumer(const DecodeParams &p, char *memory, int wg) {
  using Softmax = ColumnSoftmax<__half, K::N>;
  using Values = ValueBytes<K::D_LATENT>;
  constexpr int N = K::N, WORDS = Values::WORDS;
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(memory);
  const uint32_t base = smem_address(memory);
  const E4m3Barriers<K> barriers{base};
  const int ring_slot0 = wg * K::RING_SLOTS;
  char *const slots = memory;                                                      // of the ring
  float *const all_sums = shared.sums[0][0], *const sums = all_sums + wg * 4 * N;  // [4][N] of this warpgroup
  float *const all_tops = shared.tops[0], *const tops = all_tops + wg * N;
  const typename K::X exchange{smem_address(shared.exchange), smem_address(shared.top), smem_address(shared.sum),
                               barriers.parts_ready(),        barriers.parts_read(),    &shared.end};
  // In a block: of the thread's first row of S^T.
  const auto first_token = [](int thread) { return 16 * (thread / 32) + token_of_slot(thread % 32 / 4); };
  RingPosition<K::RING_SLOTS> ring = {0, 0};
  uint32_t pieces_done = 0;

  for (Pieces pieces(p, shared.record); !pieces.done(); pieces.next()) {
    const PieceContext context = pieces.context(K::N);
    if (context.rows <= 0) continue;
    // The remote readers of the last piece's exchange must be done before Q lands on it.
    if (context.ctas > 1 && pieces_done > 0) mbarrier_wait_cluster(barriers.parts_read(), (pieces_done - 1) & 1);
    const int thread = opaque(static_cast<int>(threadIdx.x)) % 128;
    if (thread < N) tops[thread] = kNoMaximum;
    if (thread == 0) {
      shared.piece = Fp8Loop{context.ctas,
                             context.kv_end,
                             context.piece.block_end,
                             K::ROPE_BF16 ? tensor_scale(p) : 1.f,
                             context.first_sum(),
                             context.first_limit,
                             context.table};
    }
    load_query<uint16_t, N, K::D_LATENT, K::D_ROPE>(p, context, smem_address(shared.loop.q), shared.rows, exchange.end);
    // The scale of a tensor is not the BF16 rope part's.
    query_to_half<N, K::Q_BOXES, K::ROPE_BF16, true>(
        p.q_bf16, shared.loop.q[0], p.scale_log2 * (K::ROPE_BF16 ? 1.f : tensor_scale(p)), shared.logit_scale);

    float O[K::TILES][N / 2];
    float l[N / 4];  // of the thread's columns 8 j + 2 quad + e, at 2 j + e
#pragma unroll
    for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) l[i] = shared.piece.first_sum;

    const uint32_t q_low = smem_address(shared.loop.q) >> 4;
    int blocks_done = 0;
    int block = context.first_block() + wg * context.ctas;
    for (; block < shared.piece.block_end; block += 2 * shared.piece.ctas) {
      const int tokens = shared.piece.kv_end - block * kBlockTokens;
      const auto slot_of_chunk = [&](int c) {
        return ring_slot0 + RingPosition<K::RING_SLOTS>{again<K>(ring.slot), ring.parity}.further(c).slot;
      };
      const auto wait_for_chunk = [&](int c) {
        mbarrier_wait(barriers.full(slot_of_chunk(c)), ring.further(c).parity);
      };
      if (tokens < kBlockTokens) {
        // V beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked below.
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) wait_for_chunk(c);
        const auto [index, warp, lane, group, quad] = this_thread<K>();
        for (int r = tokens + warp; r < kBlockTokens; r += 4) {
#pragma unroll
          for (int c = 0; c < K::CHUNKS; ++c) {
            if (lane < K::CHUNK_BOXES * 4) {
              *reinterpret_cast<uint4 *>(slots + slot_of_chunk(c) * K::SLOT_BYTES + lane / 4 * kFp8BoxBytes + r * 64 +
                                         lane % 4 * 16) = make_uint4(0, 0, 0, 0);
            }
          }
        }
        named_barrier(kBarrierFp8 + wg, 128);
      }

      ListEntries entries{};
      if (p.lists) {
        const int place = block * kBlockTokens + first_token(this_thread<K>().index);
        entries.ask(shared.piece.list, place, place + 8, shared.piece.kv_end);
      }
      // ---- S^T = K Q^T: while a box is multiplied, the next one is converted --------------------------------------
      constexpr int ROPE_STEPS = K::SCALED ? K::D_ROPE / 16 : 0, GROUP_STEPS = 128 / 16;
      float S[N / 2];
      [[maybe_unused]] float S_group[N / 2];
      Fragments<K::BATCH> a[2];
      KeyBytes key;
      const int qk_thread = this_thread<K>().index;
      const uint32_t key_offset = KeyBytes::offset(qk_thread);
      const auto load_key = [&](int box) {
        const int c = box / K::CHUNK_BOXES;
        if (box % K::CHUNK_BOXES == 0) wait_for_chunk(c);
        key.load(slots + slot_of_chunk(c) * K::SLOT_BYTES + box % K::CHUNK_BOXES * kFp8BoxBytes + key_offset);
      };
      // The group scales of the thread's two tokens: [0 .. 3], and the second's kSecondScales later.
      constexpr int kSecondScales = K::SCALES_BESIDE ? 8 * 4 : 8 * 16;
      const float *const scales =
          reinterpret_cast<const float *>(slots + slot_of_chunk(0) * K::SLOT_BYTES +
                                          (K::SCALES_BESIDE ? K::SCALES_AT + first_token(qk_thread) * 16
                                                            : fp8_chunk_offset(first_token(qk_thread), 0)));
      const auto add_group = [&](int g) {
        const float first = scales[g] * shared.piece.latent_scale,
                    second = scales[kSecondScales + g] * shared.piece.latent_scale;
        wgmma_wait<0>();
        wgmma_fence_registers(S_group);
        if (g == 0) wgmma_fence_registers(S);
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          S[4 * j] += first * S_group[4 * j];
          S[4 * j + 1] += first * S_group[4 * j + 1];
          S[4 * j + 2] += second * S_group[4 * j + 2];
          S[4 * j + 3] += second * S_group[4 * j + 3];
        }
        wgmma_fence_registers(S_group);
      };
      if constexpr (K::ROPE_BF16) {
        wait_for_chunk(0);
      } else {
        load_key(0);
      }
#pragma unroll
      for (int s = 0; s < 4 * K::Q_BOXES; s += K::BATCH) {
        const int buffer = s / K::BATCH % 2, latent_step = s - ROPE_STEPS;
        const int box = s / 4 + (K::ROPE_BF16 ? K::FIRST_BOXES - 1 : 0);
        const uint32_t q_box = q_low + (s < ROPE_STEPS ? K::TILES : latent_step / 4) * (N * 128 >> 4);
        if (s >= 2 * K::BATCH) wgmma_wait<1>();
        if (K::ROPE_BF16 && s < ROPE_STEPS) {
#pragma unroll
          for (int i = 0; i < K::BATCH; i += 2) {
            RopeBytes rope;
            rope.load(slots + slot_of_chunk(0) * K::SLOT_BYTES + RopeBytes::offset(qk_thread), (s + i) / 2);
            rope.fragments(a[buffer][i], a[buffer][i + 1]);
          }
        } else {
          key.convert(s % 4, a[buffer]);
        }
        if (s % 4 + K::BATCH == 4 && box + 1 < K::BOXES) load_key(box + 1);
        if (K::SCALED && latent_step > 0 && latent_step % GROUP_STEPS == 0) add_group(latent_step / GROUP_STEPS - 1);
        if (s == 0) wgmma_fence_registers(S);
        if (K::SCALED && latent_step == 0) wgmma_fence_registers(S_group);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < K::BATCH; ++i) {
          const uint64_t q = descriptor(q_box + 2 * (s % 4 + i));
          if (K::SCALED && latent_step >= 0) {
            Wgmma<__half, N>::mma(S_group, a[buffer][i], q, (latent_step + i) % GROUP_STEPS > 0);
          } else {
            Wgmma<std::conditional_t<K::ROPE_BF16, __nv_bfloat16, __half>, N>::mma(S, a[buffer][i], q, s + i > 0);
          }
        }
        wgmma_commit();
      }
      // V of the first 16 tokens is on its way during the softmax.
      const int pv_thread = this_thread<K>().index, value_box = K::FIRST_BOXES + Values::box(pv_thread);
      const uint32_t value_offset = value_box % K::CHUNK_BOXES * kFp8BoxBytes;
      const char *const value_at = slots + slot_of_chunk(value_box / K::CHUNK_BOXES) * K::SLOT_BYTES + value_offset;
      const char *const even = value_at + Values::offset(pv_thread, 0), *const odd =
                                                                            value_at + Values::offset(pv_thread, 1);
      Values value;
      if constexpr (K::BATCH == 4) value.load(even, odd);
      float2 exponents = {0.f, 0.f}, weights = {1.f, 1.f};
      const auto [index, warp, lane, group, quad] = this_thread<K>();
      const char *factors = nullptr;
      if constexpr (K::SCALED) factors = shared.loop.factors[0] + (2 * wg + blocks_done % 2) * kFactorsBytes;
      if constexpr (K::SCALED) {
        add_group(3);
        const TokenScale first(*reinterpret_cast<const float4 *>(scales)),
            second(*reinterpret_cast<const float4 *>(scales + kSecondScales));
        exponents = make_float2(first.exponent, second.exponent);
        weights = make_float2(first.inverse, second.inverse);
        __half *const to =
            reinterpret_cast<__half *>(const_cast<char *>(factors) + factor_offset(quad, 16 * warp + group));
        to[0] = __float2half(scales[quad] * first.inverse);
        to[2] = __float2half(scales[kSecondScales + quad] * second.inverse);
      } else {
        wgmma_wait<0>();
        wgmma_fence_registers(S);
      }

      // ---- softmax ------------------------------------------------------------------------------------------------
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 scale = *reinterpret_cast<const float2 *>(shared.logit_scale + 8 * j + 2 * quad);
        S[4 * j] = S[4 * j] * scale.x + exponents.x;
        S[4 * j + 1] = S[4 * j + 1] * scale.y + exponents.x;
        S[4 * j + 2] = S[4 * j + 2] * scale.x + exponents.y;
        S[4 * j + 3] = S[4 * j + 3] * scale.y + exponents.y;
      }
      // The vote tells ptxas that a warp stays together: else it makes PV's descriptors in ordinary registers.
      if (__any_sync(0xffffffffu, (block + 1) * kBlockTokens > shared.piece.first_limit))
        Softmax::mask(p, S, block * kBlockTokens + first_token(index), shared.piece.first_limit, shared.rows);
      if (p.lists) Softmax::mask_holes(S, entries.first_is_hole(), entries.second_is_hole());
      const uint32_t p_at = smem_address(shared.loop.p, 2 * wg + blocks_done % 2);
      float m[N / 4], sum[N / 4];
#pragma unroll
      for (int j = 0; j < N / 4; ++j) m[j] = tops[8 * (j / 2) + 2 * quad + j % 2];
      bool above = blocks_done == 0;  // there is no maximum yet
      ++blocks_done;
      if (!above) {
        Softmax::exponentiate(S, m, sum, p_at, weights);
        above = named_barrier_any(kBarrierFp8 + wg, 128, Softmax::above(S, m));
      }
      if (above) {
        Softmax::store_maxima(S, sums + warp * N);
        named_barrier(kBarrierFp8 + wg, 128);
        float factor[N / 4];
        Softmax::update(sums, m, l, factor);
#pragma unroll
        for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
          for (int j = 0; j < N / 2; ++j) O[t][j] *= factor[2 * (j / 4) + j % 2];
        }
        if (warp == 0 && group == 0) {
#pragma unroll
          for (int j = 0; j < N / 4; ++j) tops[8 * (j / 2) + 2 * quad + j % 2] = m[j];
        }
        Softmax::exponentiate(S, m, sum, p_at, weights);
        named_barrier(kBarrierFp8 + wg, 128);
      }
#pragma unroll
      for (int j = 0; j < N / 4; ++j) l[j] += sum[j];

      // ---- O^T += V^T P^T -----------------------------------------------------------------------------------------
      const uint32_t p_low = __shfl_sync(0xffffffffu, p_at >> 4, 0);
#pragma unroll
      for (int t = 0; t < K::TILES; ++t) wgmma_fence_registers(O[t]);
      if constexpr (K::BATCH < 4) value.load(even, odd);
      [[maybe_unused]] const char *const my_factors = factors + factor_offset(warp, 2 * quad);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint2 factor;
        if constexpr (K::SCALED) factor = *reinterpret_cast<const uint2 *>(my_factors + k * factor_offset(0, 16));
#pragma unroll
        for (int t = 0; t < K::TILES; t += K::BATCH) {
          const int batch = (k * K::TILES + t) / K::BATCH;
          if (batch >= 2) wgmma_wait<1>();
          value.convert(t, a[batch % 2]);
          if constexpr (K::SCALED) scale_fragments(a[batch % 2], factor);
          if (t + K::BATCH == K::TILES && k < 3) value.load(even + (k + 1) * (16 * 64), odd + (k + 1) * (16 * 64));
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < K::BATCH; ++i)
            Wgmma<__half, N>::mma(O[t + i], a[batch % 2][i], descriptor(p_low + 2 * k), true);
          wgmma_commit();
        }
      }
      __syncwarp();  // all of the block has been read
      if (lane == 0) {
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) mbarrier_arrive(barriers.empty(slot_of_chunk(c)));
      }
      ring = ring.further(K::CHUNKS);
      wgmma_wait<0>();
#pragma unroll
      for (int t = 0; t < K::TILES; ++t) wgmma_fence_registers(O[t]);
    }

    // ---- the end of the piece -------------------------------------------------------------------------------------
    const auto [index, warp, lane, group, quad] = this_thread<K>();
    Softmax::reduce_groups(l);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const int column = 8 * (j / 2) + 2 * quad + j % 2;
      if (group == 0) sums[warp * N + column] = l[j];
    }
    named_barrier<kBarrierConsumers, kConsumers>();  // nobody reads the ring, Q or P^T any more
    // Values of d that the thread holds, four at a time: of column 8 j + 2 quad + e, from 4 v on.
    float *const values = reinterpret_cast<float *>(shared.exchange) + 2 * quad * K::X::ROW + Values::first_d(index);
    const auto each = [&](int v_begin, int v_end, auto action) {
#pragma unroll
      for (int v = v_begin; v < v_end; ++v) {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
          const int at = 4 * (j / 2) + j % 2;
          action(*reinterpret_cast<float4 *>(values + (8 * (j / 2) + j % 2) * K::X::ROW + 4 * v), j,
                 make_float4(O[2 * v][at], O[2 * v][at + 2], O[2 * v + 1][at], O[2 * v + 1][at + 2]));
        }
      }
    };
    float factor[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const int column = 8 * (j / 2) + 2 * quad + j % 2;
      const float top = fmaxf(all_tops[column], all_tops[N + column]);
      factor[j] = exp2_approx(tops[column] - top);
      if (wg == 0 && warp == 0 && group == 0) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          float of_wg = 0.f;
#pragma unroll
          for (int i = 0; i < 4; ++i) of_wg += all_sums[(w * 4 + i) * N + column];
          total += of_wg * exp2_approx(all_tops[w * N + column] - top);
        }
        shared.top[column] = top;
        shared.sum[column] = total;
      }
    }
    // Each gives the other's half of the values away, adds what it gets to its own half, and leaves the sum there.
    const auto give = [&](float4 &sum, int j, float4 mine) {
      sum = make_float4(mine.x * factor[j], mine.y * factor[j], mine.z * factor[j], mine.w * factor[j]);
    };
    const auto add = [&](float4 &sum, int j, float4 mine) {
      sum = make_float4(sum.x + mine.x * factor[j], sum.y + mine.y * factor[j], sum.z + mine.z * factor[j],
                        sum.w + mine.w * factor[j]);
    };
    if (wg == 0) {
      each(WORDS / 2, WORDS, give);
    } else {
      each(0, WORDS / 2, give);
    }
    named_barrier<kBarrierConsumers, kConsumers>();
    if (wg == 0) {
      each(0, WORDS / 2, add);
    } else {
      each(WORDS / 2, WORDS, add);
    }
    finish_piece(p, exchange, shared.rows, tensor_scale(p), pieces_done);
    ++pieces_done;
  }
  fill_spare_rows(p, K::D_LATENT);
  // Shared memory must outlive its remote readers.
  if (pieces_done > 0 && shared.end.ctas > 1) mbarrier_wait_cluster(barriers.parts_read(), (pieces_done - 1) & 1);
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) e4m3_split_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  const uint32_t base = smem_address(shared_raw);
  const E4m3Barriers<K> barriers{base};
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x < K::SLOTS) {
    // All threads of a warp announce scales, which they copy, beside the one that announces the boxes.
    mbarrier_init(barriers.full(threadIdx.x), gathers(p) ? 128 : K::SCALES_BESIDE ? 33 : 1);
    mbarrier_init(barriers.empty(threadIdx.x), 4);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(barriers.parts_ready(), 8 * cluster_size());
    mbarrier_init(barriers.parts_read(), 8 * cluster_size());
    if (!gathers(p) && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  WorkerRecord &record = reinterpret_cast<typename K::Shared *>(shared_raw)->record;
  begin_kernel(p, record);

  if (warpgroup == 0) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    fill_e4m3_rings<K>(p, record, base);
  } else {
    set_registers_more<K::CONSUMER_REGISTERS>();
    e4m3_split_consumer<K>(p, shared_raw, warpgroup - 1);
  }
}

struct e4m3_split {
  template <typename, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = E4m3Split<ROWS, D_LATENT, D_ROPE, COPY>;
    return {reinterpret_cast<const void *>(&e4m3_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
