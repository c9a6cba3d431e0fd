/* Bad calls: each gets its status and a sentence that names the argument, and leaves every output as it was. Compiled
 * as C99 and as C++. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

#define POISON 0xff

static rng random_state = {12345};

static void expect(etap_status got, etap_status wanted, const char *mentions, const char *what) {
  if (got == wanted && strstr(etap_last_message(), mentions) != NULL) return;
  fprintf(stderr, "%s: got %s, wanted %s and a message about \"%s\"\n", what, etap_status_name(got),
          etap_status_name(wanted), mentions);
  test_fail(__FILE__, __LINE__, what);
}

/* ---- etap_problem ---- */

static etap_problem good_problem(void) {
  etap_problem p = ETAP_INIT(etap_problem);
  p.num_heads = 16;
  p.d_latent = 512;
  p.d_rope = 64;
  p.page_size = 64;
  p.batch = 2;
  p.max_query_len = 1;
  return p;
}

static void expect_bad_problem(const etap_problem *p, etap_status wanted, const char *mentions, const char *what) {
  etap_decision decision;
  memset(&decision, POISON, sizeof decision);
  decision.size = sizeof decision;
  const etap_decision before = decision;
  size_t bytes = 77;
  etap_plan *plan = (etap_plan *)&random_state;
  expect(etap_query(p, &decision), wanted, mentions, what);
  CHECK(memcmp(&decision, &before, sizeof decision) == 0);
  expect(etap_query(p, NULL), wanted, mentions, what);
  expect(etap_workspace_size(p, &bytes), wanted, mentions, what);
  CHECK(bytes == 77);
  expect(etap_plan_create(p, &plan), wanted, mentions, what);
  CHECK(plan == (etap_plan *)&random_state);
}

#define BAD_PROBLEM(change, status, mentions)                             \
  do {                                                                    \
    etap_problem p = good_problem();                                      \
    change;                                                               \
    expect_bad_problem(&p, ETAP_##status, mentions, "problem: " #change); \
  } while (0)

static void test_problem(void) {
  expect_bad_problem(NULL, ETAP_INVALID_ARGUMENT, "etap_problem is NULL", "problem: NULL");
  BAD_PROBLEM(p.size = 0, ABI_MISMATCH, "etap_problem.size is 0");
  BAD_PROBLEM(p.size = 68, ABI_MISMATCH, "etap_problem.size is 68");
  BAD_PROBLEM(p.size = 0xdeadbeef, ABI_MISMATCH, "etap_problem.size");
  BAD_PROBLEM(p.device_type = 2, INVALID_ARGUMENT, "device_type is 2");
  BAD_PROBLEM(p.device_type = -1, INVALID_ARGUMENT, "device_type is -1");
  BAD_PROBLEM(p.device_index = 1, NO_DEVICE, "device_index is 1");
  BAD_PROBLEM(p.device_index = -1, NO_DEVICE, "device_index is -1");
  BAD_PROBLEM(p.num_heads = 0, INVALID_ARGUMENT, "num_heads is 0");
  BAD_PROBLEM(p.num_heads = 129, INVALID_ARGUMENT, "num_heads is 129");
  BAD_PROBLEM(p.d_latent = 384, INVALID_ARGUMENT, "(384, 64)");
  BAD_PROBLEM(p.d_rope = 32, INVALID_ARGUMENT, "(512, 32)");
  BAD_PROBLEM((p.d_latent = 256, p.d_rope = 0), INVALID_ARGUMENT, "(256, 0)");
  BAD_PROBLEM(p.page_size = 0, INVALID_ARGUMENT, "page_size is 0");
  BAD_PROBLEM(p.page_size = 3, INVALID_ARGUMENT, "page_size is 3");
  BAD_PROBLEM(p.page_size = -64, INVALID_ARGUMENT, "page_size is -64");
  BAD_PROBLEM(p.page_size = 512, INVALID_ARGUMENT, "page_size is 512");
  BAD_PROBLEM(p.q_dtype = ETAP_FP32, INVALID_ARGUMENT, "q_dtype is 2");
  BAD_PROBLEM(p.q_dtype = ETAP_FP16, INVALID_ARGUMENT, "q_dtype is 1 and kv_format is 0");
  BAD_PROBLEM(p.kv_format = ETAP_KV_FP16, INVALID_ARGUMENT, "q_dtype is 0 and kv_format is 1");
  BAD_PROBLEM(p.kv_format = 6, INVALID_ARGUMENT, "kv_format is 6");
  BAD_PROBLEM(p.kv_format = -1, INVALID_ARGUMENT, "kv_format is -1");
  BAD_PROBLEM((p.kv_format = ETAP_KV_E4M3_656, p.d_rope = 0), INVALID_ARGUMENT, "ETAP_KV_E4M3_656");
  BAD_PROBLEM((p.kv_format = ETAP_KV_E4M3_528, p.d_rope = 64), INVALID_ARGUMENT, "ETAP_KV_E4M3_528");
  BAD_PROBLEM(p.out_dtype = 3, INVALID_ARGUMENT, "out_dtype is 3");
  BAD_PROBLEM(p.batch = 0, INVALID_ARGUMENT, "batch is 0");
  BAD_PROBLEM(p.batch = 65537, INVALID_ARGUMENT, "batch is 65537");
  BAD_PROBLEM(p.max_query_len = 0, INVALID_ARGUMENT, "max_query_len is 0");
  BAD_PROBLEM((p.batch = 65536, p.max_query_len = 32767, p.num_heads = 128), INVALID_ARGUMENT, "num_heads is 128");
  BAD_PROBLEM(p.total_q = 5, INVALID_ARGUMENT, "total_q is 5");
  BAD_PROBLEM(p.flags = ETAP_RAGGED, INVALID_ARGUMENT, "total_q is 0");
  BAD_PROBLEM(p.flags = 32, INVALID_ARGUMENT, "flags is 32");
  BAD_PROBLEM(p.flags = ETAP_SHARED_PREFIXES | ETAP_BATCH_INVARIANT, INVALID_ARGUMENT,
              "flags is 20; allowed: no ETAP_BATCH_INVARIANT (4) with ETAP_SHARED_PREFIXES (16)");
  BAD_PROBLEM((p.flags = ETAP_SHARED_PREFIXES, p.topk = 64), INVALID_ARGUMENT, "flags is 16; allowed: 0 or");
  BAD_PROBLEM(p.flags = ETAP_TREE_MASK | ETAP_CAUSAL, INVALID_ARGUMENT, "flags is 9; allowed: no ETAP_CAUSAL (1) with");
  BAD_PROBLEM((p.flags = ETAP_TREE_MASK, p.max_query_len = 257), INVALID_ARGUMENT,
              "max_query_len is 257; allowed: 1 to 256 with ETAP_TREE_MASK");
  BAD_PROBLEM(p.num_sms = -1, INVALID_ARGUMENT, "num_sms is -1");
  BAD_PROBLEM(p.force_tile = 12, INVALID_ARGUMENT, "force_tile is 12");
  BAD_PROBLEM(p.force_tile = 1024, UNSUPPORTED, "force_tile is 1024");
  BAD_PROBLEM(p.force_cluster = 9, INVALID_ARGUMENT, "force_cluster is 9");
  BAD_PROBLEM(p.force_cluster = 2, UNSUPPORTED, "force_cluster is 2");
  BAD_PROBLEM(p.reserved = 1, INVALID_ARGUMENT, "reserved is 1");

  etap_problem p = good_problem();
  etap_decision small = ETAP_INIT(etap_decision);
  small.size = 8;
  expect(etap_query(&p, &small), ETAP_ABI_MISMATCH, "etap_decision.size is 8", "decision of 8 bytes");
  expect(etap_workspace_size(&p, NULL), ETAP_INVALID_ARGUMENT, "bytes is NULL", "bytes NULL");
  expect(etap_plan_create(&p, NULL), ETAP_INVALID_ARGUMENT, "plan is NULL", "plan NULL");
}

/* A caller built for a later version has a longer struct: fine while what this library does not know is 0. */
static void test_append_only_rule(void) {
  struct {
    etap_problem known;
    int32_t later[3];
  } newer;
  memset(&newer, 0, sizeof newer);
  newer.known = good_problem();
  newer.known.size = sizeof newer;
  CHECK_OK(etap_query(&newer.known, NULL));
  newer.later[1] = 1;
  expect(etap_query(&newer.known, NULL), ETAP_ABI_MISMATCH, "byte 80", "a field of a later version that is set");

  struct {
    etap_decision known;
    unsigned char later[16];
  } decision;
  memset(&decision, POISON, sizeof decision);
  decision.known.size = sizeof decision;
  const etap_problem p = good_problem();
  CHECK_OK(etap_query(&p, &decision.known));
  CHECK(decision.known.size == sizeof decision);
  CHECK(decision.known.tile_rows == 16);
  for (size_t i = 0; i < sizeof decision.later; ++i) CHECK(decision.later[i] == POISON);
}

/* ---- etap_plan_update and etap_run ---- */

static uint64_t hash_bytes(const void *bytes, size_t count, uint64_t hash) {
  for (size_t i = 0; i < count; ++i) hash = (hash ^ ((const unsigned char *)bytes)[i]) * UINT64_C(0x100000001b3);
  return hash;
}

static uint64_t outputs(const decode_case *c) {
  uint64_t hash = hash_bytes(c->run_args.out, c->out_bytes, UINT64_C(0xcbf29ce484222325));
  hash = hash_bytes(c->run_args.lse, c->lse_bytes, hash);
  return hash_bytes(c->plan_args.workspace, c->plan_args.workspace_bytes, hash);
}

#define BAD_UPDATE(change, status, mentions)                                              \
  do {                                                                                    \
    etap_plan_args a = c.plan_args;                                                       \
    change;                                                                               \
    const uint64_t before = outputs(&c);                                                  \
    expect(etap_plan_update(plan, &a), ETAP_##status, mentions, "plan_update: " #change); \
    CHECK(outputs(&c) == before);                                                         \
  } while (0)

#define BAD_RUN(change, status, mentions)                                 \
  do {                                                                    \
    etap_run_args a = c.run_args;                                         \
    change;                                                               \
    const uint64_t before = outputs(&c);                                  \
    expect(etap_run(plan, &a), ETAP_##status, mentions, "run: " #change); \
    CHECK(outputs(&c) == before);                                         \
  } while (0)

/* A random case of the wanted kind. */
static void make_case_like(decode_case *c, int32_t kv_format, int32_t d_rope, int ragged) {
  for (;;) {
    case_make(c, &random_state, kv_format);
    const etap_problem *p = &c->problem;
    if (p->d_rope == d_rope && !(p->flags & ETAP_RAGGED) == !ragged && !(p->flags & ETAP_TREE_MASK) &&
        p->page_size > 1 && p->num_heads > 1 && c->rows > 1 && p->batch > 1 &&
        c->plan_args.cache_seqlens[p->batch - 1] > 0)
      return;
    case_free(c);
  }
}

static void test_update(void) {
  decode_case c;
  etap_plan *plan = NULL;
  make_case_like(&c, ETAP_KV_BF16, 64, 0);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  expect(etap_plan_update(NULL, &c.plan_args), ETAP_INVALID_ARGUMENT, "plan is NULL", "plan_update: plan NULL");
  expect(etap_plan_update(plan, NULL), ETAP_INVALID_ARGUMENT, "etap_plan_args is NULL", "plan_update: args NULL");
  BAD_UPDATE(a.size = 4, ABI_MISMATCH, "etap_plan_args.size is 4");
  BAD_UPDATE(a.batch += 1, PLAN_MISMATCH, "batch is");
  BAD_UPDATE(a.cache_seqlens = NULL, INVALID_ARGUMENT, "cache_seqlens is NULL");
  BAD_UPDATE(a.cache_seqlens = (const int32_t *)((const char *)a.cache_seqlens + 2), INVALID_ARGUMENT, "cache_seqlens");
  BAD_UPDATE(a.cu_seqlens_q = a.cache_seqlens, INVALID_ARGUMENT, "cu_seqlens_q");
  BAD_UPDATE(a.block_table = a.cache_seqlens, INVALID_ARGUMENT, "it must be NULL without ETAP_SHARED_PREFIXES");
  BAD_UPDATE(a.workspace = NULL, INVALID_ARGUMENT, "workspace is NULL");
  BAD_UPDATE(a.workspace = (char *)a.workspace + 64, INVALID_ARGUMENT, "workspace");
  BAD_UPDATE(a.workspace_bytes -= 1, WORKSPACE_TOO_SMALL, "workspace_bytes is");
  etap_plan_destroy(plan);
  case_free(&c);

  make_case_like(&c, ETAP_KV_BF16, 64, 1);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  int32_t *cu = (int32_t *)case_alloc(&c, sizeof(int32_t) * (size_t)(c.problem.batch + 1), 4, 0);
  BAD_UPDATE(a.cu_seqlens_q = NULL, INVALID_ARGUMENT, "cu_seqlens_q is NULL");
  cu[0] = 1;
  BAD_UPDATE(a.cu_seqlens_q = cu, INVALID_ARGUMENT, "cu_seqlens_q[0] is 1");
  cu[0] = 0;
  cu[1] = -1;
  BAD_UPDATE(a.cu_seqlens_q = cu, INVALID_ARGUMENT, "sequence 0 -1 query tokens");
  cu[1] = c.problem.max_query_len + 1;
  BAD_UPDATE(a.cu_seqlens_q = cu, INVALID_ARGUMENT, "max_query_len");
  etap_plan_destroy(plan);
  c.problem.total_q = 1;
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  for (int b = 0; b <= c.problem.batch; ++b) cu[b] = b;
  BAD_UPDATE(a.cu_seqlens_q = cu, INVALID_ARGUMENT, "total_q, which is 1");
  etap_plan_destroy(plan);
  case_free(&c);
}

static void test_run(void) {
  decode_case c;
  etap_plan *plan = NULL;
  make_case_like(&c, ETAP_KV_BF16, 64, 0);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  BAD_RUN((void)a, PLAN_MISMATCH, "etap_plan_update"); /* nothing but poison in the workspace */
  CHECK_OK(etap_plan_update(plan, &c.plan_args));
  expect(etap_run(NULL, &c.run_args), ETAP_INVALID_ARGUMENT, "plan is NULL", "run: plan NULL");
  expect(etap_run(plan, NULL), ETAP_INVALID_ARGUMENT, "etap_run_args is NULL", "run: args NULL");
  BAD_RUN(a.size = 16, ABI_MISMATCH, "etap_run_args.size is 16");
  BAD_RUN(a.batch -= 1, PLAN_MISMATCH, "batch is");
  BAD_RUN(a.q_nope = NULL, INVALID_ARGUMENT, "q_nope is NULL");
  BAD_RUN(a.q_nope = (const char *)a.q_nope + 2, INVALID_ARGUMENT, "q_nope is");
  BAD_RUN(a.q_nope_row_stride = -1, INVALID_ARGUMENT, "q_nope_row_stride is -1");
  BAD_RUN(a.q_nope_head_stride = -8, INVALID_ARGUMENT, "q_nope_head_stride is -8");
  BAD_RUN(a.q_rope = NULL, INVALID_ARGUMENT, "q_rope is NULL");
  BAD_RUN(a.q_rope = (const char *)a.q_rope + 8, INVALID_ARGUMENT, "q_rope is");
  BAD_RUN(a.q_rope_row_stride = -576, INVALID_ARGUMENT, "q_rope_row_stride is -576");
  BAD_RUN(a.q_rope_head_stride = -576, INVALID_ARGUMENT, "q_rope_head_stride is -576");
  BAD_RUN(a.kv_cache = NULL, INVALID_ARGUMENT, "kv_cache is NULL and num_pages is");
  BAD_RUN(a.kv_cache = (const char *)a.kv_cache + 8, INVALID_ARGUMENT, "kv_cache is");
  BAD_RUN(a.kv_page_stride = -a.kv_page_stride, INVALID_ARGUMENT, "kv_page_stride is -");
  BAD_RUN(a.kv_page_stride += 4, INVALID_ARGUMENT, "kv_page_stride is");
  BAD_RUN(a.kv_page_stride = 8, INVALID_ARGUMENT, "kv_page_stride is 8");
  BAD_RUN(a.kv_row_stride = -a.kv_row_stride, INVALID_ARGUMENT, "kv_row_stride is -");
  BAD_RUN(a.kv_row_stride += 1, INVALID_ARGUMENT, "kv_row_stride is");
  BAD_RUN(a.kv_row_stride = c.problem.d_latent, INVALID_ARGUMENT, "kv_row_stride is");
  BAD_RUN(a.num_pages = -1, INVALID_ARGUMENT, "num_pages is -1");
  BAD_RUN(a.num_pages = 1, INVALID_ARGUMENT, "block_table["); /* page 0 alone, which nobody owns */
  BAD_RUN((a.block_table = NULL, a.block_table_columns = 3), INVALID_ARGUMENT,
          "block_table is NULL and block_table_columns is 3");
  BAD_RUN(a.block_table_columns = -1, INVALID_ARGUMENT, "block_table_columns is -1");
  BAD_RUN(a.block_table = (const int32_t *)((const char *)a.block_table + 1), INVALID_ARGUMENT, "block_table is");
  BAD_RUN(a.block_table_stride = -1, INVALID_ARGUMENT, "block_table_stride is -1");
  BAD_RUN(a.tree_mask = (const uint32_t *)a.block_table, INVALID_ARGUMENT, "it must be NULL without ETAP_TREE_MASK");
  BAD_RUN(a.softmax_scale = NAN, INVALID_ARGUMENT, "softmax_scale is");
  BAD_RUN(a.softmax_scale = INFINITY, INVALID_ARGUMENT, "softmax_scale is inf");
  BAD_RUN(a.softmax_scale = -3e38f, INVALID_ARGUMENT, "softmax_scale is -3e+38; allowed: up to");
  BAD_RUN(a.kv_scale = NAN, INVALID_ARGUMENT, "kv_scale is");
  BAD_RUN(a.kv_scale = 0.5f, INVALID_ARGUMENT, "kv_scale is 0.5");
  BAD_RUN(a.kv_scale_ptr = (const float *)a.kv_cache, INVALID_ARGUMENT, "kv_scale_ptr is");
  BAD_RUN(a.kv_group_scales = (const float *)a.kv_cache, INVALID_ARGUMENT, "kv_group_scales is");
  BAD_RUN(a.out = NULL, INVALID_ARGUMENT, "out is NULL");
  BAD_RUN(a.out = (char *)a.out + 1, INVALID_ARGUMENT, "out is");
  BAD_RUN(a.out_row_stride = -1, INVALID_ARGUMENT, "out_row_stride is -1");
  BAD_RUN(a.out_row_stride = a.out_head_stride, INVALID_ARGUMENT, "overlap");
  BAD_RUN(a.out_head_stride = 8, INVALID_ARGUMENT, "out_head_stride is 8");
  BAD_RUN(a.lse = (float *)((char *)a.lse + 2), INVALID_ARGUMENT, "lse is");
  BAD_RUN(a.lse_row_stride = 0, INVALID_ARGUMENT, "lse_row_stride is 0");
  BAD_RUN(a.lse_head_stride = -2, INVALID_ARGUMENT, "lse_head_stride is -2");
  BAD_RUN(a.lse_base = 2, INVALID_ARGUMENT, "lse_base is 2");
  BAD_RUN(a.empty_lse = 2, INVALID_ARGUMENT, "empty_lse is 2; allowed: 0 to 1");
  BAD_RUN(a.workspace = NULL, INVALID_ARGUMENT, "workspace is NULL");
  BAD_RUN(a.workspace = (char *)a.workspace + 128, INVALID_ARGUMENT, "workspace is");
  BAD_RUN(a.workspace_bytes = 0, WORKSPACE_TOO_SMALL, "workspace_bytes is 0");

  /* A plan of another problem in the workspace */
  etap_problem other = c.problem;
  other.flags ^= ETAP_CAUSAL;
  etap_plan *other_plan = NULL;
  CHECK_OK(etap_plan_create(&other, &other_plan));
  expect(etap_run(other_plan, &c.run_args), ETAP_PLAN_MISMATCH, "etap_plan_update", "run: plan of another problem");
  etap_plan_destroy(other_plan);

  /* After all that, the good call is still good. */
  CHECK_OK(etap_run(plan, &c.run_args));
  case_check(&c, "the good call");
  c.run_args.lse = NULL;
  CHECK_OK(etap_run(plan, &c.run_args));
  etap_plan_destroy(plan);
  case_free(&c);

  make_case_like(&c, ETAP_KV_E4M3_GROUP, 0, 0);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  CHECK_OK(etap_plan_update(plan, &c.plan_args));
  BAD_RUN(a.q_rope = a.q_nope, INVALID_ARGUMENT, "q_rope is");
  BAD_RUN(a.kv_group_scales = NULL, INVALID_ARGUMENT, "kv_group_scales is NULL");
  BAD_RUN(a.kv_group_scales_page_stride = -4, INVALID_ARGUMENT, "kv_group_scales_page_stride is -4");
  BAD_RUN(a.kv_group_scales_row_stride = 1, INVALID_ARGUMENT, "kv_group_scales_row_stride is 1");
  BAD_RUN(a.kv_scale_ptr = (const float *)((const char *)a.kv_cache + 1), INVALID_ARGUMENT, "kv_scale_ptr is");
  etap_plan_destroy(plan);
  case_free(&c);
}

static void test_run_with_tree_mask(void) {
  decode_case c;
  etap_plan *plan = NULL;
  case_make_drafts(&c, &random_state, ETAP_KV_BF16, 4);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  CHECK_OK(etap_plan_update(plan, &c.plan_args));
  BAD_RUN(a.tree_mask = NULL, INVALID_ARGUMENT, "tree_mask is NULL");
  BAD_RUN(a.tree_mask = (const uint32_t *)((const char *)a.tree_mask + 2), INVALID_ARGUMENT, "tree_mask is");
  BAD_RUN(a.tree_mask_stride = -1, INVALID_ARGUMENT, "tree_mask_stride is -1; allowed: 0 or more");
  etap_run_args older = c.run_args; /* of a caller that knew no tree masks: none is given */
  older.size = offsetof(etap_run_args, tree_mask);
  expect(etap_run(plan, &older), ETAP_INVALID_ARGUMENT, "tree_mask is NULL", "run: an older struct");
  CHECK_OK(etap_run(plan, &c.run_args));
  case_check(&c, "the good call with a tree mask");
  etap_plan_destroy(plan);
  case_free(&c);
}

static void test_shared_prefixes(void) {
  decode_case c;
  etap_plan *plan = NULL;
  etap_shared shared = ETAP_INIT(etap_shared);
  make_case_like(&c, ETAP_KV_BF16, 64, 0);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  expect(etap_plan_shared(plan, c.plan_args.workspace, c.plan_args.workspace_bytes, NULL, &shared),
         ETAP_INVALID_ARGUMENT, "allowed: what has ETAP_SHARED_PREFIXES (16)", "plan_shared: no flag");
  etap_plan_destroy(plan);
  c.problem.flags = (c.problem.flags & ~ETAP_BATCH_INVARIANT) | ETAP_SHARED_PREFIXES;
  case_make_workspace(&c);
  CHECK_OK(etap_plan_create(&c.problem, &plan));
  c.plan_args.block_table = c.run_args.block_table;
  c.plan_args.block_table_stride = c.run_args.block_table_stride;
  c.plan_args.block_table_columns = c.run_args.block_table_columns;
  BAD_UPDATE((a.block_table = NULL, a.block_table_columns = 3), INVALID_ARGUMENT,
             "block_table is NULL and block_table_columns is 3");
  BAD_UPDATE(a.block_table = (const int32_t *)((const char *)a.block_table + 1), INVALID_ARGUMENT, "block_table is");
  BAD_UPDATE(a.block_table_stride = -1, INVALID_ARGUMENT, "block_table_stride is -1");
  BAD_UPDATE(a.block_table_columns = -1, INVALID_ARGUMENT, "block_table_columns is -1");
  void *workspace = c.plan_args.workspace;
  const size_t bytes = c.plan_args.workspace_bytes;
  expect(etap_plan_shared(plan, workspace, bytes, NULL, &shared), ETAP_PLAN_MISMATCH, "etap_plan_update",
         "plan_shared: no plan");
  CHECK_OK(etap_plan_update(plan, &c.plan_args));
  expect(etap_plan_shared(NULL, workspace, bytes, NULL, &shared), ETAP_INVALID_ARGUMENT, "plan is NULL",
         "plan_shared: plan NULL");
  expect(etap_plan_shared(plan, NULL, bytes, NULL, &shared), ETAP_INVALID_ARGUMENT, "workspace is NULL",
         "plan_shared: workspace NULL");
  expect(etap_plan_shared(plan, workspace, bytes - 1, NULL, &shared), ETAP_WORKSPACE_TOO_SMALL, "workspace_bytes is",
         "plan_shared: small workspace");
  expect(etap_plan_shared(plan, workspace, bytes, NULL, NULL), ETAP_INVALID_ARGUMENT, "etap_shared is NULL",
         "plan_shared: nowhere to write");
  shared.groups = 77;
  CHECK_OK(etap_plan_shared(plan, workspace, bytes, NULL, &shared));
  CHECK(shared.size == sizeof shared && shared.groups == 0 && shared.sequences == 0 && shared.tokens == 0);
  case_poison_outputs(&c);
  CHECK_OK(etap_run(plan, &c.run_args));
  case_check(&c, "the good call that may share prefixes");

  etap_plan_args older = c.plan_args; /* of a caller that knew no table: nothing is shared */
  older.size = offsetof(etap_plan_args, block_table);
  CHECK_OK(etap_plan_update(plan, &older));
  case_poison_outputs(&c);
  CHECK_OK(etap_run(plan, &c.run_args));
  case_check(&c, "a plan without a table");
  etap_plan_destroy(plan);
  case_free(&c);
}

/* Lengths beyond the table, page numbers outside of the pool, tables and pools of nothing. */
static void test_bounds(int32_t kv_format) {
  decode_case c;
  etap_plan *plan = NULL;
  char text[128];
  make_case_like(&c, kv_format, kv_format == ETAP_KV_E4M3_528 ? 0 : 64, 0);
  const etap_problem *p = &c.problem;
  const int last = p->batch - 1; /* make_case_like sees to it that this one has tokens */
  const int64_t length = c.plan_args.cache_seqlens[last], columns = (length + p->page_size - 1) / p->page_size;
  int64_t longest = 0;
  for (int b = 0; b < p->batch; ++b)
    if (c.plan_args.cache_seqlens[b] > longest) longest = c.plan_args.cache_seqlens[b];
  CHECK_OK(etap_plan_create(p, &plan));
  CHECK_OK(etap_plan_update(plan, &c.plan_args));

  /* The table ends exactly where the longest sequence does, or before. */
  c.run_args.block_table_columns = (longest + p->page_size - 1) / p->page_size;
  CHECK_OK(etap_run(plan, &c.run_args));
  case_check(&c, "a table as wide as the longest sequence");
  if (c.run_args.block_table_columns > 1) /* 0 would mean: not given */
    BAD_RUN(a.block_table_columns -= 1, INVALID_ARGUMENT, "as the block table has");
  BAD_RUN((a.block_table = NULL, a.block_table_columns = 0), INVALID_ARGUMENT, "the block table has 0 columns");
  BAD_RUN((a.kv_cache = NULL, a.num_pages = 0), INVALID_ARGUMENT, "num_pages, which is 0");

  /* A caller built before there was this field: what lies behind its struct is not looked at. */
  etap_run_args older = c.run_args;
  older.size = offsetof(etap_run_args, block_table_columns);
  older.block_table_columns = -1;
  CHECK_OK(etap_run(plan, &older));

  /* Page numbers, where a length reaches them and where none does. */
  int32_t *row = (int32_t *)c.run_args.block_table + last * c.run_args.block_table_stride;
  const int64_t column = rng_below(&random_state, (int)columns);
  const int32_t bad[] = {-1, INT32_MIN, INT32_MAX, (int32_t)c.run_args.num_pages};
  const int32_t good = row[column];
  for (int i = 0; i < 4; ++i) {
    row[column] = bad[i];
    snprintf(text, sizeof text, "block_table[%d, %d] is %d, and cache_seqlens[%d]", last, (int)column, bad[i], last);
    BAD_RUN((void)a, INVALID_ARGUMENT, text);
    if (bad[i] < 0) BAD_RUN(a.num_pages = 0, INVALID_ARGUMENT, text);
  }
  row[column] = good;
  row[columns] = bad[rng_below(&random_state, 4)]; /* the stride leaves room for it */
  case_poison_outputs(&c);
  CHECK_OK(etap_run(plan, &c.run_args));
  case_check(&c, "page numbers that no length reaches");

  /* The last sequence alone is too long. */
  int32_t *lengths = (int32_t *)c.plan_args.cache_seqlens;
  const int64_t most = c.run_args.block_table_columns * p->page_size;
  lengths[last] = (int32_t)most + 1;
  CHECK_OK(etap_plan_update(plan, &c.plan_args));
  snprintf(text, sizeof text, "cache_seqlens[%d] is %d; allowed: at most %d, as the block table has %d columns", last,
           (int)most + 1, (int)most, (int)c.run_args.block_table_columns);
  BAD_RUN((void)a, INVALID_ARGUMENT, text);

  /* Nothing to read: neither table nor pool are needed, whatever their strides. */
  for (int b = 0; b < p->batch; ++b) lengths[b] = -b;
  CHECK_OK(etap_plan_update(plan, &c.plan_args));
  for (int i = 0; i < 4; ++i) {
    etap_run_args a = c.run_args;
    if (i & 1) a.block_table = NULL, a.block_table_columns = 0, a.block_table_stride = -1;
    if (i & 2) a.kv_cache = NULL, a.num_pages = 0, a.kv_page_stride = -1, a.kv_row_stride = 3;
    if (i & 2) a.kv_group_scales = NULL, a.kv_group_scales_page_stride = -1;
    case_poison_outputs(&c);
    CHECK_OK(etap_run(plan, &a));
    case_check(&c, "no table, no pool");
  }
  etap_plan_destroy(plan);
  case_free(&c);
}

/* A sequence without query tokens may have any length and any pages: nobody looks. */
static void test_bounds_of_nobody(void) {
  decode_case c;
  for (;;) {
    make_case_like(&c, ETAP_KV_BF16, 64, 1);
    const int32_t *cu = c.plan_args.cu_seqlens_q;
    if (cu[1] == 0 && c.plan_args.cache_seqlens[0] > 0) break;
    case_free(&c);
  }
  ((int32_t *)c.run_args.block_table)[0] = -1;
  case_run(&c);
  ((int32_t *)c.plan_args.cache_seqlens)[0] = INT32_MAX;
  c.run_args.block_table_columns = c.run_args.block_table_stride;
  case_poison_outputs(&c);
  case_run(&c);
  ((int32_t *)c.plan_args.cache_seqlens)[0] = 0; /* the reference would read them */
  case_check(&c, "a sequence without query tokens");
  case_free(&c);
}

/* ---- etap_merge ---- */

enum { PARTS = 3, ROWS = 2, HEADS = 3, D = 24 };

static float merge_parts[PARTS * ROWS * HEADS * D], merge_lse[PARTS * ROWS * HEADS];
static float merged[ROWS * HEADS * D], merged_lse[ROWS * HEADS];

static etap_merge_args good_merge(void) {
  etap_merge_args a = ETAP_INIT(etap_merge_args);
  a.num_parts = PARTS;
  a.rows = ROWS;
  a.num_heads = HEADS;
  a.d = D;
  a.dtype = ETAP_FP32;
  a.parts = merge_parts;
  a.parts_part_stride = ROWS * HEADS * D;
  a.parts_row_stride = HEADS * D;
  a.parts_head_stride = D;
  a.parts_lse = merge_lse;
  a.parts_lse_part_stride = ROWS * HEADS;
  a.parts_lse_row_stride = HEADS;
  a.parts_lse_head_stride = 1;
  a.out = merged;
  a.out_row_stride = HEADS * D;
  a.out_head_stride = D;
  a.lse = merged_lse;
  a.lse_row_stride = HEADS;
  a.lse_head_stride = 1;
  return a;
}

#define BAD_MERGE(change, status, mentions)                               \
  do {                                                                    \
    etap_merge_args a = good_merge();                                     \
    change;                                                               \
    expect(etap_merge(&a), ETAP_##status, mentions, "merge: " #change);   \
    for (int i = 0; i < ROWS * HEADS * D; ++i) CHECK(merged[i] == 55.0f); \
    for (int i = 0; i < ROWS * HEADS; ++i) CHECK(merged_lse[i] == 66.0f); \
  } while (0)

static void test_merge(void) {
  for (int i = 0; i < ROWS * HEADS * D; ++i) merged[i] = 55.0f;
  for (int i = 0; i < ROWS * HEADS; ++i) merged_lse[i] = 66.0f;
  expect(etap_merge(NULL), ETAP_INVALID_ARGUMENT, "etap_merge_args is NULL", "merge: NULL");
  BAD_MERGE(a.size = 100, ABI_MISMATCH, "etap_merge_args.size is 100");
  BAD_MERGE(a.device_type = 7, INVALID_ARGUMENT, "device_type is 7");
  BAD_MERGE(a.device_index = 9, NO_DEVICE, "device_index is 9");
  BAD_MERGE(a.num_parts = 0, INVALID_ARGUMENT, "num_parts is 0");
  BAD_MERGE(a.rows = -1, INVALID_ARGUMENT, "rows is -1");
  BAD_MERGE(a.num_heads = 0, INVALID_ARGUMENT, "num_heads is 0");
  BAD_MERGE(a.d = 12, INVALID_ARGUMENT, "d is 12");
  BAD_MERGE(a.d = 1032, INVALID_ARGUMENT, "d is 1032");
  BAD_MERGE(a.dtype = 3, INVALID_ARGUMENT, "dtype is 3");
  BAD_MERGE(a.lse_base = -1, INVALID_ARGUMENT, "lse_base is -1");
  BAD_MERGE(a.parts = NULL, INVALID_ARGUMENT, "parts is NULL");
  BAD_MERGE(a.parts_part_stride = -1, INVALID_ARGUMENT, "parts_part_stride is -1");
  BAD_MERGE(a.parts_lse = NULL, INVALID_ARGUMENT, "parts_lse is NULL");
  BAD_MERGE(a.parts_lse_row_stride = -3, INVALID_ARGUMENT, "parts_lse_row_stride is -3");
  BAD_MERGE(a.out = NULL, INVALID_ARGUMENT, "out is NULL");
  BAD_MERGE(a.out_head_stride = D - 1, INVALID_ARGUMENT, "out_head_stride");
  BAD_MERGE(a.lse_row_stride = HEADS - 1, INVALID_ARGUMENT, "lse_row_stride");
  BAD_MERGE(a.reserved = 1, INVALID_ARGUMENT, "reserved is 1");

  /* Against the formula, in both bases; one part is empty and holds NaN, one row has only empty parts. */
  for (int base = 0; base < 2; ++base) {
    for (int i = 0; i < PARTS * ROWS * HEADS * D; ++i) merge_parts[i] = (float)rng_uniform(&random_state, -2, 2);
    for (int i = 0; i < PARTS * ROWS * HEADS; ++i) merge_lse[i] = (float)rng_uniform(&random_state, -300, 300);
    for (int i = 0; i < PARTS; ++i) merge_lse[i * ROWS * HEADS] = -INFINITY;
    merge_lse[ROWS * HEADS + 4] = -INFINITY;
    for (int d = 0; d < D; ++d) merge_parts[(ROWS * HEADS + 4) * D + d] = NAN;
    etap_merge_args a = good_merge();
    a.lse_base = base;
    CHECK_OK(etap_merge(&a));
    for (int i = 0; i < ROWS * HEADS; ++i) {
      double largest = (double)-INFINITY, total = 0;
      for (int part = 0; part < PARTS; ++part) largest = fmax(largest, merge_lse[part * ROWS * HEADS + i]);
      double weights[PARTS] = {0, 0, 0};
      for (int part = 0; part < PARTS && largest > (double)-INFINITY; ++part) {
        const double difference = merge_lse[part * ROWS * HEADS + i] - largest;
        weights[part] = base == ETAP_LSE_BASE_2 ? pow(2, difference) : exp(difference);
        total += weights[part];
      }
      const double lse = largest + (base == ETAP_LSE_BASE_2 ? log(total) / log(2.0) : log(total));
      CHECK(i == 0 ? merged_lse[i] == -INFINITY : fabs(merged_lse[i] - lse) <= 1e-5 * (1 + fabs(lse)));
      for (int d = 0; d < D; ++d) {
        double wanted = 0;
        for (int part = 0; part < PARTS; ++part)
          if (weights[part] > 0) wanted += weights[part] / total * merge_parts[(part * ROWS * HEADS + i) * D + d];
        CHECK(fabs(merged[i * D + d] - wanted) <= 1e-5);
      }
    }
  }
}

/* ---- What is left ---- */

static void test_status_and_version(void) {
#define CHECK_STATUS(name, value, text)                       \
  CHECK(strcmp(etap_status_name(value), "ETAP_" #name) == 0); \
  CHECK(strcmp(etap_status_message(value), text) == 0);
  ETAP_STATUS_LIST(CHECK_STATUS)
#undef CHECK_STATUS
  CHECK(strcmp(etap_status_name(12345), "ETAP_UNKNOWN") == 0);
  CHECK(etap_status_message(-1)[0] != '\0');
  CHECK(etap_version() == ETAP_VERSION_MAJOR * 10000 + ETAP_VERSION_MINOR * 100 + ETAP_VERSION_PATCH);
  CHECK(etap_abi_version() == ETAP_ABI_VERSION);
}

static void test_devices(void) {
  etap_device_info info = ETAP_INIT(etap_device_info);
  CHECK(etap_device_count(ETAP_DEVICE_CPU) == 1);
  CHECK_OK(etap_device_query(ETAP_DEVICE_CPU, 0, &info));
  CHECK(info.size == sizeof info && info.usable == 1 && info.num_sms >= 1 && info.reason[0] == '\0');
  CHECK(strncmp(info.name, "cpu (", 5) == 0);
  CHECK(etap_device_count(5) == 0);
  expect(etap_device_query(5, 0, &info), ETAP_INVALID_ARGUMENT, "device_type is 5", "device_query: type 5");
  expect(etap_device_query(ETAP_DEVICE_CPU, 1, &info), ETAP_NO_DEVICE, "device_index is 1", "device_query: cpu 1");
  expect(etap_device_query(ETAP_DEVICE_CPU, 0, NULL), ETAP_INVALID_ARGUMENT, "etap_device_info is NULL",
         "device_query: NULL");
  info.size = 12;
  expect(etap_device_query(ETAP_DEVICE_CPU, 0, &info), ETAP_ABI_MISMATCH, "size is 12", "device_query: size 12");

  /* CUDA without a GPU or a build for it: an answer, not a crash. */
  if (etap_device_count(ETAP_DEVICE_CUDA) > 0) return;
  info.size = sizeof info;
  CHECK_OK(etap_device_query(ETAP_DEVICE_CUDA, 0, &info));
  CHECK(info.usable == 0 && info.reason[0] != '\0');
  BAD_PROBLEM(p.device_type = ETAP_DEVICE_CUDA, NO_DEVICE, info.reason);
}

/* Sizes never shrink when a bound grows, so that one workspace serves smaller shapes. */
static void test_workspace_is_monotonic(void) {
  for (int i = 0; i < 200; ++i) {
    etap_problem p = good_problem();
    p.num_heads = 1 + rng_below(&random_state, 128);
    p.max_query_len = 1 + rng_below(&random_state, 8);
    p.batch = 1 + rng_below(&random_state, 300);
    p.num_sms = 1 + rng_below(&random_state, 4);
    if (rng_below(&random_state, 2)) {
      p.flags = ETAP_RAGGED;
      p.total_q = 1 + rng_below(&random_state, 1000);
    }
    size_t small = 0, large = 0;
    CHECK_OK(etap_workspace_size(&p, &small));
    p.batch += rng_below(&random_state, 100);
    p.num_sms += rng_below(&random_state, 2);
    if (p.total_q) p.total_q += rng_below(&random_state, 100);
    CHECK_OK(etap_workspace_size(&p, &large));
    CHECK(large >= small);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) random_state.state = strtoull(argv[1], NULL, 10) * 2654435769u + 1;
  printf("random state %llu\n", (unsigned long long)random_state.state);
  CHECK(etap_last_message()[0] == '\0');
  test_status_and_version();
  test_devices();
  test_problem();
  test_append_only_rule();
  test_update();
  test_run();
  test_run_with_tree_mask();
  test_shared_prefixes();
  for (int32_t format = ETAP_KV_BF16; format <= ETAP_KV_E4M3_528; ++format) test_bounds(format);
  test_bounds_of_nobody();
  test_merge();
  test_workspace_is_monotonic();
  etap_plan_destroy(NULL);
  printf("passed\n");
  return 0;
}
