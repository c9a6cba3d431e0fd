// Writes the schedule (planner.h) into the workspace: one CTA, from the lengths on the device.
#include "sm90/schedule/plan.h"

namespace etap::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kSharedUnits = 2560;  // more units than that are read back from the workspace

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

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const PlanShape shape, const int32_t *cache_seqlens, const int32_t *cu_seqlens_q, WorkerRecord *workers,
                SequenceRecord *sequences, int *unit_blocks, int *counters) {
  __shared__ int shared_blocks[kSharedUnits];
  __shared__ Outcomes outcomes;
  __shared__ unsigned long long total_cost;
  __shared__ int largest;
  const int units = shape.batch * shape.tiles;
  int *const blocks = units <= kSharedUnits ? shared_blocks : unit_blocks;
  if (threadIdx.x == 0) {
    sequences[shape.batch] = SequenceRecord{
        0, cu_seqlens_q != nullptr ? cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len, 0, 0};
    total_cost = 0;
    largest = 0;
  }
  for (int i = threadIdx.x; i < shape.workers * shape.cluster * ctas_of_tile(shape.tile_rows); i += kThreads)
    counters[i] = 0;
  __syncthreads();

  const int piece_cost = costs_of(shape.cluster).piece;
  long long my_cost = 0;
  int my_largest = 0;
  for (int b = threadIdx.x; b < shape.batch; b += kThreads) {
    int length = cache_seqlens != nullptr ? cache_seqlens[b] : shape.topk;
    // A list is not longer than topk; what says otherwise is not read (DecodeParams::token_limit).
    if (shape.topk > 0 && static_cast<unsigned>(length) > static_cast<unsigned>(shape.topk)) length = shape.topk + 1;
    SequenceRecord s{length, b * shape.max_query_len, shape.max_query_len, 0};
    if (cu_seqlens_q != nullptr) {
      s.q_begin = cu_seqlens_q[b];
      s.q_len = cu_seqlens_q[b + 1] - s.q_begin;
      s.q_len = s.q_len < shape.max_query_len ? s.q_len : shape.max_query_len;
    }
    sequences[b] = s;
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
  if (units <= kSharedUnits) {
    write_records(
        shape, [](int unit) { return shared_blocks[unit]; }, total_cost, largest, sequences, workers, outcomes);
  } else {
    write_records(
        shape, [unit_blocks](int unit) { return unit_blocks[unit]; }, total_cost, largest, sequences, workers,
        outcomes);
  }
}

}  // namespace

cudaError_t launch_plan(const PlanShape &shape, const int32_t *cache_seqlens, const int32_t *cu_seqlens_q,
                        const Workspace &layout, char *workspace, cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(
      shape, cache_seqlens, cu_seqlens_q, reinterpret_cast<WorkerRecord *>(workspace + layout.workers),
      reinterpret_cast<SequenceRecord *>(workspace + layout.sequences),
      reinterpret_cast<int *>(workspace + layout.unit_blocks), reinterpret_cast<int *>(workspace + layout.counters));
  return cudaGetLastError();
}

}  // namespace etap::sm90
