// The kernels that write the schedule (planner.h) into the workspace: one CTA, from the lengths on the device. With
// shared prefixes (prefixes.h) a CTA for each of the two passes, after a kernel in which each sequence looks for others
// that begin as it does, a CTA a sequence. plan.cu launches them; the emulator of tests/emulator runs them, too.
#pragma once

#include "device.h"
#include "sm90/prefix_pass.h"
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
};

// Tries the budgets, and writes the records of the best. For the whole CTA.
template <typename Blocks>
__device__ __forceinline__ void write_records(const PlanShape &shape, const Blocks &blocks, int64_t total_cost,
                                              int largest, const SequenceRecord *sequences, WorkerRecord *workers,
                                              Outcomes &outcomes) {
  if (threadIdx.x < kCandidates) {
    const int lane = threadIdx.x;
    const int64_t budget = candidate_budget(shape, total_cost, largest, lane);
    int64_t cost = assign(shape, blocks, budget,
                          [&outcomes, lane](int worker, const ShareEnd &end) { outcomes.ends[worker][lane] = end; });
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
    if (lane == 0) outcomes.best = best;
  }
  __syncthreads();
  const int best = outcomes.best;
  for (int w = threadIdx.x; w < shape.workers; w += kThreads) {
    WorkerRecord record =
        record_of(shape, blocks, [&outcomes, best](int worker) { return outcomes.ends[worker][best]; }, w);
    if (record.unit_begin <= record.unit_end) record.first_sequence = sequences[record.unit_begin / shape.tiles];
    workers[w] = record;
  }
}

// What a plan is made from, and where to.
struct Batch {
  const int32_t *cache_seqlens;  // [batch]; nullptr with topk: all slots of each list
  const int32_t *cu_seqlens_q;   // [batch + 1]; nullptr: max_query_len rows each
};
struct PlanMemory {
  WorkerRecord *workers;
  SequenceRecord *sequences;
  int *unit_blocks, *counters;
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

// For the whole CTA. record(b): a sequence's. UNITS: of which there is room for the blocks in shared memory.
template <int UNITS, typename Record>
__device__ __forceinline__ void write_plan(const PlanShape &shape, const Batch &batch, const PlanMemory &memory,
                                           Outcomes &outcomes, const Record &record) {
  static __shared__ int shared_blocks[UNITS];
  static __shared__ unsigned long long total_cost;
  static __shared__ int largest;
  const int units = shape.batch * shape.tiles;
  int *const blocks = units <= UNITS ? shared_blocks : memory.unit_blocks;
  if (threadIdx.x == 0) {
    memory.sequences[shape.batch] = SequenceRecord{
        0, batch.cu_seqlens_q != nullptr ? batch.cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len, 0, 0};
    total_cost = 0;
    largest = 0;
  }
  for (int i = threadIdx.x; i < shape.workers * shape.cluster; i += kThreads) memory.counters[i] = 0;
  __syncthreads();

  const int piece_cost = costs_of(shape.cluster).piece;
  long long my_cost = 0;
  int my_largest = 0;
  for (int b = threadIdx.x; b < shape.batch; b += kThreads) {
    const SequenceRecord s = record(b);
    memory.sequences[b] = s;
    for (int t = 0; t < shape.tiles; ++t) {
      const int n = blocks_of(visible_tokens(s.length, s.q_len, t, shape.tile_rows, shape.num_heads, shape.causal));
      blocks[b * shape.tiles + t] = n;
      my_cost += n > 0 ? n + piece_cost : 1;
      my_largest = n > my_largest ? n : my_largest;
    }
  }
  // A warp at a time: atomics on 64 bits of shared memory take turns.
  my_cost = warp_sum(my_cost);
  my_largest = __reduce_max_sync(0xffffffffu, my_largest);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&total_cost, static_cast<unsigned long long>(my_cost));
    atomicMax(&largest, my_largest);
  }
  __syncthreads();

  // Loads from shared memory, where the compiler can tell, are faster than loads from either.
  if (units <= UNITS) {
    write_records(
        shape, [](int unit) { return shared_blocks[unit]; }, total_cost, largest, memory.sequences, memory.workers,
        outcomes);
  } else {
    const int *const unit_blocks = memory.unit_blocks;
    write_records(
        shape, [unit_blocks](int unit) { return unit_blocks[unit]; }, total_cost, largest, memory.sequences,
        memory.workers, outcomes);
  }
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const PlanShape shape, const Batch batch, const PlanMemory memory) {
  static __shared__ Outcomes outcomes;
  write_plan<kSharedUnits>(shape, batch, memory, outcomes, [&](int b) { return sequence_of(shape, batch, b); });
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
  int count;
  int tokens[kMaxGroups];
  int begin[kMaxGroups], end[kMaxGroups];  // in `members`
  short members[kMaxSharers];
  int behind[kMaxSharers];  // a sequence's tokens in its group's prefix
};
struct GroupScratch {
  int children[kMaxSharers];
  StarMember unsorted[kMaxSharers], sorted[kMaxSharers];
};

__device__ __forceinline__ void find_groups(const PlanShape &shape, const Batch &batch, const PrefixLink *links,
                                            int max_rows, GroupScratch &scratch, Groups &groups) {
  static_assert(kThreads >= kMaxSharers);
  const int b = threadIdx.x;
  const bool exists = b < shape.batch;
  const PrefixLink link = exists ? links[b] : PrefixLink{-1, 0};
  if (b == 0) groups.count = 0;
  if (exists) {
    scratch.children[b] = 0;
    groups.behind[b] = 0;
  }
  if (!__syncthreads_or(link.parent >= 0)) return;
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
    int count = 0;
    form_groups(
        sharing, max_rows, [&](int place) { return scratch.sorted[place]; },
        [&](int sequence) { return sequence_of(shape, batch, sequence).q_len * shape.num_heads; },
        [&](int begin, int end, int tokens) {
          groups.begin[count] = begin;
          groups.end[count] = end;
          groups.tokens[count++] = tokens;
        });
    groups.count = count;
  }
  __syncthreads();
  if (b < groups.count) {
    for (int place = groups.begin[b]; place < groups.end[b]; ++place)
      groups.behind[groups.members[place]] = groups.tokens[b];
  }
  __syncthreads();
}

struct PrefixPlan {
  PlanShape shapes[2];  // of the batch, and of the prefixes, whose number is found here
  PlanMemory memories[2];
  const PrefixLink *links;
  int32_t *q_rows;
  etap_shared *found;
  float *lse;  // of the pass over prefixes
  int64_t results;
  int page_size;
};

// CTA 0: the plan of the batch, each sequence behind its prefix; CTA 1: that of the prefixes.
__global__ void __launch_bounds__(kThreads)
    plan_kernel_with_prefixes(const Batch batch, const __grid_constant__ PrefixPlan prefixes) {
  static __shared__ union {
    Outcomes outcomes;
    GroupScratch scratch;
  } shared;
  static __shared__ Groups groups;
  const PlanShape &batch_shape = prefixes.shapes[0];
  const int tile_rows = prefixes.shapes[1].tile_rows;
  find_groups(batch_shape, batch, prefixes.links, tile_rows, shared.scratch, groups);

  const bool of_prefixes = blockIdx.x == 1;
  PlanShape shape = prefixes.shapes[blockIdx.x];
  if (of_prefixes) {
    shape.batch = groups.count;
    for (int64_t i = threadIdx.x; i < prefixes.results; i += kThreads) prefixes.lse[i] = -INFINITY;
    if (threadIdx.x == 0) {
      etap_shared found{sizeof(etap_shared), groups.count, 0, 0, 0};
      for (int g = 0; g < groups.count; ++g) {
        const int members = groups.end[g] - groups.begin[g];
        found.sequences += members;
        found.tokens += static_cast<int64_t>(members - 1) * groups.tokens[g];
      }
      *prefixes.found = found;
    }
  }
  write_plan<kSharedUnitsWithPrefixes>(
      shape, of_prefixes ? Batch{} : batch, prefixes.memories[blockIdx.x], shared.outcomes, [&](int i) {
        if (!of_prefixes)
          return behind_prefix(sequence_of(batch_shape, batch, i), groups.behind[i], prefixes.page_size);
        int tokens = 0;
        for (int place = groups.begin[i]; place < groups.end[i]; ++place) {
          const SequenceRecord s = sequence_of(batch_shape, batch, groups.members[place]);
          for (int q = 0; q < s.q_len; ++q) prefixes.q_rows[i * tile_rows + tokens++] = s.q_begin + q;
        }
        return prefix_record(i, groups.tokens[i], tokens, groups.members[groups.begin[i]], tile_rows);
      });
}

PlanMemory memory_of(const Workspace &layout, void *workspace) {
  return {at<WorkerRecord>(workspace, layout.workers), at<SequenceRecord>(workspace, layout.sequences),
          at<int>(workspace, layout.unit_blocks), at<int>(workspace, layout.counters)};
}

// The launches of a plan. launch(kernel, CTAs, arguments ..): enqueues a kernel of CTAs of kThreads threads.
template <typename Launch>
void launch_plans(const etap_plan &plan, const etap_plan_args &args, const Workspace &layout,
                  const PrefixPass *prefixes, const Launch &launch) {
  const etap_problem &problem = plan.problem;
  const PlanShape shape = plan_shape(problem, plan.decision);
  const Batch batch{args.cache_seqlens, args.cu_seqlens_q};
  const PlanMemory memory = memory_of(layout, args.workspace);
  if (prefixes == nullptr) return launch(plan_kernel, 1, shape, batch, memory);
  const Table table{args.block_table, args.block_table_stride, table_tokens(args, problem.page_size), problem.page_size,
                    problem.flags};
  const PrefixWorkspace &w = prefixes->layout;
  PrefixLink *const links = at<PrefixLink>(args.workspace, w.links);
  launch(link_kernel, shape.batch, shape, batch, table, links);
  const PrefixPlan own{{shape, plan_shape(prefixes->plan.problem, prefixes->plan.decision)},
                       {memory, memory_of(w.workspace, at<char>(args.workspace, w.pass))},
                       links,
                       at<int32_t>(args.workspace, w.q_rows),
                       at<etap_shared>(args.workspace, w.found),
                       at<float>(args.workspace, w.lse),
                       w.results,
                       problem.page_size};
  launch(plan_kernel_with_prefixes, 2, batch, own);
}

}  // namespace
}  // namespace etap::sm90
