// The producer's view of the paged KV cache: block after block of one CTA's piece, through the block table.
#pragma once

#include "piece.cuh"

namespace etap::sm90 {

// Page numbers, 32 at a time: lane l holds entry l of this CTA's next 32 / pages blocks (pages of fewer than 64 tokens:
// several a block), and the next 32 are on their way. For one converged warp; `advance` is called once before each
// block, in order.
struct KvPages {
  const int32_t *table;
  int table_end;  // pages that hold a visible token
  int block_end, step;
  int page_shift, pages_log2, rows_log2;  // a block is 2^pages_log2 boxes of 2^rows_log2 rows high
  int now, next, used;

  __device__ __forceinline__ KvPages(const DecodeParams &p, const PieceContext &c, int first, int step_)
      : table(c.table),
        table_end((c.kv_end + (1 << p.page_shift) - 1) >> p.page_shift),
        block_end(c.piece.block_end),
        step(step_),
        page_shift(p.page_shift),
        pages_log2(p.page_shift >= 6 ? 0 : 6 - p.page_shift),
        rows_log2(p.page_shift >= 6 ? 6 : p.page_shift),
        now(0),
        used((32 >> pages_log2) - 1) {
    next = fetch(first);
  }
  __device__ __forceinline__ int fetch(int block) const {
    const int lane = threadIdx.x % 32, mine = block + (lane >> pages_log2) * step;
    const int64_t token = static_cast<int64_t>(mine) * kBlockTokens + ((lane & ((1 << pages_log2) - 1)) << rows_log2);
    const int64_t entry = token >> page_shift;
    return mine < block_end && entry < table_end ? __ldg(table + entry) : 0;
  }
  __device__ __forceinline__ void advance(int block) {
    if (++used == 32 >> pages_log2) {
      now = next;
      next = fetch(block + (32 >> pages_log2) * step);
      used = 0;
    }
  }
  __device__ __forceinline__ int page(int down) const {
    return __shfl_sync(0xffffffffu, now, (used << pages_log2) + down);
  }
  __device__ __forceinline__ int row_in_page(int block) const {
    return (block * kBlockTokens) & ((1 << page_shift) - 1);
  }
  // Boxes one above the other that hold a visible token of the block.
  __device__ __forceinline__ int boxes_down(int tokens) const {
    return (min(kBlockTokens, tokens) + (1 << rows_log2) - 1) >> rows_log2;
  }
};

// Token-granular copies for pages of fewer than eight tokens. Eight threads of the producer warpgroup copy 128 bytes of
// a row, 16 each, swizzled by hand; rows past the end become zeros.
struct GatherRows {
  const char *source[4];
  bool valid[4];

  __device__ __forceinline__ void locate(const DecodeParams &p, const int32_t *table, int block, int kv_end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = block * kBlockTokens + static_cast<int>(threadIdx.x) / 8 + 16 * i;
      valid[i] = token < kv_end;
      const int64_t page = valid[i] ? __ldg(table + (token >> p.page_shift)) : 0;
      source[i] =
          p.kv + page * p.kv_page_bytes + (token & ((1 << p.page_shift) - 1)) * p.kv_row_bytes + threadIdx.x % 8 * 16;
    }
  }
  // 128 bytes of each of the 64 rows, from byte `column` of the row on, into a box.
  __device__ __forceinline__ void copy_box(uint32_t box, int column) const {
    const int row0 = threadIdx.x / 8, quarter = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 16 * i;
      copy_async_16(box + row * 128 + ((quarter ^ (row & 7)) << 4), source[i] + column, valid[i]);
    }
  }
};

}  // namespace etap::sm90
