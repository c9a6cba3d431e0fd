// Decode of FP8 caches with one scale on FP8 tensor cores, for callers that let queries and probabilities be rounded to
// E4M3 (ETAP_FP8_FAST): tiles of 64 query rows on WGMMA's N, the KV context on its M as in e4m3_dv_split.cuh, whose
// warpgroups, ring, maxima and end of a piece these are.
//
//     KV block in shared memory                               S^T [64 tokens, 64] = K Q^T     every other block's
//     boxes of 64 tokens x 64 bytes   --as they lie-->        softmax, P^T in E4M3 to shared memory
//     (copy engine or cp.async)         V^T: transposed       O^T [256, 64] += V^T P^T        every block's
//                                       in registers
//
// Reason for the shape. No byte is converted: K is WGMMA's A as it lies in the ring, and V's bytes are only moved, by
// 64 prmt a thread and block, since FP8 operands can't be read across (rows on M would have to transpose V in shared
// memory). 1088 cycles of tensor cores a block, half of what FP16 takes.
//
// FP8 tensor cores keep about 13 bits of a sum. A logit has 1e-4 of its size of that, which is little beside what
// rounding does; but O^T over a long context would lose it again with each block, so PV of a block begins at zero and
// is added in FP32.
//
// P^T has two buffers, so that a warpgroup need not wait for the other to have multiplied the last one.
#pragma once

#include "sm90/kernels/e4m3_dv_split.cuh"
#include "sm90/parts/e4m3_rounded.cuh"

namespace etap::sm90 {

template <int N_, int D_LATENT_, int D_ROPE_>
struct E4m3Fast {
  static constexpr int N = N_, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_, HALF = D_LATENT / 2;
  static constexpr bool SCALED = false, SCALES_BESIDE = false, ROPE_BF16 = false;
  static_assert(N % 16 == 0 && N <= 64 && D_LATENT % 256 == 0 && D_ROPE % 64 == 0);

  static constexpr int THREADS = 384;
  static constexpr int CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 504 - 2 * CONSUMER_REGISTERS;
  static constexpr bool FEW_REGISTERS = true;                          // the producers
  static constexpr int TILES = D_LATENT / 64, HALF_TILES = TILES / 2;  // m64 tiles of O^T
  static constexpr int Q_BOXES = (D_LATENT + D_ROPE) / 64;             // of 64 values
  static constexpr int ROW_BYTES = D_LATENT + D_ROPE, BOXES = ROW_BYTES / 64, FIRST_BOXES = 0;
  __device__ static int column_of(int box) { return box * 64; }
  __device__ static uint32_t token_of_row(uint32_t row) { return row; }
  static constexpr int CHUNK_BOXES = 3, CHUNKS = (BOXES + CHUNK_BOXES - 1) / CHUNK_BOXES, QK_CHUNKS = 0;
  static constexpr float LIFT = 4.f;  // P is 2^4 at the maximum, and 2^8 before that moves
  static constexpr int P_BUFFERS = 2, P_STRIDE = 64;
  static constexpr int MAX_SLOTS = 16;
  using X = Exchange<N, D_LATENT>;

  using Slot = E4m3Slot<CHUNK_BOXES, false>;
  // A warpgroup's, that the other reads.
  struct alignas(16) Side {
    float factors[N];  // the sums', where a maximum moved
    float sums[4][N];  // of each warp; maxima while a maximum moves
    uint64_t p_ready, p_free[P_BUFFERS];
    int moved;  // did a maximum?
  };
  template <int SLOTS_>
  struct SharedOf {
    union {
      Slot ring[SLOTS_];
      char exchange[X::BYTES];  // at the end of a piece
    };
    alignas(1024) char q[Q_BOXES][N * 128];
    char p[2][N * 128];  // P^T of each warpgroup's last two blocks
    Side side[2];
    alignas(16) float columns[N / 2][2][2];  // of two columns: logit_scale, and the maxima that exponents refer to
    float logit_scale[N], top[N], sum[N];    // top and sum: at the end of a piece
    RowInfo rows[N];
    SlotBarriers slots[MAX_SLOTS];
    uint64_t ring_free, parts_ready, parts_read;
    PieceEnd end;
    Fp8Blocks piece;
  };
  static constexpr int RINGS = 1, SLOTS = slots_that_fit<SharedOf, MAX_SLOTS>(), RING_SLOTS = SLOTS;
  using Shared = SharedOf<SLOTS>;
  static constexpr int SHARED_BYTES = sizeof(Shared), SLOT_BYTES = sizeof(Slot), SCALES_AT = 0;
  static constexpr int SLOTS_AT = offsetof(Shared, slots), RING_FREE_AT = offsetof(Shared, ring_free),
                       PARTS_READY_AT = offsetof(Shared, parts_ready), PARTS_READ_AT = offsetof(Shared, parts_read);
  static_assert(RING_SLOTS > 2 * CHUNKS && X::BYTES <= sizeof(Slot) * SLOTS && SHARED_BYTES <= kSharedLimit);
};

template <typename K_>
struct E4m3FastMath : E4m3DvSplitMath<K_> {
  using K = K_;
  using Base = E4m3DvSplitMath<K>;
  using Values = ValueWords<K::HALF>;
  using Base::base, Base::lane, Base::mine, Base::O, Base::parity, Base::S, Base::shared, Base::slot_of, Base::thread,
      Base::wait_for_chunk, Base::wg;
  static constexpr int N = K::N;

  __device__ __forceinline__ bool softmax(int nth) { return Base::template softmax<RoundedProbabilities<N>>(nth); }

  // Queries as load_query leaves them.
  __device__ __forceinline__ static void convert_query(const DecodeParams &p, typename K::Shared &shared) {
    query_to_e4m3<N, K::Q_BOXES>(p.q_bf16, shared.q[0], p.scale_log2 * tensor_scale(p), shared.logit_scale);
  }

  // S^T = K Q^T. `meanwhile` is done while it is multiplied.
  template <typename Meanwhile>
  __device__ __forceinline__ void multiply_keys(int nth, Meanwhile meanwhile) {
    const uint32_t q_low = __shfl_sync(0xffffffffu, smem_address(shared.q) >> 4, 0);
    uint32_t chunk_low[K::CHUNKS];
#pragma unroll
    for (int c = 0; c < K::CHUNKS; ++c)
      chunk_low[c] = __shfl_sync(0xffffffffu, (base() + slot_of(nth, c) * K::SLOT_BYTES) >> 4, 0);
#pragma unroll
    for (int c = 0; c < K::CHUNKS; ++c) {
      wait_for_chunk(nth, c);
      if (gathers(this->p)) fence_proxy_async();
      wgmma_fence_registers(S);
      wgmma_fence();
#pragma unroll
      for (int box = c * K::CHUNK_BOXES; box < K::BOXES && box < (c + 1) * K::CHUNK_BOXES; ++box) {
        const uint32_t k_low = chunk_low[c] + box % K::CHUNK_BOXES * (kFp8BoxBytes >> 4);
#pragma unroll
        for (int k = 0; k < 2; ++k)
          WgmmaE4m3<N>::mma(S, descriptor_of_64_bytes(k_low + 2 * k), descriptor(q_low + box * (N * 128 >> 4) + 2 * k),
                            box + k > 0);
      }
    }
    wgmma_commit();
    meanwhile();
    wgmma_wait<0>();
    wgmma_fence_registers(S);
  }

  // Where the thread's first values of 128 of a block are.
  __device__ __forceinline__ uint32_t value_at(int nth, int v) const {
    const uint32_t t = thread(), box = wg * K::HALF_TILES + 2 * v + Values::box(t);
    return base() + slot_of(nth, box / K::CHUNK_BOXES) * K::SLOT_BYTES + box % K::CHUNK_BOXES * kFp8BoxBytes +
           Values::offset(t);
  }
  // O^T += V^T P^T of BLOCKS blocks from the first on, whose P^T are there and refer to the same maxima; gives their
  // slots back.
  template <int BLOCKS>
  __device__ __forceinline__ void add_blocks(int first, int side) {
    uint32_t p_low[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
      p_low[b] = __shfl_sync(0xffffffffu, this->p_of(b == 0 ? side : 1 - side, first + b) >> 4, 0);
#pragma unroll
    for (int v = 0; v < Values::WORDS; ++v) {
      uint32_t a[BLOCKS][2][2][4];  // [block][tile][k32 step]
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        Values value;
        value.load(value_at(first + b, v));
        value.transpose(0, a[b][0]);
        value.transpose(1, a[b][1]);
      }
      if (v + 1 == Values::WORDS) {
        __syncwarp();  // all of the blocks has been read
        if (lane() == 0) {
#pragma unroll
          for (int c = 0; c < BLOCKS * K::CHUNKS; ++c) this->give_back(first, c);
        }
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float sums[N / 2];
        wgmma_fence_registers(sums);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          wgmma_fence_registers(a[b][x][0]);
          wgmma_fence_registers(a[b][x][1]);
        }
        wgmma_fence();
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
          for (int k = 0; k < 2; ++k) WgmmaE4m3<N>::mma(sums, a[b][x][k], descriptor(p_low[b] + 2 * k), b + k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_fence_registers(sums);
#pragma unroll
        for (int j = 0; j < N / 2; ++j) O[2 * v + x][j] += sums[j];
      }
    }
  }
  // The same of the other warpgroup's block before the nth, whose P^T is there, and of the nth, an own one: where there
  // are such.
  __device__ __forceinline__ void add_values(int nth, bool before, bool own, bool others_moved, bool moved) {
    if (before && others_moved) this->rescale(shared.side[1 - wg]);
    const auto wait_for_own = [&] {
      mbarrier_wait(smem_address(&mine().p_ready), parity & 1);  // the other warps'
      parity ^= 1;
    };
#pragma unroll 1
      for (int is_own = before ? 0 : 1; is_own <= (own ? 1 : 0); ++is_own) {
        if (is_own) {
          wait_for_own();
          if (moved) this->rescale(mine());
        }
        add_blocks<1>(nth - 1 + is_own, is_own ? wg : 1 - wg);
      }
    if (before) {
      this->free_others_p(nth - 1);
      parity ^= 2;
    }
  }
};

// All blocks of the piece, of which this warpgroup has every other.
template <typename K>
__device__ __forceinline__ void all_blocks(E4m3FastMath<K> &math) {
  const auto &piece = math.shared.piece;
#pragma unroll 1
  for (int nth = piece.begin + math.wg;; nth += 2) {
    const bool own = nth < piece.end, before = nth > piece.begin && nth <= piece.end;
    if (!own && !before) break;
    bool others_moved = false, moved = false;
    if (own) {
      math.clear_tail(nth);
      math.multiply_keys(nth, [&] {
        math.wait_for_free_p(nth);
        if (before) others_moved = math.follow();
      });
      moved = math.softmax(opaque(nth));
    } else {
      others_moved = math.follow();
    }
    math.add_values(opaque(nth), before, own, others_moved, moved);
  }
}

struct e4m3_fast {
  template <typename, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    if constexpr (COPY == KvCopy::kE4m3) {
      using K = E4m3Fast<ROWS, D_LATENT, D_ROPE>;
      return {reinterpret_cast<const void *>(&e4m3_dv_split_kernel<E4m3FastMath<K>>), K::THREADS, K::SHARED_BYTES};
    }
    return Kernel{};
  }
};

}  // namespace etap::sm90
