// Decode for up to 32 query rows a tile: the KV context on WGMMA's M, the query rows on its N, without padding to 64.
//
//        dims ->                         N query rows                       dims of V
//      .-----------------.              .----.                            .-------------.   the same bytes of
//   64 | K (shared mem.) | x Q^T [576] = | S^T | 64 tokens      V^T [512] |   K again,  |   shared memory, read
//  tok |    [64, 576]    |               '----'                           |  read MN-   |   with M along the dims
//      '-----------------'                 | softmax over M               |   major     | x P^T [64 tokens, N] = O^T
//      [512, N]
//                                          '-> P^T, K-major in shared ------------------'
//
// Reason for the shape. O^T is 512 x N floats: with N <= 32 one warpgroup holds all of it with room to spare (4 N
// registers a thread), so the two consumer warpgroups take KV blocks in turn with maxima, sums and O^T of their own and
// meet once, at the end of a piece. No exchange in the loop: while one warpgroup is in its softmax the other's WGMMAs
// fill the tensor pipe.
//
// Work. A cluster of C CTAs, or each of them, is a worker of the plan (planner.h). The blocks of a piece go round-robin
// to the CTAs, in a CTA round-robin to the two warpgroups. At the end the warpgroups merge through shared memory, the
// CTAs through distributed shared memory (each owns 1/C of O^T), and only pieces of a unit that was cut leave partial
// results in L2, where the last one to arrive - for each of the C slices on its own - adds them up in order.
//
//   warpgroup 0   producer: KV boxes [64 tokens x 64 dims] into rings of chunks of three boxes (24 KB), by one warp, or
//                 gathered by all four
//   warpgroup 1,2 consumers: QK -> softmax -> PV, a block each
//
// Softmax. A column of S^T is a query row; its 64 tokens lie in 8 lanes of 4 warps. The maximum is lazy: exponents are
// taken against the running maximum of earlier blocks as long as no logit exceeds it by more than 2^8, which the
// barrier that P^T needs anyway finds out (barrier.red.or). Only then the warps exchange maxima and rescale, each
// column by itself, so that a row's bits never depend on its neighbours in the tile. Sums are of unrounded P and stay
// in the thread until the end.
#pragma once

#include <type_traits>

#include "sm90/kernel.h"
#include "sm90/parts/kv_pages.cuh"
#include "sm90/parts/shared_memory.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

template <typename T_, int N_, int D_LATENT_, int D_ROPE_, KvCopy COPY_>
struct TokenSplit {
  using T = T_;
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr KvCopy COPY = COPY_;
  static_assert(N % 8 == 0 && N <= 32, "O^T of one warpgroup must fit its registers");
  static_assert(sizeof(T) == 2 && D_LATENT % 64 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 384;
  static constexpr int CONSUMER_REGISTERS = N > 24 ? 224 : 200;
  static constexpr int PRODUCER_REGISTERS = 504 - 2 * CONSUMER_REGISTERS;
  static constexpr int TILES = D_LATENT / 64;             // m64 tiles of O^T
  static constexpr int BOXES = (D_LATENT + D_ROPE) / 64;  // 8 KB boxes of a KV block
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES;
  static constexpr int BOX_BYTES = kBlockTokens * 128, SLOT_BYTES = CHUNK_BOXES * BOX_BYTES;
  static constexpr int MAX_SLOTS = 12;
  using X = Exchange<N, D_LATENT>;

  template <int SLOTS_>
  struct SharedOf {
    char ring[SLOTS_][CHUNK_BOXES][BOX_BYTES];
    union {
      struct {
        char q[BOXES][N * 128];
        char p[4][N * 128];  // P^T, two of each warpgroup
      } loop;
      char exchange[X::BYTES];  // at the end of a piece
    };
    float sums[2][4][N];   // of each warp; maxima while a maximum moves
    float maxima[2][N];    // of the warpgroups, at the end of a piece
    float top[N], sum[N];  // of the CTA
    RowInfo rows[N];
    SlotBarriers slots[MAX_SLOTS];
    uint64_t parts_ready, parts_read;
    WorkerRecord record;
    PieceEnd end;
  };
  static constexpr int ALIGNMENT = 1024;  // by hand
  static constexpr int SLOTS = slots_that_fit<SharedOf, MAX_SLOTS, kSharedLimit - ALIGNMENT>() / 2 * 2;
  using Shared = SharedOf<SLOTS>;
  static constexpr int SHARED_BYTES = sizeof(Shared) + ALIGNMENT;

  // Each warpgroup has a ring of its own. In a shared one a warpgroup could overtake the other by a lap of the ring
  // (copies complete out of order), and a parity wait can't tell a lap that has not begun from one that is over.
  static constexpr int RING_SLOTS = SLOTS / 2;
  static_assert(RING_SLOTS >= CHUNKS && SHARED_BYTES <= kSharedLimit);
};

enum : int { kBarrierWarpgroup = 2 };  // named barriers 2 and 3

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) token_split_kernel(const __grid_constant__ DecodeParams p) {
  using T = typename K::T;
  constexpr int N = K::N;
  extern __shared__ char shared_raw[];
  const uint32_t unaligned = smem_address(shared_raw), base = (unaligned + K::ALIGNMENT - 1) & ~(K::ALIGNMENT - 1u);
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(shared_raw + (base - unaligned));
  // The same, for addresses: they count from `base`, pointers from the array, as in the machine code that was measured.
  const typename K::Shared &addresses = in_shared_memory<typename K::Shared>(base);

  const auto full = [first = smem_address(&addresses.slots->full)](int slot) {
    return first + slot * SlotBarriers::kBytes;
  };
  const auto empty = [first = smem_address(&addresses.slots->empty)](int slot) {
    return first + slot * SlotBarriers::kBytes;
  };
  const uint32_t parts_ready = smem_address(&addresses.parts_ready), parts_read = smem_address(&addresses.parts_read);

  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);

  if (threadIdx.x < K::SLOTS) {
    mbarrier_init(full(threadIdx.x), arrivals(K::COPY));
    mbarrier_init(empty(threadIdx.x), 4);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(parts_ready, 8 * cluster_size());
    mbarrier_init(parts_read, 8 * cluster_size());
    if (K::COPY == KvCopy::kTma && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  begin_kernel(p, shared.record);

  if (warpgroup == 0) {
    // ---- producer -----------------------------------------------------------------------------------------------
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    RingPosition<K::RING_SLOTS> rings[2] = {{0, 1}, {0, 1}};  // a fresh ring is empty
    for (Pieces pieces(p, shared.record); !pieces.done(); pieces.next()) {
      const PieceContext context = pieces.context(N);
      const Piece piece = context.piece;
      const int first = context.first_block(), step = context.ctas;
      if constexpr (K::COPY == KvCopy::kTma) {
        // One warp: with two the first block would arrive with the second.
        if (warp > 0) continue;
        KvPages kv_pages(p, context, first, step);
        for (int block = first, wg = 0; block < piece.block_end; block += step, wg ^= 1) {
          kv_pages.advance(block);
          const int down_count = kv_pages.boxes_down(context.kv_end - block * kBlockTokens),
                    row = kv_pages.row_in_page(block);
          RingPosition<K::RING_SLOTS> at = wg == 0 ? rings[0] : rings[1];
#pragma unroll 1
          for (int c = 0; c < K::CHUNKS; ++c) {
            const int boxes = min(K::CHUNK_BOXES, K::BOXES - c * K::CHUNK_BOXES), slot = wg * K::RING_SLOTS + at.slot;
            mbarrier_wait(empty(slot), at.parity);
            kv_pages.template load<K::CHUNK_BOXES, 128>(
                p, row, down_count, boxes, smem_address(addresses.ring, slot),
                [&](int i) { return (c * K::CHUNK_BOXES + i) * 64; }, full(slot));
            if (lane == 0)
              mbarrier_expect_tx(full(slot), static_cast<uint32_t>(boxes * down_count) << (kv_pages.rows_log2 + 7));
            at.advance();
          }
          (wg == 0 ? rings[0] : rings[1]) = at;
        }
      } else {
        GatherRows<128> rows;
        for (int block = first, wg = 0; block < piece.block_end; block += step, wg ^= 1) {
          rows.locate(p, context.table, block, first, step, context.kv_end);
          RingPosition<K::RING_SLOTS> at = wg == 0 ? rings[0] : rings[1];
#pragma unroll 1
          for (int c = 0; c < K::CHUNKS; ++c) {
            const int boxes = min(K::CHUNK_BOXES, K::BOXES - c * K::CHUNK_BOXES), slot = wg * K::RING_SLOTS + at.slot;
            mbarrier_wait(empty(slot), at.parity);
#pragma unroll 1
            for (int box = 0; box < boxes; ++box) {
              rows.copy_box(smem_address(addresses.ring, slot) + box * K::BOX_BYTES, (c * K::CHUNK_BOXES + box) * 128);
            }
            copy_async_arrive(full(slot));
            at.advance();
          }
          (wg == 0 ? rings[0] : rings[1]) = at;
        }
      }
    }
  } else {
    // ---- consumers ----------------------------------------------------------------------------------------------
    set_registers_more<K::CONSUMER_REGISTERS>();
    const int wg = warpgroup - 1;
    const int quad = lane % 4, group = lane / 4;
    float *const sums = shared.sums[0][0], *const maxima = shared.maxima[0];
    const float scale_log2 = p.scale_log2;
    const typename K::X exchange{smem_address(addresses.exchange),
                                 smem_address(addresses.top),
                                 smem_address(addresses.sum),
                                 parts_ready,
                                 parts_read,
                                 &shared.end};
    RingPosition<K::RING_SLOTS> ring = {0, 0};
    uint32_t pieces_done = 0;

    for (Pieces pieces(p, shared.record); !pieces.done(); pieces.next()) {
      const PieceContext context = pieces.context(N);
      if (context.rows <= 0) continue;
      const Piece piece = context.piece;
      const int ctas = context.ctas, first = context.first_block();
      const int my_blocks = piece.block_end > first ? (piece.block_end - first + ctas - 1) / ctas : 0;
      // The remote readers of the last piece's exchange must be done before Q lands on it.
      if (ctas > 1 && pieces_done > 0) mbarrier_wait_cluster(parts_read, (pieces_done - 1) & 1);
      load_query<T, N, K::D_LATENT, K::D_ROPE>(p, context, smem_address(addresses.loop.q), shared.rows, &shared.end);

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
        l[i] = context.first_sum();
      }

      const uint32_t q_low = smem_address(addresses.loop.q) >> 4;
      for (int i = wg; i < my_blocks; i += 2) {
        const int block = first + i * ctas;
        uint32_t slot_low[K::CHUNKS];
        int slots[K::CHUNKS];
        uint32_t parities[K::CHUNKS];
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) {
          slots[c] = wg * K::RING_SLOTS + ring.slot;
          parities[c] = ring.parity;
          slot_low[c] = __shfl_sync(0xffffffffu, smem_address(addresses.ring, slots[c]) >> 4, 0);
          ring.advance();
        }

        ListEntries entries{};
        if (K::COPY == KvCopy::kGather && p.lists) {
          const int place = block * kBlockTokens + warp * 16 + group;
          entries.ask(context.table, place, place + 8, context.kv_end);
        }
        float S[N / 2];
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) {
          mbarrier_wait(full(slots[c]), parities[c]);
          if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
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
                *reinterpret_cast<uint4 *>(shared.ring[0][0] + slots[c] * K::SLOT_BYTES + (lane / 8) * K::BOX_BYTES +
                                           r * 128 + (lane % 8) * 16) = make_uint4(0, 0, 0, 0);
              }
            }
          }
        }

        using Softmax = ColumnSoftmax<T, N>;
        Softmax::scale_and_mask(p, S, scale_log2, block, context.first_limit, shared.rows);
        if constexpr (K::COPY == KvCopy::kGather)
          Softmax::mask_holes(S, entries.first_is_hole(), entries.second_is_hole());
        const uint32_t p_at = smem_address(addresses.loop.p, 2 * wg + ((i >> 1) & 1));
        float sum[N / 4];
        bool above = i == wg;  // the first block: there is no maximum yet
        if (!above) {
          Softmax::exponentiate(S, m, sum, p_at);
          above = named_barrier_any(kBarrierWarpgroup + wg, 128, Softmax::above(S, m));
        }
        if (above) {
          Softmax::store_maxima(S, sums + (wg * 4 + warp) * N);
          named_barrier(kBarrierWarpgroup + wg, 128);
          float factor[N / 4];
          Softmax::update(sums + wg * 4 * N, m, l, factor);
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
          if (lane == 0) mbarrier_arrive(empty(slots[c]));
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
          sums[(wg * 4 + warp) * N + column] = l[j];
          if (warp == 0) maxima[wg * N + column] = m[j];
        }
      }
      named_barrier<kBarrierConsumers, kConsumers>();
      float factor[N / 4];
#pragma unroll
      for (int j = 0; j < N / 4; ++j) {
        const int column = 8 * (j / 2) + 2 * quad + j % 2;
        const float top = fmaxf(maxima[column], maxima[N + column]);
        factor[j] = exp2_approx(m[j] - top);
        if (wg == 0 && warp == 0 && group == 0) {
          float total = 0.f;
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            float of_wg = 0.f;
#pragma unroll
            for (int i = 0; i < 4; ++i) of_wg += sums[(w * 4 + i) * N + column];
            total += of_wg * exp2_approx(maxima[w * N + column] - top);
          }
          shared.top[column] = top;
          shared.sum[column] = total;
        }
      }
      // Each gives the other's half of the tiles away, adds what it gets to its own half, and leaves the sum there.
      float *const values = reinterpret_cast<float *>(shared.exchange) + warp * 16 + group + 2 * quad * K::X::ROW;
      const auto halves = [&](auto half, auto action) {
#pragma unroll
        for (int t = half * (K::TILES / 2); t < (half + 1) * (K::TILES / 2); ++t) {
#pragma unroll
          for (int i = 0; i < N / 2; ++i) {
            const int j = i / 4, e = i % 2, high = i / 2 % 2;
            action(values[(8 * j + e) * K::X::ROW + t * 64 + high * 8], O[t][i] * factor[2 * j + e]);
          }
        }
      };
      const auto give = [](float &sum, float mine) { sum = mine; };
      const auto add = [](float &sum, float mine) { sum += mine; };
      constexpr std::integral_constant<int, 0> low{};
      constexpr std::integral_constant<int, 1> high{};
      if (my_blocks <= 1) {  // the second warpgroup has nothing to add
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
      finish_piece(p, exchange, shared.rows, 1.f, pieces_done);
      ++pieces_done;
    }
    fill_spare_rows(p, K::D_LATENT);
    // Shared memory must outlive its remote readers.
    if (pieces_done > 0 && shared.end.ctas > 1) mbarrier_wait_cluster(parts_read, (pieces_done - 1) & 1);
  }
}

struct token_split {
  template <typename T, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = TokenSplit<T, ROWS, D_LATENT, D_ROPE, COPY>;
    return {reinterpret_cast<const void *>(&token_split_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
