// How a batch is cut into pieces of even work. The plan lies in the caller's workspace:
//
//     Header | Sequence[batch + 1] | Group[num_groups] | Partial[num_slots] | Scratch[num_workers]
//     | Prefix[], Partial[] of each, PrefixLink[batch], StarMember[batch] with ETAP_SHARED_PREFIXES
//
// The sequence after the last has the rows of q past cu_seqlens_q[batch], if any, and no tokens: their results are 0.
// A group is one tile of one sequence; its KV tokens are cut into num_pieces pieces of piece_tokens. Groups that are
// cut leave each piece's result in a slot, and the thread that finishes a group's last piece adds them up in order.
// Which thread does what never matters to the bits.
//
// A prefix that sequences share (shared_prefixes.h) is a group of its own, in a wave before those of the sequences: its
// tile has the rows of all of them, its result stays in a Partial, and each sequence adds its rows of it to what it has
// of the tokens behind.
#pragma once

#include <stddef.h>

#include "cpu/kernel.h"
#include "device.h"
#include "shared_prefixes.h"

namespace etap::cpu {

struct Sequence {
  int64_t length;
  int32_t query_begin;
  int32_t query_count;
  int32_t prefix;      // that it shares, -1: none
  int32_t prefix_row;  // the first of its rows there
};

struct Prefix {
  int64_t tokens;
  int32_t sequence;     // whose table it is read through
  int32_t query_count;  // query tokens of all that share it
  int32_t query_rows[kMaxTileRows];
};

struct Group {
  int32_t sequence;      // -1: none, but a prefix
  int32_t prefix;        // that the sequence shares, or this one
  int32_t first_row;     // of the sequence's query_count * num_heads rows
  int32_t num_pieces;    // 1 or more
  int32_t first_slot;    // of num_pieces slots; not used when num_pieces is 1
  int64_t piece_tokens;  // a multiple of kBlockTokens
  int64_t first_piece;   // pieces of the groups before
  int32_t wave;          // groups of one wave have distinct slots; waves run one after another
  int32_t pieces_done;   // run's counter
};

struct Header {
  uint64_t fingerprint;  // of the problem: what run compares to know its plan
  int32_t num_groups;
  int32_t num_workers;  // threads worth waking for this much work
  etap_shared shared;
};

// The parts of a workspace.
struct Workspace {
  Header *header;
  Sequence *sequences;
  Group *groups;
  Partial *slots;
  Scratch *scratch;
  Prefix *prefixes;
  Partial *prefix_results;
  PrefixLink *links;  // and the row of members, for make_plan
  StarMember *members;
};

// Of a sequence, behind the prefix that it shares.
int64_t first_token(const Workspace &workspace, const Sequence &sequence);

// The tile and the number of pieces: all of a decision that the CPU device decides.
void decide_tiles(const etap_problem &problem, etap_decision *decision);

size_t workspace_bytes(const etap_problem &problem, const etap_decision &decision);
Workspace layout(const etap_plan &plan, void *memory);
uint64_t fingerprint(const etap_problem &problem);

// Writes the plan into the workspace, or refuses the query counts and leaves it as it was.
etap_status make_plan(const etap_plan &plan, const etap_plan_args &args);

}  // namespace etap::cpu
