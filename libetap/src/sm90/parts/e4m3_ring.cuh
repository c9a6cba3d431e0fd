// KV blocks of FP8 caches on their way into shared memory: a ring of slots for each of the two consumer warpgroups,
// boxes of 64 tokens x 64 bytes, by the copy engine or row by row, with the group scales where there are any.
#pragma once

#include <climits>

#include "sm90/parts/e4m3_operand.cuh"
#include "sm90/parts/kv_pages.cuh"

namespace etap::sm90 {

// What the loop over KV blocks needs of a piece, in shared memory.
struct Fp8Loop {
  int kv_end, block_end;
  float latent_scale;  // of the group sums, beside their own scales
  float first_sum;     // PieceContext's
  const int32_t *list;
};

// Shared-memory addresses of the barriers.
template <typename K>
struct E4m3Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int slot) const { return base + 16 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return base + 16 * slot + 8; }
  __device__ __forceinline__ uint32_t parts_ready() const { return base + 16 * K::MAX_SLOTS; }
  __device__ __forceinline__ uint32_t parts_read() const { return parts_ready() + 8; }
  static constexpr int PIECE_END_AT = 16 * K::MAX_SLOTS + 16, LOOP_AT = PIECE_END_AT + sizeof(PieceEnd);
};

enum : int { kBarrierFp8 = 2 };  // named barriers 2 and 3, one a warpgroup

// The same value, but the compiler can't know it: what is worked out from it stays where it is written.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

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

// A block's group scales from their array, zeros past the end: THREADS threads copy FLOATS scales of a token, then of
// the next, four bytes at a time, which is all that the array is aligned to. page_of(token in the block).
template <int THREADS, int FLOATS, typename PageOf, typename RowOf>
__device__ __forceinline__ void copy_group_scales(const DecodeParams &p, uint32_t to, int block, int kv_end,
                                                  PageOf page_of, RowOf row_of) {
  const int thread = opaque(static_cast<int>(threadIdx.x)) % THREADS;
#pragma unroll 1
  for (int i = thread * FLOATS; i < 4 * kBlockTokens; i += THREADS * FLOATS) {
    const int token = block * kBlockTokens + i / 4;
    const int page = page_of(i / 4);
    const float *const from =
        p.kv_group_scales + page * p.kv_group_scales_page_stride + row_of(i / 4) * p.kv_group_scales_row_stride + i % 4;
    // Of a page that does not exist zeros do: its values are NaN.
    const bool valid = token < kv_end && static_cast<uint32_t>(page) < p.num_pages;
#pragma unroll
    for (int j = 0; j < FLOATS; ++j) copy_async_4(to + (i + j) * 4, from + j, valid);
  }
}

// Boxes are loaded by a warp for each ring, rows gathered by the whole warpgroup for one ring after the other.
template <typename K, bool GATHER>
__device__ __forceinline__ void e4m3_producer(const DecodeParams &p, uint32_t base) {
  const E4m3Barriers<K> barriers{base + K::BARRIER_AT};
  const int warp = opaque(static_cast<int>(threadIdx.x)) / 32;
  if (!GATHER && warp > 1) return;
  // The next slot of the ring whose turn it is, and of the other, times two, plus the parity to wait for: registers are
  // scarce. The second ring's slots follow the first's; a fresh ring is empty.
  uint32_t at = GATHER ? 1 : 2 * K::RING_SLOTS * warp + 1;
  [[maybe_unused]] uint32_t other = 2 * K::RING_SLOTS + 1;
  const auto change_ring = [&] {
    if constexpr (GATHER) {
      const uint32_t last = at;
      at = other;
      other = last;
    }
  };
  for (Pieces pieces(p); !pieces.done(); pieces.next()) {
    const PieceContext context = pieces.context(K::N);
    if (context.rows <= 0) continue;
    const int ctas = static_cast<int>(reread_cluster_size());
    const int first = context.piece.block_begin + static_cast<int>(reread_cluster_rank()) + (GATHER ? 0 : warp * ctas);
    const int step = GATHER ? ctas : 2 * ctas;
    if (GATHER && at >= 2 * K::RING_SLOTS) change_ring();  // every piece begins with the first
    // Brings a block: copy(slot's address, first box, boxes, slot's barrier), chunk by chunk.
    const auto fill = [&](auto copy) {
#pragma unroll 1
      for (int c = 0; c < K::CHUNKS; ++c) {
        const uint32_t slot = at / 2;
        mbarrier_wait(barriers.empty(slot), at % 2);
        copy(base + slot * K::SLOT_BYTES, c * K::CHUNK_BOXES, min(K::CHUNK_BOXES, K::BOXES - c * K::CHUNK_BOXES),
             barriers.full(slot));
        at += 2;
        if (at / 2 % K::RING_SLOTS == 0) at = (at - 2 * K::RING_SLOTS) ^ 1;
      }
      change_ring();
    };
    if constexpr (GATHER) {
      for (int block = first; block < context.piece.block_end; block += step) {
        GatherRows<64> rows;
        rows.locate(p, context.table, block, context.kv_end);
        fill([&](uint32_t to, int first_box, int boxes, uint32_t full) {
#pragma unroll 1
          for (int box = 0; box < boxes; ++box) {
            rows.copy_box(to + box * kFp8BoxBytes, K::column_of(first_box + box),
                          K::ROW_BYTES % 64 == 0 ? INT_MAX : K::ROW_BYTES);
          }
          if (K::SCALES_BESIDE && first_box == 0) {
            // Asked for again: there are no registers to keep them.
            const auto entry = [&](int token) {
              const int at = block * kBlockTokens + token;
              return at < context.kv_end ? __ldg(context.table + (at >> p.page_shift)) : 0;
            };
            const auto page_of = [&](int token) {
              const int here = entry(token);
              return p.slots_a_page > 1 && here != -1 ? static_cast<int>(static_cast<uint32_t>(here) / p.slots_a_page)
                                                      : here;
            };
            const auto row_of = [&](int token) {
              return p.slots_a_page > 1 ? static_cast<int>(static_cast<uint32_t>(entry(token)) % p.slots_a_page)
                                        : (block * kBlockTokens + token) & ((1 << p.page_shift) - 1);
            };
            copy_group_scales<128, 1>(p, to + K::SCALES_AT, block, context.kv_end, page_of, row_of);
          }
          copy_async_arrive(full);
        });
      }
    } else {
      KvPages pages(p, context, first, step);
      for (int block = first; block < context.piece.block_end; block += step) {
        pages.advance(block);
        fill([&](uint32_t to, int first_box, int boxes, uint32_t full) {
          const int lane = opaque(static_cast<int>(threadIdx.x)) % 32;
          if (K::SCALES_BESIDE && first_box == 0) {
            copy_group_scales<32, K::FEW_REGISTERS ? 1 : 4>(
                p, to + K::SCALES_AT, block, context.kv_end,
                [&](int token) { return pages.page(token >> pages.rows_log2); },
                [&](int token) { return (block * kBlockTokens + token) & ((1 << p.page_shift) - 1); });
          }
          if constexpr (K::SCALES_BESIDE) copy_async_arrive(full);
          const int here = opaque(block), down_count = pages.boxes_down(context.kv_end - here * kBlockTokens),
                    row = pages.row_in_page(here);
          const int down_shift = opaque(pages.rows_log2) + 6;  // log2 of a page's bytes of a box
          if (lane == 0) mbarrier_expect_tx(full, static_cast<uint32_t>(boxes * down_count) << down_shift);
          __syncwarp();
#pragma unroll 1
          for (int i = lane; i < 32 * (((boxes << pages.pages_log2()) + 31) / 32); i += 32) {
            const int box = i >> pages.pages_log2(), down = i - (box << pages.pages_log2()), page = pages.page(down);
            if (box < boxes && down < down_count)
              load_box(p, to + box * kFp8BoxBytes + (down << down_shift), K::column_of(first_box + box), row, page,
                       pages.exist, down_shift, full);
          }
        });
      }
    }
  }
}

template <typename K>
__device__ __forceinline__ void e4m3_produce(const DecodeParams &p, uint32_t base) {
  if (gathers(p)) {
    e4m3_producer<K, true>(p, base);
  } else {
    e4m3_producer<K, false>(p, base);
  }
}

// What all threads do first.
template <typename K>
__device__ __forceinline__ void begin_e4m3_kernel(const DecodeParams &p, uint32_t base) {
  const E4m3Barriers<K> barriers{base + K::BARRIER_AT};
  if (threadIdx.x < K::SLOTS) {
    // All threads of a warp announce scales, which they copy, beside the one that announces the boxes.
    mbarrier_init(barriers.full(threadIdx.x), gathers(p) ? 128 : K::SCALES_BESIDE ? 33 : 1);
    mbarrier_init(barriers.empty(threadIdx.x), 4);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(barriers.parts_ready(), 8 * reread_cluster_size());
    mbarrier_init(barriers.parts_read(), 8 * reread_cluster_size());
    if (!gathers(p) && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  begin_kernel();
}

}  // namespace etap::sm90
