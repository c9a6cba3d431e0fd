/* Prefixes that sequences share on the CPU device: against the reference, with equal bits in every run, and the same
 * tables without the flag.
 *
 *     test_prefix SEED COUNT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

static int32_t groups_of(const decode_case *c) {
  etap_plan *plan = NULL;
  etap_shared shared = ETAP_INIT(etap_shared);
  CHECK_OK(etap_plan_create(&c->problem, &plan));
  CHECK_OK(etap_plan_shared(plan, c->plan_args.workspace, c->plan_args.workspace_bytes, NULL, &shared));
  etap_plan_destroy(plan);
  CHECK(shared.sequences >= 2 * shared.groups && shared.sequences <= c->problem.batch);
  CHECK((shared.groups > 0) == (shared.tokens > 0));
  return shared.groups;
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  const int count = argc > 2 ? atoi(argv[2]) : 24;
  rng r = {seed * 2654435769u + 1};
  int groups = 0;
  printf("seed %llu, %d cases\n", seed, count);
  for (int i = 0; i < count; ++i) {
    decode_case c;
    char name[64];
    const int32_t format = i % (ETAP_KV_E4M3_528 + 1);
    case_make_shared(&c, &r, format);
    snprintf(name, sizeof name, "case %d, kv %d, heads %d, flags %d", i, format, c.problem.num_heads, c.problem.flags);
    case_run(&c);
    case_check(&c, name);
    groups += groups_of(&c);
    void *out = case_alloc(&c, c.out_bytes, 4, 0);
    memcpy(out, c.run_args.out, c.out_bytes);
    case_poison_outputs(&c);
    case_run(&c);
    CHECK(memcmp(out, c.run_args.out, c.out_bytes) == 0);

    c.problem.flags &= ~ETAP_SHARED_PREFIXES;
    c.plan_args.block_table = NULL;
    case_make_workspace(&c);
    case_poison_outputs(&c);
    case_run(&c);
    case_check(&c, name);
    case_free(&c);
  }
  printf("%d groups\npassed\n", groups);
  CHECK(groups > 0);
  return 0;
}
