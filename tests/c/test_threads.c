/* Two threads share a plan, each with its own workspace and outputs, and get the bits that one thread alone gets.
 * Messages of errors belong to the thread that made them. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

enum { THREADS = 2, ROUNDS = 20 };

typedef struct job {
  const etap_plan *plan;
  decode_case *c; /* read by all */
  etap_run_args run_args;
  etap_plan_args plan_args;
  int wrong_batch;
} job;

static job make_job(const etap_plan *plan, decode_case *c, int wrong_batch) {
  job j;
  j.plan = plan;
  j.c = c;
  j.run_args = c->run_args;
  j.plan_args = c->plan_args;
  j.run_args.out = case_alloc(c, c->out_bytes, 4, 0xff);
  j.run_args.lse = (float *)case_alloc(c, c->lse_bytes, 4, 0xff);
  j.plan_args.workspace = j.run_args.workspace = case_alloc(c, c->plan_args.workspace_bytes, 256, 0xff);
  j.wrong_batch = wrong_batch;
  return j;
}

static void *work(void *argument) {
  job *j = (job *)argument;
  char wanted[32];
  snprintf(wanted, sizeof wanted, "batch is %d,", j->wrong_batch);
  for (int i = 0; i < ROUNDS; ++i) {
    etap_run_args wrong = j->run_args;
    wrong.batch = j->wrong_batch;
    CHECK_OK(etap_plan_update(j->plan, &j->plan_args));
    CHECK(etap_run(j->plan, &wrong) == ETAP_PLAN_MISMATCH);
    CHECK_OK(etap_run(j->plan, &j->run_args));
    CHECK(strncmp(etap_last_message(), wanted, strlen(wanted)) == 0);
    CHECK(memcmp(j->run_args.out, j->c->run_args.out, j->c->out_bytes) == 0);
    CHECK(memcmp(j->run_args.lse, j->c->run_args.lse, j->c->lse_bytes) == 0);
  }
  return NULL;
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu\n", seed);
  for (int kv_format = 0; kv_format <= ETAP_KV_E4M3_528; ++kv_format) {
    decode_case c;
    etap_plan *plan = NULL;
    do case_make(&c, &r, kv_format);
    while (c.problem.num_sms == 1 ? case_free(&c), 1 : 0); /* the pool shall be used */
    case_run(&c);
    case_check(&c, "one thread");
    CHECK_OK(etap_plan_create(&c.problem, &plan));
    job jobs[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; ++i) jobs[i] = make_job(plan, &c, 1000 + i);
    for (int i = 0; i < THREADS; ++i) CHECK(pthread_create(&threads[i], NULL, work, &jobs[i]) == 0);
    for (int i = 0; i < THREADS; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
    etap_plan_destroy(plan);
    case_free(&c);
  }
  printf("passed\n");
  return 0;
}
