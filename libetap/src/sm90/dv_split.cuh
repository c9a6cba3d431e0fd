// Decode for 25 to 64 query rows a tile (FP8: 17 to 32): the KV context on WGMMA's M, the query rows on its N, the dims
// of V shared out.
//
//                 K block [64, 576] in shared memory                       the same bytes, read MN-major
//               .---------------------------------.                 .--------------------.---------------------.
//               | box | box | ...           | box |                 | V^T dims 0 .. 255  | V^T dims 256 .. 511 |
//               '---------------------------------'                 '--------------------'---------------------'
//   warpgroup 1   x Q^T [576, first rows]  -> S^T -> P^T \            x P^T [64, N]           (warpgroup 1)
//   warpgroup 2   x Q^T [576, other rows]  -> S^T -> P^T  > [64, N]                           x P^T [64, N] (warpgroup
//   2)
//                                                        /
//
// Reason for the shape. With more rows O^T [512, N] fills one warpgroup's registers (4 N a thread), and at 32 rows this
// shape is already faster, so both work on the same block: for QK and softmax each takes half of the query rows, for PV
// each takes half of V's dims and all rows. P^T changes hands through shared memory at one barrier a block. Only one
// block is held at a time, which leaves the rest of the ring - two blocks next to 74 KB of queries - to the copies in
// flight; a box is released as soon as its last reader is done.
//
// Work, clusters and the end of a piece are token_split.cuh's (planner.h, piece.cuh), with one difference: the exchange
// of O lies over the ring, so the producer begins the next piece after the exchange.
#pragma once

#include <type_traits>

#include "kv_expand.cuh"
#include "kv_pages.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace etap::sm90 {

template <typename T_, int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY_>
struct DvSplit {
  using T = T_;
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr KvCopy COPY = COPY_;
  static constexpr int ROWS_0 = (N + 15) / 16 * 8, ROWS_1 = N - ROWS_0;  // of S^T: warpgroup 1's, warpgroup 2's
  static_assert(N % 8 == 0 && ROWS_1 > 0 && D_LATENT % 128 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = threads(COPY);
  static constexpr int CONSUMER_REGISTERS = expands(COPY) ? 136 : N <= 48 ? 200 : 224;
  static constexpr int PRODUCER_REGISTERS = producer_registers(COPY, CONSUMER_REGISTERS);
  static constexpr int TILES = D_LATENT / 64, HALF = TILES / 2;
  static constexpr int BOXES = (D_LATENT + D_ROPE) / 64;
  static constexpr int BOX_BYTES = kBlockTokens * 128, BLOCK_BYTES = BOXES * BOX_BYTES;
  static constexpr int Q_BYTES = BOXES * N * 128, P_BYTES = N * 128;
  using X = Exchange<N, D_LATENT>;

  static constexpr int MAX_STAGES = D_LATENT == 512 ? 2 : 4;
  static constexpr int SMALL_BYTES = 7 * N * 4 + N * static_cast<int>(sizeof(RowInfo)) +
                                     (2 * MAX_STAGES * BOXES + 3) * 8 + 8 + static_cast<int>(sizeof(PieceEnd));
  static constexpr int SHARED_LIMIT = 232448;
  static constexpr int STAGES_THAT_FIT = (SHARED_LIMIT - Q_BYTES - P_BYTES - SMALL_BYTES) / BLOCK_BYTES;
  static constexpr int STAGES = STAGES_THAT_FIT < MAX_STAGES ? STAGES_THAT_FIT : MAX_STAGES;
  static constexpr int RING_BYTES = STAGES * BLOCK_BYTES;

  static constexpr int Q_AT = RING_BYTES, P_AT = Q_AT + Q_BYTES;
  static constexpr int MAXIMA_AT = P_AT + P_BYTES;  // [4][rows of a warpgroup] twice, and later the sums
  static constexpr int FACTORS_AT = MAXIMA_AT + 4 * N * 4;
  static constexpr int TOPS_AT = FACTORS_AT + N * 4, SUMS_AT = TOPS_AT + N * 4;
  static constexpr int ROWS_AT = SUMS_AT + N * 4;
  static constexpr int BARRIER_AT = ROWS_AT + N * static_cast<int>(sizeof(RowInfo));
  static constexpr int SHARED_BYTES = MAXIMA_AT + SMALL_BYTES;
  static_assert(STAGES >= 2 && X::BYTES <= Q_AT + Q_BYTES + P_BYTES && SHARED_BYTES <= SHARED_LIMIT &&
                BARRIER_AT % 8 == 0);
};

// Shared-memory addresses of the barriers.
template <typename K>
struct DvSplitBarriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int stage, int box) const { return base + 16 * (stage * K::BOXES + box); }
  __device__ __forceinline__ uint32_t empty(int stage, int box) const { return full(stage, box) + 8; }
  __device__ __forceinline__ uint32_t parts_ready() const { return full(K::MAX_STAGES, 0); }
  __device__ __forceinline__ uint32_t parts_read() const { return parts_ready() + 8; }
  __device__ __forceinline__ uint32_t ring_free() const { return parts_ready() + 16; }
  static constexpr int PIECE_END_AT = 16 * K::MAX_STAGES * K::BOXES + 24;
};

// What both warpgroups do, each with its own rows of S^T (ROWS from ROW0 on) and its own half of V's dims.
template <typename K, int WG, int ROWS, int ROW0>
__device__ __forceinline__ void dv_split_consumer(const DecodeParams &p, char *shared, uint32_t base,
                                                  uint32_t cluster_size, uint32_t rank) {
  using T = typename K::T;
  using Softmax = ColumnSoftmax<T, ROWS>;
  constexpr int N = K::N;
  const int lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const DvSplitBarriers<K> barriers{base + K::BARRIER_AT};
  float *const maxima = reinterpret_cast<float *>(shared + K::MAXIMA_AT) + 4 * ROW0;  // [4][ROWS]
  float *const factors = reinterpret_cast<float *>(shared + K::FACTORS_AT);           // [N]
  RowInfo *const row_info = reinterpret_cast<RowInfo *>(shared + K::ROWS_AT);
  PieceEnd *const piece_end = reinterpret_cast<PieceEnd *>(shared + K::BARRIER_AT + DvSplitBarriers<K>::PIECE_END_AT);
  const typename K::X exchange{
      base, base + K::TOPS_AT, base + K::SUMS_AT, barriers.parts_ready(), barriers.parts_read(), piece_end};
  const float kv_scale = kv_scale_of<K::COPY>(p), scale_log2 = p.scale_log2 * kv_scale;
  const int ctas = static_cast<int>(cluster_size);
  int stage = 0;
  uint32_t parity = 0, pieces_done = 0;

  for (Pieces pieces(p); !pieces.done(); pieces.next()) {
    const PieceContext context = pieces.context(N);
    if (context.rows <= 0) continue;
    load_query<T, N, K::D_LATENT, K::D_ROPE>(p, context, base + K::Q_AT, row_info, piece_end);

    float O[K::HALF][N / 2];
    float m[ROWS / 4], l[ROWS / 4];
#pragma unroll
    for (int t = 0; t < K::HALF; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) {
      m[i] = kNoMaximum;
      l[i] = 0.f;
    }

    const uint32_t q_low = (base + K::Q_AT + ROW0 * 128) >> 4, p_low = (base + K::P_AT) >> 4;
    const int first = context.piece.block_begin + static_cast<int>(rank);
    for (int block = first; block < context.piece.block_end; block += ctas) {
      const uint32_t block_low = __shfl_sync(0xffffffffu, (base + stage * K::BLOCK_BYTES) >> 4, 0);
      float S[ROWS / 2];
#pragma unroll
      for (int box = 0; box < K::BOXES; ++box) {
        mbarrier_wait(barriers.full(stage, box), parity);
        if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
        wgmma_fence_registers(S);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<T, ROWS>::template mma<false>(S, descriptor(block_low + box * (K::BOX_BYTES >> 4) + 2 * k),
                                              descriptor(q_low + box * (N * 128 >> 4) + 2 * k), box + k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence_registers(S);
      // Boxes that this warpgroup does not need for PV.
      if (lane < K::BOXES && (lane < WG * K::HALF || lane >= (WG + 1) * K::HALF))
        mbarrier_arrive(barriers.empty(stage, lane));

      const int tokens = context.kv_end - block * kBlockTokens;
      if (tokens < kBlockTokens) {
        // V beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked.
        for (int r = tokens + warp; r < kBlockTokens; r += 4) {
          for (int i = lane; i < K::HALF * 8; i += 32) {
            *reinterpret_cast<uint4 *>(shared + stage * K::BLOCK_BYTES + (WG * K::HALF + i / 8) * K::BOX_BYTES +
                                       r * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
          }
        }
      }
      Softmax::scale_and_mask(S, scale_log2, block, context.first_limit, row_info + ROW0);

      float sum[ROWS / 4];
      named_barrier<kBarrierConsumers, kConsumers>();  // the last block's PV has read P^T
      bool above = block == first;
      if (!above) {
        Softmax::exponentiate(S, m, sum, base + K::P_AT + ROW0 * 128);
        above = named_barrier_any(kBarrierConsumers, kConsumers, Softmax::above(S, m));
      }
      if (above) {
        Softmax::store_maxima(S, maxima + warp * ROWS);
        named_barrier<kBarrierConsumers, kConsumers>();
        float factor[ROWS / 4];
        Softmax::update(maxima, m, l, factor);
        if (warp == 0 && group == 0) {
#pragma unroll
          for (int i = 0; i < ROWS / 4; ++i) factors[ROW0 + 8 * (i / 2) + 2 * quad + i % 2] = factor[i];
        }
        Softmax::exponentiate(S, m, sum, base + K::P_AT + ROW0 * 128);
        named_barrier<kBarrierConsumers, kConsumers>();
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          const float2 f = *reinterpret_cast<const float2 *>(factors + 8 * j + 2 * quad);
#pragma unroll
          for (int t = 0; t < K::HALF; ++t) {
            O[t][4 * j] *= f.x;
            O[t][4 * j + 1] *= f.y;
            O[t][4 * j + 2] *= f.x;
            O[t][4 * j + 3] *= f.y;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS / 4; ++i) l[i] += sum[i];

#pragma unroll
      for (int t = 0; t < K::HALF; ++t) wgmma_fence_registers(O[t]);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < K::HALF; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<T, N>::template mma<true>(O[t],
                                          descriptor(block_low + (WG * K::HALF + t) * (K::BOX_BYTES >> 4) + 128 * k),
                                          descriptor(p_low + 2 * k), true);
        }
        wgmma_commit();
      }
      const auto release = [&](int t) {
        if (lane == 0) mbarrier_arrive(barriers.empty(stage, WG * K::HALF + t));
      };
      if constexpr (K::HALF == 4) {
        wgmma_wait<3>();
        release(0);
        wgmma_wait<2>();
        release(1);
      }
      wgmma_wait<1>();
      release(K::HALF - 2);
      wgmma_wait<0>();
      release(K::HALF - 1);
#pragma unroll
      for (int t = 0; t < K::HALF; ++t) wgmma_fence_registers(O[t]);
      if (++stage == K::STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }

    // ---- the end of the piece -------------------------------------------------------------------------------------
    Softmax::reduce_groups(l);
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < ROWS / 4; ++i) maxima[warp * ROWS + 8 * (i / 2) + 2 * quad + i % 2] = l[i];
    }
    named_barrier<kBarrierConsumers, kConsumers>();  // nobody reads the ring, Q or P^T any more
    if (warp == 0 && group == 0) {
#pragma unroll
      for (int i = 0; i < ROWS / 4; ++i) {
        const int column = 8 * (i / 2) + 2 * quad + i % 2;
        reinterpret_cast<float *>(shared + K::TOPS_AT)[ROW0 + column] = m[i];
        reinterpret_cast<float *>(shared + K::SUMS_AT)[ROW0 + column] =
            maxima[column] + maxima[ROWS + column] + maxima[2 * ROWS + column] + maxima[3 * ROWS + column];
      }
    }
    float *const values =
        reinterpret_cast<float *>(shared) + WG * (K::D_LATENT / 2) + warp * 16 + group + 2 * quad * K::X::ROW;
#pragma unroll
    for (int t = 0; t < K::HALF; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) values[(8 * (i / 4) + i % 2) * K::X::ROW + t * 64 + i / 2 % 2 * 8] = O[t][i];
    }
    finish_piece(p, exchange, row_info, kv_scale, cluster_size, rank, pieces_done);
    // The ring and Q are free again once every CTA has read its part.
    if (cluster_size > 1) mbarrier_wait_cluster(barriers.parts_read(), pieces_done & 1);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barriers.ring_free());
    ++pieces_done;
  }
  fill_spare_rows(p, K::D_LATENT);
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) dv_split_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = smem_address(shared);
  const DvSplitBarriers<K> barriers{base + K::BARRIER_AT};
  const int lane = threadIdx.x % 32;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  uint32_t cluster_size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(cluster_size));
  const uint32_t rank = cluster_rank();

  if (threadIdx.x < K::STAGES * K::BOXES) {
    mbarrier_init(barriers.full(threadIdx.x / K::BOXES, threadIdx.x % K::BOXES), arrivals(K::COPY));
    mbarrier_init(barriers.empty(threadIdx.x / K::BOXES, threadIdx.x % K::BOXES), 8);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(barriers.parts_ready(), 8 * cluster_size);
    mbarrier_init(barriers.parts_read(), 8 * cluster_size);
    mbarrier_init(barriers.ring_free(), 8);
    if constexpr (K::COPY == KvCopy::kTma) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  if (warpgroup == 0 || warpgroup == 3) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    if (K::COPY == KvCopy::kTma && threadIdx.x >= 32) return;
    int stage = 0;
    uint32_t parity = 1, pieces_done = 0;  // a fresh ring is empty
    for (Pieces pieces(p); !pieces.done(); pieces.next()) {
      const PieceContext context = pieces.context(K::N);
      if (context.rows <= 0) continue;
      if (pieces_done > 0) mbarrier_wait(barriers.ring_free(), (pieces_done - 1) & 1);
      ++pieces_done;
      const int first = context.piece.block_begin + static_cast<int>(rank), step = static_cast<int>(cluster_size);
      const auto advance = [&] {
        if (++stage == K::STAGES) {
          stage = 0;
          parity ^= 1;
        }
      };
      [[maybe_unused]] const auto retreat = [&] {
        if (--stage < 0) {
          stage = K::STAGES - 1;
          parity ^= 1;
        }
      };
      if constexpr (K::COPY == KvCopy::kTma) {
        KvPages kv_pages(p, context, first, step);
        for (int block = first; block < context.piece.block_end; block += step) {
          kv_pages.advance(block);
          const int down_count = kv_pages.boxes_down(context.kv_end - block * kBlockTokens),
                    row = kv_pages.row_in_page(block);
          const uint32_t box_at = base + stage * K::BLOCK_BYTES + lane * K::BOX_BYTES,
                         full = barriers.full(stage, lane);
          // Lane b loads box b, as soon as that box of the block STAGES before is released.
          bool waiting = lane < K::BOXES;
          while (__any_sync(0xffffffffu, waiting)) {
            const bool ready = waiting && mbarrier_test(barriers.empty(stage, lane), parity);
            if (ready) mbarrier_expect_tx(full, static_cast<uint32_t>(down_count) << (kv_pages.rows_log2 + 7));
            for (int down = 0; down < down_count; ++down) {
              const int page = kv_pages.page(down);
              if (ready)
                tma_load_3d(box_at + (down << (kv_pages.rows_log2 + 7)), &p.kv_map, lane * 64, row, page, full);
            }
            waiting = waiting && !ready;
          }
          advance();
        }
      } else if constexpr (K::COPY == KvCopy::kGather) {
        for (int block = first; block < context.piece.block_end; block += step) {
          GatherRows<128> rows;
          rows.locate(p, context.table, block, context.kv_end);
#pragma unroll 1
          for (int box = 0; box < K::BOXES; ++box) {
            mbarrier_wait(barriers.empty(stage, box), parity);
            rows.copy_box(base + stage * K::BLOCK_BYTES + box * K::BOX_BYTES, box * 128);
            copy_async_arrive(barriers.full(stage, box));
          }
          advance();
        }
      } else {
        // The two producer warpgroups take blocks in turn, and count all of them.
        const int mine = warpgroup == 0 ? 0 : 1;
        if (mine == 1) advance();
        ExpandBlock<typename K::T, K::COPY, K::D_LATENT, K::D_ROPE> expand;
        expand.walk(
            p, context.table, first + mine * step, context.piece.block_end, 2 * step, context.kv_end,
            [&](int box) {
              mbarrier_wait(barriers.empty(stage, box), parity);
              return shared + stage * K::BLOCK_BYTES + box * K::BOX_BYTES;
            },
            [&](int box) {
              mbarrier_arrive(barriers.full(stage, box));
              if (box == K::BOXES - 1) {
                advance();
                advance();
              }
            });
        // Now at the first block past the piece of this warpgroup's turn; the next piece begins at the first of
        // either's.
        const int blocks = context.piece.block_end > first ? (context.piece.block_end - first + step - 1) / step : 0;
        if ((blocks + mine) % 2 == 1) retreat();
      }
    }
  } else {
    set_registers_more<K::CONSUMER_REGISTERS>();
    if (warpgroup == 1) {
      dv_split_consumer<K, 0, K::ROWS_0, 0>(p, shared, base, cluster_size, rank);
    } else {
      dv_split_consumer<K, 1, K::ROWS_1, K::ROWS_0>(p, shared, base, cluster_size, rank);
    }
  }
}

}  // namespace etap::sm90
