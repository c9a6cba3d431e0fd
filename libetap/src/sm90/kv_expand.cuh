// FP8 caches: the producer warpgroup brings rows through its registers and leaves them in shared memory as BF16 or
// FP16, in the boxes that TMA would have left. E4M3 is a subset of both types, so nothing is rounded where there is one
// scale a tensor: it goes into the softmax scale and the output. Group scales are applied here, rounded once to BF16
// (2^-9, as P is).
//
// Why not on the way into WGMMA, where A may come from registers: QK and PV read the same bytes across each other, so
// every value would be converted twice and the row pitch of the cache would have to suit both. This way all page sizes,
// strides and formats are one more kind of copy for the same kernels. Two warpgroups take blocks in turn,
// each with a whole block, 18 loads of 16 bytes a thread, in flight. What bounds it is how rows are fetched: 64 bytes
// at a time (docs/tuning-log.md).
#pragma once

#include <type_traits>

#include "kv_pages.cuh"

namespace etap::sm90 {

// Two E4M3 values, in the low bytes of a word, to FP16.
__device__ __forceinline__ uint32_t e4m3_to_half2(uint32_t two_e4m3) {
  uint32_t half2;
  asm("{\n.reg .b16 pair;\ncvt.u16.u32 pair, %1;\ncvt.rn.f16x2.e4m3x2 %0, pair;\n}\n" : "=r"(half2) : "r"(two_e4m3));
  return half2;
}
template <typename T>
__device__ __forceinline__ uint32_t expand_pair(uint32_t two_e4m3) {
  const uint32_t half2 = e4m3_to_half2(two_e4m3);
  if constexpr (std::is_same_v<T, __half>) return half2;
  const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&half2));
  return pack2<T>(f.x, f.y);
}
template <typename T>
__device__ __forceinline__ uint32_t expand_pair(uint32_t two_e4m3, float scale) {
  const uint32_t half2 = e4m3_to_half2(two_e4m3);
  const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&half2));
  return pack2<T>(f.x * scale, f.y * scale);
}
__device__ __forceinline__ uint4 load_streaming(const void *source) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

// A block on its way: four threads a row and box, 16 values each, of rows thread / 4 and + 32.
template <typename T, KvCopy COPY, int D_LATENT, int D_ROPE>
struct ExpandBlock {
  static constexpr int BOXES = (D_LATENT + D_ROPE) / 64, TILES = D_LATENT / 64;
  static constexpr bool SCALED = COPY != KvCopy::kE4m3, INLINE = COPY == KvCopy::kE4m3_656;
  static constexpr int GROUPS = D_LATENT / 128;

  uint4 raw[BOXES][2];
  uint4 rope[INLINE ? 2 : 1];  // 656-byte rows: the second half of the BF16 rope part, whose first half is in raw
  float scale[SCALED ? GROUPS : 1][2];
  const char *row[2];  // nullptr past the end
  const float *scales[COPY == KvCopy::kE4m3Group ? 2 : 1];
  float row_scale;  // 656-byte rows: the tensor's scale, which is not the rope part's; else 1
  int page[2];      // of the block after the one that `row` points to

  __device__ __forceinline__ static int row_of(int i) { return threadIdx.x % 128 / 4 + 32 * i; }

  __device__ __forceinline__ void look_up(const DecodeParams &p, const int32_t *table, int block, int end, int kv_end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = block * kBlockTokens + row_of(i);
      page[i] = block < end && token < kv_end ? __ldg(table + (token >> p.page_shift)) : -1;
    }
  }
  // Turns the pages of `block` into addresses.
  __device__ __forceinline__ void locate(const DecodeParams &p, int block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int in_page = (block * kBlockTokens + row_of(i)) & ((1 << p.page_shift) - 1);
      row[i] = page[i] < 0 ? nullptr : p.kv + page[i] * p.kv_page_bytes + in_page * p.kv_row_bytes;
      if constexpr (COPY == KvCopy::kE4m3Group) {
        scales[i] =
            p.kv_group_scales + page[i] * p.kv_group_scales_page_stride + in_page * p.kv_group_scales_row_stride;
      }
    }
  }
  __device__ __forceinline__ void load(int box) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 zero = make_uint4(0, 0, 0, 0);
      if (INLINE && box == TILES) {
        const char *const source = row[i] + D_LATENT + 16 + threadIdx.x % 4 * 32;
        raw[box][i] = row[i] != nullptr ? load_streaming(source) : zero;
        rope[INLINE ? i : 0] = row[i] != nullptr ? load_streaming(source + 16) : zero;
      } else {
        raw[box][i] = row[i] != nullptr ? load_streaming(row[i] + box * 64 + threadIdx.x % 4 * 16) : zero;
      }
      if constexpr (SCALED) {
        if (box % 2 == 1 && box < TILES) {
          const float *const from =
              INLINE ? reinterpret_cast<const float *>(row[i] + D_LATENT) : scales[INLINE ? 0 : i];
          scale[box / 2][i] = row[i] != nullptr ? __ldg(from + box / 2) * row_scale : 0.f;
        }
      }
    }
  }
  __device__ __forceinline__ void store(char *to, int box) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row_of(i), chunk = threadIdx.x % 4 * 2;
      uint4 *const at[2] = {reinterpret_cast<uint4 *>(to + r * 128 + ((chunk ^ (r & 7)) << 4)),
                            reinterpret_cast<uint4 *>(to + r * 128 + (((chunk + 1) ^ (r & 7)) << 4))};
      if (INLINE && box == TILES) {
        *at[0] = raw[box][i];
        *at[1] = rope[INLINE ? i : 0];
        continue;
      }
      const auto expand = [&](uint32_t pair) {
        if constexpr (SCALED) {
          if (box < TILES) return expand_pair<T>(pair, scale[box / 2][i]);
        }
        return expand_pair<T>(pair);
      };
      const uint4 w = raw[box][i];
      *at[0] = make_uint4(expand(w.x), expand(w.x >> 16), expand(w.y), expand(w.y >> 16));
      *at[1] = make_uint4(expand(w.z), expand(w.z >> 16), expand(w.w), expand(w.w >> 16));
    }
  }

  // Walks the blocks first, first + step, .. below end. `before(box)` returns the box's place in shared memory once it
  // is free, `after(box)` is told when this thread has written it.
  template <typename Before, typename After>
  __device__ __forceinline__ void walk(const DecodeParams &p, const int32_t *table, int first, int end, int step,
                                       int kv_end, Before &&before, After &&after) {
    if (first >= end) return;
    row_scale = INLINE ? tensor_scale(p) : 1.f;
    look_up(p, table, first, end, kv_end);
    locate(p, first);
    look_up(p, table, first + step, end, kv_end);
#pragma unroll
    for (int box = 0; box < BOXES; ++box) load(box);
#pragma unroll 1
    for (int block = first; block < end; block += step) {
      locate(p, block + step);
      look_up(p, table, block + 2 * step, end, kv_end);
#pragma unroll
      for (int box = 0; box < BOXES; ++box) {
        store(before(box), box);
        // The scale of a group is loaded with its second box, after both of this block have used it.
        load(box);
        after(box);
      }
    }
  }
};

}  // namespace etap::sm90
