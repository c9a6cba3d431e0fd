// The kernel, for one instruction set: ETAP_ISA is its name, and the compiler's flags make simd.h as wide as it allows.
//
// Vectors lie along the latent dimension in both products, so that neither q nor the KV cache is ever transposed:
//
//     S[row, token] = Q[row, :] . K[token, :]          a few rows x 4 tokens of dot products in registers
//     O[row, :]    += P[row, token] * V[token, :]      4 rows x a few vectors of O in registers over a block of tokens
//
// and any number of rows costs what it has to: nothing is padded to a tile. A block of KV tokens is widened to FP32
// once for all rows. With BF16 dot products S is made of the cache's own bytes, and only V is widened.
#include "cpu/kernel.h"

#include <math.h>

#include "cpu/kv_rows.h"
#include "cpu/simd.h"

namespace etap::cpu::ETAP_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr int kDotRows = kWidth == 16 ? 4 : 2;  // a register tile of S: AVX-512 has twice the registers
constexpr int kDotTokens = 4;
constexpr int kOutRows = 4;  // a register tile of O
constexpr int kOutVectors = kWidth == 16 ? 4 : 2;
constexpr int kChunk = kOutVectors * kWidth;  // latent dimensions of it

static_assert(kBlockTokens == 32, "what a row sees of a block is a bit for each token in 32");
static_assert(kBlockTokens % kDotTokens == 0 && kBlockTokens % kWidth == 0, "whole register tiles");
static_assert(256 % kChunk == 0, "whole register tiles along d_latent");

// ---- Operands of S = Q K^T: FP32, or BF16 as in memory ----

inline void load_query(int32_t dtype, const void *from, int count, float *to) { widen_halves(dtype, from, count, to); }

inline void load_query(int32_t, const void *from, int count, uint16_t *to) { memcpy(to, from, sizeof *to * count); }

template <typename Element>
void load_queries(const Tile &tile, Element *q) {
  const etap_problem &p = *tile.problem;
  const etap_run_args &a = *tile.args;
  const char *nope = static_cast<const char *>(a.q_nope);
  const char *rope = static_cast<const char *>(a.q_rope);
  for (int i = 0; i < tile.num_rows; ++i) {
    const int32_t token = (tile.first_row + i) / p.num_heads;
    const int64_t row = tile.query_rows != nullptr ? tile.query_rows[token] : tile.query_begin + token;
    const int64_t head = (tile.first_row + i) % p.num_heads;
    Element *to = q + i * (p.d_latent + p.d_rope);
    load_query(p.q_dtype, nope + 2 * (row * a.q_nope_row_stride + head * a.q_nope_head_stride), p.d_latent, to);
    if (p.d_rope > 0)
      load_query(p.q_dtype, rope + 2 * (row * a.q_rope_row_stride + head * a.q_rope_head_stride), p.d_rope,
                 to + p.d_latent);
  }
}

// A token's key: widened to where `scratch` points, or where it is.
inline const float *load_key(const Tile &tile, int64_t token, float *scratch) {
  widen_kv_row(tile, token, scratch);
  return scratch;
}

inline const uint16_t *load_key(const Tile &tile, int64_t token, uint16_t *) {
  return reinterpret_cast<const uint16_t *>(find_kv_row(tile, token).bytes);
}

// A chunk of V for a block of tokens, given their keys: [token, kChunk] in FP32, rows *stride apart.
inline const float *load_values(const float *const *keys, int, int d, int width, float *, int *stride) {
  *stride = width;  // keys lie one after another in the scratch
  return keys[0] + d;
}

inline const float *load_values(const uint16_t *const *keys, int tokens, int d, int, float *scratch, int *stride) {
  *stride = kChunk;
  for (int t = 0; t < tokens; ++t) widen_halves(ETAP_BF16, keys[t] + d, kChunk, scratch + t * kChunk);
  return scratch;
}

// ---- S = Q K^T ----

template <int Rows, typename Element>
inline void dot_tile(const Element *q, const Element *const *k, int width, float *s) {
  constexpr int kStep = kWidth * sizeof(float) / sizeof(Element);
  constexpr int kCount = Rows * kDotTokens;
  constexpr int kVectors = (kCount + kWidth - 1) / kWidth;
  Floats acc[kVectors * kWidth] = {};
  for (int d = 0; d < width; d += kStep)
    for (int r = 0; r < Rows; ++r)
      for (int t = 0; t < kDotTokens; ++t)
        acc[r * kDotTokens + t] = dot_step(q + r * width + d, k[t] + d, acc[r * kDotTokens + t]);
  float sums[kVectors * kWidth];
  for (int i = 0; i < kVectors; ++i) store(sums + i * kWidth, sum_lanes<kWidth, kWidth / 2>(acc + i * kWidth));
  for (int r = 0; r < Rows; ++r) memcpy(s + r * kBlockTokens, sums + r * kDotTokens, sizeof(float) * kDotTokens);
}

// kDotTokens tokens against all rows
template <typename Element>
void multiply_qk(const Element *q, int rows, const Element *const *k, int width, float *s) {
  int r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) dot_tile<kDotRows>(q + r * width, k, width, s + r * kBlockTokens);
  for (; r < rows; ++r) dot_tile<1>(q + r * width, k, width, s + r * kBlockTokens);
}

// ---- O += P V ----

template <int Rows>
inline void accumulate_tile(const float *p, const float *v, int v_stride, int tokens, int o_stride, float *o) {
  Floats acc[Rows][kOutVectors];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < kOutVectors; ++c) acc[r][c] = load<Floats>(o + r * o_stride + c * kWidth);
  for (int t = 0; t < tokens; ++t) {
    Floats vt[kOutVectors];
    for (int c = 0; c < kOutVectors; ++c) vt[c] = load<Floats>(v + t * v_stride + c * kWidth);
    for (int r = 0; r < Rows; ++r) {
      const Floats weight = broadcast(p[r * kBlockTokens + t]);
      for (int c = 0; c < kOutVectors; ++c) acc[r][c] += weight * vt[c];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < kOutVectors; ++c) store(o + r * o_stride + c * kWidth, acc[r][c]);
}

// Tokens of a block, one after the other, that rows of the tile see: one row, or kOutRows of them.
struct Run {
  int row, rows;
  int first, tokens;
};

constexpr int kMaxRuns = kMaxTileRows * kBlockTokens / 2;

// One chunk of O for all rows. What a row does not see is not touched: its V may be NaN.
void multiply_pv(const float *p, const Run *runs, int num_runs, const float *v, int v_stride, int d_latent, float *o) {
  for (const Run *run = runs; run < runs + num_runs; ++run) {
    const float *weights = p + run->row * kBlockTokens + run->first;
    const float *values = v + run->first * v_stride;
    float *sums = o + run->row * d_latent;
    if (run->rows == kOutRows) {
      accumulate_tile<kOutRows>(weights, values, v_stride, run->tokens, d_latent, sums);
    } else {
      accumulate_tile<1>(weights, values, v_stride, run->tokens, d_latent, sums);
    }
  }
}

// ---- Softmax over a block of one row ----

// Turns the logits s[0, kBlockTokens), of which those count whose bits are set in `seen`, into probabilities relative
// to the new running maximum, and rescales the row's l and o to it.
inline void softmax_row(float *s, uint32_t seen, float scale, int d_latent, float *m, float *l, float *o) {
  Floats x[kBlockTokens / kWidth];
  Floats largest = broadcast(-INFINITY);
  for (int i = 0; i < kBlockTokens / kWidth; ++i) {
    const Ints counts = (lane_bits() & (seen >> (i * kWidth))) != 0;
    x[i] = select(counts, load<Floats>(s + i * kWidth) * scale, broadcast(-INFINITY));
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

// ---- What a row sees of a block: a bit for each token, the first one lowest ----

inline uint32_t lowest_bits(int64_t count) {
  if (count <= 0) return 0;
  return count < 32 ? (UINT32_C(1) << count) - 1 : ~UINT32_C(0);
}

// Bits of 32 tokens, the first of them draft number `first` of `drafts`; negative: that many tokens before the drafts,
// fewer than 32, which are seen.
inline uint32_t tree_bits(const uint32_t *mask, int64_t first, int64_t drafts) {
  if (first < 0) return lowest_bits(-first) | mask[0] << -first;
  const int64_t word = first / 32, shift = first % 32;
  const bool ends_in_next = shift > 0 && 32 * (word + 1) < drafts;
  return mask[word] >> shift | (ends_in_next ? mask[word + 1] << (32 - shift) : 0);
}

// What each row of the tile sees of `tokens` tokens of the sequence from `first` on.
void find_seen(const Tile &tile, int64_t first, int tokens, uint32_t *seen) {
  const etap_problem &p = *tile.problem;
  const int64_t before_queries = tile.length - tile.query_count;
  for (int r = 0; r < tile.num_rows; ++r) seen[r] = lowest_bits(tokens);
  if (!(p.flags & (ETAP_CAUSAL | ETAP_TREE_MASK)) || first + tokens <= before_queries) return;
  for (int r = 0; r < tile.num_rows; ++r) {
    const int64_t query = (tile.first_row + r) / p.num_heads;
    if (p.flags & ETAP_CAUSAL) {
      seen[r] &= lowest_bits(before_queries + query + 1 - first);
    } else {
      const uint32_t *mask = tile.args->tree_mask + (tile.query_begin + query) * tile.args->tree_mask_stride;
      seen[r] &= tree_bits(mask, first - before_queries, tile.query_count);
    }
  }
}

// The same as runs, those of the first rows first.
int find_runs(const uint32_t *seen, int rows, Run *runs) {
  int count = 0;
  for (int r = 0, n; r < rows; r += n) {
    n = 1;
    while (n < kOutRows && r + n < rows && seen[r + n] == seen[r]) ++n;
    if (n < kOutRows) n = 1;
    for (uint32_t left = seen[r]; left != 0;) {
      const int first = __builtin_ctz(left);
      const uint32_t behind = left + (UINT32_C(1) << first);  // the carry sets the bit behind the run, if there is one
      const int end = behind != 0 ? __builtin_ctz(behind) : kBlockTokens;
      runs[count++] = {r, n, first, end - first};
      left &= behind;
    }
  }
  return count;
}

// ---- The steps of kernel.h ----

template <typename Element>
void attend_with(const Tile &tile, int64_t begin, int64_t end, Scratch *scratch, Partial *result) {
  const etap_problem &problem = *tile.problem;
  const int width = problem.d_latent + problem.d_rope;
  const int d_latent = problem.d_latent;
  const int rows = tile.num_rows;
  const float scale = tile.args->softmax_scale * kLog2E;
  Element *q = reinterpret_cast<Element *>(scratch->q);

  for (int r = 0; r < rows; ++r) {
    result->m[r] = -INFINITY;
    result->l[r] = 0;
  }
  memset(result->o, 0, sizeof(float) * rows * d_latent);
  if (begin < end) load_queries(tile, q);

  for (int64_t first = begin; first < end; first += kBlockTokens) {
    const Element *keys[kBlockTokens];
    int tokens = 0;  // there may be fewer than slots
    for (int64_t token = first; token < end && token < first + kBlockTokens; ++token) {
      if (!has_kv_row(tile, token)) continue;
      keys[tokens] = load_key(tile, token, reinterpret_cast<Element *>(scratch->kv) + tokens * width);
      ++tokens;
    }
    if (tokens == 0) continue;
    for (int t = tokens; t < kBlockTokens; ++t) keys[t] = keys[tokens - 1];  // of a half-filled register tile: not used

    uint32_t seen[kMaxTileRows];
    find_seen(tile, first, tokens, seen);
    Run runs[kMaxRuns];
    const int num_runs = find_runs(seen, rows, runs);
    if (num_runs == 0) continue;
    const int blind = runs[0].row;  // the first rows, if they see nothing of this block, as at the end of a causal one

    for (int t = 0; t < tokens; t += kDotTokens) {
      const int64_t next = first + kBlockTokens + t;
      prefetch_kv_rows(tile, next, next + kDotTokens < end ? next + kDotTokens : end);
      multiply_qk(q + blind * width, rows - blind, keys + t, width, scratch->p + blind * kBlockTokens + t);
    }
    for (int r = blind; r < rows; ++r)
      softmax_row(scratch->p + r * kBlockTokens, seen[r], scale, d_latent, &result->m[r], &result->l[r],
                  result->o + r * d_latent);
    for (int d = 0; d < d_latent; d += kChunk) {
      int stride;
      const float *values = load_values(keys, tokens, d, width, scratch->kv, &stride);
      multiply_pv(scratch->p, runs, num_runs, values, stride, d_latent, result->o + d);
    }
  }
}

void attend(const Tile &tile, int64_t begin, int64_t end, Scratch *scratch, Partial *result) {
#if defined(__AVX512BF16__)
  if (tile.problem->kv_format == ETAP_KV_BF16) return attend_with<uint16_t>(tile, begin, end, scratch, result);
#endif
  attend_with<float>(tile, begin, end, scratch, result);
}

void add(const Partial &partial, int first_row, int num_rows, int d, Partial *sum) {
  for (int r = 0; r < num_rows; ++r) {
    const int i = first_row + r;
    const float *from = partial.o + i * d;
    float *to = sum->o + r * d;
    if (partial.l[i] == 0) {  // saw no token, or only logits of -inf: o is then 0, or NaN where V is not finite
      for (int j = 0; j < d; j += kWidth) store(to + j, load<Floats>(to + j) + load<Floats>(from + j));
      continue;
    }
    const bool grows = !(partial.m[i] <= sum->m[r]);
    const float m = grows ? partial.m[i] : sum->m[r];
    const float kept = sum->m[r] == -INFINITY ? 0.0f : exp2f(sum->m[r] - m);
    const float added = exp2f(partial.m[i] - m);
    sum->m[r] = m;
    sum->l[r] = sum->l[r] * kept + partial.l[i] * added;
    for (int j = 0; j < d; j += kWidth) store(to + j, load<Floats>(to + j) * kept + load<Floats>(from + j) * added);
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
  const float empty_lse = a.empty_lse == ETAP_EMPTY_LSE_PLUS_INF ? INFINITY : -INFINITY;
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
    const float lse = l == 0 ? empty_lse : partial->m[r] + log2f(l);
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
      const Floats part =
          args.dtype == ETAP_FP32 ? load<Floats>(memory + 4 * d) : widen_half(args.dtype, memory + 2 * d);
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
