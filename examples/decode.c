/* Decodes one token of one sequence on the CPU device. The query is zero, so that every cached token weighs the same:
 * the result is the mean of the cached values, and lse the logarithm of their number. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "etap.h"

enum { TOKENS = 100, HEADS = 16, LATENT = 512, ROPE = 64, ROW = LATENT + ROPE, PAGE = 64, PAGES = 2 };

static uint16_t q[HEADS * ROW], kv[PAGES * PAGE * ROW]; /* BF16: the upper half of a float */
static float out[HEADS * LATENT], lse[HEADS];

static void check(etap_status status) {
  if (status == ETAP_OK) return;
  fprintf(stderr, "%s: %s\n", etap_status_name(status), etap_last_message());
  exit(1);
}

int main(void) {
  const int32_t length = TOKENS, block_table[PAGES] = {1, 0}; /* the sequence begins in page 1 */
  for (int t = 0; t < TOKENS; ++t) {
    union {
      float f;
      uint32_t bits;
    } value = {(float)t};
    for (int d = 0; d < LATENT; ++d) kv[(block_table[t / PAGE] * PAGE + t % PAGE) * ROW + d] = value.bits >> 16;
  }
  etap_problem problem = ETAP_INIT(etap_problem); /* what is not set is 0: CPU device, BF16 */
  problem.num_heads = HEADS, problem.d_latent = LATENT, problem.d_rope = ROPE, problem.page_size = PAGE;
  problem.batch = 1, problem.max_query_len = 1, problem.out_dtype = ETAP_FP32;
  size_t bytes;
  etap_plan *plan;
  check(etap_workspace_size(&problem, &bytes));
  check(etap_plan_create(&problem, &plan));
  char *memory = malloc(bytes + 255);
  void *workspace = memory + (256 - (uintptr_t)memory % 256) % 256; /* aligned to 256 bytes */

  etap_plan_args step = ETAP_INIT(etap_plan_args);
  step.batch = 1, step.cache_seqlens = &length, step.workspace = workspace, step.workspace_bytes = bytes;
  check(etap_plan_update(plan, &step)); /* once a step */

  etap_run_args layer = ETAP_INIT(etap_run_args);
  layer.batch = 1, layer.workspace = workspace, layer.workspace_bytes = bytes, layer.softmax_scale = 0.04f;
  layer.q_nope = q, layer.q_nope_row_stride = HEADS * ROW, layer.q_nope_head_stride = ROW;
  layer.q_rope = q + LATENT, layer.q_rope_row_stride = HEADS * ROW, layer.q_rope_head_stride = ROW;
  layer.kv_cache = kv, layer.kv_row_stride = ROW, layer.kv_page_stride = PAGE * ROW, layer.num_pages = PAGES;
  layer.block_table = block_table, layer.block_table_stride = layer.block_table_columns = PAGES;
  layer.out = out, layer.out_row_stride = HEADS * LATENT, layer.out_head_stride = LATENT;
  layer.lse = lse, layer.lse_row_stride = HEADS, layer.lse_head_stride = 1;
  check(etap_run(plan, &layer)); /* once a layer */
  etap_plan_destroy(plan), free(memory);

  const float mean = (TOKENS - 1) / 2.0f, expected_lse = logf(TOKENS);
  printf("out[0] = %g (expected %g), lse[0] = %g (expected %g)\n", out[0], mean, lse[0], expected_lse);
  return fabsf(out[0] - mean) > 1e-3f || fabsf(lse[0] - expected_lse) > 1e-5f;
}
