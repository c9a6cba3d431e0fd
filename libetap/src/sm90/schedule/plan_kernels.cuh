// The kernels that write the schedule (planner.h) into the workspace: one CTA, from the lengths on the device. Where
// sequences may share prefixes (prefixes.h) it follows a kernel in which each of them looks for others that begin as it
// does, a CTA a sequence. plan.cu launches them; the emulator of tests/emulator runs them, too.
#pragma once

#include "device.h"
#include "sm90/dispatch.h"
#include "sm90/ptx/ptx.cuh"

namespace etap::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kSharedUnits = 2560;  // more units than that are read back from the workspace
constexpr int kSharedUnitsWithPrefixes = 1024;

template <typename T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(0xffffffffu, value, delta);
  return value;
}

// Of the budgets that were tried, and which was best.
struct Outcomes {
  ShareEnd ends[kMaxWorkers][kCandidates];
  int best;
  bool singles;  // are single CTAs the workers?
};

// Tries the budgets, and writes the records of the best. For the whole CTA.
template <typename Blocks>
__device__ __forceinline__ void write_records(const PlanShape &shape, const Blocks &blocks, const Work &work,
                                              const SequenceRecord *sequences, WorkerRecord *records,
                                              Outcomes &outcomes) {
  if (each_has_a_worker(shape, work)) {
    for (int w = threadIdx.x; w < shape.workers; w += kThreads) outcomes.ends[w][0] = end_of_own_unit(shape, w);
    if (threadIdx.x == 0) {
      outcomes.best = 0;
      outcomes.singles = false;
    }
  } else if (threadIdx.x < kCandidates) {
    const int lane = threadIdx.x, candidates = shape.singles > 0 ? kCandidates / 2 : kCandidates;
    const bool singles = lane >= candidates;
    const PlanShape tried = singles ? of_singles(shape) : shape;
    const int64_t budget = candidate_budget(tried, work, lane % candidates, candidates);
    const auto set_end = [&outcomes, lane](int worker, const ShareEnd &end) { outcomes.ends[worker][lane] = end; };
    int64_t cost = has_long_units(shape) ? assign<true>(tried, blocks, budget, set_end)
                                         : assign<false>(tried, blocks, budget, set_end);
    if (singles) cost = cost_of_singles(shape, work, cost, budget);
    int best = lane;
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) {
      const int64_t other_cost = __shfl_xor_sync(0xffffffffu, cost, delta);
      const int other = __shfl_xor_sync(0xffffffffu, best, delta);
      if (other_cost < cost || (other_cost == cost && other < best)) {
        cost = other_cost;
        best = other;
      }
    }
    if (lane == best) {
      outcomes.best = best;
      outcomes.singles = singles;
    }
  }
  __syncthreads();
  const int best = outcomes.best;
  const bool singles = outcomes.singles;
  const PlanShape chosen = singles ? of_singles(shape) : shape;
  for (int cta = threadIdx.x; cta < shape.workers * shape.cluster; cta += kThreads) {
    WorkerRecord record = record_of(
        chosen, blocks, [&outcomes, best](int worker) { return outcomes.ends[worker][best]; }, cta / chosen.cluster);
    if (record.unit_begin <= record.unit_end) record.first_sequence = sequences[record.unit_begin / shape.tiles];
    record.single = singles;
    records[cta] = record;
  }
}

// A sequence's place in a group.
struct Membership {
  short group;  // -1: it is in none
  short row;    // of its first row in the group's tile
};

__device__ __forceinline__ MergeList merge_list(const PlanShape &shape, int units, int most_pieces) {
  const int rows = shape.max_query_len * shape.num_heads;
  return MergeList{units, most_pieces, shape.tiles, shape.tile_rows, rows < shape.tile_rows ? rows : shape.tile_rows,
                   {}};
}

// What merge_pieces.cu will have to do, in any order: units that were cut, and members of groups. membership_of(unit)
// of a sequence; prefixes, which are not merged by themselves, come from unit first_prefix on. For the whole CTA.
template <typename MembershipOf>
__device__ __forceinline__ void list_merges(const PlanShape &shape, const Outcomes &outcomes, int first_prefix,
                                            const MembershipOf &membership_of, MergeList *list) {
  static __shared__ int units, most_pieces;
  if (threadIdx.x == 0) units = most_pieces = 0;
  __syncthreads();
  const int best = outcomes.best;
  const auto end_of = [&outcomes, best](int worker) { return outcomes.ends[worker][best]; };
  const auto add = [&](int unit, const Membership &membership) {
    const auto first = [&](int of) { return first_behind(shape, end_of, of, 0); };
    const auto last = [&](int of) { return first_behind(shape, end_of, of, kWhole); };
    MergedUnit merged{unit, first(unit), last(unit), -1, 0, -1, {}};
    if (membership.group >= 0) {
      merged.prefix_row = membership.row;
      merged.prefix_first = first(first_prefix + membership.group);
      merged.prefix_last = last(first_prefix + membership.group);
    }
    reinterpret_cast<MergedUnit *>(list + 1)[atomicAdd(&units, 1)] = merged;
    atomicMax(&most_pieces,
              merged.last_worker - merged.first_worker + 1 + merged.prefix_last - merged.prefix_first + 1);
  };
  if (shape.cluster == 1) {  // clusters merge by themselves
    for (int w = threadIdx.x; w < shape.workers; w += kThreads) {
      const int unit = end_of(w).unit;
      if (begins_cut_unit(end_of, w) && unit < first_prefix && membership_of(unit).group < 0) add(unit, {-1, 0});
    }
    for (int unit = threadIdx.x; unit < first_prefix; unit += kThreads) {
      const Membership membership = membership_of(unit);
      if (membership.group >= 0) add(unit, membership);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *list = merge_list(shape, units, most_pieces);
}

// What a plan is made from, and where to.
struct Batch {
  const int32_t *cache_seqlens;  // [batch]; nullptr with topk: all slots of each list
  const int32_t *cu_seqlens_q;   // [batch + 1]; nullptr: max_query_len rows each
};
struct PlanMemory {
  WorkerRecord *records;  // of CTAs
  SequenceRecord *sequences;
  int *unit_blocks, *counters;
  MergeList *merges;  // nullptr: clusters merge by themselves
};

__device__ __forceinline__ SequenceRecord sequence_of(const PlanShape &shape, const Batch &batch, int b) {
  int length = batch.cache_seqlens != nullptr ? batch.cache_seqlens[b] : shape.topk;
  // A list is not longer than topk; what says otherwise is not read (DecodeParams::token_limit).
  if (shape.topk > 0 && static_cast<unsigned>(length) > static_cast<unsigned>(shape.topk)) length = shape.topk + 1;
  SequenceRecord s{length, b * shape.max_query_len, shape.max_query_len, 0};
  if (batch.cu_seqlens_q != nullptr) {
    s.q_begin = batch.cu_seqlens_q[b];
    s.q_len = batch.cu_seqlens_q[b + 1] - s.q_begin;
    s.q_len = s.q_len < shape.max_query_len ? s.q_len : shape.max_query_len;
  }
  return s;
}
// Behind the last sequence: the number of rows in use.
__device__ __forceinline__ SequenceRecord end_of_batch(const PlanShape &shape, const Batch &batch) {
  const int rows = batch.cu_seqlens_q != nullptr ? batch.cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len;
  return SequenceRecord{0, rows, 0, 0};
}

// The sequences' records, and their units' blocks, of which seen(blocks) is told. For the whole CTA. record(b): a
// sequence's.
template <typename Record, typename Seen>
__device__ __forceinline__ void write_sequences(const PlanShape &shape, SequenceRecord *sequences, int *blocks,
                                                const Record &record, const Seen &seen) {
  for (int b = threadIdx.x; b < shape.batch; b += kThreads) {
    const SequenceRecord s = record(b);
    sequences[b] = s;
    for (int t = 0; t < shape.tiles; ++t) {
      const bool causal = shape.causal && !is_prefix(s);
      const int n = blocks_of(visible_tokens(s.length, s.q_len, t, shape.tile_rows, shape.num_heads, causal));
      blocks[b * shape.tiles + t] = n;
      seen(n);
    }
  }
}

// For the whole CTA. record(b): a sequence's. UNITS: of which there is room for the blocks in shared memory.
template <int UNITS, typename Record>
__device__ __forceinline__ void write_plan(const PlanShape &shape, const PlanMemory &memory, Outcomes &outcomes,
                                           const Record &record) {
  static __shared__ int shared_blocks[UNITS];
  static __shared__ unsigned long long all_blocks;
  static __shared__ int largest, empty;
  const int units = shape.batch * shape.tiles;
  int *const blocks = units <= UNITS ? shared_blocks : memory.unit_blocks;
  if (threadIdx.x == 0) {
    all_blocks = 0;
    largest = empty = 0;
  }
  for (int i = threadIdx.x; i < shape.workers * shape.cluster; i += kThreads) memory.counters[i] = 0;
  __syncthreads();

  long long my_blocks = 0;
  int my_largest = 0, my_empty = 0;
  write_sequences(shape, memory.sequences, blocks, record, [&](int n) {
    my_blocks += n;
    my_empty += n == 0;
    my_largest = n > my_largest ? n : my_largest;
  });
  // A warp at a time: atomics on 64 bits of shared memory take turns.
  my_blocks = warp_sum(my_blocks);
  my_empty = warp_sum(my_empty);
  my_largest = __reduce_max_sync(0xffffffffu, my_largest);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&all_blocks, static_cast<unsigned long long>(my_blocks));
    atomicAdd(&empty, my_empty);
    atomicMax(&largest, my_largest);
  }
  __syncthreads();
  const Work work{static_cast<int64_t>(all_blocks), units - empty, empty, largest};

  // Loads from shared memory, where the compiler can tell, are faster than loads from either.
  if (units <= UNITS) {
    write_records(
        shape, [](int unit) { return shared_blocks[unit]; }, work, memory.sequences, memory.records, outcomes);
  } else {
    const int *const unit_blocks = memory.unit_blocks;
    write_records(
        shape, [unit_blocks](int unit) { return unit_blocks[unit]; }, work, memory.sequences, memory.records, outcomes);
  }
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const PlanShape shape, const Batch batch, const PlanMemory memory) {
  static __shared__ Outcomes outcomes;
  write_plan<kSharedUnits>(shape, memory, outcomes, [&](int b) { return sequence_of(shape, batch, b); });
  if (threadIdx.x == 0) memory.sequences[shape.batch] = end_of_batch(shape, batch);
  if (memory.merges != nullptr) {
    list_merges(shape, outcomes, shape.batch * shape.tiles, [](int) { return Membership{-1, 0}; }, memory.merges);
  }
}

// ---- Batch-invariant mode ----

// A thread's group of units, one behind the other.
__global__ void __launch_bounds__(kThreads)
    chunk_plan_kernel(const PlanShape shape, const Batch batch, const PlanMemory memory) {
  static __shared__ int shared_blocks[kSharedUnits];
  static __shared__ long long cost_before[kThreads], of_warps[kThreads / 32];  // of groups; of a warp's groups
  static __shared__ ChunkPlace ends[kMaxWorkers];
  static __shared__ int merged, most_chunks;
  const int units = shape.batch * shape.tiles, group_units = (units + kThreads - 1) / kThreads;
  int *const blocks = units <= kSharedUnits ? shared_blocks : memory.unit_blocks;
  if (threadIdx.x == 0) {
    merged = most_chunks = 0;
    memory.sequences[shape.batch] = end_of_batch(shape, batch);
  }
  __syncthreads();
  int my_most = 0;
  write_sequences(
      shape, memory.sequences, blocks, [&](int b) { return sequence_of(shape, batch, b); },
      [&](int n) { my_most = max(my_most, chunks_of(n, shape.chunks_log2)); });
  my_most = __reduce_max_sync(0xffffffffu, my_most);
  if (threadIdx.x % 32 == 0) atomicMax(&most_chunks, my_most);
  __syncthreads();

  const int numbers_log2 = numbers_log2_of(most_chunks);
  long long mine = 0;
  const int begin = static_cast<int>(threadIdx.x) * group_units;
#pragma unroll 1
  for (int unit = begin; unit < begin + group_units && unit < units; ++unit) {
    mine += cost_of_chunks(blocks[unit], shape.chunks_log2);
    const int chunks = chunks_of(blocks[unit], shape.chunks_log2), first = unit << numbers_log2;
    if (chunks > 1)
      reinterpret_cast<MergedUnit *>(memory.merges + 1)[atomicAdd(&merged, 1)] = {
          unit, first, first + chunks - 1, -1, 0, -1, {}};
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  long long before = mine, all = 0;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const long long others = __shfl_up_sync(0xffffffffu, before, delta);
    if (lane >= delta) before += others;
  }
  if (lane == 31) of_warps[warp] = before;
  __syncthreads();
  before -= mine;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += of_warps[w];
    all += of_warps[w];
  }
  cost_before[threadIdx.x] = before;
  __syncthreads();

  const auto blocks_of_unit = [blocks](int unit) { return blocks[unit]; };
  const int w = threadIdx.x;
  static_assert(kMaxWorkers <= kThreads);
  if (w < shape.workers) {
    ends[w] = end_of_share(
        shape, blocks_of_unit, kThreads, group_units, [](int group) { return cost_before[group]; }, all, w);
  }
  __syncthreads();
  if (w < shape.workers) {
    WorkerRecord record =
        record_of_chunks(shape, blocks_of_unit, [](int worker) { return ends[worker]; }, w, numbers_log2);
    if (record.unit_begin <= record.unit_end)
      record.first_sequence = memory.sequences[(record.unit_begin >> numbers_log2) / shape.tiles];
    memory.records[w] = record;
  }
  if (threadIdx.x == 0) *memory.merges = merge_list(shape, merged, 0);
}

// ---- Shared prefixes ----

struct Table {
  const int32_t *pages;
  int64_t stride, tokens;  // tokens: that its columns hold
  int page_size, flags;
};

// A sequence's link, from all threads of a CTA.
__global__ void __launch_bounds__(kThreads)
    link_kernel(const PlanShape shape, const Batch batch, const Table table, PrefixLink *links) {
  allow_next_kernel();
  const int b = blockIdx.x;
  static __shared__ int least;
  const auto least_of = [&](int mine, int none) {  // none: what `mine` is where a thread has nothing to say
    if (!__syncthreads_or(mine != none)) return none;
    if (threadIdx.x == 0) least = none;
    __syncthreads();
    mine = __reduce_min_sync(0xffffffffu, mine);
    if (threadIdx.x % 32 == 0) atomicMin(&least, mine);
    __syncthreads();
    return least;
  };
  const auto pages_of = [&](int sequence) {
    const SequenceRecord s = sequence_of(shape, batch, sequence);
    return shareable_pages(s.length, s.q_len, table.flags, table.page_size, table.tokens);
  };
  const int32_t *const own = table.pages + b * table.stride;
  const int pages = pages_of(b);
  const auto first_with_page = [&](int column) {
    int first = b;
    for (int other = threadIdx.x; other < b; other += kThreads) {
      if (pages_of(other) > column && table.pages[other * table.stride + column] == own[column]) {
        first = other;
        break;
      }
    }
    first = least_of(first, b);
    return first < b ? first : -1;
  };
  const auto common_pages = [&](int other) {
    const int32_t *const theirs = table.pages + other * table.stride;
    const int other_pages = pages_of(other), most = pages < other_pages ? pages : other_pages;
    constexpr int kAtOnce = 4;
    for (int begin = 0; begin < most; begin += kAtOnce * kThreads) {
      int parts = most;
#pragma unroll
      for (int i = kAtOnce - 1; i >= 0; --i) {
        const int column = begin + i * kThreads + static_cast<int>(threadIdx.x);
        if (column < most && own[column] != theirs[column]) parts = column;
      }
      parts = least_of(parts, most);
      if (parts < most) return parts;
    }
    return most;
  };
  const PrefixLink link = find_link(pages, table.page_size, first_with_page, common_pages);
  if (threadIdx.x == 0) links[b] = link;
}

// The groups, for a CTA of kMaxSharers threads or more.
struct Groups {
  etap_shared found;
  int tokens[kMaxGroups];
  int begin[kMaxGroups], end[kMaxGroups];  // in `members`
  short members[kMaxSharers];
  Membership of_sequence[kMaxSharers];
};
struct GroupScratch {
  int children[kMaxSharers];
  StarMember unsorted[kMaxSharers], sorted[kMaxSharers];
  int rows[kMaxSharers];      // of a sequence
  unsigned long long blocks;  // of the whole batch
};

// None where they don't pay.
__device__ __forceinline__ void find_groups(const PlanShape &shape, const Batch &batch, const PrefixLink *links,
                                            const SharingCosts &costs, GroupScratch &scratch, Groups &groups) {
  static_assert(kThreads >= kMaxSharers);
  const int b = threadIdx.x;
  const bool exists = b < shape.batch;
  const PrefixLink link = exists ? links[b] : PrefixLink{-1, 0};
  if (b == 0) {
    groups.found = etap_shared{sizeof(etap_shared), 0, 0, 0, 0};
    scratch.blocks = 0;
  }
  if (exists) {
    scratch.children[b] = 0;
    groups.of_sequence[b] = Membership{-1, 0};
  }
  if (!__syncthreads_or(link.parent >= 0)) return;
  const SequenceRecord s = exists ? sequence_of(shape, batch, b) : SequenceRecord{};
  if (exists) scratch.rows[b] = s.q_len * shape.num_heads;
  const long long blocks = warp_sum(static_cast<long long>(s.length > 0 ? blocks_of(s.length) : 0));
  if (b % 32 == 0) atomicAdd(&scratch.blocks, static_cast<unsigned long long>(blocks));
  if (link.parent >= 0) atomicMax(&scratch.children[link.parent], link.tokens);
  __syncthreads();
  const StarMember mine = exists ? star_member(b, link, scratch.children[b]) : StarMember{-1, 0, b};
  const bool shares = mine.head >= 0;
  if (exists) scratch.unsorted[b] = mine;
  const int sharing = __syncthreads_count(shares);
  if (shares) {
    int place = 0;
    for (int other = 0; other < shape.batch; ++other) {
      const StarMember theirs = scratch.unsorted[other];
      place += theirs.head >= 0 && stands_before(theirs, mine);
    }
    scratch.sorted[place] = mine;
    groups.members[place] = static_cast<short>(b);
  }
  __syncthreads();
  if (b == 0) {
    etap_shared found = groups.found;
    int64_t gained = 0, shared = 0;
    form_groups(
        sharing, kPrefixRows, [&](int place) { return scratch.sorted[place]; },
        [&](int sequence) { return scratch.rows[sequence]; },
        [&](int begin, int end, int tokens) {
          const int64_t gain = costs.gain(end - begin, tokens / kBlockTokens);
          if (gain <= 0) return;
          gained += gain;
          shared += static_cast<int64_t>(end - begin) * (tokens / kBlockTokens);
          groups.begin[found.groups] = begin;
          groups.end[found.groups] = end;
          groups.tokens[found.groups++] = tokens;
          found.sequences += end - begin;
          found.tokens += static_cast<int64_t>(end - begin - 1) * tokens;
        });
    if (costs.pay(gained, shared, static_cast<int64_t>(scratch.blocks) - shared)) groups.found = found;
  }
  __syncthreads();
  if (b < groups.found.groups) {
    int rows = 0;
    for (int place = groups.begin[b]; place < groups.end[b]; ++place) {
      const int member = groups.members[place];
      groups.of_sequence[member] = Membership{static_cast<short>(b), static_cast<short>(rows)};
      rows += scratch.rows[member];
    }
  }
  __syncthreads();
}

struct SharingPlan {
  PlanShape usual, sharing;  // the latter's batch is the former's: what groups add is found here
  WorkerRecord *usual_records, *sharing_records;
  PlanMemory memory;  // all but the records of CTAs, for the plan that has work
  const PrefixLink *links;
  int32_t *q_rows;
  etap_shared *found;
  int page_size;
  SharingCosts costs;
};

// One of both plans, and no work for the other.
__global__ void __launch_bounds__(kThreads)
    sharing_plan_kernel(const Batch batch, const __grid_constant__ SharingPlan plan) {
  static __shared__ union {
    Outcomes outcomes;
    GroupScratch scratch;
  } shared;
  static __shared__ Groups groups;
  wait_for_previous_kernel();
  const int sequences = plan.usual.batch;
  find_groups(plan.usual, batch, plan.links, plan.costs, shared.scratch, groups);

  const bool sharing = groups.found.groups > 0;
  PlanShape shape = sharing ? plan.sharing : plan.usual;
  if (sharing) shape.batch += 1 + groups.found.groups;
  PlanMemory memory = plan.memory;
  memory.records = sharing ? plan.sharing_records : plan.usual_records;
  WorkerRecord *const idle = sharing ? plan.usual_records : plan.sharing_records;
  const PlanShape &of_idle = sharing ? plan.usual : plan.sharing;
  if (idle != memory.records) {  // else one kernel serves both
    for (int cta = threadIdx.x; cta < of_idle.workers * of_idle.cluster; cta += kThreads)
      idle[cta] = WorkerRecord{0, 0, -1, 0, 0, 0, 0, 0, 0, {}};
  }
  if (threadIdx.x == 0) *plan.found = groups.found;
  write_plan<kSharedUnitsWithPrefixes>(shape, memory, shared.outcomes, [&](int i) {
    if (i == sequences) return end_of_batch(plan.usual, batch);
    if (i < sequences) {
      const int group = groups.of_sequence[i].group;
      return behind_prefix(sequence_of(plan.usual, batch, i), group < 0 ? 0 : groups.tokens[group], plan.page_size);
    }
    const int group = i - sequences - 1, place = group * kPrefixRows;
    int tokens = 0;
    for (int member = groups.begin[group]; member < groups.end[group]; ++member) {
      const SequenceRecord s = sequence_of(plan.usual, batch, groups.members[member]);
      for (int q = 0; q < s.q_len; ++q) plan.q_rows[place + tokens++] = s.q_begin + q;
    }
    return prefix_record(place, groups.tokens[group], tokens, groups.members[groups.begin[group]]);
  });
  if (threadIdx.x == 0) memory.sequences[sequences] = end_of_batch(plan.usual, batch);
  const int first_prefix = sharing ? sequences + 1 : sequences * shape.tiles;
  list_merges(
      shape, shared.outcomes, first_prefix,
      [sharing, sequences](int unit) {
        return sharing && unit < sequences ? groups.of_sequence[unit] : Membership{-1, 0};
      },
      memory.merges);
}

// The launches of a plan. costs: where prefixes may be shared. launch(kernel, CTAs, does it wait for the one before by
// itself?, arguments ..): enqueues a kernel of CTAs of kThreads threads.
template <typename Launch>
void launch_plans(const etap_plan &plan, const etap_plan_args &args, const Workspace &layout, const SharingCosts &costs,
                  const Launch &launch) {
  const etap_problem &problem = plan.problem;
  const PlanShape shape = plan_shape(problem, plan.decision);
  const Batch batch{args.cache_seqlens, args.cu_seqlens_q};
  const bool merges = shape.cluster == 1 || layout.shares();
  const PlanMemory memory{at<WorkerRecord>(args.workspace, layout.records),
                          at<SequenceRecord>(args.workspace, layout.sequences),
                          at<int>(args.workspace, layout.unit_blocks), at<int>(args.workspace, layout.counters),
                          merges ? at<MergeList>(args.workspace, layout.merges) : nullptr};
  if (shape.chunks_log2 >= 0) return launch(chunk_plan_kernel, 1, false, shape, batch, memory);
  if (!layout.shares()) return launch(plan_kernel, 1, false, shape, batch, memory);
  const Table table{args.block_table, args.block_table_stride, table_tokens(args, problem.page_size), problem.page_size,
                    problem.flags};
  PrefixLink *const links = at<PrefixLink>(args.workspace, layout.links);
  launch(link_kernel, shape.batch, false, shape, batch, table, links);
  const SharingPlan sharing{shape,
                            sharing_shape(shape, layout.shape.sharing_workers),
                            memory.records,
                            at<WorkerRecord>(args.workspace, layout.sharing_records),
                            memory,
                            links,
                            at<int32_t>(args.workspace, layout.q_rows),
                            at<etap_shared>(args.workspace, layout.found),
                            problem.page_size,
                            costs};
  launch(sharing_plan_kernel, 1, true, batch, sharing);
}

}  // namespace
}  // namespace etap::sm90
