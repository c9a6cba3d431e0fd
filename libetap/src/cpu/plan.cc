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

// Sequences among which prefixes are looked for. A larger batch has none, but needs no less memory than a smaller one.
int64_t num_sharers(const etap_problem &p) {
  return p.flags & ETAP_SHARED_PREFIXES ? std::min(p.batch, kMaxSharers) : 0;
}

int64_t max_prefixes(const etap_problem &p) { return num_sharers(p) / 2; }

int64_t max_groups(const etap_problem &p, const etap_decision &d) {
  if (!(p.flags & ETAP_RAGGED)) return max_prefixes(p) + static_cast<int64_t>(p.batch) * d.num_tiles;
  return max_prefixes(p) + p.batch + 1 + static_cast<int64_t>(p.total_q) * p.num_heads / d.tile_rows;
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

// Finds the prefixes that sequences share, and tells the sequences. Returns how many there are.
int32_t find_prefixes(const etap_plan &plan, const etap_plan_args &args, const Workspace &w, etap_shared *shared) {
  const etap_problem &p = plan.problem;
  const int64_t most_tokens = table_tokens(args, p.page_size);
  const auto pages_of = [&](int32_t b) {
    const Sequence &s = w.sequences[b];
    return shareable_pages(static_cast<int>(s.length), s.query_count, p.flags, p.page_size, most_tokens);
  };
  int32_t &num_prefixes = shared->groups;
  find_groups(
      p.batch, p.page_size, kMaxTileRows, pages_of,
      [&](int32_t b) { return args.block_table + b * args.block_table_stride; },
      [&](int32_t b) { return w.sequences[b].query_count * p.num_heads; }, w.links, w.members,
      [&](int32_t begin, int32_t end, int32_t tokens) {
        Prefix &prefix = w.prefixes[num_prefixes];
        prefix = {tokens, w.members[begin].sequence, 0, {}};
        for (int32_t i = begin; i < end; ++i) {
          Sequence &s = w.sequences[w.members[i].sequence];
          s.prefix = num_prefixes;
          s.prefix_row = prefix.query_count * p.num_heads;
          for (int32_t q = 0; q < s.query_count; ++q) prefix.query_rows[prefix.query_count++] = s.query_begin + q;
        }
        ++num_prefixes;
        shared->sequences += end - begin;
        shared->tokens += static_cast<int64_t>(end - begin - 1) * tokens;
      });
  return num_prefixes;
}

}  // namespace

int64_t first_token(const Workspace &w, const Sequence &s) { return s.prefix < 0 ? 0 : w.prefixes[s.prefix].tokens; }

void decide_tiles(const etap_problem &p, etap_decision *decision) {
  const int64_t rows = static_cast<int64_t>(p.num_heads) * p.max_query_len;
  decision->tile_rows = static_cast<int32_t>(std::min<int64_t>(rows, p.force_tile ? p.force_tile : kMaxTileRows));
  decision->num_tiles = static_cast<int32_t>(divide_up(rows, decision->tile_rows));
  decision->cluster_size = 1;
  decision->num_workers = p.num_sms;
  const bool invariant = p.flags & ETAP_BATCH_INVARIANT;
  const int32_t pieces = p.num_sms == 1 ? 1 : static_cast<int32_t>(kPiecesPerWorker) * p.num_sms;
  decision->max_splits = invariant ? kInvariantPieces : pieces;
  decision->max_sharers = max_sharers(p, kMaxTileRows);
}

size_t workspace_bytes(const etap_problem &p, const etap_decision &d) {
  return aligned(sizeof(Header)) + aligned(sizeof(Sequence) * (p.batch + 1)) +
         aligned(sizeof(Group) * max_groups(p, d)) + aligned(sizeof(Partial) * num_slots(d)) +
         aligned(sizeof(Scratch) * d.num_workers) + aligned(sizeof(Prefix) * max_prefixes(p)) +
         aligned(sizeof(Partial) * max_prefixes(p)) + aligned(sizeof(PrefixLink) * num_sharers(p)) +
         aligned(sizeof(StarMember) * num_sharers(p));
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
  w.prefixes = static_cast<Prefix *>(take(sizeof(Prefix) * max_prefixes(p)));
  w.prefix_results = static_cast<Partial *>(take(sizeof(Partial) * max_prefixes(p)));
  w.links = static_cast<PrefixLink *>(take(sizeof(PrefixLink) * num_sharers(p)));
  w.members = static_cast<StarMember *>(take(sizeof(StarMember) * num_sharers(p)));
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
  for (int32_t b = 0; b < p.batch; ++b) {
    Sequence &s = w.sequences[b];
    s.length = args.cache_seqlens == nullptr ? p.topk : std::max(args.cache_seqlens[b], 0);
    s.query_begin = query_end;
    s.query_count = ragged ? args.cu_seqlens_q[b + 1] - query_end : p.max_query_len;
    query_end += s.query_count;
    s.prefix = -1;
  }
  w.sequences[p.batch] = {0, query_end, p.total_q - query_end, -1, 0};
  etap_shared shared = {};
  const int32_t num_prefixes = d.max_sharers > 1 ? find_prefixes(plan, args, w, &shared) : 0;

  int64_t total_tokens = 0;  // over groups
  int64_t total_work = 0;    // rows * tokens
  for (int32_t i = 0; i < num_prefixes; ++i) {
    total_tokens += w.prefixes[i].tokens;
    total_work += w.prefixes[i].tokens * w.prefixes[i].query_count * p.num_heads;
  }
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence &s = w.sequences[b];
    const int64_t rows = static_cast<int64_t>(s.query_count) * p.num_heads, tokens = s.length - first_token(w, s);
    total_tokens += tokens * divide_up(rows, d.tile_rows);
    total_work += tokens * rows;
  }

  const bool invariant = p.flags & ETAP_BATCH_INVARIANT;
  const int32_t workers = static_cast<int32_t>(std::min<int64_t>(d.num_workers, 1 + total_work / kMinWorkPerWorker));
  const int64_t even_tokens = workers == 1 ? INT32_MAX : total_tokens / (kPiecesPerWorker * workers);
  const int64_t common_tokens = whole_blocks(std::max(kMinPieceTokens, even_tokens));

  int32_t num_groups = 0;
  int32_t slot = 0;
  int32_t wave = 0;
  int64_t piece = 0;
  const auto next_wave = [&] {
    ++wave;
    slot = 0;
  };
  const auto add_group = [&](int32_t sequence, int32_t prefix, int32_t first_row, int64_t tokens,
                             int64_t piece_tokens) {
    Group &g = w.groups[num_groups++];
    g.sequence = sequence;
    g.prefix = prefix;
    g.first_row = first_row;
    g.piece_tokens = piece_tokens;
    g.num_pieces = static_cast<int32_t>(std::max<int64_t>(divide_up(tokens, piece_tokens), 1));
    g.first_piece = piece;
    g.pieces_done = 0;
    const int32_t slots = g.num_pieces > 1 ? g.num_pieces : 0;
    if (slot + slots > num_slots(d)) next_wave();
    g.first_slot = slot;
    g.wave = wave;
    slot += slots;
    piece += g.num_pieces;
  };
  for (int32_t i = 0; i < num_prefixes; ++i) add_group(-1, i, 0, w.prefixes[i].tokens, common_tokens);
  if (num_prefixes > 0) next_wave();
  for (int32_t b = 0; b <= p.batch; ++b) {
    const Sequence &s = w.sequences[b];
    const int64_t piece_tokens =
        invariant ? whole_blocks(std::max(kInvariantMinTokens, divide_up(s.length, kInvariantPieces))) : common_tokens;
    const int32_t rows = s.query_count * p.num_heads;
    for (int32_t first_row = 0; first_row < rows; first_row += d.tile_rows)
      add_group(b, s.prefix, first_row, s.length - first_token(w, s), piece_tokens);
  }
  *w.header = {fingerprint(p), num_groups, workers, shared};
  return ETAP_OK;
}

}  // namespace etap::cpu
