// The kernel, for one instruction set: ETAP_ISA is its name, and the compiler's flags make simd.h as wide as it allows.
//
// Vectors lie along the latent dimension in both products, so that neither q nor the KV cache is ever transposed:
//
//     S[row, token] = Q[row, :] . K[token, :]          dot products, 4 x 4 of them at a time in registers
//     O[row, :]    += P[row, token] * V[token, :]      4 rows x a few vectors of O in registers over a block of tokens
//
// and any number of rows costs what it has to: nothing is padded.
#include "cpu/kernel.h"

#include <math.h>

#include "cpu/simd.h"

namespace etap::cpu::ETAP_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr int kTileRows = 4;                               // rows of a register tile, both products
constexpr int kTileTokens = 4;                             // tokens of a register tile of S
constexpr int kTileVectors = kWidth == 16 ? 4 : 2;         // vectors of a register tile of O

static_assert(kBlockTokens % kTileTokens == 0 && kBlockTokens % kWidth == 0, "whole register tiles");
static_assert(256 % (kTileVectors * kWidth) == 0, "whole register tiles along d_latent");
static_assert(kTileRows * kTileTokens % kWidth == 0 || kWidth % (kTileRows * kTileTokens) == 0, "sum_lanes");

// ---- Memory formats to FP32 ----

inline Floats widen_half(int32_t dtype, const void *from) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  return dtype == ETAP_BF16 ? bf16_to_floats(halves) : fp16_to_floats(halves);
}

inline void widen_halves(int32_t dtype, const void *from, int count, float *to) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  if (dtype == ETAP_BF16) {
    for (int i = 0; i < count; i += kWidth) store(to + i, bf16_to_floats(halves + i));
  } else {
    for (int i = 0; i < count; i += kWidth) store(to + i, fp16_to_floats(halves + i));
  }
}

inline void widen_e4m3(const uint8_t *from, int count, float scale, float *to) {
  for (int i = 0; i < count; i += kWidth) store(to + i, e4m3_to_floats(from + i) * scale);
}

// Where a token's KV row and its group scales (ETAP_KV_E4M3_GROUP) lie.
struct KvRow {
  const uint8_t *bytes;
  const float *scales;
};

inline KvRow find_kv_row(const Tile &tile, int64_t token) {
  const etap_problem &p = *tile.problem;
  const etap_run_args &a = *tile.args;
  const int64_t page = tile.block_table[token / p.page_size];
  const int64_t row = token % p.page_size;
  const int64_t element_bytes = p.kv_format == ETAP_KV_BF16 || p.kv_format == ETAP_KV_FP16 ? 2 : 1;
  const int64_t element = page * a.kv_page_stride + row * a.kv_row_stride;
  const int64_t scale = page * a.kv_group_scales_page_stride + row * a.kv_group_scales_row_stride;
  return {static_cast<const uint8_t *>(a.kv_cache) + element * element_bytes, a.kv_group_scales + scale};
}

inline int kv_row_bytes(const etap_problem &p) {
  const int width = p.d_latent + p.d_rope;
  if (p.kv_format == ETAP_KV_E4M3_656) return 656;
  return p.kv_format == ETAP_KV_BF16 || p.kv_format == ETAP_KV_FP16 ? 2 * width : width;
}

// Asks for KV rows of tokens [begin, end) to be brought into the L2 cache: pages lie anywhere, and the processor can't
// guess where the next one does.
inline void prefetch_kv_rows(const Tile &tile, int64_t begin, int64_t end) {
  const int bytes = kv_row_bytes(*tile.problem);
  for (int64_t token = begin; token < end; ++token) {
    const uint8_t *row = find_kv_row(tile, token).bytes;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

inline void widen_kv_row(const Tile &tile, int64_t token, float *to) {
  const etap_problem &p = *tile.problem;
  const int width = p.d_latent + p.d_rope;
  const KvRow row = find_kv_row(tile, token);
  switch (p.kv_format) {
    case ETAP_KV_BF16:
    case ETAP_KV_FP16:
      widen_halves(p.q_dtype, row.bytes, width, to);
      break;
    case ETAP_KV_E4M3:
      widen_e4m3(row.bytes, width, tile.kv_scale, to);
      break;
    case ETAP_KV_E4M3_GROUP:
      for (int d = 0; d < p.d_latent; d += 128)
        widen_e4m3(row.bytes + d, 128, row.scales[d / 128] * tile.kv_scale, to + d);
      widen_e4m3(row.bytes + p.d_latent, p.d_rope, tile.kv_scale, to + p.d_latent);
      break;
    case ETAP_KV_E4M3_656: {
      float scales[4];
      memcpy(scales, row.bytes + 512, sizeof scales);
      for (int d = 0; d < 512; d += 128) widen_e4m3(row.bytes + d, 128, scales[d / 128] * tile.kv_scale, to + d);
      widen_halves(ETAP_BF16, row.bytes + 528, 64, to + 512);
      break;
    }
  }
}

void load_queries(const Tile &tile, float *q) {
  const etap_problem &p = *tile.problem;
  const etap_run_args &a = *tile.args;
  const char *nope = static_cast<const char *>(a.q_nope);
  const char *rope = static_cast<const char *>(a.q_rope);
  for (int i = 0; i < tile.num_rows; ++i) {
    const int64_t row = tile.query_begin + (tile.first_row + i) / p.num_heads;
    const int64_t head = (tile.first_row + i) % p.num_heads;
    float *to = q + i * (p.d_latent + p.d_rope);
    widen_halves(p.q_dtype, nope + 2 * (row * a.q_nope_row_stride + head * a.q_nope_head_stride), p.d_latent, to);
    if (p.d_rope > 0)
      widen_halves(p.q_dtype, rope + 2 * (row * a.q_rope_row_stride + head * a.q_rope_head_stride), p.d_rope,
                   to + p.d_latent);
  }
}

// ---- S = Q K^T ----

template <int Rows>
inline void dot_tile(const float *q, const float *k, int width, float *s) {
  constexpr int kCount = Rows * kTileTokens;
  Floats acc[kCount] = {};
  for (int d = 0; d < width; d += kWidth) {
    Floats kd[kTileTokens];
    for (int t = 0; t < kTileTokens; ++t) kd[t] = load<Floats>(k + t * width + d);
    for (int r = 0; r < Rows; ++r) {
      const Floats qd = load<Floats>(q + r * width + d);
      for (int t = 0; t < kTileTokens; ++t) acc[r * kTileTokens + t] += qd * kd[t];
    }
  }
  if constexpr (kCount % kWidth == 0) {
    alignas(64) float sums[kCount];
    for (int i = 0; i < kCount; i += kWidth) store(sums + i, sum_lanes<kWidth, kWidth / 2>(acc + i));
    for (int r = 0; r < Rows; ++r) memcpy(s + r * kBlockTokens, sums + r * kTileTokens, sizeof(float) * kTileTokens);
  } else {
    for (int i = 0; i < kCount; ++i) s[i / kTileTokens * kBlockTokens + i % kTileTokens] = sum(acc[i]);
  }
}

// kTileTokens tokens against all rows
void multiply_qk(const float *q, int rows, const float *k, int width, float *s) {
  int r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) dot_tile<kTileRows>(q + r * width, k, width, s + r * kBlockTokens);
  for (; r < rows; ++r) dot_tile<1>(q + r * width, k, width, s + r * kBlockTokens);
}

// ---- O += P V ----

template <int Rows>
inline void accumulate_tile(const float *p, const float *v, int tokens, int v_stride, int o_stride, float *o) {
  Floats acc[Rows][kTileVectors];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < kTileVectors; ++c) acc[r][c] = load<Floats>(o + r * o_stride + c * kWidth);
  for (int t = 0; t < tokens; ++t) {
    Floats vt[kTileVectors];
    for (int c = 0; c < kTileVectors; ++c) vt[c] = load<Floats>(v + t * v_stride + c * kWidth);
    for (int r = 0; r < Rows; ++r) {
      const Floats weight = broadcast(p[r * kBlockTokens + t]);
      for (int c = 0; c < kTileVectors; ++c) acc[r][c] += weight * vt[c];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < kTileVectors; ++c) store(o + r * o_stride + c * kWidth, acc[r][c]);
}

// Rows [0, rows) all see the first `tokens` tokens of the block.
void multiply_pv(const float *p, int rows, const float *v, int tokens, int width, int d_latent, float *o) {
  for (int d = 0; d < d_latent; d += kTileVectors * kWidth) {
    int r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      accumulate_tile<kTileRows>(p + r * kBlockTokens, v + d, tokens, width, d_latent, o + r * d_latent + d);
    for (; r < rows; ++r)
      accumulate_tile<1>(p + r * kBlockTokens, v + d, tokens, width, d_latent, o + r * d_latent + d);
  }
}

// ---- Softmax over a block of one row ----

// Turns the logits s[0, kBlockTokens), of which the first `visible` count, into probabilities relative to the new
// running maximum, and rescales the row's l and o to it.
inline void softmax_row(float *s, int visible, float scale, int d_latent, float *m, float *l, float *o) {
  Floats x[kBlockTokens / kWidth];
  Floats largest = broadcast(-INFINITY);
  for (int i = 0; i < kBlockTokens / kWidth; ++i) {
    Ints index;
    for (int j = 0; j < kWidth; ++j) index[j] = i * kWidth + j;
    x[i] = select(index < visible, load<Floats>(s + i * kWidth) * scale, broadcast(-INFINITY));
    largest = select(x[i] > largest, x[i], largest);
  }
  float block_max = largest[0];
  for (int j = 1; j < kWidth; ++j) block_max = largest[j] > block_max ? largest[j] : block_max;

  if (block_max > *m) {
    const float factor = *m == -INFINITY ? 0.0f : exp2f(*m - block_max);
    *m = block_max;
    *l *= factor;
    for (int d = 0; d < d_latent; d += kWidth) store(o + d, load<Floats>(o + d) * factor);
  }
  const float reference = *m == -INFINITY ? 0.0f : *m;  // all logits -inf so far: 2^(-inf - 0) = 0
  Floats total = {};
  for (int i = 0; i < kBlockTokens / kWidth; ++i) {
    const Floats p = exp2_nonpositive(x[i] - reference);
    store(s + i * kWidth, p);
    total += p;
  }
  *l += sum(total);
}

// ---- The three steps of kernel.h ----

void attend(const Tile &tile, int64_t begin, int64_t end, Scratch *scratch, Partial *result) {
  const etap_problem &problem = *tile.problem;
  const int width = problem.d_latent + problem.d_rope;
  const int d_latent = problem.d_latent;
  const float scale = tile.args->softmax_scale * kLog2E;
  Partial &partial = *result;

  if (begin < end) load_queries(tile, scratch->q);
  for (int r = 0; r < tile.num_rows; ++r) {
    partial.m[r] = -INFINITY;
    partial.l[r] = 0;
  }
  memset(partial.o, 0, sizeof(float) * tile.num_rows * d_latent);

  // Row r sees the tokens before limit(r); with a causal mask later query tokens see more.
  const int64_t causal_base = tile.length - tile.query_count + 1;
  auto limit = [&](int r) {
    return problem.flags & ETAP_CAUSAL ? causal_base + (tile.first_row + r) / problem.num_heads : tile.length;
  };

  for (int64_t first = begin; first < end; first += kBlockTokens) {
    const int tokens = end - first < kBlockTokens ? static_cast<int>(end - first) : kBlockTokens;
    const int padded = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
    for (int t = 0; t < tokens; ++t) widen_kv_row(tile, first + t, scratch->kv + t * width);
    memset(scratch->kv + tokens * width, 0, sizeof(float) * (padded - tokens) * width);

    // Rows before first_seeing see nothing of this block; rows from all_seeing on see all of it.
    int first_seeing = 0;
    while (first_seeing < tile.num_rows && limit(first_seeing) <= first) ++first_seeing;
    int all_seeing = first_seeing;
    while (all_seeing < tile.num_rows && limit(all_seeing) < first + tokens) ++all_seeing;

    for (int t = 0; t < padded; t += kTileTokens) {
      const int64_t next = first + kBlockTokens + t;
      prefetch_kv_rows(tile, next, next + kTileTokens < end ? next + kTileTokens : end);
      multiply_qk(scratch->q + first_seeing * width, tile.num_rows - first_seeing, scratch->kv + t * width, width,
                  scratch->p + first_seeing * kBlockTokens + t);
    }
    for (int r = first_seeing; r < tile.num_rows; ++r) {
      const int visible = r < all_seeing ? static_cast<int>(limit(r) - first) : tokens;
      float *p = scratch->p + r * kBlockTokens;
      softmax_row(p, visible, scale, d_latent, &partial.m[r], &partial.l[r], partial.o + r * d_latent);
      if (r < all_seeing) multiply_pv(p, 1, scratch->kv, visible, width, d_latent, partial.o + r * d_latent);
    }
    multiply_pv(scratch->p + all_seeing * kBlockTokens, tile.num_rows - all_seeing, scratch->kv, tokens, width,
                d_latent, partial.o + all_seeing * d_latent);
  }
}

void add(const Partial &partial, int num_rows, int d, Partial *sum) {
  for (int r = 0; r < num_rows; ++r) {
    if (partial.l[r] == 0) continue;  // saw no token
    const bool grows = !(partial.m[r] <= sum->m[r]);
    const float m = grows ? partial.m[r] : sum->m[r];
    const float kept = sum->m[r] == -INFINITY ? 0.0f : exp2f(sum->m[r] - m);
    const float added = exp2f(partial.m[r] - m);
    sum->m[r] = m;
    sum->l[r] = sum->l[r] * kept + partial.l[r] * added;
    const float *from = partial.o + r * d;
    float *to = sum->o + r * d;
    for (int i = 0; i < d; i += kWidth) store(to + i, load<Floats>(to + i) * kept + load<Floats>(from + i) * added);
  }
}

inline void narrow(int32_t dtype, const float *from, int count, void *to) {
  for (int i = 0; i < count; i += kWidth) {
    const Floats f = load<Floats>(from + i);
    if (dtype == ETAP_BF16) {
      store(static_cast<uint16_t *>(to) + i, floats_to_bf16(f));
    } else if (dtype == ETAP_FP16) {
      store(static_cast<uint16_t *>(to) + i, floats_to_fp16(f));
    } else {
      store(static_cast<float *>(to) + i, f);
    }
  }
}

void finish(const Tile &tile, Partial *partial) {
  const etap_problem &p = *tile.problem;
  const etap_run_args &a = *tile.args;
  const int64_t out_bytes = p.out_dtype == ETAP_FP32 ? 4 : 2;
  for (int r = 0; r < tile.num_rows; ++r) {
    const int64_t row = tile.query_begin + (tile.first_row + r) / p.num_heads;
    const int64_t head = (tile.first_row + r) % p.num_heads;
    const float l = partial->l[r];
    float *o = partial->o + r * p.d_latent;
    const float inverse = l == 0 ? 0.0f : 1.0f / l;
    for (int d = 0; d < p.d_latent; d += kWidth) store(o + d, load<Floats>(o + d) * inverse);
    narrow(p.out_dtype, o, p.d_latent,
           static_cast<char *>(a.out) + out_bytes * (row * a.out_row_stride + head * a.out_head_stride));
    if (a.lse == nullptr) continue;
    const float lse = l == 0 ? -INFINITY : partial->m[r] + log2f(l);
    a.lse[row * a.lse_row_stride + head * a.lse_head_stride] = a.lse_base == ETAP_LSE_BASE_2 ? lse : lse * kLn2;
  }
}

void merge(const etap_merge_args &args, int64_t row, int64_t head) {
  const float *lse = args.parts_lse + row * args.parts_lse_row_stride + head * args.parts_lse_head_stride;
  float largest = -INFINITY;
  for (int64_t i = 0; i < args.num_parts; ++i) {
    const float part = lse[i * args.parts_lse_part_stride];
    if (part > largest) largest = part;
  }

  constexpr int kMaxD = 1024;  // a multiple of kWidth; d itself need not be one
  alignas(64) char memory[kMaxD * sizeof(float)] = {};
  alignas(64) float total[kMaxD] = {};
  const size_t bytes = static_cast<size_t>(args.d) * (args.dtype == ETAP_FP32 ? 4 : 2);
  const float to_base_2 = args.lse_base == ETAP_LSE_BASE_2 ? 1.0f : kLog2E;
  const int64_t element = row * args.parts_row_stride + head * args.parts_head_stride;
  float weights = 0;
  for (int64_t i = 0; i < args.num_parts; ++i) {
    const float part_lse = lse[i * args.parts_lse_part_stride];
    if (part_lse == -INFINITY) continue;
    const float weight = exp2f((part_lse - largest) * to_base_2);
    weights += weight;
    const int64_t offset = (element + i * args.parts_part_stride) * (args.dtype == ETAP_FP32 ? 4 : 2);
    memcpy(memory, static_cast<const char *>(args.parts) + offset, bytes);
    for (int d = 0; d < args.d; d += kWidth) {
      const Floats part = args.dtype == ETAP_FP32 ? load<Floats>(memory + 4 * d) : widen_half(args.dtype, memory + 2 * d);
      store(total + d, load<Floats>(total + d) + part * weight);
    }
  }

  const float inverse = weights == 0 ? 0.0f : 1.0f / weights;
  for (int d = 0; d < args.d; d += kWidth) store(total + d, load<Floats>(total + d) * inverse);
  narrow(args.dtype, total, args.d, memory);
  const int64_t offset = (row * args.out_row_stride + head * args.out_head_stride) * (args.dtype == ETAP_FP32 ? 4 : 2);
  memcpy(static_cast<char *>(args.out) + offset, memory, bytes);
  if (args.lse != nullptr)
    args.lse[row * args.lse_row_stride + head * args.lse_head_stride] =
        weights == 0 ? -INFINITY : largest + log2f(weights) / to_base_2;
}

}  // namespace

#define ETAP_STRING(name) ETAP_STRING_OF_VALUE(name)
#define ETAP_STRING_OF_VALUE(value) #value

extern const Kernel kernel;
const Kernel kernel = {ETAP_STRING(ETAP_ISA), attend, add, finish, merge};

}  // namespace etap::cpu::ETAP_ISA
