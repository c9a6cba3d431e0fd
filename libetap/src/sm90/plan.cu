// Writes the schedule (planner.h) into the workspace: one CTA, from the lengths on the device.
#include "plan.h"

namespace etap::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kSharedUnits = 8192;  // more units than that are read back from the workspace

struct Emit {
  WorkerRecord *workers;
  __device__ void worker(int w, const WorkerRecord &record) { workers[w] = record; }
  __device__ void split(int unit, int first, int last) { mark_split(workers, unit, first, last); }
};

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const PlanShape shape, const int32_t *cache_seqlens, const int32_t *cu_seqlens_q, WorkerRecord *workers,
                SequenceRecord *sequences, int *unit_blocks, int *counters) {
  __shared__ int shared_blocks[kSharedUnits];
  __shared__ unsigned long long total_cost;
  __shared__ int largest;
  const int units = shape.batch * shape.tiles;
  int *blocks = units <= kSharedUnits ? shared_blocks : unit_blocks;
  if (threadIdx.x == 0) {
    sequences[shape.batch] = SequenceRecord{
        0, cu_seqlens_q != nullptr ? cu_seqlens_q[shape.batch] : shape.batch * shape.max_query_len, 0, 0};
    total_cost = 0;
    largest = 0;
  }
  for (int i = threadIdx.x; i < shape.workers * shape.cluster; i += kThreads) counters[i] = 0;
  __syncthreads();

  const int piece_cost = costs_of(shape.cluster).piece;
  long long my_cost = 0;
  int my_largest = 0;
  for (int b = threadIdx.x; b < shape.batch; b += kThreads) {
    SequenceRecord s{cache_seqlens[b], b * shape.max_query_len, shape.max_query_len, 0};
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
  atomicAdd(&total_cost, static_cast<unsigned long long>(my_cost));
  atomicMax(&largest, my_largest);
  __syncthreads();

  if (threadIdx.x < kCandidates) {
    const auto count = [blocks](int unit) { return blocks[unit]; };
    const int64_t budget = candidate_budget(shape, static_cast<int64_t>(total_cost), largest, threadIdx.x);
    int64_t cost = assign(shape, count, budget, NoEmit{});
    int best = threadIdx.x;
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) {
      const int64_t other_cost = __shfl_xor_sync(0xffffffffu, cost, delta);
      const int other = __shfl_xor_sync(0xffffffffu, best, delta);
      if (other_cost < cost || (other_cost == cost && other < best)) {
        cost = other_cost;
        best = other;
      }
    }
    if (threadIdx.x == best) assign(shape, count, budget, Emit{workers});
  }
  __syncthreads();
  for (int w = threadIdx.x; w < shape.workers; w += kThreads) {
    if (workers[w].unit_begin <= workers[w].unit_end)
      workers[w].first_sequence = sequences[workers[w].unit_begin / shape.tiles];
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
