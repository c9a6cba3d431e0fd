// E4M3 rows on their way into boxes of FP16: the producer warps bring bytes into registers, and store FP16 where the
// copy engine would have stored it.
//
//     a row in the cache   unit 0   unit 1   ..   64 bytes each: 16 a thread, four threads a row, two rows a thread
//     registers            AHEAD units are on their way, beside the one that becomes FP16
//     shared memory        boxes of [64 tokens x 64 values], 128-byte swizzle
//
// Reason for the shape. There is no room for bytes beside Q and two blocks of FP16. What is in flight is what the
// producers' registers hold: 24 KB with six units. A unit is 64 bytes of each row, the other half of its lines comes
// from L2.
//
// Group scales, one for each token and 128 values, are multiplied in here: a token's as the product of a power of two,
// the same for the whole row, and a factor in FP16. The power goes into the logits, and there it also stands for V's
// (rows_on_m.cuh). It is chosen so that the rope part, which has no scale, fits FP16 too.
#pragma once

#include "sm90/parts/kv_pages.cuh"

namespace etap::sm90 {

// K: RowsOnM. In a block, units come in the order of K::box_at.
template <typename K>
struct E4m3Widener {
  static constexpr bool SCALES_BESIDE = K::COPY == KvCopy::kE4m3Group,
                        ROPE_BF16 = K::COPY == KvCopy::kE4m3_656 && K::ROPE;
  static constexpr int ROPE_UNITS = K::ROPE ? 1 + ROPE_BF16 : 0, UNITS = K::LATENT_BOXES + ROPE_UNITS;
  static constexpr int AHEAD = UNITS == 9 ? 6 : UNITS % 4 == 0 ? 4 : 5;
  static_assert(2 * UNITS % AHEAD == 0);  // registers have no numbers that are known at run time only
  static constexpr int SCALES_AT = K::D_LATENT, ROPE_AT = ROPE_BF16 ? SCALES_AT + 16 : K::D_LATENT;

  struct Unit {
    int box, half;  // half: of a BF16 rope part
  };
  __device__ static constexpr Unit unit_of(int slot, int nth) {
    if (!ROPE_BF16) return {K::box_at(slot, nth), 0};
    return nth < 2 ? Unit{K::LATENT_BOXES, nth} : Unit{K::box_at(slot, nth - 1), 0};
  }

  using Rows = GatherRows<64, 256>;
  static constexpr int PASSES = Rows::PASSES;

  const DecodeParams &p;
  typename K::Shared &shared;
  const int32_t *table;
  int kv_end,
      end_and_step;  // the piece's end, times 16, and from a block of this CTA to the next: registers are scarce
  int loading;       // the block whose units are being loaded
  Rows rows;
  uint4 data[AHEAD][PASSES];
  float scale[PASSES];    // of group `lane % 4` of the thread's two rows: of the block that is being loaded
  float factors[PASSES];  // the same, as factors beside the power of two: of the block that is being stored
  float down[PASSES];     // 2^-exponent, of its rope part

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  // Between blocks: is there one more?
  __device__ __forceinline__ bool exists() const { return loading < block_end(); }
  __device__ __forceinline__ int block_end() const { return end_and_step >> 4; }
  __device__ __forceinline__ int step() const { return end_and_step & 15; }

  // The first units of the piece.
  __device__ __forceinline__ void begin() {
    rows.fetch(p, table, loading, exists() ? kv_end : 0);
    locate();
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load(0, i, i);
  }
  // `rows` become those of block `loading`, and the table is asked about the block after it.
  __device__ __forceinline__ void locate() {
    rows.resolve(p, loading, exists() ? kv_end : 0);
    const int ahead = loading + step();
    rows.fetch(p, table, ahead, ahead < block_end() ? kv_end : 0);
    if constexpr (K::SCALED) {
#pragma unroll
      for (int i = 0; i < PASSES; ++i) {
        const bool valid = rows.valid[i];
        if constexpr (SCALES_BESIDE) {
          const bool page = static_cast<uint32_t>(rows.page[i]) < p.num_pages;  // else the values are NaN
          scale[i] = valid && page ? load_ahead(p.kv_group_scales + rows.page[i] * p.kv_group_scales_page_stride +
                                                rows.row[i] * p.kv_group_scales_row_stride + lane() % 4)
                                   : 0.f;
        } else {
          const char *const scales = rows.source[i] - lane() % 4 * 16 + SCALES_AT;
          scale[i] = valid ? load_ahead(reinterpret_cast<const float *>(scales) + lane() % 4) : 0.f;
        }
      }
    }
  }
  // What is in flight in registers would not hide the memory's latency.
  __device__ __forceinline__ void prefetch() const {
    const int ahead = loading + step();
    rows.template prefetch<K::ROW_BYTES>(p, ahead, ahead < block_end() ? kv_end : 0);
  }
  __device__ __forceinline__ void load(int slot, int nth, int buffer) {
    const Unit unit = unit_of(slot, nth);
    const int column = unit.box == K::LATENT_BOXES ? ROPE_AT + 64 * unit.half : 64 * unit.box;
#pragma unroll
    for (int i = 0; i < PASSES; ++i) data[buffer][i] = load_stream_16(rows.source[i] + column, rows.valid[i]);
  }

  // The powers of two of the thread's rows, from the scales and the rope part in `first` and `second`.
  __device__ __forceinline__ void settle_scales(int slot, const uint4 (&first)[PASSES], const uint4 (&second)[PASSES]) {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      float rope = 0.f;
      if constexpr (K::ROPE) {
        const uint32_t words[8] = {first[i].x,  first[i].y,  first[i].z,  first[i].w,
                                   second[i].x, second[i].y, second[i].z, second[i].w};
#pragma unroll
        for (int w = 0; w < (ROPE_BF16 ? 8 : 4); ++w) {
          if constexpr (ROPE_BF16) {
            rope = fmaxf(rope,
                         fmaxf(fabsf(__uint_as_float(words[w] << 16)), fabsf(__uint_as_float(words[w] & 0xffff0000u))));
          } else {
            uint32_t low, high;
            e4m3_to_half(words[w], low, high);
            const float2 a = unpack_half2(low), b = unpack_half2(high);
            rope = fmaxf(rope, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
          }
        }
      }
      // 2^15 of the power fits FP16.
      float largest = fmaxf(fabsf(scale[i]), rope * 0x1p-15f);
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const int biased = min(max(__float_as_int(largest) >> 23, 27), 252);
      down[i] = __int_as_float((253 - biased) << 23);
      factors[i] = scale[i] * down[i];
      if (lane() % 4 == 0) shared.exponents[slot][Rows::row_of(i)] = static_cast<int8_t>(biased - 126);
    }
  }
  // Unit `nth` of a block, as FP16 into its box.
  __device__ __forceinline__ void store(int slot, int nth, const uint4 (&bytes)[PASSES]) const {
    const Unit unit = unit_of(slot, nth);
    const int quarter = lane() % 4;
    const uint32_t box = smem_address(shared.kv[slot][unit.box]);
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int row = Rows::row_of(i);
      const uint32_t line = box + row * 128;
      const uint32_t words[4] = {bytes[i].x, bytes[i].y, bytes[i].z, bytes[i].w};
      uint32_t out[8];
      if (ROPE_BF16 && unit.box == K::LATENT_BOXES) {
#pragma unroll
        for (int w = 0; w < 4; ++w)
          out[w] = pack2<__half>(__uint_as_float(words[w] << 16) * down[i],
                                 __uint_as_float(words[w] & 0xffff0000u) * down[i]);
        store_shared_16(line + (((4 * unit.half + quarter) ^ (row % 8)) << 4), {out[0], out[1], out[2], out[3]});
        continue;
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) e4m3_to_half(words[w], out[2 * w], out[2 * w + 1]);
      if constexpr (K::SCALED) {
        if (unit.box == K::LATENT_BOXES) {
#pragma unroll
          for (uint32_t &pair : out) {
            const float2 v = unpack_half2(pair);
            pair = pack2<__half>(v.x * down[i], v.y * down[i]);
          }
        } else {
          const float factor = __shfl_sync(0xffffffffu, factors[i], lane() / 4 * 4 + unit.box / 2);
          const uint32_t by = pack2<__half>(factor, factor);
#pragma unroll
          for (uint32_t &pair : out) multiply_half2(pair, by);
        }
      }
      store_shared_16(line + (((2 * quarter) ^ (row % 8)) << 4), {out[0], out[1], out[2], out[3]});
      store_shared_16(line + (((2 * quarter + 1) ^ (row % 8)) << 4), {out[4], out[5], out[6], out[7]});
    }
  }

  // The block that `rows` are of when it is called, each part once it is empty. A warp's stores are over when it says
  // so: `full` counts warps.
  template <int SLOT>
  __device__ __forceinline__ void bring_block(uint32_t parity) {
#pragma unroll
    for (int nth = 0; nth < UNITS; ++nth) {
      constexpr int kFirst = SLOT * UNITS;
      const Unit unit = unit_of(SLOT, nth);
      const int buffer = (kFirst + nth) % AHEAD;
      const int part = K::part_of(unit.box), stored = nth - (ROPE_BF16 && nth > 0);  // boxes before this one
      if (nth == 0 || part != K::part_of(unit_of(SLOT, nth - 1).box))
        mbarrier_wait(smem_address(&shared.empty[SLOT][part]), parity);
      if (K::SCALED && nth == 0) settle_scales(SLOT, data[buffer], data[(kFirst + 1) % AHEAD]);
      store(SLOT, nth, data[buffer]);
      const bool whole = !ROPE_BF16 || unit.box < K::LATENT_BOXES || unit.half == 1;
      if (whole && K::ends_full(SLOT, stored)) {
        __syncwarp();
        if (lane() == 0) mbarrier_arrive(smem_address(&shared.full[SLOT][K::full_of(SLOT, stored)]));
      }
      constexpr int kLast = UNITS - AHEAD;
      if (nth == kLast) {
        loading += step();
        locate();
      }
      if (nth == (kLast + 2) % UNITS) prefetch();
      if (nth < kLast) {
        load(SLOT, nth + AHEAD, buffer);
      } else {
        load(1 - SLOT, nth - kLast, buffer);
      }
    }
  }
};

}  // namespace etap::sm90
