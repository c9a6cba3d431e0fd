#define _POSIX_C_SOURCE 200112L
#include "harness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POISON 0xff /* bytes of it are a NaN in every floating-point type here, and -1 as an integer */

void test_fail(const char *file, int line, const char *what) {
  fprintf(stderr, "%s:%d: failed: %s\n  last message: %s\n", file, line, what, etap_last_message());
  exit(1);
}

uint32_t rng_next(rng *r) {
  r->state ^= r->state >> 12;
  r->state ^= r->state << 25;
  r->state ^= r->state >> 27;
  return (uint32_t)((r->state * UINT64_C(2685821657736338717)) >> 32);
}

int rng_below(rng *r, int n) { return (int)(rng_next(r) % (uint32_t)n); }

double rng_uniform(rng *r, double low, double high) { return low + (high - low) * (rng_next(r) / 4294967296.0); }

void *case_alloc(decode_case *c, size_t bytes, size_t alignment, int fill) {
  void *memory = NULL;
  CHECK(c->num_blocks < (int)(sizeof c->blocks / sizeof c->blocks[0]));
  CHECK(posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment, bytes ? bytes : 1) == 0);
  memset(memory, fill, bytes);
  c->blocks[c->num_blocks++] = memory;
  return memory;
}

void case_free(decode_case *c) {
  while (c->num_blocks > 0) free(c->blocks[--c->num_blocks]);
}

/* ---- Number formats: from bits, and random values that the format holds exactly ---- */

double from_bf16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

double from_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double fraction = (bits & 1023) / 1024.0;
  double value;
  if (exponent == 31) {
    value = fraction != 0 ? (double)NAN : (double)INFINITY;
  } else {
    value = exponent == 0 ? ldexp(fraction, -14) : ldexp(1 + fraction, exponent - 15);
  }
  return bits & 0x8000 ? -value : value;
}

double from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const double fraction = (bits & 7) / 8.0;
  double value;
  if ((bits & 127) == 127) {
    value = (double)NAN;
  } else {
    value = exponent == 0 ? ldexp(fraction, -6) : ldexp(1 + fraction, exponent - 7);
  }
  return bits & 0x80 ? -value : value;
}

static double from_half(int32_t dtype, uint16_t bits) { return dtype == ETAP_BF16 ? from_bf16(bits) : from_fp16(bits); }

static uint16_t random_half(rng *r, int32_t dtype) {
  const uint16_t sign = (uint16_t)(rng_next(r) & 0x8000);
  const int down = rng_below(r, 8); /* magnitudes from 2^-8 to 2 */
  if (dtype == ETAP_BF16) return (uint16_t)(sign | (127 - down) << 7 | (rng_next(r) & 127));
  return (uint16_t)(sign | (15 - down) << 10 | (rng_next(r) & 1023));
}

static uint8_t random_e4m3(rng *r) {
  uint8_t bits;
  do bits = (uint8_t)(rng_next(r) >> 8);
  while ((bits & 127) >= 0x48); /* below 4, subnormals among them */
  return bits;
}

/* ---- Cases ---- */

static int pick(rng *r, const int *choices, int count) { return choices[rng_below(r, count)]; }

static size_t kv_element_bytes(const etap_problem *p) { return p->kv_format <= ETAP_KV_FP16 ? 2 : 1; }

/* 512 E4M3 values, their scales, and BF16 rope values or none */
static int scales_in_row(int32_t kv_format) { return kv_format == ETAP_KV_E4M3_656 || kv_format == ETAP_KV_E4M3_528; }

static int kv_row_elements(const etap_problem *p) {
  return scales_in_row(p->kv_format) ? 528 + 2 * p->d_rope : p->d_latent + p->d_rope;
}

static void *query_at(const void *q, int64_t element) { return (char *)q + 2 * element; }

static void make_query(decode_case *c, rng *r) {
  const etap_problem *p = &c->problem;
  const int64_t head_stride = p->d_latent + p->d_rope + 8 * rng_below(r, 3);
  const int64_t row_stride = head_stride * p->num_heads + 8 * rng_below(r, 3);
  uint16_t *q = (uint16_t *)case_alloc(c, 2 * (size_t)(row_stride * c->rows), 16, POISON);
  for (int64_t row = 0; row < c->rows; ++row)
    for (int64_t head = 0; head < p->num_heads; ++head)
      for (int d = 0; d < p->d_latent + p->d_rope; ++d)
        q[row * row_stride + head * head_stride + d] = random_half(r, p->q_dtype);
  c->run_args.q_nope = q;
  c->run_args.q_nope_row_stride = row_stride;
  c->run_args.q_nope_head_stride = head_stride;
  if (p->d_rope > 0) {
    c->run_args.q_rope = q + p->d_latent;
    c->run_args.q_rope_row_stride = row_stride;
    c->run_args.q_rope_head_stride = head_stride;
  }
}

static void fill_token(const etap_problem *p, rng *r, uint8_t *row, float *scales) {
  const int width = p->d_latent + p->d_rope;
  if (p->kv_format <= ETAP_KV_FP16) {
    for (int d = 0; d < width; ++d) {
      const uint16_t bits = random_half(r, p->q_dtype);
      memcpy(row + 2 * d, &bits, sizeof bits);
    }
    return;
  }
  const int fp8_values = scales_in_row(p->kv_format) ? 512 : width;
  for (int d = 0; d < fp8_values; ++d) row[d] = random_e4m3(r);
  float group_scales[4];
  for (int g = 0; g < 4; ++g) group_scales[g] = (float)rng_uniform(r, 0.1, 0.5);
  if (p->kv_format == ETAP_KV_E4M3_GROUP) memcpy(scales, group_scales, sizeof(float) * (size_t)(p->d_latent / 128));
  if (!scales_in_row(p->kv_format)) return;
  memcpy(row + 512, group_scales, sizeof group_scales);
  for (int d = 0; d < p->d_rope; ++d) {
    const uint16_t bits = random_half(r, ETAP_BF16);
    memcpy(row + 528 + 2 * d, &bits, sizeof bits);
  }
}

static void make_cache(decode_case *c, rng *r, const int32_t *lengths) {
  const etap_problem *p = &c->problem;
  etap_run_args *a = &c->run_args;
  const size_t element = kv_element_bytes(p);
  const int unit = (int)(16 / element);
  const int groups = p->d_latent / 128;
  int longest = 0;
  int used_pages = 0;
  for (int b = 0; b < p->batch; ++b) {
    if (lengths[b] > longest) longest = lengths[b];
    if (lengths[b] > 0) used_pages += (lengths[b] + p->page_size - 1) / p->page_size;
  }
  if (used_pages == 0 && rng_below(r, 2)) return; /* a pool of no pages, a table of no columns: both NULL */
  a->num_pages = used_pages + 1 + rng_below(r, 4);
  a->kv_row_stride = kv_row_elements(p) + unit * rng_below(r, 3);
  a->kv_page_stride = a->kv_row_stride * p->page_size + unit * rng_below(r, 3);
  uint8_t *kv = (uint8_t *)case_alloc(c, element * (size_t)(a->kv_page_stride * a->num_pages), 16, POISON);
  a->kv_cache = kv;
  float *scales = NULL;
  if (p->kv_format == ETAP_KV_E4M3_GROUP) {
    a->kv_group_scales_row_stride = groups + rng_below(r, 2);
    a->kv_group_scales_page_stride = a->kv_group_scales_row_stride * p->page_size + rng_below(r, 2);
    scales =
        (float *)case_alloc(c, sizeof(float) * (size_t)(a->kv_group_scales_page_stride * a->num_pages), 16, POISON);
    a->kv_group_scales = scales;
  }

  /* Pages in random order; page 0 belongs to nobody and stays poisoned. */
  int32_t *order = (int32_t *)case_alloc(c, sizeof(int32_t) * (size_t)a->num_pages, 4, 0);
  for (int i = 0; i < a->num_pages; ++i) order[i] = i;
  for (int i = (int)a->num_pages - 1; i > 1; --i) {
    const int j = 1 + rng_below(r, i);
    const int32_t swapped = order[i];
    order[i] = order[j];
    order[j] = swapped;
  }
  a->block_table_stride = (longest + p->page_size - 1) / p->page_size + 1 + rng_below(r, 3);
  int32_t *table = (int32_t *)case_alloc(c, sizeof(int32_t) * (size_t)(a->block_table_stride * p->batch), 4, POISON);
  a->block_table = table;
  const int columns = (longest + p->page_size - 1) / p->page_size;
  a->block_table_columns = rng_below(r, 4) ? columns + rng_below(r, (int)a->block_table_stride - columns + 1) : 0;
  int next = 1;
  for (int64_t b = 0; b < p->batch; ++b) {
    for (int64_t i = 0; i < a->block_table_stride; i += 2) table[b * a->block_table_stride + i] = INT32_MAX;
    for (int t = 0; t < lengths[b]; ++t) {
      const int64_t row = t % p->page_size;
      int32_t *page = &table[b * a->block_table_stride + t / p->page_size];
      if (row == 0) *page = order[next++];
      fill_token(p, r, kv + element * (size_t)(*page * a->kv_page_stride + row * a->kv_row_stride),
                 scales ? scales + *page * a->kv_group_scales_page_stride + row * a->kv_group_scales_row_stride : NULL);
    }
  }
}

/* The bits of a tree of drafts, of anything, of cycles, of nothing, of everything, or of a causal mask; those past a
 * sequence's drafts are random or set. */
static void make_tree_mask(decode_case *c, rng *r) {
  const etap_problem *p = &c->problem;
  const int words = (p->max_query_len + 31) / 32;
  const int64_t stride = words + rng_below(r, 3);
  uint32_t *mask = (uint32_t *)case_alloc(c, sizeof(uint32_t) * (size_t)(stride * c->rows), 4, POISON);
  c->run_args.tree_mask = mask;
  c->run_args.tree_mask_stride = stride;
  for (int64_t row = 0, i = 0, kind = 0; row < c->rows; ++row, ++i) {
    const int new_sequence = i == p->max_query_len || row == 0 || rng_below(r, 8) == 0; /* whatever cu_seqlens_q says */
    if (new_sequence) i = 0, kind = rng_below(r, 6);
    uint32_t *bits = mask + row * stride;
    for (int w = 0; w < words; ++w) {
      bits[w] = kind == 0 || kind == 2 ? 0
                : kind == 1            ? rng_next(r)
                : kind == 3            ? UINT32_MAX
                                       : rng_next(r) & rng_next(r);
      if (kind == 5) bits[w] = i >= 32 * w + 31 ? UINT32_MAX : i >= 32 * w ? (UINT32_C(2) << (i - 32 * w)) - 1 : 0;
    }
    if (kind == 0) { /* the parent's bits and its own */
      if (i > 0) memcpy(bits, bits - (1 + rng_below(r, (int)i)) * stride, sizeof(uint32_t) * (size_t)words);
      bits[i / 32] |= UINT32_C(1) << i % 32;
    } else if (kind == 4) { /* i sees a later draft that sees i */
      const int64_t other = p->max_query_len - 1 - i;
      bits[other / 32] |= UINT32_C(1) << other % 32;
    }
  }
}

/* Lets sequences begin with whole pages of one before them, and tells the plan of the table. */
static void share_pages(decode_case *c, rng *r) {
  const etap_problem *p = &c->problem;
  etap_run_args *a = &c->run_args;
  int32_t *table = (int32_t *)a->block_table;
  for (int b = 1; b < p->batch; ++b) {
    const int other = rng_below(r, b), x = c->plan_args.cache_seqlens[b], y = c->plan_args.cache_seqlens[other];
    const int pages = x < 0 || y < 0 ? 0 : (x < y ? x : y) / p->page_size;
    const int count = rng_below(r, 3) > 0 ? pages : rng_below(r, pages + 1);
    memcpy(table + b * a->block_table_stride, table + other * a->block_table_stride, sizeof(int32_t) * (size_t)count);
  }
  c->plan_args.block_table = a->block_table;
  c->plan_args.block_table_stride = a->block_table_stride;
  c->plan_args.block_table_columns = a->block_table_columns;
}

static void make(decode_case *c, rng *r, int32_t kv_format, int drafts, int shared_prefixes);

void case_make(decode_case *c, rng *r, int32_t kv_format) { make(c, r, kv_format, 0, 0); }

void case_make_drafts(decode_case *c, rng *r, int32_t kv_format, int drafts) { make(c, r, kv_format, drafts, 0); }

void case_make_shared(decode_case *c, rng *r, int32_t kv_format) { make(c, r, kv_format, 0, 1); }

static void make(decode_case *c, rng *r, int32_t kv_format, int drafts, int shared_prefixes) {
  static const int heads[] = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 63, 64, 128};
  static const int pages[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};
  static const int edges[] = {0, 0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 600, 1100};
  memset(c, 0, sizeof *c);
  etap_problem *p = &c->problem;
  p->size = sizeof *p;
  p->device_type = ETAP_DEVICE_CPU;
  p->num_heads = pick(r, heads, sizeof heads / sizeof heads[0]);
  p->d_latent = !scales_in_row(kv_format) && rng_below(r, 3) == 0 ? 256 : 512;
  p->d_rope = p->d_latent == 256 || kv_format == ETAP_KV_E4M3_656 || rng_below(r, 3) > 0 ? 64 : 0;
  if (kv_format == ETAP_KV_E4M3_528) p->d_rope = 0;
  p->page_size = pick(r, pages, sizeof pages / sizeof pages[0]);
  p->kv_format = kv_format;
  p->q_dtype = kv_format == ETAP_KV_BF16 ? ETAP_BF16 : kv_format == ETAP_KV_FP16 ? ETAP_FP16 : rng_below(r, 2);
  p->out_dtype = rng_below(r, 3);
  p->batch = 1 + rng_below(r, 5);
  p->max_query_len = p->num_heads > 32 ? 1 + rng_below(r, 2) : 1 + rng_below(r, 5);
  p->flags = rng_next(r) & (ETAP_CAUSAL | ETAP_RAGGED | ETAP_BATCH_INVARIANT);
  if (drafts > 0) {
    p->max_query_len = drafts;
    p->num_heads = 1 + rng_below(r, drafts > 64 ? 1 : 128 / drafts);
  }
  if (drafts > 0 || rng_below(r, 3) == 0) p->flags = (p->flags & ~ETAP_CAUSAL) | ETAP_TREE_MASK;
  p->num_sms = rng_below(r, 3);
  if (shared_prefixes) {
    p->batch = 3 + rng_below(r, 6);
    p->num_heads = 1 + rng_below(r, 10);
    p->max_query_len = 1 + rng_below(r, 3);
    p->flags = (p->flags & ~ETAP_BATCH_INVARIANT) | ETAP_SHARED_PREFIXES;
  }

  c->plan_args.size = sizeof c->plan_args;
  c->plan_args.batch = p->batch;
  int32_t *lengths = (int32_t *)case_alloc(c, sizeof(int32_t) * (size_t)p->batch, 4, 0);
  for (int b = 0; b < p->batch; ++b) lengths[b] = pick(r, edges, sizeof edges / sizeof edges[0]);
  for (int b = 0; shared_prefixes && b < p->batch; ++b)
    if (rng_below(r, 5) > 0) lengths[b] = 1152 + rng_below(r, 200);
  if (rng_below(r, 4) == 0) lengths[0] = -3;
  c->plan_args.cache_seqlens = lengths;
  c->rows = p->batch * p->max_query_len;
  if (p->flags & ETAP_RAGGED) {
    int32_t *cu = (int32_t *)case_alloc(c, sizeof(int32_t) * (size_t)(p->batch + 1), 4, 0);
    for (int b = 0; b < p->batch; ++b) cu[b + 1] = cu[b] + rng_below(r, p->max_query_len + 1);
    p->total_q = cu[p->batch] + 1 + rng_below(r, 3);
    c->plan_args.cu_seqlens_q = cu;
    c->rows = p->total_q;
  }
  etap_run_args *a = &c->run_args;
  a->size = sizeof *a;
  a->batch = p->batch;
  make_query(c, r);
  make_cache(c, r, lengths);
  if (shared_prefixes) share_pages(c, r);
  if (p->flags & ETAP_TREE_MASK) make_tree_mask(c, r);
  /* Mostly logits that many tokens share; at times so steep that most weights are tiny, or 0. */
  const double steepest = rng_below(r, 3) ? 0.1 : rng_below(r, 2) ? 1 : 30;
  a->softmax_scale = (float)rng_uniform(r, -steepest / 2, steepest);
  if (kv_format >= ETAP_KV_E4M3) {
    a->kv_scale = (float)rng_uniform(r, 0.2, 1.0);
    if (rng_below(r, 2)) {
      float *scale = (float *)case_alloc(c, sizeof(float), 4, 0);
      *scale = a->kv_scale;
      a->kv_scale_ptr = scale;
      a->kv_scale = 123.0f; /* not used: the pointer wins */
    }
  }
  a->out_head_stride = p->d_latent + rng_below(r, 3);
  a->out_row_stride = a->out_head_stride * p->num_heads + rng_below(r, 3);
  c->out_bytes = (p->out_dtype == ETAP_FP32 ? 4 : 2) * (size_t)(a->out_row_stride * c->rows);
  a->out = case_alloc(c, c->out_bytes, 4, POISON);
  a->lse_base = rng_below(r, 2);
  a->empty_lse = rng_below(r, 2);
  a->lse_head_stride = 1 + rng_below(r, 2);
  a->lse_row_stride = a->lse_head_stride * p->num_heads + rng_below(r, 2);
  c->lse_bytes = sizeof(float) * (size_t)(a->lse_row_stride * c->rows);
  a->lse = (float *)case_alloc(c, c->lse_bytes, 4, POISON);
  case_make_workspace(c);
}

void case_make_workspace(decode_case *c) {
  size_t bytes = 0;
  CHECK_OK(etap_workspace_size(&c->problem, &bytes));
  c->plan_args.workspace = c->run_args.workspace = case_alloc(c, bytes, 256, POISON);
  c->plan_args.workspace_bytes = c->run_args.workspace_bytes = bytes;
}

void case_poison_outputs(decode_case *c) {
  memset(c->run_args.out, POISON, c->out_bytes);
  memset(c->run_args.lse, POISON, c->lse_bytes);
}

void case_run(decode_case *c) {
  etap_plan *plan = NULL;
  CHECK_OK(etap_plan_create(&c->problem, &plan));
  CHECK_OK(etap_plan_update(plan, &c->plan_args));
  CHECK_OK(etap_run(plan, &c->run_args));
  etap_plan_destroy(plan);
}

/* ---- The reference ---- */

static void read_token(const decode_case *c, int64_t b, int64_t t, double *values) {
  const etap_problem *p = &c->problem;
  const etap_run_args *a = &c->run_args;
  const int64_t page = a->block_table[b * a->block_table_stride + t / p->page_size];
  const int64_t row = t % p->page_size;
  const uint8_t *bytes =
      (const uint8_t *)a->kv_cache + kv_element_bytes(p) * (size_t)(page * a->kv_page_stride + row * a->kv_row_stride);
  const double scale = a->kv_scale_ptr ? *a->kv_scale_ptr : a->kv_scale == 0 ? 1 : a->kv_scale;
  for (int d = 0; d < p->d_latent + p->d_rope; ++d) {
    uint16_t half;
    if (p->kv_format <= ETAP_KV_FP16) {
      memcpy(&half, bytes + 2 * d, sizeof half);
      values[d] = from_half(p->q_dtype, half);
    } else if (scales_in_row(p->kv_format) && d >= 512) {
      memcpy(&half, bytes + 528 + 2 * (d - 512), sizeof half);
      values[d] = from_bf16(half);
    } else {
      float group = 1;
      if (scales_in_row(p->kv_format)) memcpy(&group, bytes + 512 + 4 * (d / 128), sizeof group);
      if (p->kv_format == ETAP_KV_E4M3_GROUP && d < p->d_latent)
        group =
            a->kv_group_scales[page * a->kv_group_scales_page_stride + row * a->kv_group_scales_row_stride + d / 128];
      values[d] = from_e4m3(bytes[d]) * scale * group;
    }
  }
}

static double read_output(const decode_case *c, int64_t index) {
  if (c->problem.out_dtype == ETAP_FP32) return ((const float *)c->run_args.out)[index];
  return from_half(c->problem.out_dtype, ((const uint16_t *)c->run_args.out)[index]);
}

/* One row and head: `values` are the `visible` tokens that it sees. Overwrites logits. */
static void check_row(const decode_case *c, const char *name, int64_t row, int64_t head, int64_t visible,
                      const double *values, double *logits) {
  const etap_problem *p = &c->problem;
  const etap_run_args *a = &c->run_args;
  const int width = p->d_latent + p->d_rope;
  const uint16_t *nope =
      (const uint16_t *)query_at(a->q_nope, row * a->q_nope_row_stride + head * a->q_nope_head_stride);
  const uint16_t *rope =
      p->d_rope ? (const uint16_t *)query_at(a->q_rope, row * a->q_rope_row_stride + head * a->q_rope_head_stride)
                : NULL;
  double q[576];
  for (int d = 0; d < width; ++d) q[d] = from_half(p->q_dtype, d < p->d_latent ? nope[d] : rope[d - p->d_latent]);
  double largest = (double)-INFINITY;
  double magnitude = 0, largest_value = 0; /* of the terms of a dot product, which are rounded in FP32; of V */
  for (int64_t t = 0; t < visible; ++t) {
    double dot = 0, terms = 0;
    for (int d = 0; d < width; ++d) {
      dot += values[t * width + d] * q[d];
      terms += fabs(values[t * width + d] * q[d]);
      if (d < p->d_latent) largest_value = fmax(largest_value, fabs(values[t * width + d]));
    }
    logits[t] = dot * a->softmax_scale;
    magnitude = fmax(magnitude, terms * fabs(a->softmax_scale));
    if (logits[t] > largest) largest = logits[t];
  }
  const double rounding = 2e-7 * magnitude; /* of a logit, and of a weight relative to itself */
  double total = 0;
  for (int64_t t = 0; t < visible; ++t) {
    logits[t] = exp(logits[t] - largest);
    total += logits[t];
  }
  const double lse = visible > 0 ? largest + log(total) : (double)-INFINITY;
  const double wanted_lse = a->lse_base == ETAP_LSE_BASE_2 ? lse / log(2.0) : lse;
  const double got_lse = a->lse[row * a->lse_row_stride + head * a->lse_head_stride];
  const double empty_lse = a->empty_lse == ETAP_EMPTY_LSE_PLUS_INF ? (double)INFINITY : (double)-INFINITY;
  const int lse_right = visible > 0
                            ? fabs(got_lse - wanted_lse) <= 1e-6 + 1.5 * rounding + fabs(wanted_lse) * 8.01 / 65536
                            : got_lse == empty_lse;
  if (!lse_right) {
    fprintf(stderr, "%s: lse[%d, %d] is %.9g, wanted %.9g\n", name, (int)row, (int)head, got_lse, wanted_lse);
    CHECK(lse_right);
  }
  double sums[512] = {0};
  for (int64_t t = 0; t < visible; ++t)
    for (int d = 0; d < p->d_latent; ++d) sums[d] += logits[t] * values[t * width + d];
  for (int d = 0; d < p->d_latent; ++d) {
    const double wanted = visible > 0 ? sums[d] / total : 0;
    const double got = read_output(c, row * a->out_row_stride + head * a->out_head_stride + d);
    const double allowed = visible > 0 ? 8e-4 + 2 * rounding * largest_value +
                                             fabs(wanted) * (p->out_dtype == ETAP_BF16 ? 2.01 / 256 : 1e-3)
                                       : 0;
    const int right = fabs(got - wanted) <= allowed;
    if (!right) {
      fprintf(stderr, "%s: out[%d, %d, %d] is %.9g, wanted %.9g\n", name, (int)row, (int)head, d, got, wanted);
      CHECK(right);
    }
  }
}

/* What lies between the results must still be poison. */
static void check_gaps(const decode_case *c, const char *name) {
  const etap_problem *p = &c->problem;
  const etap_run_args *a = &c->run_args;
  const size_t element = p->out_dtype == ETAP_FP32 ? 4 : 2;
  for (size_t i = 0; i < c->out_bytes; ++i) {
    const int64_t in_row = (int64_t)(i / element) % a->out_row_stride;
    const int inside = in_row / a->out_head_stride < p->num_heads && in_row % a->out_head_stride < p->d_latent;
    if (inside || ((const unsigned char *)a->out)[i] == POISON) continue;
    fprintf(stderr, "%s: byte %zu of out, between results, was overwritten\n", name, i);
    CHECK(inside);
  }
  for (size_t i = 0; i < c->lse_bytes; ++i) {
    const int64_t in_row = (int64_t)(i / sizeof(float)) % a->lse_row_stride;
    const int inside = in_row / a->lse_head_stride < p->num_heads && in_row % a->lse_head_stride == 0;
    if (inside || ((const unsigned char *)a->lse)[i] == POISON) continue;
    fprintf(stderr, "%s: byte %zu of lse, between results, was overwritten\n", name, i);
    CHECK(inside);
  }
}

/* Does query token i of `count`, row `row` of the batch, see token t of `length`? */
static int sees(const decode_case *c, int64_t row, int64_t i, int64_t count, int64_t t, int64_t length) {
  const int64_t draft = t - (length - count);
  if (c->problem.flags & ETAP_CAUSAL) return draft <= i;
  if (!(c->problem.flags & ETAP_TREE_MASK) || draft < 0) return 1;
  return c->run_args.tree_mask[row * c->run_args.tree_mask_stride + draft / 32] >> draft % 32 & 1;
}

void case_check(const decode_case *c, const char *name) {
  const etap_problem *p = &c->problem;
  const int width = p->d_latent + p->d_rope;
  int64_t done = 0;
  for (int64_t b = 0; b < p->batch; ++b) {
    const int64_t length = c->plan_args.cache_seqlens[b] > 0 ? c->plan_args.cache_seqlens[b] : 0;
    const int64_t count =
        p->flags & ETAP_RAGGED ? c->plan_args.cu_seqlens_q[b + 1] - c->plan_args.cu_seqlens_q[b] : p->max_query_len;
    double *values = (double *)malloc(sizeof(double) * (size_t)(length * width + 1));
    double *seen = (double *)malloc(sizeof(double) * (size_t)(length * width + 1));
    double *logits = (double *)malloc(sizeof(double) * (size_t)(length + 1));
    CHECK(values != NULL && seen != NULL && logits != NULL);
    for (int64_t t = 0; t < length; ++t) read_token(c, b, t, values + t * width);
    for (int64_t i = 0; i < count; ++i) {
      int64_t visible = 0;
      for (int64_t t = 0; t < length; ++t)
        if (sees(c, done + i, i, count, t, length))
          memcpy(seen + visible++ * width, values + t * width, sizeof(double) * (size_t)width);
      for (int64_t head = 0; head < p->num_heads; ++head) check_row(c, name, done + i, head, visible, seen, logits);
    }
    done += count;
    free(values);
    free(seen);
    free(logits);
  }
  for (; done < c->rows; ++done) /* rows of q past the last sequence's */
    for (int64_t head = 0; head < p->num_heads; ++head) check_row(c, name, done, head, 0, NULL, NULL);
  check_gaps(c, name);
}
