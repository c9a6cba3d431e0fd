/* Random decode cases on the CPU device against the double-precision reference.
 *
 *     test_matrix SEED COUNT
 *
 * Each case is run twice, into the same workspace and outputs poisoned anew, and must give the same bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

static void describe(const decode_case *c, char *name, size_t size) {
  const etap_problem *p = &c->problem;
  snprintf(name, size,
           "heads %d, (%d, %d), page size %d, q %d, kv %d, out %d, batch %d, q len %d, flags %d, num_sms %d",
           p->num_heads, p->d_latent, p->d_rope, p->page_size, p->q_dtype, p->kv_format, p->out_dtype, p->batch,
           p->max_query_len, p->flags, p->num_sms);
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  const int count = argc > 2 ? atoi(argv[2]) : 20;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu, %d cases\n", seed, count);
  for (int i = 0; i < count; ++i) {
    decode_case c;
    char name[256];
    case_make(&c, &r, i % (ETAP_KV_E4M3_528 + 1));
    describe(&c, name, sizeof name);
    case_run(&c);
    case_check(&c, name);

    void *first_out = case_alloc(&c, c.out_bytes, 4, 0);
    void *first_lse = case_alloc(&c, c.lse_bytes, 4, 0);
    memcpy(first_out, c.run_args.out, c.out_bytes);
    memcpy(first_lse, c.run_args.lse, c.lse_bytes);
    case_poison_outputs(&c);
    case_run(&c);
    CHECK(memcmp(first_out, c.run_args.out, c.out_bytes) == 0);
    CHECK(memcmp(first_lse, c.run_args.lse, c.lse_bytes) == 0);
    case_free(&c);
  }
  printf("passed\n");
  return 0;
}
