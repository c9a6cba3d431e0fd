/* Laid out by hand: a formatter runs the table of rules together. */
/* clang-format off */
/* etap.h - decode attention for MLA models (DeepSeek, Kimi, GLM, Mistral Large), the C interface of libetap.
 *
 * WHAT IT COMPUTES
 *
 * Multi-head latent attention with absorbed weights: every query head reads the same KV row of d_latent + d_rope
 * values, and the value vector is the first d_latent of them. For a sequence of L cached tokens and one query row q,
 *
 *     s[t]  = softmax_scale * ( q_nope . kv[t, 0:d_latent]  +  q_rope . kv[t, d_latent:d_latent + d_rope] )
 *     out   = sum_t softmax(s)[t] * kv[t, 0:d_latent]                lse = log( sum_t exp(s[t]) )
 *
 * The KV cache is paged: token t of sequence b lies in row t % page_size of page block_table[b, t / page_size].
 *
 * THE LIFE OF A CALL
 *
 *     etap_query(&problem, &decision);                     is it supported, by which kernel, and why
 *     etap_workspace_size(&problem, &bytes);               the caller allocates, the library never does
 *     etap_plan_create(&problem, &plan);                   once for each shape; host only, no device work
 *     etap_plan_update(plan, &plan_args);                  once a step: reads the lengths on the device
 *     etap_run(plan, &run_args);                           once a layer
 *     etap_plan_destroy(plan);
 *
 * etap_plan_update and etap_run enqueue work on the caller's stream and return: no allocation, no synchronisation, no
 * host read of device memory. Both may be captured in a CUDA graph; a replay after the lengths, or the bits of a tree
 * mask, changed on the device is right. On the CPU device they return when the work is done.
 *
 * RULES
 *
 * Structs     Each begins with `size`; fill it with the macro ETAP_INIT(type) or with sizeof. Structs grow only at the
 *             end; fields that an older caller did not know take the value 0, which always means "the default".
 * Strides     Count elements of the tensor's own type, as torch does; signed 64-bit, never negative. The element of
 *             a 656- or 528-byte row is one byte. The innermost stride is 1 everywhere. KV strides must be multiples of
 *             16 bytes. All others are free: queries whose strides are multiples of 16 bytes are read faster.
 * Pointers    KV and query pointers are aligned to 16 bytes, the workspace to 256, all others to their element.
 *             block_table may be NULL: a table of no columns. kv_cache may be NULL: a pool of no pages; num_pages must
 *             then be 0, and the KV strides and kv_group_scales are not looked at. With either, every length must be
 *             0. What else may be NULL, or must be, is said where it stands.
 * Bounds      Outside of the table and of the pool nothing is read, as far as the caller gives their sizes
 *             (block_table_columns, num_pages; 0: the caller vouches). A length beyond the columns, or a page number
 *             outside [0, num_pages) in a column that a length reaches: the CPU device refuses the call
 *             (ETAP_INVALID_ARGUMENT) and says where. The CUDA device learns it too late for that: out and lse become
 *             NaN, for a length in all rows of that sequence, for a page number in those at least that see a token of
 *             the page. Other sequences' rows have the bits that they have without it. Sequences without query tokens
 *             are not looked at.
 *             A slot outside the pool, and a count of slots that is not 0 to topk: as a page number.
 * Sparse      etap_problem.topk > 0 (DeepSeek Sparse Attention: an indexer has chosen the tokens that each query token
 *             sees). batch counts query tokens, max_query_len is 1, block_table is NULL and slots has a list for each
 *             query token; flags may be ETAP_BATCH_INVARIANT. All page sizes and strides, and all KV formats that the
 *             device has.
 * Trees       ETAP_TREE_MASK (speculative decoding, EAGLE's topk above 1): the n query tokens of a sequence are drafts,
 *             its last n tokens. Each sees all tokens before the drafts, and of the drafts those that its row of
 *             tree_mask names: draft j (token L - n + j) where bit j % 32 of word j / 32 is set. Any bits are right:
 *             they need not be those of a tree, a draft need not see itself, and a row without bits sees what is
 *             before the drafts. Bits from n on are not looked at. A sequence shorter than its drafts (L < n) lacks
 *             the first n - L of them, whatever their bits are. The lower triangle gives the results of ETAP_CAUSAL,
 *             bits that are all set those of neither flag. max_query_len is 256 at most; not with ETAP_CAUSAL, not
 *             with topk.
 * Invariance  ETAP_BATCH_INVARIANT: a sequence has the same bits alone and in any batch, and on any number of SMs or
 *             threads, where problems are alike else: max_query_len decides the tile. It is cut at places that its own
 *             length decides, and the parts are added up in one order. force_cluster is not looked at. On the CUDA
 *             device each part of each sequence has room in the workspace, for 16 query rows up to 0.5 MB a sequence
 *             with outputs in BF16, for 128 up to 2 MB, for any number up to 8 MB, with FP16 and FP32 twice that;
 *             lists of 2048 slots take an eighth and a quarter of it.
 * Prefixes    ETAP_SHARED_PREFIXES: sequences whose block tables begin with the same pages (a system prompt, tools, a
 *             document) read them together, as many as etap_decision.max_sharers says. etap_plan_update finds them
 *             in plan_args.block_table, on the device; nothing else changes for the caller. Any tables are right: those
 *             that share pages elsewhere, the same sequence twice, a common part that ends inside a page (then what is
 *             before that page is shared), lengths within it. What is shared is seen by every query token of its
 *             sequences, is whole pages and blocks of 64 tokens, and is at most what saves time. The bits of a
 *             sequence depend on what it shares, and nothing is shared by batches of more than 512; so not with
 *             ETAP_BATCH_INVARIANT, and not with topk. A page that does not exist is NaN for all who share it.
 * NaN         A NaN or an infinity in the cache reaches the rows that see its token. On the CUDA device it may also
 *             reach those rows of the same sequence that see other tokens, but not this one (ETAP_CAUSAL,
 *             ETAP_TREE_MASK). Rows that see no token, other sequences, and what lies past a sequence's end are never
 *             affected.
 * Threads     Every function may be called from every thread. A plan is read-only after etap_plan_create and can be
 *             shared; calls in flight at the same time need distinct workspaces and outputs.
 * Errors      A function returns a status and never prints, exits or throws. When it is not ETAP_OK, nothing was
 *             launched, outputs are untouched, and etap_last_message() is a sentence that names the argument, the
 *             value it had and what is allowed. It belongs to the calling thread and lives until that thread's next
 *             call.
 * ABI         Within one ETAP_ABI_VERSION symbols are never removed or changed, and structs only grow.
 */
#ifndef ETAP_H
#define ETAP_H

#include <stddef.h>
#include <stdint.h>

#define ETAP_VERSION_MAJOR 0
#define ETAP_VERSION_MINOR 1
#define ETAP_VERSION_PATCH 0
#define ETAP_ABI_VERSION 1

#if defined(__GNUC__)
#define ETAP_API __attribute__((visibility("default")))
#else
#define ETAP_API
#endif

/* An initialiser for every struct below, `size` filled in and all else 0: etap_problem p = ETAP_INIT(etap_problem); */
#ifdef __cplusplus
template <typename Struct>
inline Struct etap_init() {
  Struct made = Struct();
  made.size = sizeof(Struct);
  return made;
}
#define ETAP_INIT(type) etap_init<type>()
extern "C" {
#else
#define ETAP_INIT(type) {.size = (uint32_t)sizeof(type)}
#endif

/* ---- Status ----------------------------------------------------------------------------------------------------- */

/* name, value, what it means */
#define ETAP_STATUS_LIST(X)                                                                \
  X(OK, 0, "success")                                                                      \
  X(INVALID_ARGUMENT, 1, "an argument has a value that is never allowed")                  \
  X(UNSUPPORTED, 2, "the problem is well formed, but this device or build can't solve it") \
  X(ABI_MISMATCH, 3, "the caller was built for another version of the interface")          \
  X(WORKSPACE_TOO_SMALL, 4, "the workspace is smaller than etap_workspace_size says")      \
  X(PLAN_MISMATCH, 5, "the call does not fit the plan it was given")                       \
  X(NO_DEVICE, 6, "the device does not exist or can't be used")                            \
  X(OUT_OF_MEMORY, 7, "host memory for the plan could not be had")                         \
  X(CUDA_ERROR, 8, "the CUDA runtime or driver reported an error")                         \
  X(INTERNAL_ERROR, 9, "a defect of the library: please report it")

typedef enum etap_status {
#define ETAP_STATUS_ENUM(name, value, text) ETAP_##name = value,
  ETAP_STATUS_LIST(ETAP_STATUS_ENUM)
#undef ETAP_STATUS_ENUM
  ETAP_STATUS_MAX = 0x7fffffff /* keeps the type 32 bits wide */
} etap_status;

ETAP_API const char *etap_status_name(int32_t status);    /* "ETAP_OK"; "ETAP_UNKNOWN" for a number not listed */
ETAP_API const char *etap_status_message(int32_t status); /* the text of the list above */
ETAP_API const char *etap_last_message(void);             /* the calling thread's last error; "" when there was none */

/* ---- Version ---------------------------------------------------------------------------------------------------- */

ETAP_API int32_t etap_version(void);     /* major * 10000 + minor * 100 + patch of the library that was loaded */
ETAP_API int32_t etap_abi_version(void); /* refuse to go on when this is not ETAP_ABI_VERSION */

/* ---- Devices ---------------------------------------------------------------------------------------------------- */

typedef enum etap_device_type { ETAP_DEVICE_CPU = 0, ETAP_DEVICE_CUDA = 1 } etap_device_type;

typedef struct etap_device_info {
  uint32_t size;
  int32_t usable;        /* 1 when problems can be solved on it */
  int32_t num_sms;       /* multiprocessors; on the CPU device, threads */
  int32_t compute_major; /* CUDA compute capability; 0 on the CPU device */
  int32_t compute_minor;
  int32_t reserved;
  int64_t l2_bytes; /* last-level cache */
  char name[128];   /* "NVIDIA H100 80GB HBM3", "cpu (avx512_bf16)" */
  char reason[256]; /* why it is not usable; "" when it is */
} etap_device_info;

/* Devices of a type that this process sees. 0 when the library was built without it or there is no driver. */
ETAP_API int32_t etap_device_count(int32_t device_type);
/* Fills *info. Succeeds with usable = 0 and a reason for a device that exists but can't be used, and also (for index
 * 0 of a known type) when there is none: "libetap was built without CUDA". */
ETAP_API etap_status etap_device_query(int32_t device_type, int32_t device_index, etap_device_info *info);

/* ---- The problem ------------------------------------------------------------------------------------------------ */

typedef enum etap_dtype { ETAP_BF16 = 0, ETAP_FP16 = 1, ETAP_FP32 = 2 } etap_dtype;

/* How a KV row lies in memory. */
typedef enum etap_kv_format {
  ETAP_KV_BF16 = 0,       /* d_latent + d_rope BF16 values */
  ETAP_KV_FP16 = 1,       /* d_latent + d_rope FP16 values */
  ETAP_KV_E4M3 = 2,       /* d_latent + d_rope FP8 E4M3 values; value = e4m3 * kv_scale */
  ETAP_KV_E4M3_GROUP = 3, /* the same bytes; latent values also times kv_group_scales[token, dim / 128] */
  ETAP_KV_E4M3_656 = 4,   /* 656 bytes: 512 E4M3, 4 FP32 group scales, 64 BF16 rope values. (512, 64) only; a kv_scale
                             other than 1 counts for the E4M3 values */
  ETAP_KV_E4M3_528 = 5    /* 528 bytes: the same without rope values. (512, 0) only */
} etap_kv_format;
/* The CUDA device takes the formats with group scales with BF16 queries and (512, 64), or (512, 0) for the last one. In
 * tiles of up to 24 rows it rounds the scales of V to FP16. In larger tiles, the only ones for 528-byte rows, it rounds
 * a latent value times its scale to FP16, a value of K, too: a logit is then off by up to 2.5e-4 of the sum of its
 * terms' magnitudes, an FP32 result by 1.2e-3 of its norm with eight outlier dims (where few heads weigh them 0.6e-3 to
 * 1.7e-3, rarely more), by 6e-4 without (force_tile 24 avoids it where there is one). The CPU device computes with
 * FP32 scales. */

typedef enum etap_flags {
  ETAP_CAUSAL = 1,          /* query token i of n sees the first L - n + i + 1 tokens (the end of the sequence) */
  ETAP_RAGGED = 2,          /* query counts differ: plan_args.cu_seqlens_q gives them */
  ETAP_BATCH_INVARIANT = 4, /* a sequence's bits don't depend on what else is in the batch. See "Invariance" */
  ETAP_TREE_MASK = 8,       /* query tokens are drafts, and run_args.tree_mask says which of them each sees. See "Trees" */
  ETAP_SHARED_PREFIXES = 16 /* KV pages with which several sequences begin are read once for them. See "Prefixes" */
} etap_flags;

/* A shape. Everything a kernel is chosen by, nothing that changes from step to step. */
typedef struct etap_problem {
  uint32_t size;
  int32_t device_type; /* etap_device_type */
  int32_t device_index;
  int32_t num_heads;     /* query heads on this device, 1 to 128 */
  int32_t d_latent;      /* 512 or 256 */
  int32_t d_rope;        /* 64 or 0: (512, 64), (512, 0), (256, 64) */
  int32_t page_size;     /* tokens a page: a power of two, 1 to 256; with topk any number from 1 */
  int32_t q_dtype;       /* ETAP_BF16 or ETAP_FP16. A 16-bit KV cache has the same type */
  int32_t kv_format;     /* etap_kv_format */
  int32_t out_dtype;     /* ETAP_BF16, ETAP_FP16 or ETAP_FP32. With BF16, partial results of a sequence that several SMs
                            share may be kept in FP16: an error of 2^-11 of a value at most, beside BF16's 2^-8 */
  int32_t batch;         /* sequences, 1 to 65536; padded ones have length 0 */
  int32_t max_query_len; /* query tokens a sequence at most; exactly that many without ETAP_RAGGED */
  int32_t total_q;       /* with ETAP_RAGGED: rows of q, an upper bound of cu_seqlens_q[batch] (the rest: as if of
                            length 0); else 0 */
  int32_t flags;         /* etap_flags, or-ed */
  int32_t num_sms;       /* multiprocessors (threads on the CPU device) to use at most; 0: all */
  int32_t force_tile;    /* experiments: query rows a tile (a multiple of 8); 0: the library decides */
  int32_t force_cluster; /* experiments: CTAs a cluster (1 to 8); 0: the library decides, as with ETAP_BATCH_INVARIANT */
  int32_t reserved;
  int32_t topk; /* sparse attention: slots in the list of each query token, 1 to 65536; 0: dense. See "Sparse" */
} etap_problem;

/* What the library decided for a problem, as data and in words. */
typedef struct etap_decision {
  uint32_t size;
  int32_t tile_rows;    /* query rows (heads * query tokens) a tile: WGMMA's N, or its M where the kernel says rows_on_m */
  int32_t num_tiles;    /* tiles that cover the rows of one sequence */
  int32_t cluster_size; /* CTAs that share one piece of a sequence; where lengths differ the plan may take pairs and
                           threes for CTAs that each have pieces of their own */
  int32_t num_workers;  /* clusters (threads on the CPU device) launched: the most pieces that run at a time, where CTAs
                           of clusters have none of their own */
  int32_t max_splits;   /* the most pieces that one sequence can be cut into */
  char kernel[64];      /* "sm90_bf16_token_split_n16", "cpu_avx512_bf16" */
  char reason[256];     /* a sentence */
  int32_t max_sharers;  /* with ETAP_SHARED_PREFIXES: sequences that read a common prefix together, at most, as many as
                           have rows for one tile; 1: none do. Else 0 */
} etap_decision;

/* Is this problem supported? ETAP_OK and *decision (may be NULL), or a status and a message. Allocates nothing. */
ETAP_API etap_status etap_query(const etap_problem *problem, etap_decision *decision);

/* Bytes of workspace that plan_update and run need, on the problem's device. batch, total_q and num_sms are upper
 * bounds: the size never shrinks when one of them grows: one workspace sized for the largest shape serves them all. */
ETAP_API etap_status etap_workspace_size(const etap_problem *problem, size_t *bytes);

/* ---- Plan ------------------------------------------------------------------------------------------------------- */

typedef struct etap_plan etap_plan;

ETAP_API etap_status etap_plan_create(const etap_problem *problem, etap_plan **plan);
ETAP_API void etap_plan_destroy(etap_plan *plan); /* NULL is allowed. Work already enqueued is not affected */

typedef struct etap_plan_args {
  uint32_t size;
  int32_t batch; /* must be the plan's */
  const int32_t *cache_seqlens; /* [batch], on the device: KV tokens of each sequence, the new ones included; <= 0:
                                   none. With topk: slots of each list that count, from its beginning, 0 to topk; NULL:
                                   all of them */
  const int32_t *cu_seqlens_q;  /* [batch + 1], on the device, with ETAP_RAGGED: prefix sums of query counts; else
                                   NULL */
  void *workspace;   /* on the device */
  size_t workspace_bytes;
  void *stream; /* cudaStream_t; NULL: the default stream. Ignored on the CPU device */

  const int32_t *block_table; /* with ETAP_SHARED_PREFIXES: the block table of all runs until the next update, as there,
                                 or another one whose rows have the same pages in common; NULL: a table of no columns,
                                 nothing is shared. Else NULL */
  int64_t block_table_stride;
  int64_t block_table_columns; /* 0: not given, the caller vouches that every length lies within the table */
} etap_plan_args;

/* Cuts the batch into pieces of even work and writes the schedule into the workspace. Every etap_run until the next
 * update uses it, so all layers of a step share one call. */
ETAP_API etap_status etap_plan_update(const etap_plan *plan, const etap_plan_args *args);

/* What the last update of a workspace found to share (ETAP_SHARED_PREFIXES). */
typedef struct etap_shared {
  uint32_t size;
  int32_t groups;    /* prefixes that several sequences read together */
  int32_t sequences; /* that read one of them */
  int32_t reserved;
  int64_t tokens; /* KV tokens that are not read because another sequence of the group reads them */
} etap_shared;

/* For logs and tests: waits for the stream, and is refused while it is captured. The plan must have
 * ETAP_SHARED_PREFIXES, the workspace be one that etap_plan_update filled for it. */
ETAP_API etap_status etap_plan_shared(const etap_plan *plan, const void *workspace, size_t workspace_bytes,
                                      void *stream, etap_shared *shared);

/* ---- Run -------------------------------------------------------------------------------------------------------- */

typedef enum etap_lse_base { ETAP_LSE_BASE_E = 0, ETAP_LSE_BASE_2 = 1 } etap_lse_base;

/* The log-sum-exp of a row that sees no token: the logarithm of an empty sum, which etap_merge and most libraries take
 * for one, or FlashMLA's. */
typedef enum etap_empty_lse { ETAP_EMPTY_LSE_MINUS_INF = 0, ETAP_EMPTY_LSE_PLUS_INF = 1 } etap_empty_lse;

typedef struct etap_run_args {
  uint32_t size;
  int32_t batch; /* must be the plan's */

  const void *q_nope; /* [rows, num_heads, d_latent] of q_dtype; rows = batch * max_query_len, or total_q */
  int64_t q_nope_row_stride;
  int64_t q_nope_head_stride;
  const void *q_rope; /* [rows, num_heads, d_rope] of q_dtype; NULL when d_rope is 0. One fused q tensor:
                         q_rope = q_nope + d_latent with the same strides */
  int64_t q_rope_row_stride;
  int64_t q_rope_head_stride;

  const void *kv_cache; /* [num_pages, page_size, row] in kv_format; NULL: a pool of no pages */
  int64_t kv_page_stride;
  int64_t kv_row_stride;
  int64_t num_pages; /* 0: not known, the caller vouches for the page numbers (kv_cache NULL: there is none) */

  const int32_t *block_table; /* [batch, block_table_columns], the pages of each sequence in the order of its tokens;
                                 entries past a sequence's end are never read. NULL: a table of no columns */
  int64_t block_table_stride;

  float softmax_scale;          /* finite */
  float kv_scale;               /* E4M3 formats: one scale for the tensor; 0: 1.0 unless kv_scale_ptr is given */
  const float *kv_scale_ptr;    /* [1] on the device; taken instead of kv_scale when not NULL */
  const float *kv_group_scales; /* [num_pages, page_size, d_latent / 128], ETAP_KV_E4M3_GROUP only */
  int64_t kv_group_scales_page_stride;
  int64_t kv_group_scales_row_stride;

  void *out; /* [rows, num_heads, d_latent] of out_dtype */
  int64_t out_row_stride;
  int64_t out_head_stride;
  float *lse; /* [rows, num_heads]; NULL: not wanted */
  int64_t lse_row_stride;
  int64_t lse_head_stride;
  int32_t lse_base;  /* etap_lse_base */
  int32_t empty_lse; /* etap_empty_lse */

  void *workspace; /* the one that etap_plan_update filled */
  size_t workspace_bytes;
  void *stream;

  int64_t block_table_columns; /* 0: not given, the caller vouches that every length lies within the table (block_table
                                  NULL: there is none). See "Bounds" */

  const int32_t *slots; /* with topk: [batch, topk], on the device: page * page_size + offset of each KV token, or -1
                           where there is none; the same one twice counts twice. Else NULL */
  int64_t slots_stride;

  const uint32_t *tree_mask; /* with ETAP_TREE_MASK: [rows, (max_query_len + 31) / 32], on the device: a bit for each
                                draft of the row's sequence, the lowest first. Else NULL */
  int64_t tree_mask_stride;
} etap_run_args;

/* One layer of decode attention. A row that sees no token gets out = 0 and lse = -inf (or +inf, empty_lse) and reads
 * nothing. A row whose logits are all -inf counts as such a row. */
ETAP_API etap_status etap_run(const etap_plan *plan, const etap_run_args *args);

/* ---- Merge ------------------------------------------------------------------------------------------------------ */

typedef struct etap_merge_args {
  uint32_t size;
  int32_t device_type;
  int32_t device_index;
  int32_t num_parts; /* >= 1 */
  int32_t rows;      /* rows * heads results of d values each */
  int32_t num_heads;
  int32_t d;        /* a multiple of 8, up to 1024 */
  int32_t dtype;    /* etap_dtype of the partial results and of out */
  int32_t lse_base; /* of the partial lse and of the merged one */
  int32_t reserved;
  const void *parts; /* [num_parts, rows, num_heads, d] */
  int64_t parts_part_stride;
  int64_t parts_row_stride;
  int64_t parts_head_stride;
  const float *parts_lse; /* [num_parts, rows, num_heads] */
  int64_t parts_lse_part_stride;
  int64_t parts_lse_row_stride;
  int64_t parts_lse_head_stride;
  void *out; /* [rows, num_heads, d]; must not overlap parts */
  int64_t out_row_stride;
  int64_t out_head_stride;
  float *lse; /* [rows, num_heads]; NULL: not wanted */
  int64_t lse_row_stride;
  int64_t lse_head_stride;
  void *stream;
} etap_merge_args;

/* out = sum_p w_p parts_p with w_p = exp(lse_p - lse), lse = log sum_p exp(lse_p): joins results over disjoint sets of
 * KV tokens (decode context parallelism, cascades). A part with lse = -inf counts as empty whatever its values are;
 * where all are empty, out = 0 and lse = -inf. Stateless: needs no workspace and no plan. */
ETAP_API etap_status etap_merge(const etap_merge_args *args);

#ifdef __cplusplus
}
#endif
#endif /* ETAP_H */
