// Merges the partial results of cut units, by the tasks that the plan made (planner.h).
//
//     slot 3   slot 4   slot 6            partial results of a unit: rows of d_latent floats each,
//      .--.     .--.     .--.             and a maximum and a sum for each row
//      |  |     |  |     |  |
//      |--|     |--|     |--|   <- item   out = sum_i w_i O_i / sum_i w_i l_i,   w_i = 2^(m_i - max m)
//      '--'     '--'     '--'
//
// Reason for the shape. All SMs take part, and a unit's rows are shared out by the number of its parts: what counts is
// how many loads are in flight. A warp merges 256 values of a row of up to four parts, 128 values of more, eight parts
// at once; beyond eight parts several warps share an item and add up through shared memory. The parts are added in an
// order that depends on their number alone.
//
// Launched as a programmatic dependent of the decode kernel. The tasks are the plan's, so they are read before the wait.
#include "merge_partials.h"
#include "parts/output.cuh"

namespace etap::sm90 {
namespace {

constexpr int kThreads = 32 * kMergeWarps;
__device__ __forceinline__ void add(float4 &sum, float weight, const float4 &v) {
  sum.x += weight * v.x;
  sum.y += weight * v.y;
  sum.z += weight * v.z;
  sum.w += weight * v.w;
}

// A warp's share of an item: parts nth, nth + warps, .. of VECTORS float4s a lane, PARTS of them at once.
template <int D, int VECTORS, int PARTS>
struct Item {
  const DecodeParams &p;
  const MergeTask &task;
  int row, d;  // of the group; of the lane's first value

  __device__ __forceinline__ Item(const DecodeParams &params, const MergeTask &t, int index) : p(params), task(t) {
    constexpr int kOfRow = D / (128 * VECTORS);
    row = index / kOfRow;
    d = index % kOfRow * (128 * VECTORS) + threadIdx.x % 32 * 4;
  }
  // Among the rows of all slots. 32 bits do: a row is 1 KB of workspace and more.
  __device__ __forceinline__ int row_of(int part) const {
    const int slot = part == 0 ? task.first_slot : task.next_slot + (part - 1) * task.slot_step;
    return slot * p.group_rows + row;
  }

  __device__ __forceinline__ RowSums merge(int nth, int warps, float4 (&total)[VECTORS]) const {
    const int parts = task.parts;
    RowSums sums{kNoMaximum, 0.f};
#pragma unroll 1
    for (int begin = nth; begin < parts; begin += PARTS * warps) {
      float4 v[PARTS][VECTORS];
      float2 stats[PARTS];
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        const int part = begin + i * warps;
        if (part >= parts) continue;
        const int from = row_of(part);
        stats[i] = __ldcg(p.stats + from);
#pragma unroll
        for (int j = 0; j < VECTORS; ++j)
          v[i][j] = __ldcg(reinterpret_cast<const float4 *>(p.partials + static_cast<int64_t>(from) * D + d) + 32 * j);
      }
      float top = sums.top;
#pragma unroll
      for (int i = 0; i < PARTS; ++i) top = begin + i * warps < parts ? fmaxf(top, stats[i].x) : top;
      const float before = exp2_approx(sums.top - top);
      sums = {top, sums.sum * before};
#pragma unroll
      for (int j = 0; j < VECTORS; ++j)
        total[j] = make_float4(total[j].x * before, total[j].y * before, total[j].z * before, total[j].w * before);
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        if (begin + i * warps >= parts) continue;
        const float weight = exp2_approx(stats[i].x - top);
        sums.sum += stats[i].y * weight;
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) add(total[j], weight, v[i][j]);
      }
    }
    return sums;
  }
  __device__ __forceinline__ void store(const float4 (&total)[VECTORS], const RowSums &sums) const {
    const int in_sequence = task.row_begin + row;
    const int token = task.sequence.q_len == 1 ? 0 : in_sequence / p.num_heads;
    const int head = in_sequence - token * p.num_heads, limit = seen_by(task.sequence, token, p.causal);
    const int64_t q_row = task.sequence.q_begin + token;
    const float kv_scale = tensor_scale(p);
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      store_values(p, q_row, head, d + 128 * j, {total[j].x, total[j].y, total[j].z, total[j].w}, sums, limit,
                   kv_scale);
    }
    if (d == 0) store_lse(p, q_row, head, sums, limit);
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads, 1) merge_partials_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ float4 of_warps[kMergeWarps][32];
  __shared__ float2 sums_of_warps[kMergeWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ MergeTask task;
  const auto fetch = [&p](int t) {
    constexpr int kWords = sizeof(MergeTask) / sizeof(int);
    if (threadIdx.x < kWords) reinterpret_cast<int *>(&task)[threadIdx.x] = reinterpret_cast<const int *>(p.tasks + t)[threadIdx.x];
    __syncthreads();
  };
  const PlanHeader header = *p.header;
  fetch(blockIdx.x);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (header.id != p.plan_id) return;
#pragma unroll 1
  for (int t = blockIdx.x; t < header.tasks; t += gridDim.x) {
    if (t != static_cast<int>(blockIdx.x)) {
      __syncthreads();
      fetch(t);
    }
    if (merge_item(task.parts).values == 256) {
      if (warp >= task.items) continue;
      const Item<D, 2, 4> item(p, task, task.item_begin + warp);
      float4 total[2] = {};
      const RowSums sums = item.merge(0, 1, total);
      item.store(total, sums);
      continue;
    }
    const int warps = merge_warps(task.parts), nth = warp % warps;
    const bool mine = warp / warps < task.items;
    const Item<D, 1, 8> item(p, task, task.item_begin + warp / warps);
    float4 total[1] = {};
    RowSums sums{kNoMaximum, 0.f};
    if (mine) sums = item.merge(nth, warps, total);
    if (warps > 1) {
      if (nth > 0) {
        of_warps[warp][lane] = total[0];
        if (lane == 0) sums_of_warps[warp] = make_float2(sums.top, sums.sum);
      }
      __syncthreads();
      if (nth == 0) {
        float top = sums.top;
#pragma unroll 1
        for (int i = 1; i < warps; ++i) top = fmaxf(top, sums_of_warps[warp + i].x);
        RowSums all{top, 0.f};
        float4 sum[1] = {};
#pragma unroll 1
        for (int i = 0; i < warps; ++i) {
          const float2 of_warp = i == 0 ? make_float2(sums.top, sums.sum) : sums_of_warps[warp + i];
          const float weight = exp2_approx(of_warp.x - top);
          all.sum += of_warp.y * weight;
          add(sum[0], weight, i == 0 ? total[0] : of_warps[warp + i][lane]);
        }
        total[0] = sum[0];
        sums = all;
      }
      __syncthreads();
    }
    if (mine && nth == 0) item.store(total, sums);
  }
}

}  // namespace

Kernel merge_partials(int d_latent) {
  const auto kernel = d_latent == 512 ? merge_partials_kernel<512> : merge_partials_kernel<256>;
  return Kernel{reinterpret_cast<const void *>(kernel), kThreads, 0};
}

}  // namespace etap::sm90
