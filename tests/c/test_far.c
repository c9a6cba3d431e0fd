/* KV pools of 8 GiB, more than 2^32 bytes and 2^31 elements, whose pages are spread over all of it: a product of page
 * number and stride in 32 bits would read elsewhere. Only the pages in use take memory. */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "harness.h"

#define POOL_BYTES (INT64_C(8) << 30)

/* Moves the case's pages as far apart as the pool allows. */
static void spread(decode_case *c, char *pool) {
  etap_run_args *a = &c->run_args;
  const int64_t element = c->problem.kv_format <= ETAP_KV_FP16 ? 2 : 1;
  const int64_t stride = POOL_BYTES / element / a->num_pages / 16 * 16;
  CHECK(stride >= a->kv_page_stride);
  for (int64_t page = 0; page < a->num_pages; ++page)
    memcpy(pool + page * stride * element, (const char *)a->kv_cache + page * a->kv_page_stride * element,
           (size_t)(a->kv_page_stride * element));
  a->kv_cache = pool;
  a->kv_page_stride = stride;
}

int main(int argc, char **argv) {
  const unsigned long long seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
  rng r = {seed * 2654435769u + 1};
  printf("seed %llu\n", seed);
  for (int kv_format = 0; kv_format <= ETAP_KV_E4M3_656; ++kv_format) {
    void *pool = mmap(NULL, POOL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(pool != MAP_FAILED);
    decode_case c;
    case_make(&c, &r, kv_format);
    while (c.run_args.num_pages == 0) { /* no sequence has a token */
      case_free(&c);
      case_make(&c, &r, kv_format);
    }
    spread(&c, (char *)pool);
    case_run(&c);
    case_check(&c, "far pages");
    case_free(&c);
    CHECK(munmap(pool, POOL_BYTES) == 0);
  }
  printf("passed\n");
  return 0;
}
