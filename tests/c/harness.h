/* What the C tests share: random decode cases on the CPU device, with poison wherever the library has no business, and
 * their reference in double precision. */
#ifndef ETAP_TEST_HARNESS_H
#define ETAP_TEST_HARNESS_H

#include <stddef.h>
#include <stdint.h>

#include "etap.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CHECK(condition)                                         \
  do {                                                           \
    if (!(condition)) test_fail(__FILE__, __LINE__, #condition); \
  } while (0)
#define CHECK_OK(call)                                           \
  do {                                                           \
    if ((call) != ETAP_OK) test_fail(__FILE__, __LINE__, #call); \
  } while (0)

/* Prints where, what and libetap's last message, and ends the program with status 1. */
void test_fail(const char *file, int line, const char *what);

/* xorshift64*: the same numbers from the same seed everywhere */
typedef struct rng {
  uint64_t state;
} rng;
uint32_t rng_next(rng *r);
int rng_below(rng *r, int n); /* 0 .. n - 1 */
double rng_uniform(rng *r, double low, double high);

/* Values of bit patterns */
double from_bf16(uint16_t bits);
double from_fp16(uint16_t bits);
double from_e4m3(uint8_t bits);

/* A decode call with all its memory. Everything that the library must not read is NaN (or a page number out of range),
 * everything that it must write is a known byte pattern before the call. */
typedef struct decode_case {
  etap_problem problem;
  etap_plan_args plan_args;
  etap_run_args run_args;
  int rows;         /* query rows: problem.batch * max_query_len, or total_q */
  void *blocks[32]; /* what case_free frees */
  int num_blocks;
  size_t out_bytes;
  size_t lse_bytes;
} decode_case;

/* A random small case of a given KV format. */
void case_make(decode_case *c, rng *r, int32_t kv_format);
/* One with a tree mask, and so many query tokens a sequence, or at most so many. */
void case_make_drafts(decode_case *c, rng *r, int32_t kv_format, int drafts);
/* One with long sequences, most of which begin with pages of others, and ETAP_SHARED_PREFIXES. */
void case_make_shared(decode_case *c, rng *r, int32_t kv_format);
void case_free(decode_case *c);
/* Gives the case a poisoned workspace; once more after the problem was changed. */
void case_make_workspace(decode_case *c);
void case_poison_outputs(decode_case *c);
/* plan_create, plan_update, run, plan_destroy; all must succeed */
void case_run(decode_case *c);
/* Compares out and lse with the reference, and everything around them with the poison. */
void case_check(const decode_case *c, const char *name);

void *case_alloc(decode_case *c, size_t bytes, size_t alignment, int fill);

#ifdef __cplusplus
}
#endif
#endif
