// The ring of FP8 rows in shared memory, and the warps that fill it.
//
//     slot     CHUNK_BOXES boxes of [64 tokens x 64 bytes], 64-byte swizzle (e4m3_operand.cuh); a block is CHUNKS slots
//     rings    one, whose blocks all warpgroups read, or one a warpgroup, whose blocks it alone reads
//     copies   by the copy engine, a warp a ring; rows of small pages and lists by cp.async, the whole warpgroup
#pragma once

#include <climits>

#include "sm90/parts/e4m3_operand.cuh"
#include "sm90/parts/kv_pages.cuh"
#include "sm90/parts/shared_memory.cuh"

namespace etap::sm90 {

// K below: the kernel's description, with RINGS, RING_SLOTS, SLOT_BYTES, SLOTS_AT, CHUNKS, CHUNK_BOXES, BOXES and
// column_of(box).

// A slot, and, SCALES_BESIDE, the group scales of a block in its first.
template <int BOXES, bool SCALES_BESIDE>
struct E4m3Slot {
  char boxes[BOXES][kFp8BoxBytes];
};
template <int BOXES>
struct E4m3Slot<BOXES, true> {
  char boxes[BOXES][kFp8BoxBytes];
  float scales[kBlockTokens][4];
};

// Addresses of the barriers, from that of shared memory.
template <typename K>
struct E4m3Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int slot) const { return base + K::SLOTS_AT + slot * SlotBarriers::kBytes; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(slot) + SlotBarriers::kEmpty; }
  __device__ __forceinline__ uint32_t ring_free() const { return base + K::RING_FREE_AT; }
  __device__ __forceinline__ uint32_t parts_ready() const { return base + K::PARTS_READY_AT; }
  __device__ __forceinline__ uint32_t parts_read() const { return base + K::PARTS_READ_AT; }
};

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
__device__ __forceinline__ void e4m3_producer(const DecodeParams &p, const WorkerRecord &record, uint32_t base) {
  const E4m3Barriers<K> barriers{base};
  const int warp = opaque(static_cast<int>(threadIdx.x)) / 32;
  if (!GATHER && warp >= K::RINGS) return;
  // The next slot of the ring whose turn it is, and of the other, times two, plus the parity to wait for: registers are
  // scarce. The second ring's slots follow the first's; a fresh ring is empty.
  uint32_t at = GATHER ? 1 : 2 * K::RING_SLOTS * warp + 1;
  [[maybe_unused]] uint32_t other = 2 * K::RING_SLOTS + 1;
  const auto change_ring = [&] {
    if constexpr (GATHER && K::RINGS == 2) {
      const uint32_t last = at;
      at = other;
      other = last;
    }
  };
  // Bit 0: whether the ring is free, as it is at first; else units.
  for (uint32_t units = 1;; units += 2) {
    const Pieces pieces(p, record, static_cast<int>(units / 2));
    if (pieces.done()) break;
    const PieceContext context = pieces.context(K::N);
    if (context.rows <= 0) continue;
    if constexpr (K::RINGS == 1) {  // the end of a piece needs the ring
      mbarrier_wait(barriers.ring_free(), units & 1);
      units ^= 1;
    }
    const int ctas = context.ctas, first = context.first_block() + (GATHER ? 0 : warp * ctas);
    const int step = GATHER ? ctas : K::RINGS * ctas;
    if (GATHER && K::RINGS == 2 && at >= 2 * K::RING_SLOTS) change_ring();  // every piece begins with the first
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
      GatherRows<64> rows;
      for (int block = first; block < context.piece.block_end; block += step) {
        rows.locate(p, context.table, block, first, step, context.kv_end);
        fill([&](uint32_t to, int first_box, int boxes, uint32_t full) {
#pragma unroll 1
          for (int box = 0; box < boxes; ++box) {
            rows.copy_box(to + box * kFp8BoxBytes, K::column_of(first_box + box),
                          K::ROW_BYTES % 64 == 0 ? INT_MAX : K::ROW_BYTES);
          }
          if (K::SCALES_BESIDE && first_box == 0) {
            copy_group_scales<128, 1>(
                p, to + K::SCALES_AT, block, context.kv_end,
                [&](int token) { return token < 32 ? rows.page[0] : rows.page[1]; },
                [&](int token) { return token < 32 ? rows.row[0] : rows.row[1]; });
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
          pages.template load<K::CHUNK_BOXES, 64>(
              p, row, down_count, boxes, to, [&](int i) { return K::column_of(first_box + i); }, full);
          if (lane == 0)
            mbarrier_expect_tx(full, static_cast<uint32_t>(boxes * down_count) << (opaque(pages.rows_log2) + 6));
        });
      }
    }
  }
}

template <typename K>
__device__ __forceinline__ void fill_e4m3_rings(const DecodeParams &p, const WorkerRecord &record, uint32_t base) {
  if (gathers(p)) {
    e4m3_producer<K, true>(p, record, base);
  } else {
    e4m3_producer<K, false>(p, record, base);
  }
}

}  // namespace etap::sm90
