// Decode for up to 40 query rows a tile: the KV context on WGMMA's M, the query rows on its N, without padding to 64.
//
//        dims ->                         N query rows                       dims of V
//      .-----------------.              .----.                            .-------------.   the same bytes of
//   64 | K (shared mem.) | x Q^T [576] = | S^T | 64 tokens      V^T [512] |   K again,  |   shared memory, read
//  tok |    [64, 576]    |               '----'                           |  read MN-   |   with M along the dims
//      '-----------------'                 | softmax over M               |   major     | x P^T [64 tokens, N] = O^T [512, N]
//                                          '-> P^T, K-major in shared ------------------'
//
// Reason for the shape. O^T is 512 x N floats: with N <= 40 one warpgroup holds all of it (4 N registers a thread), so the two
// consumer warpgroups take KV blocks in turn with maxima, sums and O^T of their own and meet once, at the end of a piece. No
// exchange in the loop: while one warpgroup is in its softmax the other's WGMMAs fill the tensor pipe.
//
// Work. A cluster of C CTAs is one worker of the plan (planner.h). The blocks of a piece go round-robin to the CTAs, in a CTA
// round-robin to the two warpgroups. At the end the warpgroups merge through shared memory, the CTAs through distributed
// shared memory (each owns 1/C of O^T), and only pieces of a unit that was cut leave partial results in L2, where the last
// one to arrive - for each of the C slices on its own - adds them up in order.
//
//   warpgroup 0   producer: KV boxes [64 tokens x 64 dims] into a ring of chunks of three boxes (24 KB)
//   warpgroup 1,2 consumers: QK -> softmax -> PV, a block each
//
// Softmax. A column of S^T is a query row; its 64 tokens lie in 8 lanes of 4 warps. The maximum is lazy: exponents are taken
// against the running maximum of earlier blocks as long as no logit exceeds it by more than 2^8, which the barrier that P^T needs
// anyway finds out (barrier.red.or). Only then the warps exchange maxima and rescale, each column by itself, so that a row's
// bits never depend on its neighbours in the tile. Sums are of unrounded P and stay in the thread until the end.
#pragma once

#include "params.h"
#include "wgmma.cuh"
#include "workspace.h"

namespace etap::sm90 {

template <typename T_, int N_, int D_LATENT_, int D_ROPE_, bool GATHER_>
struct TokenSplit {
  using T = T_;
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr bool GATHER = GATHER_;  // pages of fewer than eight rows: TMA boxes would break the swizzle
  static_assert(N % 8 == 0 && N <= 40, "O^T of one warpgroup must fit its registers");
  static_assert(sizeof(T) == 2 && D_LATENT % 64 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 384, CONSUMERS = 256;
  static constexpr int CONSUMER_REGISTERS = N <= 24 ? 200 : 224, PRODUCER_REGISTERS = 504 - 2 * CONSUMER_REGISTERS;
  static constexpr int TILES = D_LATENT / 64;              // m64 tiles of O^T
  static constexpr int BOXES = (D_LATENT + D_ROPE) / 64;   // 8 KB boxes of a KV block
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES;
  static constexpr int BOX_BYTES = kBlockTokens * 128, SLOT_BYTES = CHUNK_BOXES * BOX_BYTES;
  static constexpr int P_BYTES = N * 128;

  // Q and the four P^T buffers are dead at the end of a piece; the exchange of O^T lies over them.
  static constexpr int Q_BYTES = BOXES * N * 128;
  static constexpr int EXCHANGE_BYTES = N * D_LATENT * 4;
  static constexpr int WORK_BYTES = Q_BYTES + 4 * P_BYTES > EXCHANGE_BYTES ? Q_BYTES + 4 * P_BYTES : EXCHANGE_BYTES;
  static constexpr int STATS_BYTES = 12 * N * 4;           // [2][4][N] sums or maxima, [2][N] maxima, [2][N] of the CTA
  static constexpr int LIMIT_BYTES = N * 4;                // tokens that a row sees
  static constexpr int MAX_SLOTS = 12;
  static constexpr int BARRIER_BYTES = (2 * MAX_SLOTS + 2) * 8 + 16;
  static constexpr int SHARED_LIMIT = 232448;
  static constexpr int SLOTS_THAT_FIT = (SHARED_LIMIT - 1024 - WORK_BYTES - STATS_BYTES - LIMIT_BYTES - BARRIER_BYTES) / SLOT_BYTES;
  static constexpr int SLOTS = SLOTS_THAT_FIT < MAX_SLOTS ? SLOTS_THAT_FIT : MAX_SLOTS;

  static constexpr int WORK_AT = SLOTS * SLOT_BYTES, P_AT = WORK_AT + Q_BYTES;
  static constexpr int STATS_AT = WORK_AT + WORK_BYTES, LIMIT_AT = STATS_AT + STATS_BYTES;
  static constexpr int BARRIER_AT = LIMIT_AT + LIMIT_BYTES;
  static constexpr int SHARED_BYTES = BARRIER_AT + BARRIER_BYTES + 1024;  // 1024: the base is aligned by hand
  static_assert(SLOTS >= CHUNKS && SHARED_BYTES <= SHARED_LIMIT);

  static constexpr int ITEMS = TILES * (N / 8) * 128;      // float4 of O^T: 2 dims (d, d + 8) x 2 rows (n, n + 1)
  static constexpr int LAG = 4;                            // gather path: chunks in flight before one is announced
};

// Barrier numbers: 0 is __syncthreads.
enum : int { kBarrierConsumers = 1, kBarrierWarpgroup = 2 /* and 3 */, kBarrierProducers = 4 };

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) token_split_kernel(const __grid_constant__ DecodeParams p) {
  using T = typename K::T;
  constexpr int N = K::N;
  extern __shared__ char shared_raw[];
  const uint32_t base = (smem_address(shared_raw) + 1023) & ~1023u;
  char *const shared = shared_raw + (base - smem_address(shared_raw));

  const auto full = [base](int slot) { return base + K::BARRIER_AT + 16 * slot; };
  const auto empty = [base](int slot) { return base + K::BARRIER_AT + 16 * slot + 8; };
  const uint32_t parts_ready = base + K::BARRIER_AT + 16 * K::MAX_SLOTS, parts_read = parts_ready + 8;
  int *const last_flag = reinterpret_cast<int *>(shared + K::BARRIER_AT + 16 * K::MAX_SLOTS + 16);

  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  uint32_t cluster_size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(cluster_size));
  const uint32_t rank = cluster_rank();
  const int worker = blockIdx.x / cluster_size;

  if (threadIdx.x == 0) {
    for (int i = 0; i < K::SLOTS; ++i) {
      mbarrier_init(full(i), K::GATHER ? 128 : 1);
      mbarrier_init(empty(i), 4);
    }
    mbarrier_init(parts_ready, 8 * cluster_size);
    mbarrier_init(parts_read, 8 * cluster_size);
    mbarrier_init_fence();
    if constexpr (!K::GATHER) tma_prefetch_map(&p.kv_map);
  }
  if (cluster_size > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  wait_for_previous_kernel();

  const WorkerRecord record = p.workers[worker];
  const auto piece_at = [&](int unit, const SequenceRecord &sequence, int *kv_end) {
    *kv_end = visible_tokens(sequence.length, sequence.q_len, unit % p.tiles, N, p.num_heads, p.causal);
    return piece_of(record, worker, unit, blocks_of(*kv_end));
  };

  if (warpgroup == 0) {
    // ---- producer -----------------------------------------------------------------------------------------------
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    int slot = 0;
    uint32_t phase = 1;  // a fresh ring is empty
    const auto advance = [&] {
      if (++slot == K::SLOTS) {
        slot = 0;
        phase ^= 1;
      }
    };
    [[maybe_unused]] int announced = 0, issued = 0;  // gather path
    for (int unit = record.unit_begin; unit <= record.unit_end; ++unit) {
      const SequenceRecord sequence = p.sequences[unit / p.tiles];
      int kv_end;
      const Piece piece = piece_at(unit, sequence, &kv_end);
      const int32_t *table = p.block_table + static_cast<int64_t>(unit / p.tiles) * p.block_table_stride;
      const int first = piece.block_begin + static_cast<int>(rank), step = static_cast<int>(cluster_size);
      if constexpr (!K::GATHER) {
        if (warp != 0) break;
        // Lane l holds the page of entry l: block l / pages of this CTA's next 32 / pages blocks, page l % pages in it.
        const int pages_log2 = p.page_shift >= 6 ? 0 : 6 - p.page_shift, pages = 1 << pages_log2;
        const int rows_log2 = p.page_shift >= 6 ? 6 : p.page_shift;
        const int table_end = (kv_end + (1 << p.page_shift) - 1) >> p.page_shift;
        const auto fetch = [&](int block) {
          const int mine = block + (lane >> pages_log2) * step;
          const int64_t token = static_cast<int64_t>(mine) * kBlockTokens + ((lane & (pages - 1)) << rows_log2);
          const int64_t entry = token >> p.page_shift;
          return mine < piece.block_end && entry < table_end ? __ldg(table + entry) : 0;
        };
        const int batch_blocks = 32 >> pages_log2;
        int next_pages = fetch(first), page_lane = 0, in_batch = batch_blocks;
        for (int block = first; block < piece.block_end; block += step, ++in_batch) {
          if (in_batch == batch_blocks) {
            page_lane = next_pages;
            next_pages = fetch(block + batch_blocks * step);
            in_batch = 0;
          }
          const int tokens = min(kBlockTokens, kv_end - block * kBlockTokens);
          const int boxes_down = (tokens + (1 << rows_log2) - 1) >> rows_log2;
          const int row = (block * kBlockTokens) & ((1 << p.page_shift) - 1);
#pragma unroll 1
          for (int c = 0; c < K::CHUNKS; ++c) {
            const int boxes = min(K::CHUNK_BOXES, K::BOXES - c * K::CHUNK_BOXES);
            mbarrier_wait(empty(slot), phase);
            if (lane == 0) mbarrier_expect_tx(full(slot), static_cast<uint32_t>(boxes * boxes_down) << (rows_log2 + 7));
            __syncwarp();
            for (int i = lane; i < 32 * ((boxes * pages + 31) / 32); i += 32) {
              const int box = i >> pages_log2, down = i & (pages - 1);
              const int page = __shfl_sync(0xffffffffu, page_lane, (in_batch << pages_log2) + down);
              if (box < boxes && down < boxes_down) {
                tma_load_3d(base + slot * K::SLOT_BYTES + box * K::BOX_BYTES + (down << (rows_log2 + 7)), &p.kv_map,
                            (c * K::CHUNK_BOXES + box) * 64, row, page, full(slot));
              }
            }
            advance();
          }
        }
      } else {
        // Rows of a block are scattered: every thread copies 16-byte pieces of its rows, swizzled by hand. Eight threads copy
        // 128 bytes of a row; tokens past the end become zeros. WGMMA must see the bytes, so a chunk is announced LAG chunks
        // later, after its copies have landed and a proxy fence.
        const int quarter = thread % 8, row0 = thread / 8;
        for (int block = first; block < piece.block_end; block += step) {
          const char *source[4];
          bool valid[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = block * kBlockTokens + row0 + 16 * i;
            valid[i] = token < kv_end;
            const int64_t page = valid[i] ? __ldg(table + (token >> p.page_shift)) : 0;
            source[i] = p.kv + page * p.kv_page_bytes + (token & ((1 << p.page_shift) - 1)) * p.kv_row_bytes + quarter * 16;
          }
#pragma unroll 1
          for (int c = 0; c < K::CHUNKS; ++c) {
            const int boxes = min(K::CHUNK_BOXES, K::BOXES - c * K::CHUNK_BOXES);
            mbarrier_wait(empty(slot), phase);
#pragma unroll 1
            for (int box = 0; box < boxes; ++box) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int row = row0 + 16 * i;
                copy_async_16(base + slot * K::SLOT_BYTES + box * K::BOX_BYTES + row * 128 + ((quarter ^ (row & 7)) << 4),
                              source[i] + (c * K::CHUNK_BOXES + box) * 128, valid[i]);
              }
            }
            copy_async_commit();
            if (++issued > K::LAG) {
              copy_async_wait<K::LAG>();
              fence_proxy_async();
              mbarrier_arrive(full(announced));
              announced = announced + 1 == K::SLOTS ? 0 : announced + 1;
            }
            advance();
          }
        }
      }
    }
    if constexpr (K::GATHER) {
      copy_async_wait<0>();
      fence_proxy_async();
      for (int i = min(issued, K::LAG); i > 0; --i) {
        mbarrier_arrive(full(announced));
        announced = announced + 1 == K::SLOTS ? 0 : announced + 1;
      }
    }
  } else {
    // ---- consumers ----------------------------------------------------------------------------------------------
    set_registers_more<K::CONSUMER_REGISTERS>();
    const int wg = warpgroup - 1, consumer = threadIdx.x - 128;
    const int quad = lane % 4, group = lane / 4;
    float *const sums = reinterpret_cast<float *>(shared + K::STATS_AT);  // [2][4][N]
    float *const maxima = sums + 8 * N;                                   // [2][N]
    float *const cta_stats = maxima + 2 * N;                              // [2][N]: maximum, sum
    int *const limits = reinterpret_cast<int *>(shared + K::LIMIT_AT);
    int first_block = 0;   // blocks that this CTA has walked before the current piece
    uint32_t pieces_done = 0;

    for (int unit = record.unit_begin; unit <= record.unit_end; ++unit) {
      const int sequence_index = unit / p.tiles;
      const SequenceRecord sequence = p.sequences[sequence_index];
      int kv_end;
      const Piece piece = piece_at(unit, sequence, &kv_end);
      const int row_begin = (unit % p.tiles) * N;
      const int rows = min(N, sequence.q_len * p.num_heads - row_begin);
      if (rows <= 0) continue;
      const int blocks = piece.block_end - piece.block_begin;
      const int my_blocks = blocks > static_cast<int>(rank) ? (blocks - static_cast<int>(rank) + static_cast<int>(cluster_size) - 1) /
                                                                  static_cast<int>(cluster_size)
                                                            : 0;
      const bool split = piece.first_worker != piece.last_worker;
      const int64_t q_row0 = sequence.q_begin;

      // The remote readers of the last piece's exchange must be done before Q lands on it.
      if (cluster_size > 1 && pieces_done > 0) mbarrier_wait_cluster(parts_read, (pieces_done - 1) & 1);

      // Q, [N rows x 64] boxes with 128-byte swizzle; rows past the tile's end are zeros.
      constexpr int ROW_CHUNKS = K::BOXES * 8;
      for (int i = consumer; i < N * ROW_CHUNKS; i += K::CONSUMERS) {
        const int n = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS, box = chunk / 8;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (n < rows) {
          const int row = row_begin + n;
          const int64_t token = q_row0 + row / p.num_heads, head = row % p.num_heads;
          const T *source = chunk < K::D_LATENT / 8
                                ? static_cast<const T *>(p.q_nope) + token * p.q_nope_row_stride + head * p.q_nope_head_stride + chunk * 8
                                : static_cast<const T *>(p.q_rope) + token * p.q_rope_row_stride + head * p.q_rope_head_stride +
                                      (chunk * 8 - K::D_LATENT);
          value = *reinterpret_cast<const uint4 *>(source);
        }
        *reinterpret_cast<uint4 *>(shared + K::WORK_AT + box * N * 128 + n * 128 + (((chunk & 7) ^ (n & 7)) << 4)) = value;
      }
      if (consumer < N) {
        const int token = (row_begin + consumer) / p.num_heads;
        limits[consumer] = consumer >= rows ? 0 : (p.causal ? sequence.length - sequence.q_len + token + 1 : sequence.length);
      }
      fence_proxy_async();
      named_barrier<kBarrierConsumers, K::CONSUMERS>();
      const int first_limit = p.causal ? sequence.length - sequence.q_len + row_begin / p.num_heads + 1 : sequence.length;

      float O[K::TILES][N / 2];
      float m[N / 4], l[N / 4];  // of the thread's columns 8 j + 2 quad + e, at 2 j + e
#pragma unroll
      for (int t = 0; t < K::TILES; ++t) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) O[t][i] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        m[i] = -1e30f;  // below every logit, finite: exp2(-inf - m) is 0, not NaN
        l[i] = 0.f;
      }

      const uint32_t q_low = (base + K::WORK_AT) >> 4;
      for (int i = wg; i < my_blocks; i += 2) {
        const int block = piece.block_begin + static_cast<int>(rank) + i * static_cast<int>(cluster_size);
        const int fill = (first_block + i) * K::CHUNKS;  // chunks that the ring carried before this block
        uint32_t slot_low[K::CHUNKS];
        int slots[K::CHUNKS];
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) {
          slots[c] = (fill + c) % K::SLOTS;
          slot_low[c] = __shfl_sync(0xffffffffu, (base + slots[c] * K::SLOT_BYTES) >> 4, 0);
        }

        float S[N / 2];
#pragma unroll
        for (int c = 0; c < K::CHUNKS; ++c) {
          mbarrier_wait(full(slots[c]), ((fill + c) / K::SLOTS) & 1);
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

        const int tokens = kv_end - block * kBlockTokens;
        wgmma_wait<0>();
        wgmma_fence_registers(S);
        if (tokens < kBlockTokens) {
          // V beyond the end may be anything, and 0 x NaN is NaN. K needs no care: its logits are masked below.
          for (int r = tokens + warp; r < kBlockTokens; r += 4) {
#pragma unroll
            for (int c = 0; c < K::CHUNKS; ++c) {
              if (lane < K::CHUNK_BOXES * 8) {
                *reinterpret_cast<uint4 *>(shared + slots[c] * K::SLOT_BYTES + (lane / 8) * K::BOX_BYTES + r * 128 + (lane % 8) * 16) =
                    make_uint4(0, 0, 0, 0);
              }
            }
          }
        }

#pragma unroll
        for (int j = 0; j < N / 2; ++j) S[j] *= p.scale_log2;
        if ((block + 1) * kBlockTokens > first_limit) {
          const int token = block * kBlockTokens + warp * 16 + group;
#pragma unroll
          for (int j = 0; j < N / 8; ++j) {
            const int2 limit = *reinterpret_cast<const int2 *>(limits + 8 * j + 2 * quad);
            if (token >= limit.x) S[4 * j] = -INFINITY;
            if (token >= limit.y) S[4 * j + 1] = -INFINITY;
            if (token + 8 >= limit.x) S[4 * j + 2] = -INFINITY;
            if (token + 8 >= limit.y) S[4 * j + 3] = -INFINITY;
          }
        }

        const uint32_t p_at = base + K::P_AT + (2 * wg + ((i >> 1) & 1)) * K::P_BYTES;
        float sum[N / 4];
        const auto exponentiate = [&] {
          uint32_t packed[N / 4];
#pragma unroll
          for (int j = 0; j < N / 8; ++j) {
            const float a = exp2_approx(S[4 * j] - m[2 * j]), b = exp2_approx(S[4 * j + 1] - m[2 * j + 1]);
            const float c = exp2_approx(S[4 * j + 2] - m[2 * j]), d = exp2_approx(S[4 * j + 3] - m[2 * j + 1]);
            sum[2 * j] = a + c;
            sum[2 * j + 1] = b + d;
            packed[2 * j] = pack2<T>(a, b);
            packed[2 * j + 1] = pack2<T>(c, d);
          }
          // P^T, K-major: row n of 64 tokens; this warp's 16 tokens are 16-byte chunks 2 warp and 2 warp + 1.
          const int n_in_8 = lane & 7, half = (lane >> 3) & 1, j_of_lane = lane >> 4;
          const uint32_t chunk_at = p_at + n_in_8 * 128 + (((2 * warp + half) ^ n_in_8) << 4);
#pragma unroll
          for (int j = 0; j + 1 < N / 8; j += 2) {
            store_matrix_x4_transposed(chunk_at + (j + j_of_lane) * 1024, packed[2 * j], packed[2 * j + 1], packed[2 * j + 2],
                                       packed[2 * j + 3]);
          }
          if (N / 8 % 2 == 1) {
            store_matrix_x2_transposed(chunk_at + (N / 8 - 1) * 1024, packed[2 * (N / 8 - 1)], packed[2 * (N / 8 - 1) + 1]);
          }
          fence_proxy_async();
        };
        bool above = false;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          above |= fmaxf(S[4 * j], S[4 * j + 2]) > m[2 * j] + 8.f;
          above |= fmaxf(S[4 * j + 1], S[4 * j + 3]) > m[2 * j + 1] + 8.f;
        }
        exponentiate();
        if (named_barrier_any(kBarrierWarpgroup + wg, 128, above)) {
          float *const warp_maxima = sums + wg * 4 * N;
#pragma unroll
          for (int j = 0; j < N / 4; ++j) {
            const int at = 4 * (j / 2) + j % 2;
            float top = fmaxf(S[at], S[at + 2]);
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
            if (group == 0) warp_maxima[warp * N + 8 * (j / 2) + 2 * quad + j % 2] = top;
          }
          named_barrier(kBarrierWarpgroup + wg, 128);
#pragma unroll
          for (int j = 0; j < N / 4; ++j) {
            const int column = 8 * (j / 2) + 2 * quad + j % 2;
            const float top = fmaxf(fmaxf(warp_maxima[column], warp_maxima[N + column]),
                                    fmaxf(warp_maxima[2 * N + column], warp_maxima[3 * N + column]));
            if (top > m[j] + 8.f) {
              const float factor = exp2_approx(m[j] - top);
              m[j] = top;
              l[j] *= factor;
#pragma unroll
              for (int t = 0; t < K::TILES; ++t) {
                O[t][4 * (j / 2) + j % 2] *= factor;
                O[t][4 * (j / 2) + j % 2 + 2] *= factor;
              }
            }
          }
          exponentiate();
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
          for (int b = 0; b < K::CHUNK_BOXES; ++b) {
            const int box = c * K::CHUNK_BOXES + b;
            if (box < K::TILES) {
#pragma unroll
              for (int k = 0; k < 4; ++k) {
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
      first_block += my_blocks;

      // ---- the two warpgroups meet --------------------------------------------------------------------------------
#pragma unroll
      for (int j = 0; j < N / 4; ++j) {
        l[j] += __shfl_xor_sync(0xffffffffu, l[j], 4);
        l[j] += __shfl_xor_sync(0xffffffffu, l[j], 8);
        l[j] += __shfl_xor_sync(0xffffffffu, l[j], 16);
        const int column = 8 * (j / 2) + 2 * quad + j % 2;
        if (group == 0) {
          sums[(wg * 4 + warp) * N + column] = l[j];
          if (warp == 0) maxima[wg * N + column] = m[j];
        }
      }
      named_barrier<kBarrierConsumers, K::CONSUMERS>();
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
          cta_stats[column] = top;
          cta_stats[N + column] = total;
        }
      }
      // Each gives the other's half of the tiles away, adds what it gets to its own half, and leaves the sum there.
      float4 *const exchange = reinterpret_cast<float4 *>(shared + K::WORK_AT);
      const auto item = [thread](int t, int j) { return (t * (N / 8) + j) * 128 + thread; };
      const auto scaled = [&](int t, int j) {
        return make_float4(O[t][4 * j] * factor[2 * j], O[t][4 * j + 1] * factor[2 * j + 1], O[t][4 * j + 2] * factor[2 * j],
                           O[t][4 * j + 3] * factor[2 * j + 1]);
      };
      const auto give = [&](auto half) {
#pragma unroll
        for (int t = 0; t < K::TILES / 2; ++t) {
#pragma unroll
          for (int j = 0; j < N / 8; ++j) exchange[item(t + half() * (K::TILES / 2), j)] = scaled(t + half() * (K::TILES / 2), j);
        }
      };
      const auto add = [&](auto half) {
#pragma unroll
        for (int t = 0; t < K::TILES / 2; ++t) {
#pragma unroll
          for (int j = 0; j < N / 8; ++j) {
            const float4 mine = scaled(t + half() * (K::TILES / 2), j);
            float4 &sum = exchange[item(t + half() * (K::TILES / 2), j)];
            sum = make_float4(sum.x + mine.x, sum.y + mine.y, sum.z + mine.z, sum.w + mine.w);
          }
        }
      };
      struct Low {
        __device__ constexpr int operator()() const { return 0; }
      };
      struct High {
        __device__ constexpr int operator()() const { return 1; }
      };
      if (wg == 0) {
        give(High{});
      } else {
        give(Low{});
      }
      named_barrier<kBarrierConsumers, K::CONSUMERS>();
      if (wg == 0) {
        add(Low{});
      } else {
        add(High{});
      }

      // ---- the CTAs of the cluster meet ---------------------------------------------------------------------------
      if (cluster_size > 1) {
        __syncwarp();
        if (lane < static_cast<int>(cluster_size)) mbarrier_arrive_cluster(parts_ready, lane);
        mbarrier_wait_cluster(parts_ready, pieces_done & 1);
      } else {
        named_barrier<kBarrierConsumers, K::CONSUMERS>();
      }
      const int slice = K::ITEMS / static_cast<int>(cluster_size);
      const size_t partial_size = partial_floats(N, K::D_LATENT, static_cast<int>(cluster_size));
      const auto partial_of = [&](int w) { return p.partials + partial_size * slot_of(w, piece.first_worker); };
      const auto place = [&](int index, int *n, int *d) {
        *n = 8 * ((index >> 7) % (N / 8)) + 2 * (index & 3);
        *d = (index >> 7) / (N / 8) * 64 + ((index >> 5) & 3) * 16 + ((index >> 2) & 7);
      };
      // Sums weighted parts into (top, sum, value), all of a float4's two columns.
      struct Merged {
        float2 top{-1e30f, -1e30f}, sum{0.f, 0.f};
        float4 value{0.f, 0.f, 0.f, 0.f};
        __device__ void add(float2 part_top, float2 part_sum, float4 part) {
          const float2 to = make_float2(fmaxf(top.x, part_top.x), fmaxf(top.y, part_top.y));
          const float2 a = make_float2(exp2_approx(top.x - to.x), exp2_approx(top.y - to.y));
          const float2 b = make_float2(exp2_approx(part_top.x - to.x), exp2_approx(part_top.y - to.y));
          top = to;
          sum = make_float2(sum.x * a.x + part_sum.x * b.x, sum.y * a.y + part_sum.y * b.y);
          value = make_float4(value.x * a.x + part.x * b.x, value.y * a.y + part.y * b.y, value.z * a.x + part.z * b.x,
                              value.w * a.y + part.w * b.y);
        }
      };
      const auto store = [&](int n, int d, const Merged &r) {
        const float2 inverse = make_float2(r.sum.x == 0.f ? 0.f : 1.f / r.sum.x, r.sum.y == 0.f ? 0.f : 1.f / r.sum.y);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (n + e >= rows) continue;
          const int row = row_begin + n + e;
          const int64_t token = q_row0 + row / p.num_heads, head = row % p.num_heads;
          const int64_t at = token * p.out_row_stride + head * p.out_head_stride + d;
          const float lo = e == 0 ? r.value.x * inverse.x : r.value.y * inverse.y;
          const float hi = e == 0 ? r.value.z * inverse.x : r.value.w * inverse.y;
          if (p.out_dtype == 0) {
            static_cast<__nv_bfloat16 *>(p.out)[at] = __float2bfloat16(lo);
            static_cast<__nv_bfloat16 *>(p.out)[at + 8] = __float2bfloat16(hi);
          } else if (p.out_dtype == 1) {
            static_cast<__half *>(p.out)[at] = __float2half(lo);
            static_cast<__half *>(p.out)[at + 8] = __float2half(hi);
          } else {
            static_cast<float *>(p.out)[at] = lo;
            static_cast<float *>(p.out)[at + 8] = hi;
          }
          if (p.lse != nullptr && d == 0) {
            const float top = e == 0 ? r.top.x : r.top.y, sum = e == 0 ? r.sum.x : r.sum.y;
            p.lse[token * p.lse_row_stride + head * p.lse_head_stride] =
                sum == 0.f ? -INFINITY : (top + __log2f(sum)) * p.lse_factor;
          }
        }
      };
      for (int i = consumer; i < slice; i += K::CONSUMERS) {
        const int index = static_cast<int>(rank) * slice + i;
        int n, d;
        place(index, &n, &d);
        Merged r;
        for (uint32_t c = 0; c < cluster_size; ++c) {
          r.add(load_cluster_float2(base + K::STATS_AT + (10 * N + n) * 4, c), load_cluster_float2(base + K::STATS_AT + (11 * N + n) * 4, c),
                load_cluster_float4(base + K::WORK_AT + index * 16, c));
        }
        if (split) {
          float *const partial = partial_of(worker);
          __stcg(reinterpret_cast<float4 *>(partial) + index, r.value);
          if (i < 128 * (N / 8) && ((i >> 2) & 31) == 0) {
            float *const stats = partial + K::ITEMS * 4 + rank * 2 * N + n;
            __stcg(reinterpret_cast<float2 *>(stats), r.top);
            __stcg(reinterpret_cast<float2 *>(stats + N), r.sum);
          }
        } else {
          store(n, d, r);
        }
      }
      if (cluster_size > 1) {
        __syncwarp();
        if (lane < static_cast<int>(cluster_size)) mbarrier_arrive_cluster(parts_read, lane);
      } else {
        named_barrier<kBarrierConsumers, K::CONSUMERS>();
      }

      // ---- the pieces of a cut unit meet --------------------------------------------------------------------------
      if (split) {
        __threadfence();
        named_barrier<kBarrierConsumers, K::CONSUMERS>();
        if (consumer == 0) {
          int *const counter = p.counters + piece.first_worker * static_cast<int>(cluster_size) + rank;
          const int arrived = atomicAdd(counter, 1);
          *last_flag = arrived == piece.last_worker - piece.first_worker;
          if (*last_flag) *counter = 0;
        }
        named_barrier<kBarrierConsumers, K::CONSUMERS>();
        if (*last_flag) {
          __threadfence();
          for (int i = consumer; i < slice; i += K::CONSUMERS) {
            const int index = static_cast<int>(rank) * slice + i;
            int n, d;
            place(index, &n, &d);
            Merged r;
#pragma unroll 4
            for (int w = piece.first_worker; w <= piece.last_worker; ++w) {
              const float *const partial = partial_of(w);
              const float *const stats = partial + K::ITEMS * 4 + rank * 2 * N + n;
              r.add(__ldcg(reinterpret_cast<const float2 *>(stats)), __ldcg(reinterpret_cast<const float2 *>(stats + N)),
                    __ldcg(reinterpret_cast<const float4 *>(partial) + index));
            }
            store(n, d, r);
          }
        }
      }
      ++pieces_done;
    }
    // Shared memory must outlive its remote readers.
    if (cluster_size > 1 && pieces_done > 0) mbarrier_wait_cluster(parts_read, (pieces_done - 1) & 1);
  }
}

}  // namespace etap::sm90
