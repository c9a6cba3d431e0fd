// Decode for 33 to 56 query rows a tile, where the tensor cores are slow (dispatch.cc): the KV context on WGMMA's M,
// the query rows on its N, the two products and the dims of V shared out among warpgroups.
//
//              rope    latent boxes [64 tokens x 64 dims]                   .------------------- ring: boxes
//             .-----.-----.-----.-----.- ... -.-----.                       |  full / empty: one pair of barriers a box
//     block i |  r  |  0  |  1  |  2  |       |  7  | <-- producer (TMA) ---'
//             '-----'-----'-----'-----'- ... -'-----'
//     QK         S^T [64, N] = all boxes x Q^T  -> softmax -> P^T [64, N] in shared memory
//     PV 0             0  +  1  +  2  +  3                x P^T  -> O^T, half of the dims     (P ready / P free:
//     PV 1                            4  +  5  +  6  +  7 x P^T  -> O^T, the other half        one pair of barriers)
//
//   warpgroup 0      producer
//   warpgroups 1, 2  PV; they also bring Q and finish pieces
//   warpgroup 3      QK and softmax
//
// Reason for the shape. With more rows O^T [512, N] fills one warpgroup's registers (4 N a thread), so two hold it. A
// third does QK and softmax: alone it knows the rows' maxima, so nobody waits for an exchange, and it is at block i + 1
// while PV of block i runs. Only two blocks fit next to 65 KB of queries at N = 56, so boxes are given back one by one,
// in the order in which the producer fills them: the rope box after QK, then the latent boxes as PV goes through them.
//
// The tensor cores serve whoever comes. Were both halves of PV issued at once, QK of the next block would run beside
// them at half its speed, and nothing beside its softmax. So PV 1 begins when QK of the next block is nearly through:
//
//     QK    | QK i+1         | softmax    |            | QK i+2         | softmax ..
//     PV 0  | PV i: 0 1 2 3 |                          | PV i+1: 0 1 2 3 |
//     PV 1               | PV i: 4 5 6 7 |                           | PV i+1: 4 5 6 7 |
//
// Work, clusters and the end of a piece are token_split.cuh's (planner.h, piece.cuh), with one difference: the exchange
// of O lies over the ring, so the producer begins the next piece after the exchange.
#pragma once

#include <type_traits>

#include "sm90/kernel.h"
#include "sm90/parts/kv_pages.cuh"
#include "sm90/parts/shared_memory.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

template <typename T_, int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY_>
struct DvSplit {
  using T = T_;
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr KvCopy COPY = COPY_;
  static_assert(N % 8 == 0 && D_LATENT % 128 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 512;
  static constexpr int PV_WARPGROUPS = 2, QK_WARPGROUP = PV_WARPGROUPS + 1;
  static constexpr int PRODUCER_REGISTERS = 48;

  static constexpr int TILES = D_LATENT / 64, PV_TILES = TILES / PV_WARPGROUPS;  // m64 tiles of O^T
  static constexpr int PV_REGISTERS = PV_TILES * N / 2 <= 64 ? 144 : 168;
  static constexpr int QK_REGISTERS = 512 - PRODUCER_REGISTERS - PV_WARPGROUPS * PV_REGISTERS;
  static constexpr int ROPE_BOXES = D_ROPE / 64, BOXES = ROPE_BOXES + TILES;
  // After how many of the next block's boxes PV 1 may begin. To 32 rows after all: softmax is short. With more, after
  // about half where one tile is bound by the memory, later where several tiles are bound by the SM
  // (docs/tuning-log.md).
  static constexpr bool PV1_AFTER_QK = N <= 32;
  static constexpr int BOXES_BEFORE_PV1 = BOXES / 2 + 1, BOXES_BEFORE_PV1_OF_SEVERAL_TILES = BOXES - 2;
  static constexpr int BOX_BYTES = kBlockTokens * 128;
  static constexpr int MAX_SLOTS = 24;
  using X = Exchange<N, D_LATENT>;

  template <int SLOTS_>
  struct SharedOf {
    union {
      char ring[SLOTS_][BOX_BYTES];
      char exchange[X::BYTES];  // at the end of a piece
    };
    char q[BOXES][N * 128];
    char p[N * 128];
    float maxima[4][N];  // of each warp; its sums at the end of a piece
    float factors[N];    // that come with P
    float top[N], sum[N];
    RowInfo rows[N];
    SlotBarriers slots[MAX_SLOTS];
    uint64_t p_ready, p_free, q_ready, ring_free, parts_ready, parts_read, sums_ready, qk_passed;
    volatile int rescale;  // are there factors?
    WorkerRecord record;
    alignas(8) PieceEnd end;
  };
  static constexpr int SLOTS = slots_that_fit<SharedOf, MAX_SLOTS>();
  using Shared = SharedOf<SLOTS>;
  static constexpr int SLOTS_AT = offsetof(Shared, slots);
  static constexpr int SHARED_BYTES = sizeof(Shared);
  static_assert(SLOTS >= 2 * BOXES && X::BYTES <= SLOTS * BOX_BYTES && SHARED_BYTES <= kSharedLimit);

  // A block's boxes stand in the ring with the rope box first, in a row of Q and in the cache last.
  static constexpr int place_in_row(int box) { return (box + TILES) % BOXES; }
};

// What the roles know in common.
template <typename K>
struct DvSplitCta {
  const DecodeParams &p;
  char *memory;   // shared memory,
  uint32_t base;  // and its address

  __device__ __forceinline__ typename K::Shared &shared() const {
    return *reinterpret_cast<typename K::Shared *>(memory);
  }

  __device__ __forceinline__ uint32_t full(int slot) const { return base + K::SLOTS_AT + slot * SlotBarriers::kBytes; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(slot) + SlotBarriers::kEmpty; }
  __device__ __forceinline__ typename K::X exchange() const {
    return {smem_address(shared().exchange),     smem_address(shared().top),         smem_address(shared().sum),
            smem_address(&shared().parts_ready), smem_address(&shared().parts_read), &shared().end};
  }
  // A value that is the same in all lanes, as the compiler can see: descriptors come from uniform registers then.
  __device__ __forceinline__ static uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

  // Calls body(context) for the pieces of this worker.
  template <typename Body>
  __device__ __forceinline__ void for_pieces(Body &&body) const {
    for (Pieces pieces(p, shared().record); !pieces.done(); pieces.next()) {
      const PieceContext context = pieces.context(K::N);
      if (context.rows > 0) body(context);
    }
  }

  // Warpgroups 1 and 2, before and after the blocks of a piece.
  __device__ __forceinline__ void begin_piece(const PieceContext &context) const {
    load_query<typename K::T, K::N, K::D_LATENT, K::D_ROPE>(p, context, smem_address(shared().q), shared().rows,
                                                            &shared().end);
    if (threadIdx.x == 128) mbarrier_arrive(smem_address(&shared().q_ready));
  }
  __device__ __forceinline__ void end_piece(uint32_t nth) const {
    finish_piece(p, exchange(), shared().rows, 1.f, nth);
    // The ring is free again once every CTA has read its part, the tables of rows and of the end once
    // all warps are here.
    if (shared().end.ctas > 1) mbarrier_wait_cluster(smem_address(&shared().parts_read), nth & 1);
    named_barrier<kBarrierConsumers, kConsumers>();
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&shared().ring_free));
  }
};

enum : int { kBarrierQk = 2, kBarrierPv = 3, kBarrierZeros = 4 };  // named barriers; of PV 0 and PV 1: 4 and 5

template <typename K>
__device__ __forceinline__ void dv_split_qk(const DvSplitCta<K> &cta) {
  using T = typename K::T;
  constexpr int N = K::N;
  using Softmax = ColumnSoftmax<T, N>;
  const int lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  float *const maxima = cta.shared().maxima[0];
  const float scale_log2 = cta.p.scale_log2;
  const uint32_t ring_low = cta.uniform(smem_address(cta.shared().ring) >> 4),
                 q_low = ring_low + (offsetof(typename K::Shared, q) >> 4);
  RingPosition<K::SLOTS> ring{0, 0};
  uint32_t p_free_parity = 1, pieces_done = 0;  // P is free at first

  cta.for_pieces([&](const PieceContext &context) {
    mbarrier_wait(smem_address(&cta.shared().q_ready), pieces_done & 1);
    float m[N / 4], l[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      m[i] = kNoMaximum;
      l[i] = context.first_sum();
    }
    bool follows = false;  // a block of this piece that PV 1 may be waiting with
    for (int block = context.first_block(); block < context.piece.block_end; block += context.ctas) {
      ListEntries entries{};
      if (K::COPY == KvCopy::kGather && cta.p.lists) {
        const int place = block * kBlockTokens + warp * 16 + group;
        entries.ask(context.table, place, place + 8, context.kv_end);
      }
      float S[N / 2];
      const int rope_slot = ring.slot;
      const auto let_pv1_begin = [&] {
        if (follows && lane == 0) mbarrier_arrive(smem_address(&cta.shared().qk_passed));
      };
#pragma unroll
      for (int box = 0; box < K::BOXES; ++box) {
        mbarrier_wait(cta.full(ring.slot), ring.parity);
        if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
        const uint32_t box_low = cta.uniform(ring_low + ring.slot * (K::BOX_BYTES >> 4));
        wgmma_fence_registers(S);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<T, N>::template mma<false>(S, descriptor(box_low + 2 * k),
                                           descriptor(q_low + K::place_in_row(box) * (N * 128 >> 4) + 2 * k),
                                           box + k > 0);
        }
        ring = ring.further(1);
        if constexpr (!K::PV1_AFTER_QK) {
          if (box + 1 == K::BOXES_BEFORE_PV1 && cta.p.tiles == 1) let_pv1_begin();
          if (box + 1 == K::BOXES_BEFORE_PV1_OF_SEVERAL_TILES && cta.p.tiles > 1) let_pv1_begin();
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence_registers(S);
      if constexpr (K::PV1_AFTER_QK) let_pv1_begin();
      follows = true;
      if (K::ROPE_BOXES > 0 && lane == 0) mbarrier_arrive(cta.empty(rope_slot));

      Softmax::scale_and_mask(cta.p, S, scale_log2, block, context.first_limit, cta.shared().rows);
      if constexpr (K::COPY == KvCopy::kGather)
        Softmax::mask_holes(S, entries.first_is_hole(), entries.second_is_hole());
      const bool above = named_barrier_any(kBarrierQk, 128, Softmax::above(S, m));
      if (above) {
        Softmax::store_maxima(S, maxima + warp * N);
        named_barrier<kBarrierQk, 128>();
        float factor[N / 4];
        Softmax::update(maxima, m, l, factor);
        mbarrier_wait(smem_address(&cta.shared().p_free),
                      p_free_parity);  // PV of the block before has read its factors
        if (warp == 0 && group == 0) {
#pragma unroll
          for (int i = 0; i < N / 4; ++i) cta.shared().factors[8 * (i / 2) + 2 * quad + i % 2] = factor[i];
        }
      }
      float sum[N / 4];
      uint32_t P[N / 4];
      Softmax::exponentiate(S, m, sum, P);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) l[i] += sum[i];
      mbarrier_wait(smem_address(&cta.shared().p_free), p_free_parity);  // PV of the block before is done
      p_free_parity ^= 1;
      Softmax::store(P, smem_address(cta.shared().p));
      __syncwarp();
      if (lane == 0) {
        if (warp == 0) cta.shared().rescale = above;
        mbarrier_arrive(smem_address(&cta.shared().p_ready));
      }
    }

    // The end of the piece: maxima and sums. They have a barrier of their own: PV may not have seen the last P yet, and
    // would miss it if p_ready went on.
    Softmax::reduce_groups(l);
    named_barrier<kBarrierQk, 128>();  // the last block may have moved the maxima, which lie where the sums go
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) maxima[warp * N + 8 * (i / 2) + 2 * quad + i % 2] = l[i];
    }
    named_barrier<kBarrierQk, 128>();
    if (warp == 0 && group == 0) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int column = 8 * (i / 2) + 2 * quad + i % 2;
        cta.shared().top[column] = m[i];
        cta.shared().sum[column] =
            maxima[column] + maxima[N + column] + maxima[2 * N + column] + maxima[3 * N + column];
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&cta.shared().sums_ready));
    ++pieces_done;
  });
}

// `pv`: 0 or 1. Its m64 tiles of O^T are the first or the second half of the latent boxes.
template <typename K>
__device__ __forceinline__ void dv_split_pv(const DvSplitCta<K> &cta, int pv) {
  using T = typename K::T;
  constexpr int N = K::N;
  const int lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const uint32_t ring_low = cta.uniform(smem_address(cta.shared().ring) >> 4),
                 p_low = ring_low + (offsetof(typename K::Shared, p) >> 4);
  RingPosition<K::SLOTS> ring{0, 0};
  uint32_t p_ready_parity = 0, qk_passed_parity = 0, pieces_done = 0;
  const auto box_of = [pv](int tile) { return K::ROPE_BOXES + pv * K::PV_TILES + tile; };

  cta.for_pieces([&](const PieceContext &context) {
    cta.begin_piece(context);
    float O[K::PV_TILES][N / 2];
#pragma unroll
    for (int t = 0; t < K::PV_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
    for (int block = context.first_block(); block < context.piece.block_end; block += context.ctas) {
      mbarrier_wait(smem_address(&cta.shared().p_ready), p_ready_parity);
      p_ready_parity ^= 1;
      if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
      const int tokens = context.kv_end - block * kBlockTokens;
      if (tokens < kBlockTokens) {
        // V beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked.
        for (int r = tokens + warp; r < kBlockTokens; r += 4) {
          for (int i = lane; i < K::PV_TILES * 8; i += 32) {
            *reinterpret_cast<uint4 *>(cta.shared().ring[0] + ring.further(box_of(i / 8)).slot * K::BOX_BYTES +
                                       r * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
          }
        }
        fence_proxy_async();
        named_barrier(kBarrierZeros + pv, 128);
      }
      if (cta.shared().rescale) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          const float2 f = *reinterpret_cast<const float2 *>(cta.shared().factors + 8 * j + 2 * quad);
#pragma unroll
          for (int t = 0; t < K::PV_TILES; ++t) {
            O[t][4 * j] *= f.x;
            O[t][4 * j + 1] *= f.y;
            O[t][4 * j + 2] *= f.x;
            O[t][4 * j + 3] *= f.y;
          }
        }
      }

      if (pv == 1 && block + context.ctas < context.piece.block_end) {
        mbarrier_wait(smem_address(&cta.shared().qk_passed), qk_passed_parity);
        qk_passed_parity ^= 1;
      }
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) wgmma_fence_registers(O[t]);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) {
        const uint32_t box_low = cta.uniform(ring_low + ring.further(box_of(t)).slot * (K::BOX_BYTES >> 4));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<T, N>::template mma<true>(O[t], descriptor(box_low + 128 * k), descriptor(p_low + 2 * k), true);
        }
        wgmma_commit();
      }
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) {
        wgmma_wait_until(K::PV_TILES - 1 - t);
        if (lane == 0) mbarrier_arrive(cta.empty(ring.further(box_of(t)).slot));
      }
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) wgmma_fence_registers(O[t]);
      if (lane == 0) mbarrier_arrive(smem_address(&cta.shared().p_free));
      ring = ring.further(K::BOXES);
    }

    mbarrier_wait(smem_address(&cta.shared().sums_ready), pieces_done & 1);
    named_barrier<kBarrierPv, 128 * K::PV_WARPGROUPS>();  // nobody reads the ring any more
    float *const values = reinterpret_cast<float *>(cta.shared().exchange) + warp * 16 + group + 2 * quad * K::X::ROW;
#pragma unroll
    for (int t = 0; t < K::PV_TILES; ++t) {
      const int d = (pv * K::PV_TILES + t) * 64;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) values[(8 * (i / 4) + i % 2) * K::X::ROW + d + i / 2 % 2 * 8] = O[t][i];
    }
    cta.end_piece(pieces_done);
    ++pieces_done;
  });
}

template <typename K>
__device__ __forceinline__ void dv_split_producer(const DvSplitCta<K> &cta) {
  const DecodeParams &p = cta.p;
  const int lane = threadIdx.x % 32;
  RingPosition<K::SLOTS> ring{0, 1};  // a fresh ring is empty
  uint32_t pieces_done = 0;
  cta.for_pieces([&](const PieceContext &context) {
    if (pieces_done > 0) mbarrier_wait(smem_address(&cta.shared().ring_free), (pieces_done - 1) & 1);
    ++pieces_done;
    const int first = context.first_block(), end = context.piece.block_end, step = context.ctas;
    if constexpr (K::COPY == KvCopy::kTma) {
      if (threadIdx.x >= 32) return;
      KvPages pages(p, context, first, step);
      for (int block = first; block < end; block += step) {
        pages.advance(block);
        const int down_count = pages.boxes_down(context.kv_end - block * kBlockTokens), row = pages.row_in_page(block);
        const uint32_t bytes = static_cast<uint32_t>(down_count) << (pages.rows_log2 + 7);
#pragma unroll 1
        for (int box = 0; box < K::BOXES; ++box) {
          const uint32_t full = cta.full(ring.slot);
          mbarrier_wait(cta.empty(ring.slot), ring.parity);
          pages.template load<1, 128>(
              p, row, down_count, 1, smem_address(cta.shared().ring, ring.slot),
              [&](int) { return K::place_in_row(box) * 64; }, full);
          if (lane == 0) mbarrier_expect_tx(full, bytes);
          ring.advance();
        }
      }
    } else {
      GatherRows<128> rows;
      for (int block = first; block < end; block += step) {
        rows.locate(p, context.table, block, first, step, context.kv_end);
#pragma unroll 1
        for (int box = 0; box < K::BOXES; ++box) {
          mbarrier_wait(cta.empty(ring.slot), ring.parity);
          rows.copy_box(smem_address(cta.shared().ring, ring.slot), K::place_in_row(box) * 128);
          copy_async_arrive(cta.full(ring.slot));
          ring = ring.further(1);
        }
      }
    }
  });
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) dv_split_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  const DvSplitCta<K> cta{p, shared_raw, smem_address(shared_raw)};
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);

  if (threadIdx.x < K::SLOTS) {
    mbarrier_init(cta.full(threadIdx.x), arrivals(K::COPY));
    mbarrier_init(cta.empty(threadIdx.x), 4);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&cta.shared().p_ready), 4);
    mbarrier_init(smem_address(&cta.shared().p_free), 4 * K::PV_WARPGROUPS);
    mbarrier_init(smem_address(&cta.shared().sums_ready), 4);
    mbarrier_init(smem_address(&cta.shared().qk_passed), 4);
    mbarrier_init(smem_address(&cta.shared().q_ready), 1);
    mbarrier_init(smem_address(&cta.shared().ring_free), 8);
    mbarrier_init(smem_address(&cta.shared().parts_ready), 8 * cluster_size());
    mbarrier_init(smem_address(&cta.shared().parts_read), 8 * cluster_size());
    if (K::COPY == KvCopy::kTma && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  begin_kernel(p, cta.shared().record);

  if (warpgroup >= 1 && warpgroup <= K::PV_WARPGROUPS) {
    set_registers_more<K::PV_REGISTERS>();
    dv_split_pv(cta, warpgroup - 1);
  } else if (warpgroup == K::QK_WARPGROUP) {
    if constexpr (K::QK_REGISTERS > 128) {
      set_registers_more<K::QK_REGISTERS>();
    } else {
      set_registers_fewer<K::QK_REGISTERS>();
    }
    dv_split_qk(cta);
  } else {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    dv_split_producer(cta);
  }
  if (threadIdx.x >= 128 && threadIdx.x < 128 + kConsumers) fill_spare_rows(p, K::D_LATENT);
}

struct dv_split {
  template <typename T, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = DvSplit<T, ROWS, D_LATENT, D_ROPE, COPY>;
    return {reinterpret_cast<const void *>(&dv_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
