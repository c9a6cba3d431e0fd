// Decode for tiles of 64 query rows: the query rows on WGMMA's M, the KV context on its N, as most kernels have it.
// With this many rows nothing is padded.
//
//            dims ->                                64 tokens                            dims of V
//         .-----------.                            .----------.        .----------.     .------------.
//      64 | Q (regi-  | x  K^T [dims, 64 tokens] = | S        |  -->   | P (shared|  x  | K again,   |  =  O [64, dims]
//    rows | sters)    |                            |          | softm. | memory)  |     | read MN-   |
//         '-----------'                            '----------'        '----------'     | major      |
//                                                                                       '------------'
//     shared memory: a ring of pairs of boxes [64 tokens x 64 dims], and the rope parts of two blocks
//
//         | pair 3 | pair 1 | pair 2 | pair 0 | next block: pair 3 | .. | pair .. |  what of Q has no registers
//           right    left     right    left     as PV gives them back      until QK begins, all of Q
//
//   warpgroup 0      producer: the copy engine, a warp a slot; rows that are gathered; E4M3 that becomes FP16 on the
//   way
//                    (e4m3_widen.cuh)
//   warpgroups 1, 2  PV left and right: each has O of half of V's dims in registers; they also bring Q and finish
//   pieces warpgroup 3      QK and softmax
//
// Reason for the shape. A block is 2176 cycles of the tensor cores, so shared memory must not need more, and neither a
// softmax nor a barrier may stand between products. QK reads 64 x 16 values of Q for each 64 x 16 of K: what of Q is in
// registers, six boxes of nine, is a third of its bytes. One warpgroup has room for that and S, two for O [64, 512].
//
// The tensor cores serve whoever comes. Were PV of a block beside QK of the next, both would end late and nothing would
// run beside the softmax. So PV begins when QK of the next block is nearly through, or has to wait for its keys:
//
//     QK, softmax   | QK 1           | softmax 1 | QK 2            | softmax 2 | ..
//     PV                          | PV 0             |          | PV 1              |
//
// A block stays for two of these steps, so that two and a half blocks of shared memory are not too many: Q leaves them.
//
// E4M3 fits FP16 exactly, and so do BF16 queries once their rows are multiplied by a power of two: the products are
// those of the values in the cache. Group scales round them (e4m3_widen.cuh).
#pragma once

#include <type_traits>

#include "sm90/kernel.h"
#include "sm90/parts/kv_pages.cuh"
#include "sm90/parts/shared_memory.cuh"
#include "sm90/parts/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace etap::sm90 {

template <typename T_, int D_LATENT_, int D_ROPE_, KvCopy COPY_>
struct RowsOnM {
  using T = T_;
  static constexpr int ROWS = 64, D_LATENT = D_LATENT_, D_ROPE = D_ROPE_;
  static constexpr KvCopy COPY = COPY_;
  static_assert(D_LATENT % 256 == 0 && (D_ROPE == 0 || D_ROPE == 64));

  static constexpr int THREADS = 512;
  static constexpr int KEYS_WARPGROUP = 3;
  // O takes half of D_LATENT, and ptxas begins it at the 24th.
  static constexpr int VALUES_REGISTERS = D_LATENT == 512 ? 160 : 144,
                       PRODUCER_REGISTERS = COPY == KvCopy::kTma ? 24 : 56,
                       KEYS_REGISTERS = 512 - PRODUCER_REGISTERS - 2 * VALUES_REGISTERS;
  static constexpr int LATENT_BOXES = D_LATENT / 64, HALF = D_LATENT / 2;
  static constexpr bool ROPE = D_ROPE > 0;
  static constexpr int BOXES = LATENT_BOXES + ROPE;
  static constexpr int FULL_ARRIVALS = COPY == KvCopy::kTma ? 1 : 128;
  // Boxes of Q whose A fragments are in registers, 16 a thread each: the first ones.
  static constexpr int IN_REGISTERS = LATENT_BOXES < 8 ? LATENT_BOXES - 1 : COPY == KvCopy::kTma ? 6 : 4;
  static constexpr int PAIRS = LATENT_BOXES / 2, HALF_PAIRS = PAIRS / 2;  // of boxes: slots of the ring
  // PV of a block begins when so many of the next one's pairs are on their way into the tensor cores.
  static constexpr int PAIRS_BEFORE_VALUES = PAIRS - 1;
  static constexpr int BOX_BYTES = kBlockTokens * 128, PAIR_BYTES = 2 * BOX_BYTES;
  static constexpr int MAX_SLOTS = 12;

  using X = Exchange<ROWS, D_LATENT, 8>;

  template <int SLOTS_>
  struct SharedOf {
    union {
      char ring[SLOTS_][PAIR_BYTES];
      char exchange[X::BYTES];  // at the end of a piece
    };
    char q[BOXES - IN_REGISTERS][BOX_BYTES];  // behind those that are for registers, at the ring's end
    char p[2][BOX_BYTES];                     // of even and odd blocks, as all that comes in twos
    char rope[ROPE ? 2 : 1][ROPE ? BOX_BYTES : 16];
    float factors[2][ROWS];                  // that come with P
    float maxima[ROWS], sums[ROWS];          // at the end of a piece
    int moved[2][4];                         // did a maximum of the warp's rows move?
    uint32_t holes[4][2];                    // of a warp's block: bit t is set where the list has no token t
    int kv_end, block_end, step;             // of the piece; step: from a block of this CTA to the next
    RowInfo rows[ROWS];
    WorkerRecord record;
    PieceEnd end;
    SlotBarriers slots[MAX_SLOTS], asides[2];  // asides: of the rope part and the exponents
    uint64_t p_ready[2], p_free[2];            // ready: and the tensor cores free for PV
    uint64_t q_ready, q_taken, sums_ready, ring_free, parts_ready, parts_read;
  };
  static constexpr int SLOTS = slots_that_fit<SharedOf, MAX_SLOTS>();
  using Shared = SharedOf<SLOTS>;
  static constexpr int SHARED_BYTES = sizeof(Shared);
  // From here on slots hold Q until it is in registers.
  static constexpr int FIRST_OF_Q = SLOTS - (IN_REGISTERS + 1) / 2;
  static_assert(SLOTS >= 2 * PAIRS + 1 && SHARED_BYTES <= kSharedLimit);
  static_assert(offsetof(Shared, q) == SLOTS * PAIR_BYTES);  // nothing lies between the ring and it

  // The order in which a block's pairs come: those that are given back first, first. Right and left in turn.
  __device__ static constexpr int pair_at(int nth) {
    return (nth % 2 == 0 ? HALF_PAIRS : 0) + HALF_PAIRS - 1 - nth / 2;
  }
};

enum : int { kBarrierRows = 2 };  // named barriers 2 and 3, of PV left and right

// What all roles have.
template <typename K>
struct RowsOnMRole {
  const DecodeParams &p;
  typename K::Shared &shared;

  // Worked out again where it is needed: registers are scarce.
  // Unsigned, which saves the instructions that a negative one would need.
  __device__ __forceinline__ static uint32_t thread() { return static_cast<uint32_t>(opaque(threadIdx.x)); }
  __device__ __forceinline__ static uint32_t lane() { return thread() % 32; }
  __device__ __forceinline__ static uint32_t warp() { return thread() / 32 % 4; }
  __device__ __forceinline__ static uint32_t row() { return warp() * 16 + lane() / 4; }
  // For a descriptor, in a uniform register: 14 bits. In a cluster the upper bits of an address tell the CTA, and would
  // lie where descriptor_across says how far the next boxes are.
  __device__ __forceinline__ static uint32_t low(uint32_t address) {
    return __shfl_sync(0xffffffffu, (address >> 4) & 0x3fff, 0);
  }
  __device__ __forceinline__ uint32_t full(int slot) const { return smem_address(shared.slots, slot); }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(slot) + SlotBarriers::kEmpty; }
  __device__ __forceinline__ uint32_t aside_full(int slot) const { return smem_address(shared.asides, slot); }
  __device__ __forceinline__ uint32_t aside_empty(int slot) const { return aside_full(slot) + SlotBarriers::kEmpty; }
  // Where Q is brought to: its last boxes stay there.
  __device__ __forceinline__ uint32_t q_at() const { return smem_address(shared.q) - K::IN_REGISTERS * K::BOX_BYTES; }
  __device__ __forceinline__ static int slot_after(int slot, int by = 1) {
    return slot + by >= K::SLOTS ? slot + by - K::SLOTS : slot + by;
  }
  // By all lanes of a warp, which have met.
  __device__ __forceinline__ static void arrive(uint32_t barrier) {
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  // Calls body(context) for the pieces of this worker. The ring begins anew with each of them.
  template <typename Body>
  __device__ __forceinline__ void for_pieces(Body &&body) const {
    for (Pieces pieces(p, shared.record); !pieces.done(); pieces.next()) {
      const PieceContext context = pieces.context(K::ROWS);
      if (context.rows > 0) body(context);
    }
  }
};

// Warpgroup 3.
template <typename K>
struct RowsOnMKeys : RowsOnMRole<K> {
  using T = typename K::T;
  using Role = RowsOnMRole<K>;
  using Role::arrive, Role::lane, Role::low, Role::p, Role::row, Role::shared, Role::warp;

  uint32_t Q[K::IN_REGISTERS][4][4];  // [box][16 dims]: A fragments
  float S[32], m[2], l[2];            // m, l: of rows `row` and `row` + 8
  uint32_t blocks;                    // so far
  uint32_t parity;                    // of each slot's next use
  uint32_t k_low[K::PAIRS], filled[K::PAIRS], lap[K::PAIRS];  // of the next block
  bool waiting;                       // does PV wait to begin with the last block?

  __device__ __forceinline__ RowsOnMKeys(const DecodeParams &params, typename K::Shared &memory)
      : Role{params, memory}, blocks(0), parity(0), waiting(false) {}

  __device__ __forceinline__ void take_query() {
    const uint32_t t = this->thread() % 128, q_row = t / 32 * 16 + t % 16, chunk = t / 16 % 2;
    const uint32_t at = this->q_at() + q_row * 128;
#pragma unroll
    for (int box = 0; box < K::IN_REGISTERS; ++box) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        load_matrix_x4(at + box * K::BOX_BYTES + (((2 * k + chunk) ^ (q_row % 8)) << 4), Q[box][k]);
    }
    fence_proxy_async();  // the copy engine may write there
    __syncwarp();
    arrive(smem_address(&shared.q_taken));
  }

  __device__ __forceinline__ void let_values_begin() {
    if (waiting) arrive(smem_address(shared.p_ready, (blocks - 1) & 1));
    waiting = false;
  }
  __device__ __forceinline__ void wait_for_keys(uint32_t full, uint32_t full_parity) {
    if (mbarrier_passed(full, full_parity)) return;
    let_values_begin();
    mbarrier_wait(full, full_parity);
  }
  // Of the block, before its products: it is on its way then.
  __device__ __forceinline__ void find_holes(const int32_t *list, int list_end, int block) {
    const int place = block * kBlockTokens + lane();
    const uint32_t first = __ballot_sync(0xffffffffu, is_hole(list, place, list_end));
    const uint32_t second = __ballot_sync(0xffffffffu, is_hole(list, place + 32, list_end));
    if (lane() == 0) {
      shared.holes[warp()][0] = first;
      shared.holes[warp()][1] = second;
    }
    __syncwarp();
  }

  // S += Q K^T of one box of K.
  __device__ __forceinline__ void multiply_box(int box, uint32_t k_low, bool first) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (box < K::IN_REGISTERS) {
        Wgmma<T, 64>::mma(S, Q[box < K::IN_REGISTERS ? box : 0][k], descriptor(k_low + 2 * k), !first || k > 0);
      } else {
        const uint32_t q_low = low(smem_address(shared.q)) + (box - K::IN_REGISTERS) * (K::BOX_BYTES >> 4);
        Wgmma<T, 64>::template mma<false>(S, descriptor(q_low + 2 * k), descriptor(k_low + 2 * k), !first || k > 0);
      }
    }
  }
  // S = Q K^T, pair after pair as they come. A product with A in registers holds the warp up until it has begun, so
  // there is little time between two: the next pair is asked for before the one at hand is multiplied, and where all
  // are is worked out before the first.
  __device__ __forceinline__ void locate_keys(int slot) {
#pragma unroll
    for (int nth = 0; nth < K::PAIRS; ++nth) {
      k_low[nth] = low(smem_address(shared.ring[0]) + slot * K::PAIR_BYTES);
      filled[nth] = this->full(slot);
      lap[nth] = parity >> slot & 1;
      parity ^= 1u << slot;
      slot = this->slot_after(slot);
    }
  }
  template <typename Meanwhile>
  __device__ __forceinline__ void multiply_keys(Meanwhile &&meanwhile) {
    wgmma_fence_registers(S);
    if constexpr (K::ROPE) {
      wait_for_keys(this->aside_full(blocks & 1), blocks >> 1 & 1);
      if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
      wgmma_fence();
      multiply_box(K::LATENT_BOXES, low(smem_address(shared.rope[0]) + (blocks & 1) * K::BOX_BYTES), true);
    }
    bool there = false;
#pragma unroll
    for (int nth = 0; nth < K::PAIRS; ++nth) {
      if (!there) wait_for_keys(filled[nth], lap[nth]);
      if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
      if (nth == 0 && !K::ROPE) wgmma_fence();
      there = nth + 1 < K::PAIRS && mbarrier_passed(filled[(nth + 1) % K::PAIRS], lap[(nth + 1) % K::PAIRS]);
      // The second may be one of those that are not in registers.
      multiply_box(2 * K::pair_at(nth), k_low[nth], !K::ROPE && nth == 0);
      multiply_box(2 * K::pair_at(nth) + 1, k_low[nth] + (K::BOX_BYTES >> 4), false);
      if (nth + 1 == K::PAIRS_BEFORE_VALUES) let_values_begin();
    }
    wgmma_commit();
    meanwhile();
    let_values_begin();
    wgmma_wait<0>();
    wgmma_fence_registers(S);
  }

  __device__ __forceinline__ void mask(const PieceContext &context, int block) {
    const int first_token = block * kBlockTokens;
    if (__builtin_expect(first_token + kBlockTokens > context.first_limit, 0)) {
      const int limit0 = shared.rows[row()].limit - first_token, limit1 = shared.rows[row() + 8].limit - first_token;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = 8 * (i / 4) + 2 * (lane() % 4) + i % 2;
        if (token >= (i % 4 < 2 ? limit0 : limit1)) S[i] = -INFINITY;
      }
      if (p.tree_mask != nullptr) {
        // A lane asks for 32 tokens of one of the warp's rows.
        const RowInfo &asked = shared.rows[warp() * 16 + lane() % 16];
        const uint32_t mine = seen_drafts(p, asked, first_token + lane() / 16 * 32 - context.first_limit,
                                          asked.limit - context.first_limit);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2, r = i % 2;
          const uint32_t seen = __shfl_sync(0xffffffffu, mine, 16 * half + 8 * r + lane() / 4) >> (2 * (lane() % 4));
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (!(seen >> (8 * (j / 2) + j % 2) & 1)) S[16 * half + 4 * (j / 2) + 2 * r + j % 2] = -INFINITY;
          }
        }
      }
    }
    if (K::COPY != KvCopy::kTma && p.lists) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t holes = shared.holes[warp()][half] >> (2 * (lane() % 4));
        if (holes == 0) continue;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (holes >> (8 * (i / 4) + i % 2) & 1) S[16 * half + i] = -INFINITY;
        }
      }
    }
  }

  // P of the block, and what comes with it. PV of the last but one is done, or nearly.
  __device__ __forceinline__ void softmax(const PieceContext &context, int block) {
    const uint32_t buffer = blocks & 1;
    if constexpr (K::ROPE) arrive(this->aside_empty(buffer));
    // S stays as it is: the scale goes into the subtraction of the maximum. It must be positive for that; where it is
    // 0, what is masked must stay so.
    if (__builtin_expect(p.scale_log2 < 0.f, 0)) {
#pragma unroll
      for (float &s : S) s = -s;
    }
    const float scale = fmaxf(fabsf(p.scale_log2), kLeastScale);
    mask(context, block);
    float top0 = S[0], top1 = S[2];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      top0 = fmaxf(top0, fmaxf(S[4 * j], S[4 * j + 1]));
      top1 = fmaxf(top1, fmaxf(S[4 * j + 2], S[4 * j + 3]));
    }
    top0 *= scale;
    top1 *= scale;
    const bool moved = __any_sync(0xffffffffu, top0 > m[0] + kSlack || top1 > m[1] + kSlack);
    mbarrier_wait(smem_address(shared.p_free, buffer), (blocks >> 1 & 1) ^ 1);
    if (__builtin_expect(moved, 0)) {
      float f0 = 1.f, f1 = 1.f;
      top0 = fmaxf(top0, __shfl_xor_sync(0xffffffffu, top0, 1));
      top1 = fmaxf(top1, __shfl_xor_sync(0xffffffffu, top1, 1));
      top0 = fmaxf(top0, __shfl_xor_sync(0xffffffffu, top0, 2));
      top1 = fmaxf(top1, __shfl_xor_sync(0xffffffffu, top1, 2));
      if (top0 > m[0] + kSlack) {
        f0 = exp2_approx(m[0] - top0);
        m[0] = top0;
      }
      if (top1 > m[1] + kSlack) {
        f1 = exp2_approx(m[1] - top1);
        m[1] = top1;
      }
      l[0] *= f0;
      l[1] *= f1;
      if (lane() % 4 == 0) {
        shared.factors[buffer][row()] = f0;
        shared.factors[buffer][row() + 8] = f1;
      }
    }
    if (lane() == 0) shared.moved[buffer][warp()] = moved;
    const uint32_t t = this->thread() % 128, p_row = t / 32 * 16 + t % 16;
    const uint32_t to = smem_address(shared.p[0]) + buffer * K::BOX_BYTES + p_row * 128;
    float s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t P[4];
#pragma unroll
      for (int j = 2 * k; j < 2 * k + 2; ++j) {
        const float a = exp2_approx(fmaf(S[4 * j], scale, -m[0]));
        const float b = exp2_approx(fmaf(S[4 * j + 1], scale, -m[0]));
        const float c = exp2_approx(fmaf(S[4 * j + 2], scale, -m[1]));
        const float d = exp2_approx(fmaf(S[4 * j + 3], scale, -m[1]));
        s[0] += a;
        s[1] += b;
        s[2] += c;
        s[3] += d;
        P[2 * (j % 2)] = pack2<T>(a, b);
        P[2 * (j % 2) + 1] = pack2<T>(c, d);
      }
      store_matrix_x4(to + (((2 * k + t / 16 % 2) ^ (p_row % 8)) << 4), P[0], P[1], P[2], P[3]);
    }
    l[0] += s[0] + s[1];
    l[1] += s[2] + s[3];
    fence_proxy_async();
    __syncwarp();
    ++blocks;
    waiting = true;
  }

  __device__ __forceinline__ void run() {
    uint32_t pieces_done = 0;
    this->for_pieces([&](const PieceContext &context) {
      mbarrier_wait(smem_address(&shared.q_ready), pieces_done++ & 1);
      take_query();
      m[0] = m[1] = kNoMaximum;
      l[0] = l[1] = context.first_sum();
      int slot = 0;
      const auto locate_next = [&] {
        locate_keys(slot);
        slot = this->slot_after(slot, K::PAIRS);
      };
      const uint32_t before = parity;
      locate_next();
      uint32_t located = before;
      for (int block = context.first_block(); block < context.piece.block_end; block += context.ctas) {
        if (K::COPY != KvCopy::kTma && p.lists) find_holes(context.table, context.kv_end, block);
        multiply_keys([&] {
          located = parity;
          locate_next();
        });
        softmax(context, block);
      }
      parity = located;  // no block follows the last
      let_values_begin();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
        l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
        if (lane() % 4 == 0) {
          shared.sums[row() + 8 * r] = l[r];
          shared.maxima[row() + 8 * r] = m[r];
        }
      }
      __syncwarp();
      arrive(smem_address(&shared.sums_ready));
    });
  }
};

// Warpgroups 1 and 2: the left and the right half of V's dims.
template <typename K>
struct RowsOnMValues : RowsOnMRole<K> {
  using T = typename K::T;
  using Role = RowsOnMRole<K>;
  using Role::arrive, Role::lane, Role::low, Role::p, Role::row, Role::shared, Role::warp;

  float O[K::HALF / 2];

  __device__ __forceinline__ RowsOnMValues(const DecodeParams &params, typename K::Shared &memory)
      : Role{params, memory} {}

  // 0: left.
  __device__ __forceinline__ static int half() { return __shfl_sync(0xffffffffu, Role::thread() / 128 - 1, 0); }
  // A half's pairs of a block, those that are given back first, first: where they are, and which 128 dims of the half.
  __device__ __forceinline__ int slot_of(int slot, int nth) const {
    return this->slot_after(slot, 2 * nth + 1 - half());
  }
  __device__ static constexpr int dims_of(int nth) { return K::HALF_PAIRS - 1 - nth; }

  // V beyond a sequence's end may be anything, and 0 x NaN is NaN: this half of the block's dims. Who gathers has left
  // zeros.
  __device__ __forceinline__ void clear_tail(int slot, int tokens) const {
    if constexpr (K::COPY != KvCopy::kTma) return;
    if (tokens >= kBlockTokens) return;
#pragma unroll
    for (int nth = 0; nth < K::HALF_PAIRS; ++nth) {
      char *const chunk = shared.ring[slot_of(slot, nth)] + lane() / 8 % 2 * K::BOX_BYTES + lane() % 8 * 16;
#pragma unroll 1
      for (int t = tokens + 2 * warp() + lane() / 16; t < kBlockTokens; t += 8)
        *reinterpret_cast<uint4 *>(chunk + t * 128) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
    fence_proxy_async();
    named_barrier(kBarrierRows + half(), 128);
  }

  // O += P V of a block, whose pairs begin at `slot` and have `tokens` tokens. state: of which bit 0 and 1 count
  // blocks. What is known beforehand is worked out before P is there: the tensor cores wait for the rest.
  __device__ __forceinline__ void add_values(uint32_t state, int slot, int tokens) {
    const uint32_t buffer = state & 1, p_low = low(smem_address(shared.p[0]) + buffer * K::BOX_BYTES);
    uint32_t v_low[K::HALF_PAIRS];
#pragma unroll
    for (int nth = 0; nth < K::HALF_PAIRS; ++nth)
      v_low[nth] = low(smem_address(shared.ring[0]) + slot_of(slot, nth) * K::PAIR_BYTES);
    mbarrier_wait(smem_address(shared.p_ready, buffer), state >> 1 & 1);
    if constexpr (K::COPY != KvCopy::kTma) fence_proxy_async();
    if (__builtin_expect(shared.moved[buffer][warp()] != 0, 0)) {
      const float f0 = shared.factors[buffer][row()], f1 = shared.factors[buffer][row() + 8];
#pragma unroll
      for (int i = 0; i < K::HALF / 2; i += 4) {
        O[i] *= f0;
        O[i + 1] *= f0;
        O[i + 2] *= f1;
        O[i + 3] *= f1;
      }
    }
    clear_tail(slot, tokens);
    __syncwarp();
    wgmma_fence_registers(O);
    wgmma_fence();
#pragma unroll
    for (int nth = 0; nth < K::HALF_PAIRS; ++nth) {
      float (&part)[64] = *reinterpret_cast<float (*)[64]>(&O[64 * dims_of(nth)]);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        WgmmaTransposedB<T, 128>::mma(part, descriptor(p_low + 2 * k),
                                      descriptor_across(v_low[nth] + 128 * k, K::BOX_BYTES), true);
      wgmma_commit();
    }
#pragma unroll
    for (int nth = 0; nth < K::HALF_PAIRS; ++nth) {
      wgmma_wait_until(K::HALF_PAIRS - 1 - nth);
      arrive(this->empty(slot_of(slot, nth)));
    }
    wgmma_fence_registers(O);
    arrive(smem_address(shared.p_free, buffer));
  }

  // O into the exchange.
  __device__ __forceinline__ void leave_rows() {
    named_barrier<kBarrierConsumers, kConsumers>();  // nobody reads the ring any more
    float *const values =
        reinterpret_cast<float *>(shared.exchange) + row() * K::X::ROW + half() * K::HALF + 2 * (lane() % 4);
#pragma unroll
    for (int i = 0; i < K::HALF / 2; i += 2)
      *reinterpret_cast<float2 *>(values + i / 2 % 2 * 8 * K::X::ROW + i / 4 * 8) = make_float2(O[i], O[i + 1]);
  }

  __device__ __forceinline__ void run() {
    // Bits 0 and 1 count blocks, bit 2 pieces, bit 3 says whether there was one, and the rest counts units.
    uint32_t state = 0;
    for (;; state += 16) {
      const Pieces pieces(p, shared.record, static_cast<int>(state >> 4));
      if (pieces.done()) break;
      const PieceContext context = pieces.context(K::ROWS);
      if (context.rows <= 0) continue;
      if (threadIdx.x == 128) {
        shared.kv_end = context.kv_end;
        shared.block_end = context.piece.block_end;
        shared.step = context.ctas;
      }
      load_query<T, K::ROWS, K::D_LATENT, K::D_ROPE>(p, context, this->q_at(), shared.rows, &shared.end);
      if (threadIdx.x == 128) mbarrier_arrive(smem_address(&shared.q_ready));
#pragma unroll
      for (float &o : O) o = 0.f;
      int slot = 0;
#pragma unroll 1
      for (int block = context.first_block(); block < shared.block_end; block += shared.step) {
        add_values(state, slot, shared.kv_end - block * kBlockTokens);
        slot = this->slot_after(slot, K::PAIRS);
        state = (state & ~3u) | ((state + 1) & 3);
      }
      mbarrier_wait(smem_address(&shared.sums_ready), state >> 2 & 1);
      leave_rows();
      const typename K::X exchange{smem_address(shared.exchange),    smem_address(shared.maxima),
                                   smem_address(shared.sums),        smem_address(&shared.parts_ready),
                                   smem_address(&shared.parts_read), &shared.end};
      finish_piece(p, exchange, shared.rows, 1.f, state >> 2 & 3);
      // The ring is free again once every CTA has read its part, the tables of rows and of the end once all warps are
      // here.
      if (shared.end.ctas > 1) mbarrier_wait_cluster(smem_address(&shared.parts_read), state >> 2 & 1);
      named_barrier<kBarrierConsumers, kConsumers>();
      fence_proxy_async();
      __syncwarp();
      arrive(smem_address(&shared.ring_free));
      state = (state ^ 4) | 8;
    }
    fill_spare_rows(p, K::D_LATENT);
  }
};

// Warpgroup 0.
template <typename K>
struct RowsOnMProducer : RowsOnMRole<K> {
  using Role = RowsOnMRole<K>;
  using Role::lane, Role::p, Role::shared;

  enum : uint32_t { kQInRing = 1u << 28, kPiece = 1u << 29, kBlock = 1u << 30 };
  // Bits 0 .. SLOTS - 1: of each slot's next use; fresh, they are empty. Does Q still lie in the ring's end, for all
  // that this warp knows? Then a bit that counts pieces and two that count blocks. Registers are scarce.
  uint32_t parity = (1u << K::SLOTS) - 1;

  __device__ __forceinline__ RowsOnMProducer(const DecodeParams &params, typename K::Shared &memory)
      : Role{params, memory} {}

  __device__ __forceinline__ void begin_piece() {
    mbarrier_wait(smem_address(&shared.ring_free), (parity / kPiece & 1) ^ 1);
    parity |= kQInRing;
  }
  __device__ __forceinline__ void end_piece() { parity ^= kPiece; }
  __device__ __forceinline__ void wait_for_slot(int slot) {
    if ((parity & kQInRing) != 0 && slot >= K::FIRST_OF_Q) {
      mbarrier_wait(smem_address(&shared.q_taken), parity / kPiece & 1);
      parity ^= kQInRing;
    }
    mbarrier_wait(this->empty(slot), parity >> slot & 1);
    parity ^= 1u << slot;
  }
  // Where the block's rope part goes, even or odd, once it may.
  __device__ __forceinline__ uint32_t block() const { return parity / kBlock & 1; }
  __device__ __forceinline__ uint32_t wait_for_aside() const {
    mbarrier_wait(this->aside_empty(block()), (parity >> 31) ^ 1);
    return smem_address(shared.rope[0]) + block() * K::BOX_BYTES;
  }

  // By the copy engine: a warp has every fourth slot, the last one that of the rope part, too.
  __device__ __forceinline__ void load() {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    this->for_pieces([&](const PieceContext &context) {
      const int first = context.first_block(), end = context.piece.block_end, step = context.ctas;
      KvPages pages(p, context, first, step);
      begin_piece();
      int slot = 0;
#pragma unroll 1
      for (int nth_block = first; nth_block < end; nth_block += step, parity += kBlock) {
        pages.advance(nth_block);
        const int row = pages.row_in_page(nth_block),
                  down_count = pages.boxes_down(context.kv_end - nth_block * kBlockTokens);
        const auto bring = [&](auto boxes, uint32_t to, int first_box, uint32_t full) {
          pages.template load<boxes.value, 128>(
              p, row, down_count, boxes.value, to, [&](int i) { return (first_box + i) * 64; }, full);
          if (lane() == 0)
            mbarrier_expect_tx(full, static_cast<uint32_t>(boxes.value * down_count) << (pages.rows_log2 + 7));
        };
        if (K::ROPE && warp == 3) {
          bring(std::integral_constant<int, 1>{}, wait_for_aside(), K::LATENT_BOXES, this->aside_full(block()));
        }
#pragma unroll 1
        for (int nth = 0; nth < K::PAIRS; ++nth, slot = this->slot_after(slot)) {
          if (slot % 4 != warp) continue;
          wait_for_slot(slot);
          bring(std::integral_constant<int, 2>{}, smem_address(shared.ring, slot), 2 * K::pair_at(nth),
                this->full(slot));
        }
      }
      end_piece();
    });
  }

  // Row by row, all warps together.
  __device__ __forceinline__ void gather() {
    this->for_pieces([&](const PieceContext &context) {
      const int first = context.first_block(), end = context.piece.block_end, step = context.ctas;
      begin_piece();
      int slot = 0;
      GatherRows<128> rows;
#pragma unroll 1
      for (int nth_block = first; nth_block < end; nth_block += step, parity += kBlock) {
        rows.locate(p, context.table, nth_block, first, step, context.kv_end);
        if constexpr (K::ROPE) {
          rows.copy_box(wait_for_aside(), K::LATENT_BOXES * 128);
          copy_async_arrive(this->aside_full(block()));
        }
#pragma unroll 1
        for (int nth = 0; nth < K::PAIRS; ++nth, slot = this->slot_after(slot)) {
          wait_for_slot(slot);
          for (int i = 0; i < 2; ++i)
            rows.copy_box(smem_address(shared.ring, slot) + i * K::BOX_BYTES, (2 * K::pair_at(nth) + i) * 128);
          copy_async_arrive(this->full(slot));
        }
      }
      end_piece();
    });
  }
};

template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) rows_on_m_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char shared_raw[];
  typename K::Shared &shared = *reinterpret_cast<typename K::Shared *>(shared_raw);
  if (p.second && Pieces(p, p.records[cta_index()]).done()) {  // nothing is shared
    allow_next_kernel();
    wait_for_previous_kernel();
    return;
  }
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x < K::SLOTS + 2) {
    SlotBarriers &slot = threadIdx.x < K::SLOTS ? shared.slots[threadIdx.x] : shared.asides[threadIdx.x - K::SLOTS];
    mbarrier_init(smem_address(&slot.full), K::FULL_ARRIVALS);
    mbarrier_init(smem_address(&slot.empty), 4);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem_address(&shared.p_ready[i]), 4);
      mbarrier_init(smem_address(&shared.p_free[i]), 8);
    }
    mbarrier_init(smem_address(&shared.q_ready), 1);
    mbarrier_init(smem_address(&shared.q_taken), 4);
    mbarrier_init(smem_address(&shared.sums_ready), 4);
    mbarrier_init(smem_address(&shared.ring_free), 8);
    mbarrier_init(smem_address(&shared.parts_ready), 8 * cluster_size());
    mbarrier_init(smem_address(&shared.parts_read), 8 * cluster_size());
    if (K::COPY == KvCopy::kTma && p.kv != nullptr) tma_prefetch_map(&p.kv_map);
  }
  mbarrier_init_fence();
  cluster_arrive_relaxed();  // waited for where the CTAs first meet
  begin_kernel(p, shared.record);

  if (warpgroup == 0) {
    set_registers_fewer<K::PRODUCER_REGISTERS>();
    RowsOnMProducer<K> producer(p, shared);
    if constexpr (K::COPY == KvCopy::kTma) {
      producer.load();
    } else {
      producer.gather();
    }
  } else if (warpgroup == K::KEYS_WARPGROUP) {
    if constexpr (K::KEYS_REGISTERS > 128) {
      set_registers_more<K::KEYS_REGISTERS>();
    } else {
      set_registers_fewer<K::KEYS_REGISTERS>();
    }
    RowsOnMKeys<K>(p, shared).run();
  } else {
    set_registers_more<K::VALUES_REGISTERS>();
    RowsOnMValues<K>(p, shared).run();
  }
  if (p.second) wait_for_previous_kernel();
}

struct rows_on_m {
  template <typename T, int ROWS, int D_LATENT, int D_ROPE, KvCopy COPY>
  static Kernel instance() {
    using K = RowsOnM<T, D_LATENT, D_ROPE, COPY>;
    static_assert(ROWS == K::ROWS);
    return {reinterpret_cast<const void *>(&rows_on_m_kernel<K>), K::THREADS, K::SHARED_BYTES};
  }
};

}  // namespace etap::sm90
