/* Sparse attention over lists that name all tokens of a sequence, with holes between them: what dense attention gives,
 * whatever stands past the count, and what is refused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

/* A case whose rows are one query token of a sequence each. */
static void make_single(decode_case *c, rng *r, int32_t kv_format) {
  for (;;) {
    case_make(c, r, kv_format);
    if (!(c->problem.flags & (ETAP_RAGGED | ETAP_TREE_MASK)) && c->problem.max_query_len == 1) return;
    case_free(c);
  }
}

static void run_sparse(rng *r, int32_t kv_format, int with_counts) {
  decode_case c;
  make_single(&c, r, kv_format);
  etap_problem *p = &c.problem;
  etap_run_args *a = &c.run_args;
  int longest = 0;
  for (int b = 0; b < p->batch; ++b) {
    const int length = c.plan_args.cache_seqlens[b];
    longest = length > longest ? length : longest;
  }
  p->topk = 2 * longest + 3;
  p->flags &= ~ETAP_CAUSAL;
  const int stride = p->topk + rng_below(r, 3);
  int32_t *slots = case_alloc(&c, sizeof(int32_t) * (size_t)(p->batch * stride), sizeof(int32_t), 0x7f);
  int32_t *counts = case_alloc(&c, sizeof(int32_t) * (size_t)p->batch, sizeof(int32_t), 0);
  for (int b = 0; b < p->batch; ++b) {
    int32_t *list = slots + b * stride;
    int at = 0;
    for (int t = 0; t < c.plan_args.cache_seqlens[b]; ++t) {
      while (at < p->topk - (c.plan_args.cache_seqlens[b] - t) && rng_below(r, 3) == 0) list[at++] = -1;
      list[at++] = a->block_table[b * a->block_table_stride + t / p->page_size] * p->page_size + t % p->page_size;
    }
    counts[b] = at;
    while (!with_counts && at < p->topk) list[at++] = -1;
  }
  c.plan_args.cache_seqlens = with_counts ? counts : NULL;
  a->block_table = NULL, a->block_table_columns = 0;
  a->slots = slots, a->slots_stride = stride;
  case_make_workspace(&c);
  case_run(&c);
  /* The reference is the dense one. */
  int32_t *lengths = case_alloc(&c, sizeof(int32_t) * (size_t)p->batch, sizeof(int32_t), 0);
  int32_t *table = case_alloc(&c, sizeof(int32_t) * (size_t)(p->batch * p->topk), sizeof(int32_t), 0);
  const int page_size = p->page_size;
  for (int b = 0; b < p->batch; ++b) {
    for (int i = 0; i < counts[b]; ++i) {
      if (slots[b * stride + i] < 0) continue;
      const int t = lengths[b]++;
      table[b * p->topk + t / page_size] = slots[b * stride + i] / page_size;
    }
  }
  a->block_table = table, a->block_table_stride = p->topk;
  c.plan_args.cache_seqlens = lengths;
  case_check(&c, "sparse");
  case_free(&c);
}

#define BAD(change, words)                                      \
  do {                                                          \
    etap_problem p = c.problem;                                 \
    etap_plan_args u = c.plan_args;                             \
    etap_run_args a = c.run_args;                               \
    change;                                                     \
    etap_plan *plan = NULL;                                     \
    etap_status status = etap_plan_create(&p, &plan);           \
    if (status == ETAP_OK) status = etap_plan_update(plan, &u); \
    if (status == ETAP_OK) status = etap_run(plan, &a);         \
    CHECK(status == ETAP_INVALID_ARGUMENT);                     \
    if (strstr(etap_last_message(), words) == NULL) {           \
      fprintf(stderr, "%s\n", etap_last_message());             \
      CHECK(!words);                                            \
    }                                                           \
    etap_plan_destroy(plan);                                    \
  } while (0)

static void test_refusals(rng *r) {
  decode_case c;
  for (make_single(&c, r, ETAP_KV_BF16); c.run_args.kv_cache == NULL; make_single(&c, r, ETAP_KV_BF16)) case_free(&c);
  c.problem.topk = 4;
  c.problem.flags &= ~ETAP_CAUSAL;
  const int batch = c.problem.batch;
  int32_t *slots = case_alloc(&c, sizeof(int32_t) * (size_t)(4 * batch), sizeof(int32_t), 0xff); /* none */
  int32_t *counts = case_alloc(&c, sizeof(int32_t) * (size_t)batch, sizeof(int32_t), 0);
  c.plan_args.cache_seqlens = NULL;
  c.run_args.block_table = NULL, c.run_args.block_table_columns = 0;
  c.run_args.slots = slots, c.run_args.slots_stride = 4;
  case_make_workspace(&c);
  case_run(&c);
  c.run_args.num_pages = 5;
  BAD(p.topk = -1, "topk is -1; allowed: 0 to 65536");
  BAD(p.topk = 65537, "topk is 65537; allowed: 0 to 65536");
  BAD((p.max_query_len = 2), "max_query_len is 2; allowed: 1 with topk");
  BAD(p.flags |= ETAP_CAUSAL, "allowed: 0 or ETAP_BATCH_INVARIANT (4) with topk");
  BAD(p.flags |= ETAP_TREE_MASK, "allowed: 0 or ETAP_BATCH_INVARIANT (4) with topk, whose lists say what a row sees");
  BAD((counts[batch - 1] = 5, u.cache_seqlens = counts), "is 5; allowed: 0 to topk, which is 4");
  BAD((counts[batch - 1] = -1, u.cache_seqlens = counts), "is -1; allowed: 0 to topk, which is 4");
  BAD(a.slots = NULL, "slots is NULL");
  BAD(a.slots = (const int32_t *)((const char *)slots + 1), "slots is");
  BAD(a.slots_stride = -1, "slots_stride is -1; allowed: 0 or more");
  BAD(a.block_table = counts, "block_table is");
  BAD(a.block_table_columns = 1, "block_table_columns is 1; allowed: 0 with topk");
  BAD(slots[2] = -2, "slots[0, 2] is -2; allowed: -1 for none, or 0 to below num_pages * page_size, which is");
  slots[2] = -1;
  BAD(slots[4 * batch - 1] = 5 * c.problem.page_size, ", 3] is");
  slots[4 * batch - 1] = -1;
  BAD((p.topk = 0, u.cache_seqlens = counts, a.block_table = NULL), "slots is");
  case_free(&c);
}

int main(int argc, char **argv) {
  rng r = {argc > 1 ? strtoull(argv[1], NULL, 10) : 1};
  for (int i = 0; i < 60; ++i)
    for (int32_t format = ETAP_KV_BF16; format <= ETAP_KV_E4M3_528; ++format) run_sparse(&r, format, i % 2);
  for (int i = 0; i < 10; ++i) test_refusals(&r);
  printf("passed\n");
  return 0;
}
