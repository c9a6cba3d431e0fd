// Prefixes that sequences share (../../shared_prefixes.h) on the CUDA device: a second plan, in which prefixes are
// units beside those of the sequences, and one kernel that computes both.
//
//     the table            units: the batch, each sequence behind      groups, a tile of the rows
//                          its prefix, the row past the last one       of all members each
//     0  p p p p a a       0   a a                                     p p p p  x  rows of 0, 2, 3
//     1  b b b             1   b b b
//     2  p p p p c         2   c
//     3  p p p p d d d     3   d d d
//
// All of them stand in one row, which is cut evenly among single CTAs (planner.h), and the kernel of the largest tile
// computes them. A whole unit of a member or of a prefix leaves its sums in FP32 (`kept`), a cut one in the slots of
// its workers, and merge_pieces.cu adds up what each row has of its prefix and of its own. A sequence of no group is a
// unit like any other.
//
// The plan chooses: with groups this one has all work, without them that of the kernel which the dispatch takes without
// the flag. Both kernels are launched, and one finds nothing to do: a CUDA graph can't know which.
#pragma once

#include "shared_prefixes.h"
#include "sm90/schedule/planner.h"

namespace etap::sm90 {

constexpr int kPrefixRows = 64;  // of a tile, whatever the cache
constexpr int kMaxGroups = kMaxSharers / 2;

// The plan with groups of a batch, without them: each has one unit more, and so has the batch (end_of_batch).
inline PlanShape sharing_shape(PlanShape shape, int workers) {
  shape.tiles = 1;
  shape.tile_rows = kPrefixRows;
  shape.workers = workers;
  shape.cluster = 1;
  shape.singles = 0;
  return shape;
}

// Of a group. place: of its first query token in the list of rows; first: the member whose table is read.
ETAP_HD SequenceRecord prefix_record(int place, int tokens, int query_tokens, int first) {
  return SequenceRecord{tokens, ~place, query_tokens, first};
}
// A sequence behind its prefix of so many tokens, which are whole pages; 0: it has none.
ETAP_HD SequenceRecord behind_prefix(const SequenceRecord &s, int tokens, int page_size) {
  return SequenceRecord{s.length - tokens, s.q_begin, s.q_len, tokens / page_size};
}

// Floats of a result that is kept: a row's sums of P V, their maximum and the sum of P. Result 2 r is that of a prefix,
// 2 r + 1 the sequence's own, where r counts the rows of q and their heads.
ETAP_HD int kept_floats(int d_latent) { return d_latent + 8; }

// What decides whether groups pay, in cycles of an SM; a card's and a problem's (dispatch.h).
struct SharingCosts {
  int usual, together;          // a block of a prefix: for each member with the usual kernel, for all in one tile
  int usual_own, together_own;  // a block that one sequence alone reads: it comes from the memory, not from L2
  int merge;                    // what the merge adds to the step
  int sms;

  // Of all SMs, what a group of so many members saves with a prefix of so many blocks.
  ETAP_HD int64_t gain(int members, int blocks) const {
    return static_cast<int64_t>(blocks) * (static_cast<int64_t>(members) * usual - together) -
           static_cast<int64_t>(kGroupPiece + kGroupMerge) * together;
  }
  // Do groups that gain so much pay? shared: the blocks of their prefixes, once for each member; own: all other blocks.
  // The estimate must be ahead by a sixteenth of the step: it is right to a few percent.
  ETAP_HD bool pay(int64_t gained, int64_t shared, int64_t own) const {
    const int64_t step = shared * usual + own * usual_own, padded = own * (together_own - usual_own);
    return gained - padded > static_cast<int64_t>(sms) * merge + step / 16;
  }
};

}  // namespace etap::sm90
