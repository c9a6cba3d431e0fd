/* Tree masks on the CPU device: against the reference with up to 256 drafts, against what they must equal, and with NaN
 * in drafts that are not seen.
 *
 *     test_tree SEED COUNT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

/* Runs the case and keeps what came out, in memory of the case. */
typedef struct results {
  void *out, *lse;
} results;

static results solve(decode_case *c) {
  results made = {case_alloc(c, c->out_bytes, 4, 0), case_alloc(c, c->lse_bytes, 4, 0)};
  case_poison_outputs(c);
  case_run(c);
  memcpy(made.out, c->run_args.out, c->out_bytes);
  memcpy(made.lse, c->run_args.lse, c->lse_bytes);
  return made;
}

static void check_equal(const decode_case *c, const results *x, const results *y) {
  CHECK(memcmp(x->out, y->out, c->out_bytes) == 0);
  CHECK(memcmp(x->lse, y->lse, c->lse_bytes) == 0);
}

/* Rows of a sequence: from first on, and how many. */
static int rows_of(const decode_case *c, int b, int *first) {
  const etap_problem *p = &c->problem;
  *first = p->flags & ETAP_RAGGED ? c->plan_args.cu_seqlens_q[b] : b * p->max_query_len;
  return p->flags & ETAP_RAGGED ? c->plan_args.cu_seqlens_q[b + 1] - *first : p->max_query_len;
}

static uint32_t *bits_of(const decode_case *c, int row) {
  return (uint32_t *)c->run_args.tree_mask + row * c->run_args.tree_mask_stride;
}

static int has_bit(const decode_case *c, int row, int j) { return bits_of(c, row)[j / 32] >> j % 32 & 1; }

/* The lower triangle gives the bits of a causal mask, and all ones those of none, whatever the lengths are. */
static void test_masks_with_a_name(rng *r, int32_t kv_format, int drafts, int causal) {
  decode_case c;
  case_make_drafts(&c, r, kv_format, drafts);
  for (int b = 0; b < c.problem.batch; ++b) {
    int first;
    const int count = rows_of(&c, b, &first);
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < count; ++j) {
        uint32_t *word = &bits_of(&c, first + i)[j / 32];
        *word &= ~(UINT32_C(1) << j % 32);
        if (!causal || j <= i) *word |= UINT32_C(1) << j % 32;
      }
  }
  const results tree = solve(&c);
  c.problem.flags &= ~ETAP_TREE_MASK;
  if (causal) c.problem.flags |= ETAP_CAUSAL;
  c.run_args.tree_mask = NULL;
  const results other = solve(&c);
  check_equal(&c, &tree, &other);
  case_free(&c);
}

/* Bits from a sequence's number of drafts on change nothing. */
static void test_bits_past_the_drafts(rng *r, int32_t kv_format, int drafts) {
  decode_case c;
  case_make_drafts(&c, r, kv_format, drafts);
  const results before = solve(&c);
  for (int b = 0; b < c.problem.batch; ++b) {
    int first;
    const int count = rows_of(&c, b, &first);
    for (int row = first; row < first + count; ++row)
      for (int j = count; j < (drafts + 31) / 32 * 32; ++j) bits_of(&c, row)[j / 32] ^= UINT32_C(1) << j % 32;
  }
  const results after = solve(&c);
  check_equal(&c, &before, &after);
  case_free(&c);
}

/* A draft that is NaN reaches the rows that see it, and no others: their bits stay. */
static void test_nan_stays_unseen(rng *r, int32_t kv_format, int drafts) {
  decode_case c;
  case_make_drafts(&c, r, kv_format, drafts);
  const etap_problem *p = &c.problem;
  const etap_run_args *a = &c.run_args;
  const results before = solve(&c);
  const size_t element = kv_format <= ETAP_KV_FP16 ? 2 : 1;
  const size_t out_row = (p->out_dtype == ETAP_FP32 ? 4 : 2) * (size_t)a->out_row_stride;
  const size_t lse_row = sizeof(float) * (size_t)a->lse_row_stride;
  int *hit = (int *)case_alloc(&c, sizeof(int) * (size_t)p->batch, 4, 0);
  for (int b = 0; b < p->batch; ++b) {
    int first;
    const int count = rows_of(&c, b, &first), length = c.plan_args.cache_seqlens[b];
    hit[b] = count > 0 ? rng_below(r, count) : 0;
    const int64_t t = length - count + hit[b];
    if (count == 0 || t < 0 || t >= length) {
      hit[b] = -1;
      continue;
    }
    const int64_t page = a->block_table[b * a->block_table_stride + t / p->page_size];
    const int64_t at = page * a->kv_page_stride + t % p->page_size * a->kv_row_stride;
    memset((char *)a->kv_cache + element * (size_t)at, 0xff, element * (size_t)(p->d_latent / 2));
  }
  const results after = solve(&c);
  for (int b = 0; b < p->batch; ++b) {
    int first;
    const int count = rows_of(&c, b, &first);
    for (int row = first; row < first + count; ++row) {
      const float lse = ((float *)after.lse)[row * a->lse_row_stride];
      if (hit[b] >= 0 && has_bit(&c, row, hit[b])) {
        CHECK(lse != lse);
        continue;
      }
      CHECK(memcmp((char *)before.out + row * out_row, (char *)after.out + row * out_row, out_row) == 0);
      CHECK(memcmp((char *)before.lse + row * lse_row, (char *)after.lse + row * lse_row, lse_row) == 0);
    }
  }
  case_free(&c);
}

int main(int argc, char **argv) {
  static const int drafts[] = {1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 100, 256};
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  const int count = argc > 2 ? atoi(argv[2]) : 24;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu, %d cases\n", seed, count);
  for (int i = 0; i < count; ++i) {
    const int32_t format = i % (ETAP_KV_E4M3_528 + 1);
    const int n = drafts[rng_below(&r, sizeof drafts / sizeof drafts[0])];
    decode_case c;
    char name[64];
    case_make_drafts(&c, &r, format, n);
    snprintf(name, sizeof name, "%d drafts, kv %d, heads %d", n, format, c.problem.num_heads);
    case_run(&c);
    case_check(&c, name);
    case_free(&c);
    test_masks_with_a_name(&r, format, n, i / 2 % 2);
    test_bits_past_the_drafts(&r, format, n);
    test_nan_stays_unseen(&r, format, n);
  }
  printf("passed\n");
  return 0;
}
