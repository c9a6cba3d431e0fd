/* Every bit pattern of every KV format, and the rounding of every output type. A sequence of one token gives its value
 * vector, whatever the query: so the conversions show alone, and are exact or rounded to nearest, ties to even. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "harness.h"

enum { LATENT = 512, ROPE = 64, ROW = LATENT + ROPE, BATCH = 128 }; /* BATCH * LATENT = 65536 */

static uint16_t q[BATCH * ROW]; /* zeros */
static union {
  uint16_t halves[BATCH * ROW];
  uint8_t bytes[BATCH * ROW];
} kv; /* [sequence, ROW] */
static union {
  float floats[BATCH * LATENT];
  uint16_t halves[BATCH * LATENT];
} out; /* [sequence, LATENT] */

/* Puts bit pattern i where sequence i / LATENT has value i % LATENT. */
static void fill_halves(void) {
  for (int i = 0; i < BATCH * LATENT; ++i) kv.halves[i / LATENT * ROW + i % LATENT] = (uint16_t)i;
}

static void fill_bytes(void) {
  for (int i = 0; i < BATCH * LATENT; ++i) kv.bytes[i / LATENT * ROW + i % LATENT] = (uint8_t)i;
}

static void decode(int32_t kv_format, int32_t out_dtype) {
  int32_t lengths[BATCH], table[BATCH];
  for (int b = 0; b < BATCH; ++b) {
    lengths[b] = 1;
    table[b] = b;
  }
  decode_case c;
  memset(&c, 0, sizeof c);
  c.problem.size = sizeof c.problem;
  c.problem.num_heads = 1;
  c.problem.d_latent = LATENT;
  c.problem.d_rope = ROPE;
  c.problem.page_size = 1;
  c.problem.q_dtype = kv_format == ETAP_KV_FP16 ? ETAP_FP16 : ETAP_BF16;
  c.problem.kv_format = kv_format;
  c.problem.out_dtype = out_dtype;
  c.problem.batch = c.plan_args.batch = c.run_args.batch = BATCH;
  c.problem.max_query_len = 1;
  c.plan_args.size = sizeof c.plan_args;
  c.plan_args.cache_seqlens = lengths;
  c.run_args.size = sizeof c.run_args;
  c.run_args.q_nope = q;
  c.run_args.q_nope_row_stride = ROW;
  c.run_args.q_rope = q + LATENT;
  c.run_args.q_rope_row_stride = ROW;
  c.run_args.kv_cache = &kv;
  c.run_args.kv_page_stride = ROW;
  c.run_args.block_table = table;
  c.run_args.block_table_stride = 1;
  c.run_args.softmax_scale = 1;
  c.run_args.out = &out;
  c.run_args.out_row_stride = LATENT;
  case_make_workspace(&c);
  case_run(&c);
  case_free(&c);
}

/* A NaN or infinity makes its token's logit NaN (0 times infinity), and with it all of the sequence's results. */
static int sequence_is_finite(int i, double (*value_of)(int i)) {
  for (int j = i / LATENT * LATENT; j < (i / LATENT + 1) * LATENT; ++j)
    if (!isfinite(value_of(j))) return 0;
  return 1;
}

static double bf16_value(int i) { return from_bf16((uint16_t)i); }
static double fp16_value(int i) { return from_fp16((uint16_t)i); }
static double e4m3_value(int i) { return from_e4m3((uint8_t)i); }

static void check_exact(const char *format, double (*value_of)(int i)) {
  for (int i = 0; i < BATCH * LATENT; ++i) {
    const int right = sequence_is_finite(i, value_of) ? out.floats[i] == value_of(i) : isnan(out.floats[i]);
    if (right) continue;
    fprintf(stderr, "%s %#x became %.9g, not %.9g\n", format, i, out.floats[i], value_of(i));
    CHECK(right);
  }
}

/* The result is at least as near as both its neighbours, and even when it is as near as one of them. */
static void check_rounded(const char *type, double (*of_bits)(uint16_t), uint16_t infinity, double (*value_of)(int i)) {
  for (int i = 0; i < BATCH * LATENT; ++i) {
    if (!sequence_is_finite(i, value_of)) continue;
    const double value = fabs(value_of(i));
    const uint16_t bits = out.halves[i] & 0x7fff;
    if (value != 0) CHECK((out.halves[i] & 0x8000) == (value_of(i) < 0 ? 0x8000 : 0)); /* -0 added to 0 is 0 */
    /* Infinity stands where the next finite number would. */
    const double next = 2 * of_bits((uint16_t)(infinity - 1)) - of_bits((uint16_t)(infinity - 2));
    const double below = bits == 0 ? -1 : of_bits((uint16_t)(bits - 1));
    const double got = bits == infinity ? next : of_bits(bits);
    const double above = bits == infinity ? HUGE_VAL : bits + 1 == infinity ? next : of_bits((uint16_t)(bits + 1));
    const double from_below = value - below, from_above = above - value, error = fabs(got - value);
    const int past_infinity = bits == infinity && value > next;
    const int right = past_infinity || (error <= from_below && error <= from_above &&
                                        ((error < from_below && error < from_above) || bits % 2 == 0));
    if (right) continue;
    fprintf(stderr, "%.9g became %s %#x\n", value_of(i), type, out.halves[i]);
    CHECK(right);
  }
}

int main(void) {
  fill_halves();
  decode(ETAP_KV_BF16, ETAP_FP32);
  check_exact("bf16", bf16_value);
  decode(ETAP_KV_BF16, ETAP_FP16);
  check_rounded("fp16", from_fp16, 0x7c00, bf16_value);
  decode(ETAP_KV_FP16, ETAP_FP32);
  check_exact("fp16", fp16_value);
  decode(ETAP_KV_FP16, ETAP_BF16);
  check_rounded("bf16", from_bf16, 0x7f80, fp16_value);
  decode(ETAP_KV_FP16, ETAP_FP16);
  check_rounded("fp16", from_fp16, 0x7c00, fp16_value);
  fill_bytes();
  for (int i = 0; i < BATCH * ROW; ++i) /* NaNs in every other sequence only */
    if (i / ROW % 2 == 0 && (kv.bytes[i] & 0x7f) == 0x7f) kv.bytes[i] = 0;
  decode(ETAP_KV_E4M3, ETAP_FP32);
  for (int i = 0; i < BATCH * LATENT; ++i) {
    const double value = e4m3_value(i);
    const int odd = i / LATENT % 2;
    CHECK(odd ? isnan(out.floats[i]) : out.floats[i] == (isnan(value) ? 0 : value));
  }
  printf("passed\n");
  return 0;
}
