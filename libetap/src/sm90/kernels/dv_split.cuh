// Decode for 25 to 64 query rows a tile: the KV context on WGMMA's M, the query rows on its N, the two products and the
// dims of V shared out among warpgroups.
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
// while PV of block i runs. Only two blocks fit next to 74 KB of queries at N = 64, so boxes are given back one by one,
// in the order in which the producer fills them: the rope box after QK, then the latent boxes as PV goes through them.
//
// The tensor cores serve whoever comes. Were both halves of PV issued at once, QK of the next block would run beside
// them at half its speed, and nothing beside its softmax. So PV 1 begins when QK of the next block is nearly through:
//
//     QK    | QK i+1         | softmax    |            | QK i+2         | softmax ..
//     PV 0  | PV i: 0 1 2 3 |                          | PV i+1: 0 1 2 3 |
//     PV 1               | PV i: 4 5 6 7 |                           | PV i+1: 4 5 6 7 |
//
// Pieces and partial results are those of token_split.cuh, but each warp turns its dims of O^T round by itself, 16 at a
// time, where Q was: the ring is at the next piece meanwhile.
#pragma once

#include <type_traits>

#include "../parts/kv_pages.cuh"
#include "../parts/merge.cuh"
#include "../parts/softmax.cuh"
#include "../ptx/wgmma.cuh"

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

  template <int SLOTS>
  struct SharedMemory {
    char ring[SLOTS][BOX_BYTES];
    char q[BOXES * N * 128];
    char p[N * 128];
    float maxima[4][N];  // of each warp, and at the end of a piece the sums
    float factors[N];
    float stats[2][N];  // of the piece: maxima, sums
    RowInfo rows[N];
    PieceEnd end;
    CutUnits cut;
    int rescale;
    uint64_t full[SLOTS], empty[SLOTS];
    uint64_t q_ready, p_ready, p_free, qk_passed, sums_ready;
  };
  static constexpr int SLOTS_THAT_FIT =
      (kSharedMemoryLimit - static_cast<int>(sizeof(SharedMemory<1>))) / (BOX_BYTES + 16) + 1;
  static constexpr int SLOTS = SLOTS_THAT_FIT < 24 ? SLOTS_THAT_FIT : 24;
  using Shared = SharedMemory<SLOTS>;
  static_assert(SLOTS >= 2 * BOXES && sizeof(Shared) <= kSharedMemoryLimit);
  static_assert(8 * N * kStripRow * 4 <= BOXES * N * 128, "strips of 16 dims a warp lie where Q was");

  // A block's boxes stand in the ring with the rope box first, in a row of Q and in the cache last.
  static constexpr int place_in_row(int box) { return (box + TILES) % BOXES; }
};

// A value that is the same in all lanes, as the compiler can see: descriptors come from uniform registers then.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

enum : int { kBarrierQk = 2, kBarrierZeros = 3 };  // named barriers; of PV 0 and PV 1: 3 and 4

template <typename K>
__device__ __forceinline__ void dv_split_qk(const DecodeParams &p, typename K::Shared &shared) {
  using T = typename K::T;
  constexpr int N = K::N;
  using Softmax = ColumnSoftmax<T, N>;
  const int lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  float *const maxima = shared.maxima[0];
  const float scale_log2 = p.scale_log2;
  const uint32_t ring_low = uniform(smem_address(shared.ring) >> 4), q_low = uniform(smem_address(shared.q) >> 4);
  RingPosition<K::SLOTS> ring{0, 0};
  uint32_t p_free_parity = 1, pieces_done = 0;  // P is free at first

  for_pieces(p, K::N, [&](const PieceContext &context) {
    mbarrier_wait(smem_address(&shared.q_ready), pieces_done & 1);
    float m[N / 4], l[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      m[i] = kNoMaximum;
      l[i] = context.unreadable ? NAN : 0.f;
    }
    bool follows = false;  // a block of this piece that PV 1 may be waiting with
    for (int block = context.block_begin; block < context.block_end; ++block) {
      float S[N / 2];
      const int rope_slot = ring.slot;
      const auto let_pv1_begin = [&] {
        if (follows && lane == 0) mbarrier_arrive(smem_address(&shared.qk_passed));
      };
#pragma unroll
      for (int box = 0; box < K::BOXES; ++box) {
        mbarrier_wait(smem_address(&shared.full[ring.slot]), ring.parity);
        if constexpr (K::COPY != KvCopy::kBoxes) fence_proxy_async();
        const uint32_t box_low = uniform(ring_low + ring.slot * (K::BOX_BYTES >> 4));
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
          if (box + 1 == K::BOXES_BEFORE_PV1 && p.team == 1) let_pv1_begin();
          if (box + 1 == K::BOXES_BEFORE_PV1_OF_SEVERAL_TILES && p.team > 1) let_pv1_begin();
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence_registers(S);
      if constexpr (K::PV1_AFTER_QK) let_pv1_begin();
      follows = true;
      if (K::ROPE_BOXES > 0 && lane == 0) mbarrier_arrive(smem_address(&shared.empty[rope_slot]));

      Softmax::scale_and_mask(S, scale_log2, block, context.first_limit, shared.rows);
      const bool above = named_barrier_any(kBarrierQk, 128, Softmax::above(S, m));
      if (above) {
        Softmax::store_maxima(S, maxima + warp * N);
        named_barrier<kBarrierQk, 128>();
        float factor[N / 4];
        Softmax::update(maxima, m, l, factor);
        mbarrier_wait(smem_address(&shared.p_free), p_free_parity);  // PV of the block before has read its factors
        if (warp == 0 && group == 0) {
#pragma unroll
          for (int i = 0; i < N / 4; ++i) shared.factors[8 * (i / 2) + 2 * quad + i % 2] = factor[i];
        }
      }
      float sum[N / 4];
      uint32_t P[N / 4];
      Softmax::exponentiate(S, m, sum, P);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) l[i] += sum[i];
      mbarrier_wait(smem_address(&shared.p_free), p_free_parity);  // PV of the block before is done
      p_free_parity ^= 1;
      Softmax::store(P, smem_address(shared.p));
      __syncwarp();
      if (lane == 0) {
        if (warp == 0) *const_cast<volatile int *>(&shared.rescale) = above;
        mbarrier_arrive(smem_address(&shared.p_ready));
      }
    }

    // The end of the piece: maxima and sums. They have a barrier of their own: PV may not have seen the last P yet, and
    // would miss it if p_ready went on.
    Softmax::reduce_groups(l);
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) maxima[warp * N + 8 * (i / 2) + 2 * quad + i % 2] = l[i];
    }
    named_barrier<kBarrierQk, 128>();
    if (warp == 0 && group == 0) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int column = 8 * (i / 2) + 2 * quad + i % 2;
        shared.stats[0][column] = m[i];
        shared.stats[1][column] =
            maxima[column] + maxima[N + column] + maxima[2 * N + column] + maxima[3 * N + column];
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&shared.sums_ready));
    ++pieces_done;
  });
}

// `pv`: 0 or 1. Its m64 tiles of O^T are the first or the second half of the latent boxes.
template <typename K>
__device__ __forceinline__ void dv_split_pv(const DecodeParams &p, typename K::Shared &shared, int pv) {
  using T = typename K::T;
  constexpr int N = K::N;
  const int lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const uint32_t ring_low = uniform(smem_address(shared.ring) >> 4), p_low = uniform(smem_address(shared.p) >> 4);
  RingPosition<K::SLOTS> ring{0, 0};
  uint32_t p_ready_parity = 0, qk_passed_parity = 0, pieces_done = 0;
  const auto box_of = [pv](int tile) { return K::ROPE_BOXES + pv * K::PV_TILES + tile; };

  for_pieces(p, N, &shared.end, [&](const PieceContext &context) {
    load_query<T, N, K::D_LATENT, K::D_ROPE>(p, context, smem_address(shared.q), shared.rows);
    if (threadIdx.x == 128) mbarrier_arrive(smem_address(&shared.q_ready));
    float O[K::PV_TILES][N / 2];
#pragma unroll
    for (int t = 0; t < K::PV_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
    for (int block = context.block_begin; block < context.block_end; ++block) {
      mbarrier_wait(smem_address(&shared.p_ready), p_ready_parity);
      p_ready_parity ^= 1;
      if constexpr (K::COPY != KvCopy::kBoxes) fence_proxy_async();
      const int tokens = context.kv_end - block * kBlockTokens;
      if (tokens < kBlockTokens) {
        // V beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked.
        for (int r = tokens + warp; r < kBlockTokens; r += 4) {
          for (int i = lane; i < K::PV_TILES * 8; i += 32) {
            *reinterpret_cast<uint4 *>(shared.ring[ring.further(box_of(i / 8)).slot] + r * 128 +
                                       i % 8 * 16) = make_uint4(0, 0, 0, 0);
          }
        }
        fence_proxy_async();
        named_barrier(kBarrierZeros + pv, 128);
      }
      if (*const_cast<volatile int *>(&shared.rescale)) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          const float2 f = *reinterpret_cast<const float2 *>(shared.factors + 8 * j + 2 * quad);
#pragma unroll
          for (int t = 0; t < K::PV_TILES; ++t) {
            O[t][4 * j] *= f.x;
            O[t][4 * j + 1] *= f.y;
            O[t][4 * j + 2] *= f.x;
            O[t][4 * j + 3] *= f.y;
          }
        }
      }

      if (pv == 1 && block + 1 < context.block_end) {
        mbarrier_wait(smem_address(&shared.qk_passed), qk_passed_parity);
        qk_passed_parity ^= 1;
      }
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) wgmma_fence_registers(O[t]);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) {
        const uint32_t box_low = uniform(ring_low + ring.further(box_of(t)).slot * (K::BOX_BYTES >> 4));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<T, N>::template mma<true>(O[t], descriptor(box_low + 128 * k), descriptor(p_low + 2 * k), true);
        }
        wgmma_commit();
      }
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) {
        wgmma_wait_until(K::PV_TILES - 1 - t);
        if (lane == 0) mbarrier_arrive(smem_address(&shared.empty[ring.further(box_of(t)).slot]));
      }
#pragma unroll
      for (int t = 0; t < K::PV_TILES; ++t) wgmma_fence_registers(O[t]);
      if (lane == 0) mbarrier_arrive(smem_address(&shared.p_free));
      ring = ring.further(K::BOXES);
    }

    mbarrier_wait(smem_address(&shared.sums_ready), pieces_done & 1);
    if (pv == 0) store_stats<N>(p, shared.stats, shared.rows, shared.end);
    float *const strip = reinterpret_cast<float *>(shared.q) + (4 * pv + warp) * N * kStripRow;
#pragma unroll
    for (int t = 0; t < K::PV_TILES; ++t) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        strip[(8 * (i / 4) + 2 * quad + i % 2) * kStripRow + group + i / 2 % 2 * 8] = O[t][i];
      __syncwarp();
      store_strip(p, strip, (pv * K::PV_TILES + t) * 64 + 16 * warp, K::D_LATENT, shared.stats[0], N, shared.rows,
                  shared.end);
    }
    close_piece<K::D_LATENT>(p, shared.end, shared.cut);
    ++pieces_done;
  });
}

template <typename K>
__device__ __forceinline__ void dv_split_producer(const DecodeParams &p, typename K::Shared &shared) {
  const int lane = threadIdx.x % 32;
  RingPosition<K::SLOTS> ring{0, 1};  // a fresh ring is empty
  // One warp takes about 500 cycles a box. Memory gives a single tile no more, and boxes in order are 2 % faster; where
  // several tiles read the same KV the four warps take boxes in turn, which is 5 % faster.
  const int warp = threadIdx.x / 32, warps = p.team == 1 ? 1 : 4;
  if (K::COPY == KvCopy::kBoxes && warp >= warps) return;
  for_pieces(p, K::N, [&](const PieceContext &context) {
    if constexpr (K::COPY == KvCopy::kBoxes) {
      KvPages pages(p, context, context.block_begin, 1);
      for (int block = context.block_begin; block < context.block_end; ++block) {
        pages.advance(block);
        const int down_count = pages.boxes_down(context.kv_end - block * kBlockTokens), page = pages.page(lane),
                  row = pages.row_in_page(block), down_log2 = pages.rows_log2 + 7;
#pragma unroll 1
        for (int box = warp; box < K::BOXES; box += warps) {
          const RingPosition<K::SLOTS> at = ring.further(box);
          const uint32_t full = smem_address(&shared.full[at.slot]);
          mbarrier_wait(smem_address(&shared.empty[at.slot]), at.parity);
          if (lane == 0) mbarrier_expect_tx(full, static_cast<uint32_t>(down_count) << down_log2);
          __syncwarp();
          if (lane < down_count) {
            load_box<128>(p, smem_address(shared.ring[at.slot]) + (lane << down_log2), K::place_in_row(box) * 64, row,
                          page, pages.rows_log2, full);
          }
        }
        ring = ring.further(K::BOXES);
      }
    } else {
      for (int block = context.block_begin; block < context.block_end; ++block) {
        GatherRows<128> rows;
        rows.locate(p, context.table, block, context.kv_end);
#pragma unroll 1
        for (int box = 0; box < K::BOXES; ++box) {
          mbarrier_wait(smem_address(&shared.empty[ring.slot]), ring.parity);
          rows.copy_box(smem_address(shared.ring[ring.slot]), K::place_in_row(box) * 128);
          copy_async_arrive(smem_address(&shared.full[ring.slot]));
          ring = ring.further(1);
        }
      }
    }
  });
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) dv_split_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(shared_raw);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x < K::SLOTS) {
    mbarrier_init(smem_address(&shared.full[threadIdx.x]), arrivals(K::COPY));
    mbarrier_init(smem_address(&shared.empty[threadIdx.x]), 4);
  }
  if (threadIdx.x == 0) {
    shared.cut.count = 0;
    mbarrier_init(smem_address(&shared.q_ready), 1);
    mbarrier_init(smem_address(&shared.p_ready), 4);
    mbarrier_init(smem_address(&shared.p_free), 4 * K::PV_WARPGROUPS);
    mbarrier_init(smem_address(&shared.qk_passed), 4);
    mbarrier_init(smem_address(&shared.sums_ready), 4);
    if (K::COPY == KvCopy::kBoxes && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  begin_kernel();

  if (warpgroup >= 1 && warpgroup <= K::PV_WARPGROUPS) {
    set_registers_more<K::PV_REGISTERS>();
    dv_split_pv<K>(p, shared, warpgroup - 1);
    merge_cut_units<K::D_LATENT>(p, shared.cut);
    fill_spare_rows(p, K::D_LATENT);
  } else if (warpgroup == K::QK_WARPGROUP) {
    if constexpr (K::QK_REGISTERS > 128) {
      set_registers_more<K::QK_REGISTERS>();
    } else {
      set_registers_fewer<K::QK_REGISTERS>();
    }
    dv_split_qk<K>(p, shared);
  } else {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    dv_split_producer<K>(p, shared);
  }
}

template <int TILE, int Q_DTYPE, int, int D_LATENT, int D_ROPE, KvCopy COPY>
Kernel dv_split_entry() {
  using K = DvSplit<QueryType<Q_DTYPE>, TILE, D_LATENT, D_ROPE, COPY>;
  return kernel_entry<K>(dv_split_kernel<K>);
}

}  // namespace etap::sm90
