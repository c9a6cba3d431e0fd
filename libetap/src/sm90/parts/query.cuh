// The queries of a tile into shared memory, for 256 consumer threads.
#pragma once

#include "work.cuh"

namespace etap::sm90 {

// A row of the tile: where it comes from and goes to, and what it sees.
struct RowInfo {
  uint32_t place;  // row of q, out and lse, and in the lowest p.head_bits bits the head
  int limit;       // KV tokens that it sees; 0 for rows past the tile's end

  __device__ __forceinline__ int64_t token(const DecodeParams &p) const { return place >> p.head_bits; }
  __device__ __forceinline__ int head(const DecodeParams &p) const {
    return static_cast<int>(place & ((1u << p.head_bits) - 1));
  }
};

// 16 bytes of q to shared memory, zeros where `exists` is false; of rows that are not aligned two bytes at a time.
__device__ __forceinline__ void copy_query_16(uint32_t to, const void *from, bool exists, bool aligned) {
  if (aligned) return copy_async_16(to, from, exists);
  uint32_t words[4] = {0, 0, 0, 0};
  if (exists) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      words[i / 2] |= static_cast<uint32_t>(__ldg(static_cast<const unsigned short *>(from) + i)) << (16 * (i % 2));
  }
  store_shared_16(to, words);
}

// Q as [N rows x 64 values] boxes with 128-byte swizzle, zeros past the tile's end, and the table of rows. A warp takes every eighth row. Ends with a barrier over the consumers; WGMMA may read Q
// after it.
template <typename T, int N, int D_LATENT, int D_ROPE>
__device__ __forceinline__ void load_query(const DecodeParams &p, const PieceContext &c, uint32_t q_at,
                                           RowInfo *row_info) {
  const int warp = threadIdx.x / 32 % 8, lane = threadIdx.x % 32;
#pragma unroll 2
  for (int n = warp; n < N; n += 8) {
    const bool exists = n < c.rows;
    const int row = exists ? c.row_begin + n : 0;
    const int token = row / p.num_heads, head = row - token * p.num_heads;
    const int64_t q_row = c.sequence.q_begin + token;
    const T *const latent =
        static_cast<const T *>(p.q_nope) + q_row * p.q_nope_row_stride + head * p.q_nope_head_stride;
    const auto copy = [&](int chunk, const T *source) {
      copy_query_16(q_at + (chunk >> 3) * (N * 128) + n * 128 + (((chunk & 7) ^ (n & 7)) << 4), source, exists,
                    p.q_vectors);
    };
#pragma unroll
    for (int chunk = lane; chunk < D_LATENT / 8; chunk += 32) copy(chunk, latent + chunk * 8);
    if (D_ROPE > 0 && lane < D_ROPE / 8) {
      const T *const rope =
          static_cast<const T *>(p.q_rope) + q_row * p.q_rope_row_stride + head * p.q_rope_head_stride;
      copy(D_LATENT / 8 + lane, rope + lane * 8);
    }
    if (lane == 0)
      row_info[n] = RowInfo{static_cast<uint32_t>(q_row) << p.head_bits | static_cast<uint32_t>(head),
                            exists ? seen_by(c.sequence, token, p.causal) : 0};
  }
  copy_async_wait_all();
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}

}  // namespace etap::sm90
