// The producer's view of the paged KV cache: block after block of one CTA's piece, through the block table.
#pragma once

#include <climits>

#include "sm90/parts/piece.cuh"

namespace etap::sm90 {

// A place in a ring of SLOTS slots, and the parity of the lap.
template <int SLOTS>
struct RingPosition {
  int slot;
  uint32_t parity;

  // Less than a lap further on.
  __device__ __forceinline__ RingPosition further(int by) const {
    const bool wraps = slot + by >= SLOTS;
    return {wraps ? slot + by - SLOTS : slot + by, parity ^ wraps};
  }
  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Pages of fewer than eight tokens are gathered row by row.
__device__ __forceinline__ bool gathers(const DecodeParams &p) { return p.page_shift < 3; }

// Page numbers, 32 at a time: lane l holds entry l of this CTA's next 32 / pages blocks (pages of fewer than 64 tokens:
// several a block), and the next 32 are on their way. For one converged warp; `advance` is called once before each
// block, in order.
struct KvPages {
  const int32_t *table;
  int table_end;  // pages that hold a visible token
  int block_end, step;
  int page_shift, rows_log2;  // a block is 2^pages_log2() boxes of 2^rows_log2 rows high
  int now, next, used;
  uint32_t num_pages;
  bool exist;  // all 32 pages: asked once for all of them, not once a box

  __device__ __forceinline__ KvPages(const DecodeParams &p, const PieceContext &c, int first, int step_)
      : table(c.table),
        table_end((c.kv_end + (1 << p.page_shift) - 1) >> p.page_shift),
        block_end(c.piece.block_end),
        step(step_),
        page_shift(p.page_shift),
        rows_log2(min(p.page_shift, 6)),
        now(0),
        used((32 >> pages_log2()) - 1),
        num_pages(p.num_pages),
        exist(true) {
    next = fetch(first);
  }
  __device__ __forceinline__ int pages_log2() const { return 6 - rows_log2; }
  __device__ __forceinline__ int fetch(int block) const {
    const int lane = threadIdx.x % 32, mine = block + (lane >> pages_log2()) * step;
    const int64_t token = static_cast<int64_t>(mine) * kBlockTokens + ((lane & ((1 << pages_log2()) - 1)) << rows_log2);
    const int64_t entry = token >> page_shift;
    return mine < block_end && entry < table_end ? __ldg(table + entry) : 0;
  }
  __device__ __forceinline__ void advance(int block) {
    if (++used == 32 >> pages_log2()) {
      now = next;
      exist = __all_sync(0xffffffffu, static_cast<uint32_t>(now) < num_pages);
      next = fetch(block + (32 >> pages_log2()) * step);
      used = 0;
    }
  }
  __device__ __forceinline__ int page(int down) const {
    return __shfl_sync(0xffffffffu, now, (used << pages_log2()) + down);
  }
  __device__ __forceinline__ int row_in_page(int block) const {
    return (block * kBlockTokens) & ((1 << page_shift) - 1);
  }
  // Boxes one above the other that hold a visible token of the block.
  __device__ __forceinline__ int boxes_down(int tokens) const {
    return (min(kBlockTokens, tokens) + (1 << rows_log2) - 1) >> rows_log2;
  }
  // Brings `count` columns, at most MOST, of `down_count` boxes of ROW_BYTES wide rows: column(i) is where in a row the
  // i-th begins. `barrier` counts their bytes, which the caller announces. NaN where there is no such page.
  // An elected lane copies with what all lanes share: the copy engine's operands are uniform registers, and where ptxas
  // must find them out lane by lane a box takes 240 to 500 cycles.
  template <int MOST, int ROW_BYTES, typename Column>
  __device__ __forceinline__ void load(const DecodeParams &p, int row, int down_count, int count, uint32_t to,
                                       Column column, uint32_t barrier) const {
    constexpr int kColumnBytes = kBlockTokens * ROW_BYTES;
    const int bytes_log2 = rows_log2 + (ROW_BYTES == 128 ? 7 : 6);
    if (exist) {
#pragma unroll 1
      for (int down = 0; down < down_count; ++down) {
        const int whole = page(down);
        if (elect_one()) {
#pragma unroll
          for (int i = 0; i < MOST; ++i) {
            if (i < count)
              tma_load_3d(to + i * kColumnBytes + (down << bytes_log2), &p.kv_map, column(i), row, whole, barrier);
          }
        }
        __syncwarp();
      }
      return;
    }
    const int lane = threadIdx.x % 32, mine = page(lane);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const uint32_t box = to + i * kColumnBytes + (lane << bytes_log2);
      if (lane >= down_count) continue;
      if (static_cast<uint32_t>(mine) < p.num_pages) {
        tma_load_3d(box, &p.kv_map, column(i), row, mine, barrier);
      } else {
        bulk_load(box, &kNanBytes, 1u << bytes_log2, barrier);
      }
    }
    __syncwarp();
  }
};

// Token-granular copies, 16 bytes a thread of the producers, swizzled by hand; rows past the end become zeros. THREADS:
// 128, the first warpgroup; 256, and the fourth.
template <int ROW_BYTES, int THREADS = 128>
struct GatherRows {
  static_assert(ROW_BYTES == 128 || ROW_BYTES == 64);
  static constexpr int CHUNKS = ROW_BYTES / 16, ROWS = THREADS / CHUNKS, PASSES = kBlockTokens / ROWS;
  const char *source[PASSES];
  int page[PASSES];  // -1 where a list has a hole
  int row[PASSES];   // in the page
  bool valid[PASSES];
  int next[PASSES];  // the table's entries for the block after

  __device__ __forceinline__ static int row_of(int pass) {
    const int thread = threadIdx.x % 128 + (THREADS > 128 ? threadIdx.x / 384 * 128 : 0);
    return thread / CHUNKS + pass * ROWS;
  }
  // Asks the table for the entries of a block's rows: all are on their way before the first is looked at. kv_end: 0
  // where there is no such block.
  __device__ __forceinline__ void fetch(const DecodeParams &p, const int32_t *table, int block, int kv_end) {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int token = block * kBlockTokens + row_of(i);
      next[i] = token < kv_end ? load_ahead(table + (token >> p.page_shift)) : 0;
    }
  }
  // Where the rows are whose entries were asked for, and that of pages that don't exist is somewhere else.
  __device__ __forceinline__ void resolve(const DecodeParams &p, int block, int kv_end) {
    bool exist = true;
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int token = block * kBlockTokens + row_of(i);
      valid[i] = token < kv_end;
      page[i] = next[i];
      row[i] = token & ((1 << p.page_shift) - 1);
    }
    if (p.lists) {
#pragma unroll
      for (int i = 0; i < PASSES; ++i) {
        valid[i] = valid[i] && page[i] != -1;
        if (p.slots_a_page > 1) {
          const uint32_t slot = static_cast<uint32_t>(page[i]);
          page[i] = page[i] == -1 ? -1 : static_cast<int>(slot / p.slots_a_page);
          row[i] = static_cast<int>(slot % p.slots_a_page);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      exist = exist && static_cast<uint32_t>(page[i]) < p.num_pages;
      source[i] = p.kv + page[i] * p.kv_page_bytes + row[i] * p.kv_row_bytes + threadIdx.x % CHUNKS * 16;
    }
    if (__all_sync(0xffffffffu, exist)) return;
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      if (static_cast<uint32_t>(page[i]) >= p.num_pages)
        source[i] = reinterpret_cast<const char *>(&kNanBytes) + threadIdx.x % CHUNKS * 16;
    }
  }
  // The same, and the table is asked about the block after. first: of the piece.
  __device__ __forceinline__ void locate(const DecodeParams &p, const int32_t *table, int block, int first, int step,
                                         int kv_end) {
    if (block == first) fetch(p, table, block, kv_end);
    resolve(p, block, kv_end);
    fetch(p, table, block + step, kv_end);
  }
  // Lines of the block after, rows of ALL_BYTES, into L2: for those who have less in flight than hides the memory's
  // latency. kv_end: as for fetch.
  template <int ALL_BYTES>
  __device__ __forceinline__ void prefetch(const DecodeParams &p, int block, int kv_end) const {
    if (p.slots_a_page > 1) return;
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int token = block * kBlockTokens + row_of(i), chunk = threadIdx.x % CHUNKS;
      if (token >= kv_end || static_cast<uint32_t>(next[i]) >= p.num_pages) continue;
      const char *const line =
          p.kv + next[i] * p.kv_page_bytes + (token & ((1 << p.page_shift) - 1)) * p.kv_row_bytes + chunk * 128;
#pragma unroll
      for (int at = 0; at < ALL_BYTES; at += 128 * CHUNKS) {
        if (at + chunk * 128 < ALL_BYTES) prefetch_l2(line + at);
      }
    }
  }
  // ROW_BYTES of each of the 64 rows, from byte `column` of the row on, into a box; zeros from byte `columns` on. The
  // box's swizzle XORs the number of the 128-byte line into that of the 16-byte chunk.
  __device__ __forceinline__ void copy_box(uint32_t box, int column, int columns = INT_MAX) const {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int row = row_of(i), line = row * ROW_BYTES / 128, chunk = threadIdx.x % CHUNKS;
      copy_async_16(box + row * ROW_BYTES + ((chunk ^ (line % CHUNKS)) << 4), source[i] + column,
                    valid[i] && column + chunk * 16 < columns);
    }
  }
};

// The same for one warp, which copies boxes of all 64 rows. Where they are it knows beforehand, each lane of those that
// it copies from: a box that is given back is on its way again after as many instructions as it has copies.
struct GatherLanes {
  const char *source[16];  // of rows lane / 8 + 4 i, from the lane's chunk of 16 bytes on
  int next[2];             // the table's entries of rows lane and lane + 32 of the block after

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  // As GatherRows::fetch.
  __device__ __forceinline__ void fetch(const DecodeParams &p, const int32_t *table, int block, int kv_end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = block * kBlockTokens + lane() + 32 * i;
      next[i] = token < kv_end ? load_ahead(table + (token >> p.page_shift)) : 0;
    }
  }
  // As GatherRows::resolve.
  __device__ __forceinline__ void resolve(const DecodeParams &p, int block, int kv_end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = block * kBlockTokens + lane() + 32 * i;
      uint32_t page = static_cast<uint32_t>(next[i]), row = static_cast<uint32_t>(token & ((1 << p.page_shift) - 1));
      if (p.slots_a_page > 1 && next[i] != -1) {
        row = page % p.slots_a_page;
        page /= p.slots_a_page;
      }
      const char *from = p.kv + static_cast<int64_t>(page) * p.kv_page_bytes + row * p.kv_row_bytes;
      if (page >= p.num_pages) from = reinterpret_cast<const char *>(&kNanBytes);
      if (token >= kv_end || (p.lists && next[i] == -1)) from = reinterpret_cast<const char *>(&kZeroBytes);
#pragma unroll
      for (int j = 0; j < 8; ++j) source[8 * i + j] = of_lane(from, lane() / 8 + 4 * j) + lane() % 8 * 16;
    }
  }
  // BOXES boxes of 64 values of 16 bits, one behind the other, from byte `column` of the rows on.
  template <int BOXES>
  __device__ __forceinline__ void copy(uint32_t box, int column) const {
    const int row = lane() / 8, chunk = lane() % 8;
    const uint32_t to[2] = {box + row * 128 + ((chunk ^ row) << 4), box + row * 128 + ((chunk ^ row ^ 4) << 4)};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int b = 0; b < BOXES; ++b)
        copy_async_16(to[i % 2] + i * 512 + b * kBlockTokens * 128, source[i] + column + b * 128);
    }
  }
};

// The entries of a thread's two places of a list, which holes in it are found by. They are asked for before the block's
// products, and come beside them: who looks at them at once waits for the memory.
struct ListEntries {
  int first, second;

  __device__ __forceinline__ void ask(const int32_t *list, int place, int second_place, int count) {
    first = place < count ? load_ahead(list + place) : 0;
    second = second_place < count ? load_ahead(list + second_place) : 0;
  }
  // Is there no token?
  __device__ __forceinline__ bool first_is_hole() const { return first == -1; }
  __device__ __forceinline__ bool second_is_hole() const { return second == -1; }
};

}  // namespace etap::sm90
