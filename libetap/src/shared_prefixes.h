// Sequences of a batch whose block tables begin with the same pages, and which of them read their common prefix
// together (ETAP_SHARED_PREFIXES).
//
// 1. Every sequence looks for a *parent*, a sequence before it in the batch with which it shares more than with others
//    (find_link). It asks for the first sequence with the same first page, compares both tables from the beginning to
//    where they part, asks again for the first one with the same page there, and so on:
//
//        sequence 0   s s s s a a a
//        sequence 1   s s s s b b        parent 0, which shares s s s s
//        sequence 2   s s s s b b c c    first 0, then 1, which shares two pages more: parent 1
//
//    Tables are compared page by page. So what they look like never matters to the result, only to how much of it is
//    found: tables that share pages in the middle alone have no parent, or another one.
// 2. A parent and its children are a *star*: any of them share the least that its children have in common with it.
// 3. Members of a star, those that share most first, are taken into a *group* as long as their query rows fit one tile
//    and what is saved grows (form_groups). A group that does not pay is none.
//
// Everything here runs on the host and on the device, one sequence a thread or one after the other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"
#include "etap.h"
#include "host_device.h"

namespace etap {

constexpr int kMaxSharers = 512;        // larger batches are not looked through
constexpr int kPrefixBlockTokens = 64;  // prefixes are whole blocks of KV, and whole pages
constexpr int kLevels = 4;              // parents that are asked for

// What a group costs beside its blocks, in the time of a block: a piece more, and the merge with what follows.
constexpr int kGroupPiece = 7;
constexpr int kGroupMerge = 10;

// Tokens that a prefix is a multiple of: page_size is a power of two.
ETAP_HD int prefix_step(int page_size) { return page_size > kPrefixBlockTokens ? page_size : kPrefixBlockTokens; }

// Tokens that the columns of a call's table hold.
inline int64_t table_tokens(const etap_plan_args &args, int page_size) {
  if (args.block_table == nullptr) return 0;
  return args.block_table_columns == 0 ? INT32_MAX : args.block_table_columns * page_size;
}

// Pages at the beginning of a sequence that all of its query tokens see, and that its table holds: in whole steps.
// table_tokens: what the table's columns hold.
ETAP_HD int shareable_pages(int length, int query_count, int flags, int page_size, int64_t table_tokens) {
  if (length <= 0 || query_count <= 0 || length > table_tokens) return 0;
  const int unseen = flags & ETAP_TREE_MASK ? query_count : flags & ETAP_CAUSAL ? query_count - 1 : 0;
  const int step = prefix_step(page_size);
  return length > unseen ? (length - unseen) / step * (step / page_size) : 0;
}

struct PrefixLink {
  int parent;  // -1: none
  int tokens;  // that are common with it
};

// The link of a sequence that has `pages` shareable pages. first_with_page(column): the first sequence before this one
// that has the same page in this column of its shareable ones, or -1. common_pages(other): the number of leading pages
// that both share.
template <typename FirstWithPage, typename CommonPages>
ETAP_HD PrefixLink find_link(int pages, int page_size, const FirstWithPage &first_with_page,
                             const CommonPages &common_pages) {
  const int step = prefix_step(page_size);
  PrefixLink link{-1, 0};
  int column = 0;
  for (int level = 0; level < kLevels && column < pages; ++level) {
    const int other = first_with_page(column);
    if (other < 0) break;
    column = common_pages(other);
    const int tokens = column / (step / page_size) * step;
    if (tokens <= link.tokens) break;
    link = PrefixLink{other, tokens};
  }
  return link;
}

// A sequence's place in the row of sequences from which groups are cut.
struct StarMember {
  int head;    // the star's parent; -1: it shares nothing
  int tokens;  // that are common with it, or, of the parent, the most that a child has
  int sequence;
};

// children_tokens: the most that a child shares with this sequence, 0 where there is none.
ETAP_HD StarMember star_member(int sequence, const PrefixLink &link, int children_tokens) {
  return children_tokens > 0 ? StarMember{sequence, children_tokens, sequence}
                             : StarMember{link.parent, link.tokens, sequence};
}

// The order of the row: stars, in each of them those that share most first.
ETAP_HD bool stands_before(const StarMember &x, const StarMember &y) {
  if (x.head != y.head) return x.head < y.head;
  return x.tokens != y.tokens ? x.tokens > y.tokens : x.sequence < y.sequence;
}

// What reading a prefix once saves `members` sequences.
ETAP_HD bool group_pays(int members, int tokens) {
  return static_cast<int64_t>(members - 1) * (tokens / kPrefixBlockTokens) > kGroupPiece + kGroupMerge;
}

// Cuts the row of `count` members that share something into groups of at most max_rows query rows. member_at(place);
// rows_of(sequence); add_group(first place, place behind the last, tokens) is called for each group. The first member's
// table holds the prefix of all.
template <typename MemberAt, typename RowsOf, typename AddGroup>
ETAP_HD void form_groups(int count, int max_rows, const MemberAt &member_at, const RowsOf &rows_of,
                         const AddGroup &add_group) {
  int begin = 0, rows = 0, tokens = 0, head = -1;
  for (int place = 0; place < count; ++place) {
    const StarMember next = member_at(place);
    const int next_rows = rows_of(next.sequence), members = place - begin;
    const int64_t saved = static_cast<int64_t>(members - 1) * tokens;
    const bool joins =
        next.head == head && rows + next_rows <= max_rows && static_cast<int64_t>(members) * next.tokens > saved;
    if (!joins) {
      if (members > 1 && group_pays(members, tokens)) add_group(begin, place, tokens);
      begin = place;
      rows = 0;
      head = next.head;
    }
    rows += next_rows;
    tokens = next.tokens;
  }
  if (count - begin > 1 && group_pays(count - begin, tokens)) add_group(begin, count, tokens);
}

// All of it on the host, one sequence after the other. pages_of(sequence): its shareable pages; table_of(sequence): its
// row of the block table; links and members: [count] of scratch, members in their order where add_group is called.
template <typename PagesOf, typename TableOf, typename RowsOf, typename AddGroup>
void find_groups(int count, int page_size, int max_rows, const PagesOf &pages_of, const TableOf &table_of,
                 const RowsOf &rows_of, PrefixLink *links, StarMember *members, const AddGroup &add_group) {
  for (int b = 0; b < count; ++b) {
    const int pages = pages_of(b);
    const auto first_with_page = [&](int column) {
      for (int other = 0; other < b; ++other)
        if (pages_of(other) > column && table_of(other)[column] == table_of(b)[column]) return other;
      return -1;
    };
    const auto common_pages = [&](int other) {
      const int most = std::min(pages, pages_of(other));
      int column = 0;
      while (column < most && table_of(other)[column] == table_of(b)[column]) ++column;
      return column;
    };
    links[b] = find_link(pages, page_size, first_with_page, common_pages);
    members[b] = StarMember{-1, 0, b};  // tokens: the most that a child shares, for now
  }
  for (int b = 0; b < count; ++b) {
    if (links[b].parent < 0) continue;
    int &most = members[links[b].parent].tokens;
    most = std::max(most, links[b].tokens);
  }
  int sharing = 0;
  for (int b = 0; b < count; ++b) {
    const StarMember member = star_member(b, links[b], members[b].tokens);
    if (member.head >= 0) members[sharing++] = member;
  }
  std::sort(members, members + sharing, stands_before);
  form_groups(sharing, max_rows, [&](int place) { return members[place]; }, rows_of, add_group);
}

// Sequences whose rows fit a tile, whatever the batch.
inline int64_t sharers_of_tile(const etap_problem &p, int max_rows) {
  return max_rows / (static_cast<int64_t>(p.num_heads) * (p.flags & ETAP_RAGGED ? 1 : p.max_query_len));
}

// Sequences of a group at most.
inline int max_sharers(const etap_problem &p, int max_rows) {
  if (!(p.flags & ETAP_SHARED_PREFIXES)) return 0;
  const int64_t most = std::min<int64_t>(sharers_of_tile(p, max_rows), p.batch);
  return p.batch > kMaxSharers || most < 2 ? 1 : static_cast<int>(most);
}

// Goes on with the reason of a decision whose max_sharers is set.
inline void tell_of_sharers(const etap_problem &p, etap_decision *decision) {
  if (!(p.flags & ETAP_SHARED_PREFIXES)) return;
  if (decision->max_sharers > 1) {
    explain(decision, "; up to %d sequences read a common prefix together", decision->max_sharers);
  } else if (p.batch > kMaxSharers) {
    explain(decision, "; no prefix is shared: batch is more than %d", kMaxSharers);
  } else {
    explain(decision, "; no prefix is shared: no tile has room for two sequences");
  }
}

}  // namespace etap
