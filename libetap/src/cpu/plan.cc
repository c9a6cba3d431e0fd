#include "cpu/plan.h"

#include <algorithm>

#include "validate.h"

namespace etap::cpu {
namespace {

constexpr int64_t kPiecesPerWorker = 4;       // more even out threads of uneven speed, fewer have less to add up
constexpr int64_t kMinPieceTokens = 128;      // below this, adding up costs as much as attending
constexpr int32_t kInvariantPieces = 16;      // pieces of a long sequence in batch-invariant mode
constexpr int64_t kInvariantMinTokens = 256;  // and the shortest of them
constexpr int64_t kMinWorkPerWorker = 2048;   // rows * KV tokens, some 50 microseconds: they pay for waking a thread

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t whole_blocks(int64_t tokens) { return divide_up(tokens, kBlockTokens) * kBlockTokens; }

// Pieces of cut groups that are in flight together. Without batch invariance this is enough for all of a plan: pieces
// have the same number of tokens t = total / (kPiecesPerWorker * workers), and a group of L > t tokens has
// ceil(L / t) <= 2 L / t of them.
int64_t num_slots(const etap_decision &decision) {
  return std::max<int64_t>(2 * kPiecesPerWorker * decision.num_workers, kInvariantPieces);
}

int64_t max_groups(const etap_problem &p, const etap_decision &d) {
  if (!(p.flags & ETAP_RAGGED)) return static_cast<int64_t>(p.batch) * d.num_tiles;
  return p.batch + 1 + static_cast<int64_t>(p.total_q) * p.num_heads / d.tile_rows;
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

etap_status check_query_counts(const etap_problem &p, const etap_plan_args &args) {
  if (!(p.flags & ETAP_RAGGED)) return ETAP_OK;
  const int32_t *cu = args.cu_seqlens_q;
  if (cu[0] != 0) return fail(ETAP_INVALID_ARGUMENT, "cu_seqlens_q[0] is %d; allowed: 0", cu[0]);
  for (int32_t b = 0; b < p.batch; ++b) {
    const int64_t count = static_cast<int64_t>(cu[b + 1]) - cu[b];
    if (count < 0 || count > p.max_query_len)
      return fail(ETAP_INVALID_ARGUMENT,
                  "cu_seqlens_q gives sequence %d %lld query tokens; allowed: 0 to max_query_len, which is %d", b,
                  static_cast<long long>(count), p.max_query_len);
  }
  if (cu[p.batch] > p.total_q)
    return fail(ETAP_INVALID_ARGUMENT, "cu_seqlens_q[%d] is %d; allowed: at most total_q, which is %d", p.batch,
                cu[p.batch], p.total_q);
  return ETAP_OK;
}

etap_status check_slot_counts(const etap_problem &p, const etap_plan_args &args) {
  if (p.topk == 0 || args.cache_seqlens == nullptr) return ETAP_OK;
  for (int32_t b = 0; b < p.batch; ++b)
    if (args.cache_seqlens[b] < 0 || args.cache_seqlens[b] > p.topk)
      return fail(ETAP_INVALID_ARGUMENT, "cache_seqlens[%d] is %d; allowed: 0 to topk, which is %d", b,
                  args.cache_seqlens[b], p.topk);
  return ETAP_OK;
}

}  // namespace

void decide_tiles(const etap_problem &p, etap_decision *decision) {
  const int64_t rows = static_cast<int64_t>(p.num_heads) * p.max_query_len;
  decision->tile_rows = static_cast<int32_t>(std::min<int64_t>(rows, p.force_tile ? p.force_tile : kMaxTileRows));
  decision->num_tiles = static_cast<int32_t>(divide_up(rows, decision->tile_rows));
  decision->cluster_size = 1;
  decision->num_workers = p.num_sms;
  const bool invariant = p.flags & ETAP_BATCH_INVARIANT;
  const int32_t pieces = p.num_sms == 1 ? 1 : static_cast<int32_t>(kPiecesPerWorker) * p.num_sms;
  decision->max_splits = invariant ? kInvariantPieces : pieces;
}

size_t workspace_bytes(const etap_problem &p, const etap_decision &d) {
  return aligned(sizeof(Header)) + aligned(sizeof(Sequence) * (p.batch + 1)) +
         aligned(sizeof(Group) * max_groups(p, d)) + aligned(sizeof(Partial) * num_slots(d)) +
         aligned(sizeof(Scratch) * d.num_workers);
}

Workspace layout(const etap_plan &plan, void *memory) {
  const etap_problem &p = plan.problem;
  char *at = static_cast<char *>(memory);
  auto take = [&at](size_t bytes) {
    void *part = at;
    at += aligned(bytes);
    return part;
  };
  Workspace w;
  w.header = static_cast<Header *>(take(sizeof(Header)));
  w.sequences = static_cast<Sequence *>(take(sizeof(Sequence) * (p.batch + 1)));
  w.groups = static_cast<Group *>(take(sizeof(Group) * max_groups(p, plan.decision)));
  w.slots = static_cast<Partial *>(take(sizeof(Partial) * num_slots(plan.decision)));
  w.scratch = static_cast<Scratch *>(take(sizeof(Scratch) * plan.decision.num_workers));
  return w;
}

uint64_t fingerprint(const etap_problem &problem) {
  // FNV-1a over the problem, which has no padding
  static_assert(sizeof(etap_problem) % sizeof(int32_t) == 0, "all fields are 32 bits wide");
  uint64_t hash = 0xcbf29ce484222325;
  const unsigned char *bytes = reinterpret_cast<const unsigned char *>(&problem);
  for (size_t i = 0; i < sizeof problem; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

etap_status make_plan(const etap_plan &plan, const etap_plan_args &args) {
  const etap_problem &p = plan.problem;
  const etap_decision &d = plan.decision;
  ETAP_CHECK(check_query_counts(p, args));
  ETAP_CHECK(check_slot_counts(p, args));

  const Workspace w = layout(plan, args.workspace);
  const bool ragged = p.flags & ETAP_RAGGED;
  int32_t query_end = 0;
  int64_t total_tokens = 0;  // over groups
  int64_t total_work = 0;    // rows * tokens
  for (int32_t b = 0; b < p.batch; ++b) {
    Sequence &s = w.sequences[b];
    s.length = args.cache_seqlens == nullptr ? p.topk : std::max(args.cache_seqlens[b], 0);
    s.query_begin = query_end;
    s.query_count = ragged ? args.cu_seqlens_q[b + 1] - query_end : p.max_query_len;
    query_end += s.query_count;
    const int64_t rows = static_cast<int64_t>(s.query_count) * p.num_heads;
    total_tokens += s.length * divide_up(rows, d.tile_rows);
    total_work += s.length * rows;
  }
  w.sequences[p.batch] = {0, query_end, p.total_q - query_end};

  const bool invariant = p.flags & ETAP_BATCH_INVARIANT;
  const int32_t workers = static_cast<int32_t>(std::min<int64_t>(d.num_workers, 1 + total_work / kMinWorkPerWorker));
  const int64_t even_tokens = workers == 1 ? INT32_MAX : total_tokens / (kPiecesPerWorker * workers);
  const int64_t common_tokens = whole_blocks(std::max(kMinPieceTokens, even_tokens));

  int32_t num_groups = 0;
  int32_t slot = 0;
  int32_t wave = 0;
  int64_t piece = 0;
  for (int32_t b = 0; b <= p.batch; ++b) {
    const Sequence &s = w.sequences[b];
    const int64_t piece_tokens =
        invariant ? whole_blocks(std::max(kInvariantMinTokens, divide_up(s.length, kInvariantPieces))) : common_tokens;
    const int32_t rows = s.query_count * p.num_heads;
    for (int32_t first_row = 0; first_row < rows; first_row += d.tile_rows) {
      Group &g = w.groups[num_groups++];
      g.sequence = b;
      g.first_row = first_row;
      g.piece_tokens = piece_tokens;
      g.num_pieces = static_cast<int32_t>(std::max<int64_t>(divide_up(s.length, piece_tokens), 1));
      g.first_piece = piece;
      g.pieces_done = 0;
      const int32_t slots = g.num_pieces > 1 ? g.num_pieces : 0;
      if (slot + slots > num_slots(d)) {
        ++wave;
        slot = 0;
      }
      g.first_slot = slot;
      g.wave = wave;
      slot += slots;
      piece += g.num_pieces;
    }
  }
  *w.header = {fingerprint(p), num_groups, workers};
  return ETAP_OK;
}

}  // namespace etap::cpu
