// What a decode kernel is told. Filled on the host once a call, passed by value.
#pragma once

#include <cuda.h>

#include "sm90/divisor.h"
#include "sm90/kv_copy.h"
#include "sm90/schedule/planner.h"

namespace etap::sm90 {

struct DecodeParams {
  CUtensorMap kv_map;  // [pages, page_size, row] in boxes of [min(page_size, 64), 64 values]; not used where rows are
                       // gathered

  const WorkerRecord *records;      // [CTAs launched]
  const SequenceRecord *sequences;  // [batch + 1]; the last has only q_begin, the number of rows in use
  int *counters;                    // [workers, CTAs of one]: pieces of a unit that have arrived; 0 between calls
  float *partials;                  // [slots][partial_floats]; of a worker two, of a chunk one
  int partial_row;                  // row_floats

  const void *q_nope;  // [rows, heads, d_latent]
  const void *q_rope;  // [rows, heads, d_rope]
  bool q_bf16;         // else FP16
  bool q_vectors;      // every row is aligned to 16 bytes
  int64_t q_nope_row_stride, q_nope_head_stride, q_rope_row_stride, q_rope_head_stride;

  const char *kv;  // [pages, page_size, row]; strides in bytes
  int64_t kv_page_bytes, kv_row_bytes;
  uint32_t num_pages;          // 2^31 where the caller doesn't say
  const int32_t *block_table;  // [batch, pages of a sequence], or lists of slots [batch, topk]
  int64_t block_table_stride;
  int token_limit;        // tokens that the table's columns hold: a longer sequence is not read, its rows become NaN
  bool lists;             // the table holds slots, page * slots_a_page + offset, or -1 for none; page_shift is 0
  uint32_t slots_a_page;  // 1 where the pool has no gaps between pages: a slot is then a page of one token

  const float *kv_scale_ptr;  // [1] or nullptr
  float kv_scale;
  const float *kv_group_scales;  // [pages, page_size, d_latent / 128]
  int64_t kv_group_scales_page_stride, kv_group_scales_row_stride;

  // Of shared prefixes (schedule/prefixes.h): the rows of q of their query tokens, which are of several sequences, and
  // results that wait for the merge
  const int32_t *q_rows;
  float *kept;  // [2 * rows * heads][kept_floats]

  void *out;  // [rows, heads, d_latent]
  int64_t out_row_stride, out_head_stride;
  float *lse;  // [rows, heads] or nullptr
  int64_t lse_row_stride, lse_head_stride;

  bool merged_after;  // merge_pieces.cu follows, and adds up what single CTAs have of a cut unit
  bool second;        // launched behind another kernel of the same call, which has waited for those before
  float scale_log2;   // softmax_scale * log2(e)
  float lse_factor;   // log-sum-exp is kept in base 2: ln(2) for base e, 1 for base 2
  float empty_lse;    // of rows that see no token
  Divisor num_heads;
  int batch;
  int total_q;       // rows of q of a ragged batch; 0: not ragged
  Divisor tiles;     // row tiles a sequence
  int chunks_log2;   // log2 of the chunks that a unit may have, of which workers take whole ones; 0: none
  int page_shift;    // log2(page_size)
  int out_dtype;     // etap_dtype
  bool out_vectors;  // out may be written four values at a time
  bool narrow;       // partial results travel as FP16 (parts/partial.cuh)
  bool causal;

  // Of drafts that are a tree: bits [rows of q, words of 32 drafts]; else nullptr
  const uint32_t *tree_mask;
  int64_t tree_mask_stride;
};

}  // namespace etap::sm90
