/* What must not change a sequence's bits: in batch-invariant mode the rest of the batch and the number of threads; in
 * every mode the caller's floating-point environment, which in turn comes back as it was. */
#include <fenv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "harness.h"

static size_t out_element_bytes(const etap_problem *p) { return p->out_dtype == ETAP_FP32 ? 4 : 2; }

/* Sequence b of the case alone, its results in the same places. */
static void run_alone(decode_case *c, int b, int32_t num_sms) {
  decode_case alone = *c;
  etap_problem *p = &alone.problem;
  etap_run_args *a = &alone.run_args;
  int32_t cu[2] = {0, p->max_query_len};
  int first = b * p->max_query_len;
  if (p->flags & ETAP_RAGGED) {
    first = c->plan_args.cu_seqlens_q[b];
    cu[1] = p->total_q = c->plan_args.cu_seqlens_q[b + 1] - first;
    alone.plan_args.cu_seqlens_q = cu;
    if (cu[1] == 0) return;
  }
  p->batch = alone.plan_args.batch = a->batch = 1;
  p->num_sms = num_sms;
  alone.plan_args.cache_seqlens += b;
  a->q_nope = (const char *)a->q_nope + 2 * first * a->q_nope_row_stride;
  if (a->q_rope != NULL) a->q_rope = (const char *)a->q_rope + 2 * first * a->q_rope_row_stride;
  a->block_table += b * a->block_table_stride;
  if (a->tree_mask != NULL) a->tree_mask += first * a->tree_mask_stride;
  a->out = (char *)a->out + (int64_t)out_element_bytes(p) * first * a->out_row_stride;
  a->lse += first * a->lse_row_stride;
  case_make_workspace(&alone);
  case_run(&alone);
  free(a->workspace);
}

static void test_batch_invariance(rng *r, int kv_format) {
  decode_case c;
  case_make(&c, r, kv_format);
  c.problem.flags |= ETAP_BATCH_INVARIANT;
  c.problem.num_sms = 0;
  case_make_workspace(&c);
  case_run(&c);
  case_check(&c, "batch");
  void *out = case_alloc(&c, c.out_bytes, 4, 0);
  void *lse = case_alloc(&c, c.lse_bytes, 4, 0);
  memcpy(out, c.run_args.out, c.out_bytes);
  memcpy(lse, c.run_args.lse, c.lse_bytes);
  /* What no sequence owns, rows past the last one, stays from the first run. */
  for (int num_sms = 1; num_sms <= 2; ++num_sms) {
    for (int b = 0; b < c.problem.batch; ++b) run_alone(&c, b, num_sms);
    CHECK(memcmp(out, c.run_args.out, c.out_bytes) == 0);
    CHECK(memcmp(lse, c.run_args.lse, c.lse_bytes) == 0);
  }
  case_free(&c);
}

static void test_floating_point_environment(rng *r, int kv_format) {
  decode_case c;
  case_make(&c, r, kv_format);
  case_run(&c);
  case_check(&c, "default environment");
  void *out = case_alloc(&c, c.out_bytes, 4, 0);
  memcpy(out, c.run_args.out, c.out_bytes);
  case_poison_outputs(&c);
  CHECK(fesetround(FE_UPWARD) == 0);
#if defined(__SSE__)
  const unsigned int strange = _mm_getcsr() | 0x8040; /* flush to zero, subnormals are zeros */
  _mm_setcsr(strange);
#endif
  case_run(&c);
#if defined(__SSE__)
  CHECK((_mm_getcsr() & ~0x3fu) == (strange & ~0x3fu));
#endif
  CHECK(fegetround() == FE_UPWARD);
  CHECK(fesetenv(FE_DFL_ENV) == 0);
  CHECK(memcmp(out, c.run_args.out, c.out_bytes) == 0);
  case_free(&c);
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  const int count = argc > 2 ? atoi(argv[2]) : 10;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu, %d cases\n", seed, count);
  for (int i = 0; i < count; ++i) {
    test_batch_invariance(&r, i % (ETAP_KV_E4M3_528 + 1));
    test_floating_point_environment(&r, i % (ETAP_KV_E4M3_528 + 1));
  }
  printf("passed\n");
  return 0;
}
