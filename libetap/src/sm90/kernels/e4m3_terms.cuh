// Decode of FP8 caches for BF16 queries, on FP8 tensor cores without rounding the queries: the KV context on WGMMA's M
// as it lies in the cache, queries and probabilities on its N as two E4M3 terms each (e4m3_terms.cuh).
//
//     dims ->                     2N columns                              dims of V
//    .-------------.             .--------.    S = hi + lo / 16         .-------------.
//    | K, bytes in | x [hi; lo]^T = | hi lo | -> softmax -> P^T  -->    | V^T, bytes  | x [hi; lo]^T = T [dims, 2N]
//    | shared mem. |   of Q      '--------'     [hi; lo] in           | in registers|   of P        O^T += hi + lo / 16
//    '-------------'                            shared memory           '-------------'
//
// Reason for the shape. What holds FP8 caches in e4m3_split.cuh is the conversion of every byte to FP16, twice: cvt and
// its kin issue once in two cycles. Here no instruction touches K, and V's bytes are only moved (128 prmt a thread and
// block). Twice the columns cost nothing: WGMMAs of so few columns take as long as A's rows do. A BF16 value fits two
// terms exactly.
//
// FP8 WGMMA keeps about 13 bits of its sums. So QK sums 128 dims in the tensor cores and adds these in FP32, and PV of
// a block begins at zero and is added to O^T in FP32. A sum then keeps 1e-4 of a logit's size, PV 2e-4.
//
// A tile has up to 32 rows, whose O^T fits one warpgroup (4 N registers a thread): the two consumer warpgroups take KV
// blocks in turn, as in token_split.cuh, each with a ring of its own.
//
// Group scales, one for each token and 128 dims: QK's sums are of 128 dims anyway, and are multiplied. In PV they go
// into P^T, which becomes four, one for each 128 dims of V; what is common to a token's scales is a power of two that
// the logit takes (TokenScale), so that P^T stays within E4M3 whatever they are.
//
// Softmax, clusters and the end of a piece are token_split.cuh's (softmax.cuh, piece.cuh).
#pragma once

#include "sm90/kernel.h"
#include "sm90/parts/e4m3_ring.cuh"
#include "sm90/parts/e4m3_terms.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

template <int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY>
struct E4m3Terms {
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr bool SCALED = COPY != KvCopy::kE4m3;              // group scales, from
  static constexpr bool SCALES_BESIDE = COPY == KvCopy::kE4m3Group;  // an array of their own, or
  static constexpr bool ROPE_BF16 = COPY == KvCopy::kE4m3_656;       // the row, with BF16 rope values or none
  static_assert(!SCALED || (D_LATENT == 512 && D_ROPE == (COPY == KvCopy::kE4m3_528 ? 0 : 64)));
  static_assert(N % 8 == 0 && N <= 32 && D_LATENT % 128 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 384;
  static constexpr int CONSUMER_REGISTERS = N <= 24 || D_LATENT == 256 ? 224 : SCALES_BESIDE ? 216 : 232;
  static constexpr int PRODUCER_REGISTERS = 504 - 2 * CONSUMER_REGISTERS;
  // O^T leaves so few that what a thread's number gives is worked out again where it is needed.
  static constexpr bool FEW_REGISTERS = N > 16 || SCALES_BESIDE;
  static constexpr int TILES = D_LATENT / 64, GROUPS = D_LATENT / 128;
  // Sums of QK in flight, of 128 dims each; tiles of O^T multiplied at once, and sets of these, beside O^T's registers.
  static constexpr int SUMS = N <= 16 ? GROUPS : 1;
  // With many rows the maxima are asked about before P is written, at the price of a barrier: then P is written once
  // only, and its sums are not kept apart.
  static constexpr bool ASK_FIRST = N > 16;
  static constexpr int TILES_AT_ONCE = N <= 24 ? 2 : 1, SETS = N <= 16 ? 2 : 1;
  // A KV block is boxes of 64 bytes a token, 4 KB each. Where there are group scales those of the rope part, beside
  // which the scales may lie, come first.
  static constexpr int ROW_BYTES = ROPE_BF16 ? 656 : COPY == KvCopy::kE4m3_528 ? 528 : D_LATENT + D_ROPE;
  static constexpr int BOXES = (ROW_BYTES + 63) / 64, FIRST_BOXES = SCALED ? BOXES - TILES : 0;
  __device__ static int column_of(int box) { return (box < FIRST_BOXES ? box + TILES : box - FIRST_BOXES) * 64; }
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES;
  static constexpr int SCALES_AT = CHUNK_BOXES * kFp8BoxBytes;  // in a block's first slot: [64 tokens][4]
  static constexpr int SLOT_BYTES = SCALES_AT + (SCALES_BESIDE ? kBlockTokens * 16 : 0);

  // Q and P^T, of the two warpgroups and perhaps of even and odd blocks, are dead at the end of a piece; the exchange
  // of O^T lies over them.
  using X = Exchange<N, D_LATENT>;
  static constexpr int Q_BOX_BYTES = 2 * N * 64, Q_BYTES = (D_LATENT + D_ROPE) / 64 * Q_BOX_BYTES;
  static constexpr int P_COPY_BYTES = 2 * N * 64, P_BYTES = (SCALED ? GROUPS : 1) * P_COPY_BYTES;
  static constexpr int P_BUFFERS = ASK_FIRST ? 1 : 2;  // of a warpgroup: who has asked is through with the block before
  static constexpr int LOOP_BYTES = Q_BYTES + 2 * P_BUFFERS * P_BYTES;
  static constexpr int WORK_BYTES = X::BYTES > LOOP_BYTES ? X::BYTES : LOOP_BYTES;
  static constexpr int STATS_BYTES =
      13 * N * 4;  // sums or maxima [2][4][N], tops [2][N], the CTA's [2][N], logit scales [N]
  static constexpr int ROWS_BYTES = N * static_cast<int>(sizeof(RowInfo)), ASIDE_BYTES = 8 * 8;  // [8] warps
  static constexpr int MAX_SLOTS = 16;
  static constexpr int BARRIER_BYTES = (2 * MAX_SLOTS + 2) * 8 + static_cast<int>(sizeof(PieceEnd) + sizeof(Fp8Loop));
  static constexpr int SHARED_LIMIT = 232448;
  static constexpr int SLOTS_THAT_FIT =
      (SHARED_LIMIT - WORK_BYTES - STATS_BYTES - ROWS_BYTES - ASIDE_BYTES - BARRIER_BYTES) / SLOT_BYTES;
  // One ring a warpgroup; token_split.cuh says why they don't share one.
  static constexpr int RING_SLOTS = (SLOTS_THAT_FIT < MAX_SLOTS ? SLOTS_THAT_FIT : MAX_SLOTS) / 2;
  static constexpr int SLOTS = 2 * RING_SLOTS;

  static constexpr int WORK_AT = SLOTS * SLOT_BYTES, P_AT = WORK_AT + Q_BYTES;
  static constexpr int STATS_AT = WORK_AT + WORK_BYTES, ROWS_AT = STATS_AT + STATS_BYTES;
  static constexpr int ASIDE_AT = ROWS_AT + ROWS_BYTES, BARRIER_AT = ASIDE_AT + ASIDE_BYTES;
  static constexpr int SHARED_BYTES = BARRIER_AT + BARRIER_BYTES;
  static_assert(RING_SLOTS >= CHUNKS && SHARED_BYTES <= SHARED_LIMIT && BARRIER_AT % 8 == 0 && WORK_AT % 1024 == 0);
};

// What a warp must still know at the end of a piece, where O^T leaves no registers for it: in shared memory.
struct KeptAside {
  int unit;
  uint32_t pieces_done;
};

template <typename K>
__device__ __forceinline__ void e4m3_terms_consumer(const DecodeParams &p, char *shared, int wg) {
  constexpr int N = K::N;
  using Softmax = ColumnSoftmax<__half, N>;
  const uint32_t base = smem_address(shared);
  const E4m3Barriers<K> barriers{base + K::BARRIER_AT};
  const int ring_slot0 = wg * K::RING_SLOTS;
  float *const stats = reinterpret_cast<float *>(shared + K::STATS_AT);
  float *const sums = stats + wg * 4 * N;      // [4][N] of this warpgroup, and maxima
  float *const tops = stats + 8 * N + wg * N;  // [N]: what exponents refer to, 2^kTermLift below the maxima
  float *const cta_stats = stats + 10 * N;     // [2][N]: maximum, sum
  float *const logit_scale = stats + 12 * N;   // [N]
  RowInfo *const row_info = reinterpret_cast<RowInfo *>(shared + K::ROWS_AT);
  Fp8Loop *const loop = reinterpret_cast<Fp8Loop *>(shared + K::BARRIER_AT + E4m3Barriers<K>::LOOP_AT);
  const typename K::X exchange{base + K::WORK_AT,
                               base + K::STATS_AT + 10 * N * 4,
                               base + K::STATS_AT + 11 * N * 4,
                               barriers.parts_ready(),
                               barriers.parts_read(),
                               reinterpret_cast<PieceEnd *>(shared + K::BARRIER_AT + E4m3Barriers<K>::PIECE_END_AT)};
  RingPosition<K::RING_SLOTS> ring = {0, 0};
  uint32_t pieces_done = 0;

  for (Pieces pieces(p); !pieces.done(); pieces.next(), pieces.read_record()) {
    const PieceContext context = pieces.context(N);
    if (context.rows <= 0) continue;
    const uint32_t cluster_size = reread_cluster_size();
    // The remote readers of the last piece's exchange must be done before Q lands on it.
    if (cluster_size > 1 && pieces_done > 0) mbarrier_wait_cluster(barriers.parts_read(), (pieces_done - 1) & 1);
    const int thread = opaque(static_cast<int>(threadIdx.x)) % 128;
    if (thread < N) tops[thread] = kNoMaximum;
    if (thread == 0) {
      *loop = Fp8Loop{context.kv_end, context.piece.block_end, K::ROPE_BF16 ? tensor_scale(p) : 1.f,
                      context.first_sum(), context.table};
    }
    // The scale of a tensor is not the BF16 rope part's.
    load_query_terms<N, K::D_LATENT, K::D_ROPE, K::ROPE_BF16>(p, context, base + K::WORK_AT, row_info, exchange.end,
                                                              p.scale_log2 * (K::ROPE_BF16 ? 1.f : tensor_scale(p)),
                                                              logit_scale);

    float O[K::TILES][N / 2];
    float l[N / 4];  // of the thread's columns 8 j + 2 quad + e, at 2 j + e
#pragma unroll
    for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) l[i] = loop->first_sum;

    const auto aside = [&] {
      return reinterpret_cast<volatile KeptAside *>(shared + K::ASIDE_AT) +
             (opaque(static_cast<int>(threadIdx.x)) / 32 - 4);
    };
    if constexpr (K::FEW_REGISTERS) {
      if (this_thread<K>().lane == 0) {
        aside()->unit = pieces.unit;
        aside()->pieces_done = pieces_done;
      }
      __syncwarp();
    }
    const uint32_t q_low = __shfl_sync(0xffffffffu, (base + K::WORK_AT) >> 4, 0);
    [[maybe_unused]] int odd_block = 0;
    [[maybe_unused]] bool first_block = true;  // there is no maximum yet
    int block = context.piece.block_begin + static_cast<int>(reread_cluster_rank() + wg * cluster_size);
    for (; block < loop->block_end; block += 2 * static_cast<int>(reread_cluster_size())) {
      const int tokens = loop->kv_end - block * kBlockTokens;
      const auto slot_of_chunk = [&](int c) { return ring_slot0 + ring.further(c).slot; };
      const auto wait_for_chunk = [&](int c) {
        mbarrier_wait(barriers.full(slot_of_chunk(c)), ring.further(c).parity);
      };
      const auto box_at = [&](int box) {
        return base + slot_of_chunk(box / K::CHUNK_BOXES) * K::SLOT_BYTES + box % K::CHUNK_BOXES * kFp8BoxBytes;
      };
      if (tokens < kBlockTokens) {
        const Fp8Thread me = this_thread<K>();
        // V and scales beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked
        // below.
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) wait_for_chunk(c);
        for (int r = tokens + me.warp; r < kBlockTokens; r += 4) {
#pragma unroll
          for (int c = 0; c < K::CHUNKS; ++c) {
            if (me.lane < K::CHUNK_BOXES * 4) {
              *reinterpret_cast<uint4 *>(shared + slot_of_chunk(c) * K::SLOT_BYTES + me.lane / 4 * kFp8BoxBytes +
                                         r * 64 + me.lane % 4 * 16) = make_uint4(0, 0, 0, 0);
            }
          }
        }
        named_barrier(kBarrierFp8 + wg, 128);
      }

      // ---- S^T = K Q^T, 128 dims at a time --------------------------------------------------------------------------
      constexpr int PARTS = K::GROUPS + K::SCALES_BESIDE;  // the rope part beside group scales is the last
      float S[N / 2], part[K::SUMS][N];
      // Of the thread's first token [4], and those of the second, which is eight on, SECOND later.
      constexpr int SECOND = K::SCALES_BESIDE ? 8 * 4 : 8 * 16;
      [[maybe_unused]] const auto scales_at = [&] {
        const Fp8Thread me = this_thread<K>();
        const int token = 16 * me.warp + me.group;
        return reinterpret_cast<const float *>(
            shared + slot_of_chunk(0) * K::SLOT_BYTES +
            (K::SCALES_BESIDE ? K::SCALES_AT + token * 16 : fp8_chunk_offset(token, 0)));
      };
      // The next box, in the order in which they come.
      const auto multiply_box = [&](float (&sum)[N], int box, int q_box, bool accumulate) {
        const uint32_t k_low = __shfl_sync(0xffffffffu, box_at(box) >> 4, 0);
        if (box % K::CHUNK_BOXES == 0) {
          wait_for_chunk(box / K::CHUNK_BOXES);
          if (gathers(p)) fence_proxy_async();
        }
        if (box % K::CHUNK_BOXES == 0 || !accumulate) {
          wgmma_fence_registers(sum);
          wgmma_fence();
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          WgmmaE4m3<2 * N>::mma(sum, descriptor_of_64_bytes(k_low + 2 * k),
                                descriptor_of_64_bytes(q_low + q_box * (K::Q_BOX_BYTES >> 4) + 2 * k),
                                accumulate || k > 0);
        }
      };
      const auto begin_part = [&](int i) {
        float (&sum)[N] = part[i % K::SUMS];
        wgmma_fence_registers(sum);
        wgmma_fence();
        if (i == K::GROUPS) {
          multiply_box(sum, 0, K::TILES, false);
        } else {
          multiply_box(sum, K::FIRST_BOXES + 2 * i, 2 * i, false);
          multiply_box(sum, K::FIRST_BOXES + 2 * i + 1, 2 * i + 1, true);
          if (!K::SCALED && K::D_ROPE > 0 && i == K::GROUPS - 1) multiply_box(sum, K::TILES, K::TILES, true);
        }
        wgmma_commit();
      };
      const auto add_part = [&](int i) {
        float (&sum)[N] = part[i % K::SUMS];
        wgmma_fence_registers(sum);
        if (K::ROPE_BF16 && i == 0) wgmma_fence_registers(S);
        float first = 1.f, second = 1.f;
        if (K::SCALED && i < K::GROUPS) {
          const float *const scales = scales_at() + i;
          first = scales[0] * loop->latent_scale;
          second = scales[SECOND] * loop->latent_scale;
        }
#pragma unroll
        for (int j = 0; j < N / 2; ++j) {
          const float joined = sum[j] + sum[j + N / 2] * (1.f / kTermScale);
          const float scaled = K::SCALED ? joined * (j % 4 < 2 ? first : second) : joined;
          S[j] = !K::ROPE_BF16 && i == 0 ? scaled : S[j] + scaled;
        }
      };
      if constexpr (K::SCALED) {
        wait_for_chunk(0);
        if (gathers(p)) fence_proxy_async();
      }
      if constexpr (K::ROPE_BF16) {
        uint32_t rope[4][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          RopeRows bytes;
          bytes.load(shared + slot_of_chunk(0) * K::SLOT_BYTES + RopeRows::offset(this_thread<K>().index), half);
          bytes.fragments(rope[2 * half], rope[2 * half + 1]);
          wgmma_fence_registers(rope[2 * half]);
          wgmma_fence_registers(rope[2 * half + 1]);
        }
        wgmma_fence_registers(S);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<__nv_bfloat16, N>::mma(S, rope[k], descriptor(q_low + K::TILES * (K::Q_BOX_BYTES >> 4) + 2 * k), k > 0);
        }
        wgmma_commit();
        if constexpr (K::SUMS == 1) {  // gives the fragments' registers back
          wgmma_wait<0>();
          wgmma_fence_registers(S);
        }
      }
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        if (i >= K::SUMS) {
          wgmma_wait<K::SUMS - 1>();
          add_part(i - K::SUMS);
        }
        begin_part(i);
      }
      constexpr int LEFT = PARTS < K::SUMS ? PARTS : K::SUMS;
#pragma unroll
      for (int i = PARTS - LEFT; i < PARTS; ++i) {
        wgmma_wait_until(PARTS - 1 - i);
        add_part(i);
      }

      // V of the first 128 dims is on its way during the softmax.
      ValueWords value;
      const auto load_values = [&](int v) {
        const int box = K::FIRST_BOXES + 2 * v;
        const Fp8Thread me = this_thread<K>();
        value.load((me.warp < 2 ? box_at(box) : box_at(box + 1)) + ValueWords::offset(me.index));
      };
      if constexpr (N <= 24) load_values(0);

      // ---- softmax --------------------------------------------------------------------------------------------------
      const Fp8Thread me = this_thread<K>();
      float2 exponents = {0.f, 0.f}, weights = {1.f, 1.f};
      if constexpr (K::SCALED) {
        const float *const scales = scales_at();
        const TokenScale first(*reinterpret_cast<const float4 *>(scales)),
            second(*reinterpret_cast<const float4 *>(scales + SECOND));
        exponents = make_float2(first.exponent, second.exponent);
        weights = make_float2(first.inverse, second.inverse);
      }
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 scale = *reinterpret_cast<const float2 *>(logit_scale + 8 * j + 2 * me.quad);
        S[4 * j] = S[4 * j] * scale.x + exponents.x;
        S[4 * j + 1] = S[4 * j + 1] * scale.y + exponents.x;
        S[4 * j + 2] = S[4 * j + 2] * scale.x + exponents.y;
        S[4 * j + 3] = S[4 * j + 3] * scale.y + exponents.y;
      }
      if ((block + 1) * kBlockTokens > row_info[0].limit)  // the first row sees the fewest tokens
        Softmax::mask(S, block * kBlockTokens + 16 * me.warp + me.group, row_info);
      if (p.lists) {
        const int place = block * kBlockTokens + 16 * me.warp + me.group;
        Softmax::mask_holes(S, is_hole(loop->list, place, loop->kv_end), is_hole(loop->list, place + 8, loop->kv_end));
      }
      const uint32_t p_at = base + K::P_AT + (K::P_BUFFERS * wg + (K::P_BUFFERS == 2 ? odd_block : 0)) * K::P_BYTES;
      const int quad = this_thread<K>().quad;
      float m[N / 4];
#pragma unroll
      for (int j = 0; j < N / 4; ++j) m[j] = tops[8 * (j / 2) + 2 * quad + j % 2];
      const auto exponentiate = [&](float (&sum)[N / 4]) {
        float2 P[N / 4];
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
          const int at = 4 * (j / 2) + j % 2;
          P[j] = make_float2(exp2_approx(S[at] - m[j]), exp2_approx(S[at + 2] - m[j]));
          sum[j] += P[j].x * weights.x + P[j].y * weights.y;
        }
        if constexpr (K::SCALED) {
          const float *const scales = scales_at();
#pragma unroll
          for (int g = 0; g < 4; ++g) {
            const float first = scales[g] * weights.x, second = scales[SECOND + g] * weights.y;
            float2 scaled[N / 4];
#pragma unroll
            for (int j = 0; j < N / 4; ++j) scaled[j] = make_float2(P[j].x * first, P[j].y * second);
            store_terms<N>(scaled, p_at + g * K::P_COPY_BYTES);
          }
        } else {
          store_terms<N>(P, p_at);
        }
        fence_proxy_async();
      };
      const auto move_maxima = [&] {
        const Fp8Thread me = this_thread<K>();
        Softmax::store_maxima(S, sums + me.warp * N);
        named_barrier(kBarrierFp8 + wg, 128);
        float factor[N / 4];
        Softmax::template update<kTermLift>(sums, m, l, factor);
#pragma unroll
        for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
          for (int j = 0; j < N / 2; ++j) O[t][j] *= factor[2 * (j / 4) + j % 2];
        }
        if (me.warp == 0 && me.group == 0) {
#pragma unroll
          for (int j = 0; j < N / 4; ++j) tops[8 * (j / 2) + 2 * me.quad + j % 2] = m[j];
        }
      };
      if constexpr (K::ASK_FIRST) {
        if (named_barrier_any(kBarrierFp8 + wg, 128, Softmax::above(S, m))) move_maxima();
        exponentiate(l);
        named_barrier(kBarrierFp8 + wg, 128);
      } else {
        float sum[N / 4] = {};
        bool above = first_block;
        first_block = false;
        odd_block ^= 1;
        if (!above) {
          exponentiate(sum);
          above = named_barrier_any(kBarrierFp8 + wg, 128, Softmax::above(S, m));
        }
        if (above) {
          move_maxima();
#pragma unroll
          for (float &x : sum) x = 0.f;
          exponentiate(sum);
          named_barrier(kBarrierFp8 + wg, 128);
        }
#pragma unroll
        for (int j = 0; j < N / 4; ++j) l[j] += sum[j];
      }

      // ---- O^T += V^T P^T, 128 dims at a time -----------------------------------------------------------------------
      const uint32_t p_low = __shfl_sync(0xffffffffu, p_at >> 4, 0);
      if constexpr (N > 24) load_values(0);
      uint32_t a[K::SETS][2][2][4];
      float T[K::SETS][K::TILES_AT_ONCE][N];
      const auto multiply_tile = [&](float (&t)[N], const uint32_t (&bytes)[2][4], int v) {
        const uint32_t p_of_v = p_low + (K::SCALED ? v * (K::P_COPY_BYTES >> 4) : 0);
#pragma unroll
        for (int k = 0; k < 2; ++k) WgmmaE4m3<2 * N>::mma(t, bytes[k], descriptor_of_64_bytes(p_of_v + 2 * k), k > 0);
      };
      const auto add_tile = [&](int tile, float (&t)[N]) {
        wgmma_fence_registers(t);
#pragma unroll
        for (int j = 0; j < N / 2; ++j) O[tile][j] += t[j] + t[j + N / 2] * (1.f / kTermScale);
      };
#pragma unroll
      for (int v = 0; v < K::GROUPS; ++v) {
        const int set = v % K::SETS;
        value.transpose(a[set]);
        if (v + 1 == K::GROUPS) {  // all of the block has been read
          __syncwarp();
          if (this_thread<K>().lane == 0) {
#pragma unroll
            for (int c = 0; c < K::CHUNKS; ++c) mbarrier_arrive(barriers.empty(slot_of_chunk(c)));
          }
        }
        if constexpr (K::TILES_AT_ONCE == 2) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            wgmma_fence_registers(T[set][x]);
            wgmma_fence_registers(a[set][x][0]);
            wgmma_fence_registers(a[set][x][1]);
          }
          wgmma_fence();
          multiply_tile(T[set][0], a[set][0], v);
          multiply_tile(T[set][1], a[set][1], v);
          wgmma_commit();
          if (v + 1 < K::GROUPS) load_values(v + 1);
          if constexpr (K::SETS == 2) {
            if (v > 0) {
              wgmma_wait<1>();
              add_tile(2 * v - 2, T[set ^ 1][0]);
              add_tile(2 * v - 1, T[set ^ 1][1]);
            }
          } else {
            wgmma_wait<0>();
            add_tile(2 * v, T[0][0]);
            add_tile(2 * v + 1, T[0][1]);
          }
        } else {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            wgmma_fence_registers(T[0][0]);
            wgmma_fence_registers(a[0][x][0]);
            wgmma_fence_registers(a[0][x][1]);
            wgmma_fence();
            multiply_tile(T[0][0], a[0][x], v);
            wgmma_commit();
            if (x == 1 && v + 1 < K::GROUPS) load_values(v + 1);
            wgmma_wait<0>();
            add_tile(2 * v + x, T[0][0]);
          }
        }
      }
      if constexpr (K::SETS == 2) {
        constexpr int LAST = (K::GROUPS - 1) % 2;
        wgmma_wait<0>();
        add_tile(K::TILES - 2, T[LAST][0]);
        add_tile(K::TILES - 1, T[LAST][1]);
      }
      ring = ring.further(K::CHUNKS);
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
    // Values of d that the thread holds, four at a time: of column 8 j + 2 quad + e, from 128 v on.
    float *const values = reinterpret_cast<float *>(shared + K::WORK_AT) + 2 * quad * K::X::ROW + 32 * warp + 4 * group;
    const auto each = [&](int v_begin, int v_end, auto action) {
#pragma unroll
      for (int v = v_begin; v < v_end; ++v) {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
          const int at = 4 * (j / 2) + j % 2;
          action(*reinterpret_cast<float4 *>(values + (8 * (j / 2) + j % 2) * K::X::ROW + 128 * v), j,
                 make_float4(O[2 * v][at], O[2 * v][at + 2], O[2 * v + 1][at], O[2 * v + 1][at + 2]));
        }
      }
    };
    float factor[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const int column = 8 * (j / 2) + 2 * quad + j % 2;
      const float top = fmaxf(stats[8 * N + column], stats[9 * N + column]);
      factor[j] = exp2_approx(tops[column] - top);
      if (wg == 0 && warp == 0 && group == 0) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          float of_wg = 0.f;
#pragma unroll
          for (int i = 0; i < 4; ++i) of_wg += stats[(w * 4 + i) * N + column];
          total += of_wg * exp2_approx(stats[(8 + w) * N + column] - top);
        }
        cta_stats[column] = top;
        cta_stats[N + column] = total;
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
      each(K::GROUPS / 2, K::GROUPS, give);
    } else {
      each(0, K::GROUPS / 2, give);
    }
    named_barrier<kBarrierConsumers, kConsumers>();
    if (wg == 0) {
      each(0, K::GROUPS / 2, add);
    } else {
      each(K::GROUPS / 2, K::GROUPS, add);
    }
    if constexpr (K::FEW_REGISTERS) {
      pieces.unit = aside()->unit;
      pieces_done = aside()->pieces_done;
    }
    finish_piece(p, exchange, row_info, tensor_scale(p), reread_cluster_size(), reread_cluster_rank(), pieces_done);
    ++pieces_done;
  }
  fill_spare_rows(p, K::D_LATENT);
  // Shared memory must outlive its remote readers.
  if (reread_cluster_size() > 1 && pieces_done > 0) mbarrier_wait_cluster(barriers.parts_read(), (pieces_done - 1) & 1);
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) e4m3_terms_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared[];
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  begin_e4m3_kernel<K>(p, smem_address(shared));

  if (warpgroup == 0) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    e4m3_produce<K>(p, smem_address(shared));
  } else {
    set_registers_more<K::CONSUMER_REGISTERS>();
    e4m3_terms_consumer<K>(p, shared, warpgroup - 1);
  }
}

struct e4m3_terms {
  static constexpr bool kE4m3 = true;
  template <typename, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = E4m3Terms<ROWS, D_LATENT, D_ROPE, COPY>;
    return {reinterpret_cast<const void *>(&e4m3_terms_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
