// Decode for up to 24 query rows a tile: the KV context on WGMMA's M, the query rows on its N, without padding to 64.
//
//        dims ->                         N query rows                       dims of V
//      .-----------------.              .----.                            .-------------.   the same bytes of
//   64 | K (shared mem.) | x Q^T [576] = | S^T | 64 tokens      V^T [512] |   K again,  |   shared memory, read
//  tok |    [64, 576]    |               '----'                           |  read MN-   |   with M along the dims
//      '-----------------'                 | softmax over M               |   major     | x P^T [64 tokens, N] = O^T
//      [512, N]
//                                          '-> P^T, K-major in shared ------------------'
//
// Reason for the shape. O^T is 512 x N floats: with N <= 24 one warpgroup holds all of it with room to spare (4 N
// registers a thread), so the two consumer warpgroups take KV blocks in turn with maxima, sums and O^T of their own and
// meet once, at the end of a piece. No exchange in the loop: while one warpgroup is in its softmax the other's WGMMAs
// fill the tensor pipe.
//
// Work. A CTA computes pieces of the plan (planner.h); the blocks of a piece go to its two warpgroups in turn. At the
// end they add up through shared memory, and the result goes to the output or, where the unit is cut, to L2, where the
// CTAs that share it merge it (merge.cuh).
//
//   warpgroup 0   producer: KV boxes [64 tokens x 64 dims] into a ring of chunks of three boxes (24 KB)
//   warpgroup 1,2 consumers: QK -> softmax -> PV, a block each
//
// Softmax. A column of S^T is a query row; its 64 tokens lie in 8 lanes of 4 warps. The maximum is lazy: exponents are
// taken against the running maximum of earlier blocks as long as no logit exceeds it by more than 2^8, which the
// barrier that P^T needs anyway finds out (barrier.red.or). Only then the warps exchange maxima and rescale, each
// column by itself, so that a row's bits never depend on its neighbours in the tile. Sums are of unrounded P and stay
// in the thread until the end.
#pragma once

#include <type_traits>

#include "../parts/kv_pages.cuh"
#include "../parts/merge.cuh"
#include "../parts/softmax.cuh"
#include "../ptx/wgmma.cuh"

namespace etap::sm90 {

template <typename T_, int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY_>
struct TokenSplit {
  using T = T_;
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr KvCopy COPY = COPY_;
  static_assert(N % 8 == 0 && N <= 24, "O^T of one warpgroup must fit its registers");
  static_assert(sizeof(T) == 2 && D_LATENT % 64 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 384;
  static constexpr int CONSUMER_REGISTERS = 200;
  static constexpr int PRODUCER_REGISTERS = 504 - 2 * CONSUMER_REGISTERS;
  static constexpr int TILES = D_LATENT / 64;             // m64 tiles of O^T
  static constexpr int BOXES = (D_LATENT + D_ROPE) / 64;  // 8 KB boxes of a KV block
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES;
  static constexpr int BOX_BYTES = kBlockTokens * 128, SLOT_BYTES = CHUNK_BOXES * BOX_BYTES;
  static constexpr int P_BYTES = N * 128;

  // A warpgroup's ring of chunks. In a shared one a warpgroup could overtake the other by a lap of the ring (copies
  // complete out of order), and a parity wait can't tell a lap that has not begun from one that is over.
  template <int RING_SLOTS>
  struct SharedMemory {
    char ring[2 * RING_SLOTS][SLOT_BYTES];
    union {
      struct {
        char q[BOXES * N * 128];
        char p[2][2][P_BYTES];  // P^T of each warpgroup, one after the other
      };
      float exchange[Exchange<N, D_LATENT>::BYTES / 4];  // at the end of a piece, when Q and P^T are dead
    };
    float sums[2][4][N];  // of each warp, or maxima
    float maxima[2][N];   // of each warpgroup
    float stats[2][N];    // of the CTA: maxima, sums
    RowInfo rows[N];
    PieceEnd end;
    CutUnits cut;
    uint64_t full[2 * RING_SLOTS], empty[2 * RING_SLOTS];
  };
  static constexpr int SLOTS_THAT_FIT =
      (kSharedMemoryLimit - static_cast<int>(sizeof(SharedMemory<1>))) / (2 * (SLOT_BYTES + 16)) + 1;
  static constexpr int RING_SLOTS = SLOTS_THAT_FIT < 6 ? SLOTS_THAT_FIT : 6;
  using Shared = SharedMemory<RING_SLOTS>;
  static_assert(RING_SLOTS >= CHUNKS && sizeof(Shared) <= kSharedMemoryLimit);
};

enum : int { kBarrierWarpgroup = 2 };  // named barriers 2 and 3

// Boxes are loaded by a warp for each ring, rows gathered by the whole warpgroup for one ring after the other.
template <typename K>
__device__ __forceinline__ void token_split_producer(const DecodeParams &p, typename K::Shared &shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Waits for the next slots of ring `wg` and calls copy(slot's address, its barrier, first box, boxes).
  const auto fill = [&shared](int wg, RingPosition<K::RING_SLOTS> &at, auto copy) {
#pragma unroll 1
    for (int c = 0; c < K::CHUNKS; ++c) {
      const int slot = wg * K::RING_SLOTS + at.slot;
      mbarrier_wait(smem_address(&shared.empty[slot]), at.parity);
      copy(smem_address(shared.ring[slot]), smem_address(&shared.full[slot]), c * K::CHUNK_BOXES,
           min(K::CHUNK_BOXES, K::BOXES - c * K::CHUNK_BOXES));
      at.advance();
    }
  };
  if constexpr (K::COPY == KvCopy::kBoxes) {
    if (warp > 1) return;
    RingPosition<K::RING_SLOTS> ring = {0, 1};  // a fresh ring is empty
    for_pieces(p, K::N, [&](const PieceContext &context) {
      KvPages pages(p, context, context.block_begin + warp, 2);
      for (int block = context.block_begin + warp; block < context.block_end; block += 2) {
        pages.advance(block);
        const int down_count = pages.boxes_down(context.kv_end - block * kBlockTokens), row = pages.row_in_page(block);
        fill(warp, ring, [&](uint32_t to, uint32_t full, int first_box, int boxes) {
          if (lane == 0) mbarrier_expect_tx(full, static_cast<uint32_t>(boxes * down_count) << (pages.rows_log2 + 7));
          __syncwarp();
          for (int i = lane; i < 32 * (((boxes << pages.pages_log2()) + 31) / 32); i += 32) {
            const int box = i >> pages.pages_log2(), down = i & ((1 << pages.pages_log2()) - 1), page = pages.page(down);
            if (box < boxes && down < down_count) {
              load_box<128>(p, to + box * K::BOX_BYTES + (down << (pages.rows_log2 + 7)), (first_box + box) * 64, row,
                            page, pages.rows_log2, full);
            }
          }
        });
      }
    });
  } else {
    RingPosition<K::RING_SLOTS> rings[2] = {{0, 1}, {0, 1}};
    for_pieces(p, K::N, [&](const PieceContext &context) {
      for (int block = context.block_begin, wg = 0; block < context.block_end; ++block, wg ^= 1) {
        GatherRows<128> rows;
        rows.locate(p, context.table, block, context.kv_end);
        const auto copy = [&](uint32_t to, uint32_t full, int first_box, int boxes) {
#pragma unroll 1
          for (int box = 0; box < boxes; ++box) rows.copy_box(to + box * K::BOX_BYTES, (first_box + box) * 128);
          copy_async_arrive(full);
        };
        if (wg == 0) {
          fill(0, rings[0], copy);
        } else {
          fill(1, rings[1], copy);
        }
      }
    });
  }
}

template <typename K>
__device__ __forceinline__ void token_split_consumer(const DecodeParams &p, typename K::Shared &shared, int wg) {
  using T = typename K::T;
  constexpr int N = K::N;
  const int lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const float scale_log2 = p.scale_log2;
  RingPosition<K::RING_SLOTS> ring = {0, 0};

  for_pieces(p, N, &shared.end, [&](const PieceContext &context) {
    const int blocks = context.block_end - context.block_begin;
    load_query<T, N, K::D_LATENT, K::D_ROPE>(p, context, smem_address(shared.q), shared.rows);

    float O[K::TILES][N / 2];
    float m[N / 4], l[N / 4];  // of the thread's columns 8 j + 2 quad + e, at 2 j + e
#pragma unroll
    for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      m[i] = kNoMaximum;
      l[i] = context.unreadable ? NAN : 0.f;
    }

    const uint32_t q_low = smem_address(shared.q) >> 4;
    for (int i = wg; i < blocks; i += 2) {
      const int block = context.block_begin + i;
      uint32_t slot_low[K::CHUNKS];
      int slots[K::CHUNKS];
      uint32_t parities[K::CHUNKS];
#pragma unroll
      for (int c = 0; c < K::CHUNKS; ++c) {
        slots[c] = wg * K::RING_SLOTS + ring.slot;
        parities[c] = ring.parity;
        slot_low[c] = __shfl_sync(0xffffffffu, smem_address(shared.ring[slots[c]]) >> 4, 0);
        ring.advance();
      }

      float S[N / 2];
#pragma unroll
      for (int c = 0; c < K::CHUNKS; ++c) {
        mbarrier_wait(smem_address(&shared.full[slots[c]]), parities[c]);
        if constexpr (K::COPY != KvCopy::kBoxes) fence_proxy_async();
        wgmma_fence_registers(S);
        wgmma_fence();
#pragma unroll
        for (int b = 0; b < K::CHUNK_BOXES; ++b) {
          const int box = c * K::CHUNK_BOXES + b;
          if (box < K::BOXES) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              Wgmma<T, N>::template mma<false>(S, descriptor(slot_low[c] + b * (K::BOX_BYTES >> 4) + 2 * k),
                                               descriptor(q_low + box * (N * 128 >> 4) + 2 * k), box + k > 0);
            }
          }
        }
      }
      wgmma_commit();
      const int tokens = context.kv_end - block * kBlockTokens;
      wgmma_wait<0>();
      wgmma_fence_registers(S);
      if (tokens < kBlockTokens) {
        // V beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked below.
        for (int r = tokens + warp; r < kBlockTokens; r += 4) {
#pragma unroll
          for (int c = 0; c < K::CHUNKS; ++c) {
            if (lane < K::CHUNK_BOXES * 8) {
              *reinterpret_cast<uint4 *>(shared.ring[slots[c]] + (lane / 8) * K::BOX_BYTES + r * 128 +
                                         (lane % 8) * 16) = make_uint4(0, 0, 0, 0);
            }
          }
        }
      }

      using Softmax = ColumnSoftmax<T, N>;
      Softmax::scale_and_mask(S, scale_log2, block, context.first_limit, shared.rows);
      const uint32_t p_at = smem_address(shared.p[wg][(i >> 1) & 1]);
      float sum[N / 4];
      bool above = i == wg;  // the first block: there is no maximum yet
      if (!above) {
        Softmax::exponentiate(S, m, sum, p_at);
        above = named_barrier_any(kBarrierWarpgroup + wg, 128, Softmax::above(S, m));
      }
      if (above) {
        Softmax::store_maxima(S, shared.sums[wg][warp]);
        named_barrier(kBarrierWarpgroup + wg, 128);
        float factor[N / 4];
        Softmax::update(shared.sums[wg][0], m, l, factor);
#pragma unroll
        for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
          for (int j = 0; j < N / 2; ++j) O[t][j] *= factor[2 * (j / 4) + j % 2];
        }
        Softmax::exponentiate(S, m, sum, p_at);
        named_barrier(kBarrierWarpgroup + wg, 128);
      }
#pragma unroll
      for (int j = 0; j < N / 4; ++j) l[j] += sum[j];

#pragma unroll
      for (int t = 0; t < K::TILES; ++t) wgmma_fence_registers(O[t]);
      wgmma_fence();
      const uint32_t p_low = __shfl_sync(0xffffffffu, p_at >> 4, 0);
#pragma unroll
      for (int c = 0; c < K::CHUNKS; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int b = 0; b < K::CHUNK_BOXES; ++b) {
            const int box = c * K::CHUNK_BOXES + b;
            if (box < K::TILES) {
              Wgmma<T, N>::template mma<true>(O[box], descriptor(slot_low[c] + b * (K::BOX_BYTES >> 4) + 128 * k),
                                              descriptor(p_low + 2 * k), true);
            }
          }
        }
        wgmma_commit();
      }
      const auto release = [&](int c) {
        if (lane == 0) mbarrier_arrive(smem_address(&shared.empty[slots[c]]));
      };
      if constexpr (K::CHUNKS == 3) {
        wgmma_wait<2>();
        release(0);
      }
      wgmma_wait<1>();
      release(K::CHUNKS - 2);
      wgmma_wait<0>();
      release(K::CHUNKS - 1);
#pragma unroll
      for (int t = 0; t < K::TILES; ++t) wgmma_fence_registers(O[t]);
    }

    // ---- the two warpgroups meet --------------------------------------------------------------------------------
    ColumnSoftmax<T, N>::reduce_groups(l);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const int column = 8 * (j / 2) + 2 * quad + j % 2;
      if (group == 0) {
        shared.sums[wg][warp][column] = l[j];
        if (warp == 0) shared.maxima[wg][column] = m[j];
      }
    }
    named_barrier<kBarrierConsumers, kConsumers>();
    float factor[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const int column = 8 * (j / 2) + 2 * quad + j % 2;
      const float top = fmaxf(shared.maxima[0][column], shared.maxima[1][column]);
      factor[j] = exp2_approx(m[j] - top);
      if (wg == 0 && warp == 0 && group == 0) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          float of_wg = 0.f;
#pragma unroll
          for (int i = 0; i < 4; ++i) of_wg += shared.sums[w][i][column];
          total += of_wg * exp2_approx(shared.maxima[w][column] - top);
        }
        shared.stats[0][column] = top;
        shared.stats[1][column] = total;
      }
    }
    using X = Exchange<N, K::D_LATENT>;
    // Each gives the other's half of the tiles away, adds what it gets to its own half, and leaves the sum there.
    float *const values = shared.exchange + warp * 16 + group + 2 * quad * X::ROW;
    const auto halves = [&](auto half, auto action) {
#pragma unroll
      for (int t = half * (K::TILES / 2); t < (half + 1) * (K::TILES / 2); ++t) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const int j = i / 4, e = i % 2, high = i / 2 % 2;
          action(values[(8 * j + e) * X::ROW + t * 64 + high * 8], O[t][i] * factor[2 * j + e]);
        }
      }
    };
    const auto give = [](float &sum, float mine) { sum = mine; };
    const auto add = [](float &sum, float mine) { sum += mine; };
    constexpr std::integral_constant<int, 0> low{};
    constexpr std::integral_constant<int, 1> high{};
    if (blocks <= 1) {  // the second warpgroup has nothing to add
      if (wg == 0) {
        halves(low, give);
        halves(high, give);
      }
    } else {
      if (wg == 0) {
        halves(high, give);
      } else {
        halves(low, give);
      }
      named_barrier<kBarrierConsumers, kConsumers>();
      if (wg == 0) {
        halves(low, add);
      } else {
        halves(high, add);
      }
    }
    store_exchange<N, K::D_LATENT>(p, shared.exchange, shared.stats[0], shared.rows, shared.end);
    close_piece<K::D_LATENT>(p, shared.end, shared.cut);
  });
  merge_cut_units<K::D_LATENT>(p, shared.cut);
  fill_spare_rows(p, K::D_LATENT);
}

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) token_split_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(shared_raw);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x < 2 * K::RING_SLOTS) {
    mbarrier_init(smem_address(&shared.full[threadIdx.x]), arrivals(K::COPY));
    mbarrier_init(smem_address(&shared.empty[threadIdx.x]), 4);
  }
  if (threadIdx.x == 0) {
    shared.cut.count = 0;
    if (K::COPY == KvCopy::kBoxes && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  begin_kernel();

  if (warpgroup == 0) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    token_split_producer<K>(p, shared);
  } else {
    set_registers_more<K::CONSUMER_REGISTERS>();
    token_split_consumer<K>(p, shared, warpgroup - 1);
  }
}

template <int TILE, int Q_DTYPE, int, int D_LATENT, int D_ROPE, KvCopy COPY>
Kernel token_split_entry() {
  using K = TokenSplit<QueryType<Q_DTYPE>, TILE, D_LATENT, D_ROPE, COPY>;
  return kernel_entry<K>(token_split_kernel<K>);
}

}  // namespace etap::sm90
