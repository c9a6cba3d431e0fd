// The arithmetic of the CPU device, compiled once for each instruction set (kernel.cc) and chosen at run time (isa.cc).
//
// Work comes in pieces: the query rows of one tile (heads * query tokens of one sequence) against a range of that
// sequence's KV tokens. A piece leaves its unnormalised result in a Partial; pieces of one tile are added up in order
// of their tokens, and the last step normalises and stores.
#pragma once

#include <stdint.h>

#include "etap.h"

namespace etap::cpu {

constexpr int kMaxTileRows = 64;
constexpr int kMaxLatent = 512;
constexpr int kMaxRow = 576;
constexpr int kBlockTokens = 32;  // KV tokens that are converted, multiplied and forgotten together

// Unnormalised softmax results of a tile, base 2: out = o / l, log2-sum-exp2 = m + log2(l).
struct Partial {
  float m[kMaxTileRows];  // running maximum of the scaled logits; -inf: no token yet
  float l[kMaxTileRows];  // sum of 2^(logit - m), of unrounded values
  alignas(
      64) float o[kMaxTileRows * kMaxLatent];  // [row, d_latent], rows d_latent apart; only the tile's rows are used
};

// One thread's working set. It lies in the caller's workspace.
struct Scratch {
  alignas(64) float q[kMaxTileRows * kMaxRow];       // [row, d_latent + d_rope]
  alignas(64) float kv[kBlockTokens * kMaxRow];      // [token, d_latent + d_rope]
  alignas(64) float p[kMaxTileRows * kBlockTokens];  // [row, token]: logits, then probabilities
  Partial partial;
};

// The query rows of a tile: row i of the tile is row first_row + i of the sequence, query token (first_row + i) /
// num_heads and head (first_row + i) % num_heads. Of a prefix that sequences share: their rows one after the other.
struct Tile {
  const etap_problem *problem;
  const etap_run_args *args;
  float kv_scale;              // args->kv_scale or what kv_scale_ptr points to
  const int32_t *block_table;  // this sequence's; with topk its list of slots
  int64_t length;              // KV tokens of the sequence, or slots of its list
  int64_t query_begin;         // the sequence's first row in q, out and lse
  const int32_t *query_rows;   // of each query token, where they don't follow each other from query_begin on; else NULL
  int32_t query_count;
  int32_t first_row;
  int32_t num_rows;
};

struct Kernel {
  const char *name;
  // Attends to KV tokens, or slots, [begin, end) of the tile's sequence. Reads nothing when there are none.
  void (*attend)(const Tile &tile, int64_t begin, int64_t end, Scratch *scratch, Partial *result);
  // sum += partial's rows from first_row on, over num_rows rows of d values
  void (*add)(const Partial &partial, int first_row, int num_rows, int d, Partial *sum);
  // Normalises a tile's result and stores out and lse.
  void (*finish)(const Tile &tile, Partial *partial);
  // etap_merge for one row and head.
  void (*merge)(const etap_merge_args &args, int64_t row, int64_t head);
};

}  // namespace etap::cpu
