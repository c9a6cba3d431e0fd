// Writes the schedule (planner.h) into the workspace: one CTA, from the lengths on the device.
//
//     lengths --> costs of the units, summed up --> 16 warps try 16 ways to cut, a lane a team --> the cheapest one's
//     records, a thread a team
#include "plan.h"

namespace etap::sm90 {
namespace {

constexpr int kThreads = 32 * kCandidates;
constexpr int kSharedUnits = 2560;  // costs of more units than that are read back from the workspace

template <typename T>
__device__ T warp_max(T value) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, delta);
    value = other > value ? other : value;
  }
  return value;
}

// Sums over the CTA's threads, in their order: `before` gets those of lower threads, the result is all of it. Every
// thread calls it; ends with a barrier.
__device__ __forceinline__ int64_t scan(int64_t value, int64_t &before, int64_t (&of_warps)[kCandidates]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t up_to = value;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, up_to, delta);
    if (lane >= delta) up_to += other;
  }
  if (lane == 31) of_warps[warp] = up_to;
  __syncthreads();
  before = up_to - value;
  int64_t all = 0;
#pragma unroll
  for (int w = 0; w < kCandidates; ++w) {
    if (w < warp) before += of_warps[w];
    all += of_warps[w];
  }
  __syncthreads();
  return all;
}

struct Shared {
  int64_t of_warps[kCandidates];
  float candidate_cycles[kCandidates];
  Place ends[kCandidates][kMaxTeams];
  int64_t cost_before[kSharedUnits + 1];
};

// Cuts the units, and writes the records. For the whole CTA.
template <typename CostBefore>
__device__ __forceinline__ void cut(const PlanShape &shape, int64_t total_blocks, const CostBefore &cost_before,
                                    const SequenceRecord *sequences, TeamRecord *teams, Shared &shared) {
  const int units = shape.batch * shape.groups, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto blocks = [&cost_before](int unit) {
    const int64_t cost = cost_before(unit + 1) - cost_before(unit);
    return cost > 1 ? static_cast<int>(cost - kPieceCost) : 0;
  };

  Place *const ends = shared.ends[warp];
  const Candidate candidate = candidate_of(shape, units, cost_before(units), warp);
  for (int t = lane; t < shape.teams; t += 32) ends[t] = share_end(shape, candidate, units, t, cost_before, blocks);
  __syncwarp();
  int64_t longest = 0;
  int cuts = 0;
  for (int t = lane; t < shape.teams; t += 32) {
    const Place begin = t > 0 ? ends[t - 1] : Place{0, 0}, end = ends[t];
    const int64_t cost = share_cost(begin, end, cost_before);
    longest = cost > longest ? cost : longest;
    cuts += end.done > 0;
  }
  longest = warp_max(longest);
  cuts = __reduce_add_sync(0xffffffffu, cuts);
  if (lane == 0) shared.candidate_cycles[warp] = step_cycles(shape, total_blocks, longest, cuts);
  __syncthreads();

  int best = 0;
#pragma unroll
  for (int c = 1; c < kCandidates; ++c) best = shared.candidate_cycles[c] < shared.candidate_cycles[best] ? c : best;
  const auto end_of = [&shared, best](int team) { return shared.ends[best][team]; };
  for (int t = threadIdx.x; t < shape.teams; t += kThreads) {
    TeamRecord record = record_of(shape, blocks, end_of, t);
    if (record.unit_begin <= record.unit_end) record.first_sequence = sequences[record.unit_begin / shape.groups];
    teams[t] = record;
  }
  __threadfence();  // the kernels of the step read it as soon as they begin
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const PlanShape shape, const int32_t *cache_seqlens, const int32_t *cu_seqlens_q, TeamRecord *teams,
                SequenceRecord *sequences, int64_t *far_costs, uint64_t *counters, int num_counters) {
  __shared__ Shared shared;
  const int units = shape.batch * shape.groups;
  const bool near = units <= kSharedUnits;
  int64_t *const costs = near ? shared.cost_before : far_costs;
  if (threadIdx.x == 0) {
    costs[0] = 0;
    sequences[shape.batch] = SequenceRecord{
        0, cu_seqlens_q != nullptr ? cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len, 0, 0};
  }
  for (int i = threadIdx.x; i < num_counters; i += kThreads) counters[i] = 0;
  int64_t sum = 0, total_blocks = 0;
  for (int first = 0; first < units; first += kThreads) {
    const int unit = first + threadIdx.x;
    int64_t cost = 0, before;
    if (unit < units) {
      const int b = unit / shape.groups, group = unit - b * shape.groups;
      SequenceRecord s{cache_seqlens[b], b * shape.max_query_len, shape.max_query_len, 0};
      if (cu_seqlens_q != nullptr) {
        s.q_begin = cu_seqlens_q[b];
        s.q_len = cu_seqlens_q[b + 1] - s.q_begin;
        s.q_len = s.q_len < shape.max_query_len ? s.q_len : shape.max_query_len;
      }
      if (group == 0) sequences[b] = s;
      cost = unit_cost(blocks_of(visible_tokens(s.length, s.q_len, group * shape.group_rows, shape.group_rows,
                                                shape.num_heads, shape.causal)));
    }
    const int64_t all = scan(cost, before, shared.of_warps);
    if (unit < units) costs[unit + 1] = sum + before + cost;
    sum += all;
    const int with_blocks = __syncthreads_count(cost > 1), empty = __syncthreads_count(cost == 1);
    total_blocks += all - static_cast<int64_t>(with_blocks) * kPieceCost - empty;
  }
  __syncthreads();

  // Loads from shared memory, where the compiler can tell, are faster than loads from either.
  if (near) {
    cut(shape, total_blocks, [](int unit) { return shared.cost_before[unit]; }, sequences, teams, shared);
  } else {
    cut(shape, total_blocks, [far_costs](int unit) { return far_costs[unit]; }, sequences, teams, shared);
  }
}

}  // namespace

cudaError_t launch_plan(const PlanShape &shape, const int32_t *cache_seqlens, const int32_t *cu_seqlens_q,
                        const Workspace &layout, char *workspace, cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(
      shape, cache_seqlens, cu_seqlens_q, reinterpret_cast<TeamRecord *>(workspace + layout.teams),
      reinterpret_cast<SequenceRecord *>(workspace + layout.sequences),
      reinterpret_cast<int64_t *>(workspace + layout.costs), reinterpret_cast<uint64_t *>(workspace + layout.counters),
      counters_of(shape));
  return cudaGetLastError();
}

}  // namespace etap::sm90
