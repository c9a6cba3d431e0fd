/* The weights of the softmax, alone: 2^-x for x from 0 to 300, NaN and infinity among the logits.
 *
 *     test_exponent SEED
 *
 * Each sequence has two tokens. The first has logit 0 and value 0, the second logit -x and value 2^100 (sequences of
 * many tokens: the first one's logit is the largest as well). So out / 2^100 is the weight, even where that is tiny. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

enum { LATENT = 512, ROPE = 64, ROW = LATENT + ROPE, BATCH = 2048, TOKENS = 2 };

#define HUGE_VALUE 0x1p100f

static uint16_t q[BATCH * ROW];
static uint16_t kv[BATCH * TOKENS * ROW]; /* [sequence, token, ROW] */
static float out[BATCH * LATENT];
static float lse[BATCH];
static int32_t lengths[BATCH], table[BATCH];

static uint16_t to_bf16(float value) { /* towards 0 */
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return (uint16_t)(word >> 16);
}

/* Gives a sequence's second token the logit -x: three BF16 numbers hold what a float does. */
static void set_logit(int sequence, float x) {
  uint16_t *rope = kv + (sequence * TOKENS + 1) * ROW + LATENT;
  float rest = x;
  for (int i = 0; i < 3; ++i) {
    rope[i] = to_bf16(rest);
    if (isfinite(rest)) rest -= (float)from_bf16(rope[i]);
    rope[i] ^= 0x8000;
  }
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu\n", seed);
  static float x[BATCH];
  for (int b = 0; b < BATCH; ++b) {
    x[b] = (float)rng_uniform(&r, 0, b % 2 ? 140 : 300);
    lengths[b] = TOKENS;
    table[b] = b;
    for (int i = 0; i < 3; ++i) q[b * ROW + LATENT + i] = 0x3f80; /* 1 */
    for (int d = 0; d < LATENT; ++d) kv[(b * TOKENS + 1) * ROW + d] = to_bf16(HUGE_VALUE);
  }
  x[0] = 0;
  x[1] = 126;
  x[2] = nextafterf(126, 127);
  x[3] = 1e30f;
  for (int b = 0; b < BATCH; ++b) set_logit(b, x[b]);
  kv[(4 * TOKENS + 1) * ROW + LATENT] = 0x7fc0; /* NaN */
  kv[(5 * TOKENS + 1) * ROW + LATENT] = 0xff80; /* -inf: a weight of 0 */

  decode_case c;
  memset(&c, 0, sizeof c);
  c.problem.size = sizeof c.problem;
  c.problem.num_heads = 1;
  c.problem.d_latent = LATENT;
  c.problem.d_rope = ROPE;
  c.problem.page_size = TOKENS;
  c.problem.out_dtype = ETAP_FP32;
  c.problem.batch = c.plan_args.batch = c.run_args.batch = BATCH;
  c.problem.max_query_len = 1;
  c.plan_args.size = sizeof c.plan_args;
  c.plan_args.cache_seqlens = lengths;
  c.run_args.size = sizeof c.run_args;
  c.run_args.q_nope = q;
  c.run_args.q_nope_row_stride = ROW;
  c.run_args.q_rope = q + LATENT;
  c.run_args.q_rope_row_stride = ROW;
  c.run_args.kv_cache = kv;
  c.run_args.kv_page_stride = TOKENS * ROW;
  c.run_args.kv_row_stride = ROW;
  c.run_args.num_pages = BATCH;
  c.run_args.block_table = table;
  c.run_args.block_table_stride = 1;
  c.run_args.block_table_columns = 1;
  c.run_args.softmax_scale = 0.69314718f;
  c.run_args.out = out;
  c.run_args.out_row_stride = LATENT;
  c.run_args.lse = lse;
  c.run_args.lse_row_stride = 1;
  c.run_args.lse_base = ETAP_LSE_BASE_2;
  case_make_workspace(&c);
  case_run(&c);
  case_free(&c);

  for (int b = 0; b < BATCH; ++b) {
    const double weight = exp2(-(double)x[b]);
    const double wanted = weight / (1 + weight), allowed = wanted * (4e-7 + 3e-7 * x[b]);
    for (int d = 0; d < LATENT; ++d) {
      const double got = out[b * LATENT + d] / (double)HUGE_VALUE;
      int right = fabs(got - wanted) <= allowed;
      if (x[b] > 125.999) right = right || got == 0; /* below 2^-126 a weight is 0 */
      if (b == 4) right = isnan(got);
      if (b == 5) right = got == 0;
      if (right) continue;
      fprintf(stderr, "the weight 2^-%.9g became %.9g (sequence %d)\n", x[b], got, b);
      CHECK(right);
    }
    if (b != 4 && b != 5) CHECK(fabs(lse[b] - log2(1 + weight)) <= 1e-6);
  }
  printf("passed\n");
  return 0;
}
