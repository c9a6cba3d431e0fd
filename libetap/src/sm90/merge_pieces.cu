// The end of units that were cut, where a worker is a single CTA: the decode kernel has left their partial results in
// L2, row by row, and all SMs add them up.
//
//     plan:    worker 3   '---- unit 1, piece 2 ----|-- unit 2, piece 0 --'
//              worker 4   '-------- unit 2, piece 1 --------'
//              worker 5   '- unit 2, piece 2 -|--- unit 3 ...               <- unit 2 ends in worker 5: a cut unit
//     warp:    (cut unit, row)  reads that row of pieces 0, 1, 2 in order, and writes the output
//
// And of sequences behind a prefix that others share (schedule/prefixes.h): a row's pieces are those of the prefix,
// where it lies somewhere in the tile, and then its own. A unit that was not cut has one piece, which is kept
// elsewhere.
//
// Reason for a kernel of its own. The last CTA to arrive could merge, but then one SM reads what eight have written
// while the others are idle: at 64 rows that takes 19 us where this takes 6. The kernel is launched as a programmatic
// dependent, so that its CTAs are there, and have read in the plan what there is to merge, when the last piece is
// written.
//
// Rows that a warp can take whole are taken whole; few rows are cut into slices of 128 values, and many pieces are
// shared out among warps of a CTA. The order of additions depends on the plan alone.
#include "sm90/merge_pieces.h"
#include "sm90/parts/piece.cuh"

namespace etap::sm90 {

constexpr int kMergeWarps = 8, kMergeThreads = 32 * kMergeWarps;

struct MergeShared {
  Merged from_warp[kMergeWarps][32];
};

// Of one piece.
struct PartialRow {
  const float *values, *stats;
};

// SLICES x 32 float4s of a row, a float4 a lane and slice, of pieces [begin, end) in order, PIECES at a time; all loads
// of a time are in flight at once.
template <int SLICES, int PIECES, typename PartialOf>
__device__ __forceinline__ void merge_row(int begin, int end, int value_at, PartialOf partial_of,
                                          Merged (&merged)[SLICES]) {
  const int mine = static_cast<int>(threadIdx.x) % PIECES, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (Merged &m : merged) m = Merged{kNoMaximum, 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
  for (int first = begin; first < end; first += PIECES) {
    float2 stats = make_float2(kNoMaximum, 0.f);
    if (first + mine < end) stats = __ldcg(reinterpret_cast<const float2 *>(partial_of(first + mine).stats));
    float4 values[PIECES][SLICES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const float *const partial = partial_of(min(first + i, end - 1)).values + value_at;
#pragma unroll
      for (int s = 0; s < SLICES; ++s) values[i][s] = __ldcg(reinterpret_cast<const float4 *>(partial) + 32 * s + lane);
    }
    float top = stats.x;
#pragma unroll
    for (int delta = PIECES / 2; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, delta));
    const float weight = first + mine < end ? exp2_approx(stats.x - top) : 0.f;
    float sum = stats.y * weight;
#pragma unroll
    for (int delta = PIECES / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    Merged next[SLICES];
#pragma unroll
    for (Merged &n : next) n = Merged{top, sum, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const float w = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
      for (int s = 0; s < SLICES; ++s) {
        float4 &to = next[s].value;
        const float4 v = values[i][s];
        to = make_float4(to.x + w * v.x, to.y + w * v.y, to.z + w * v.z, to.w + w * v.w);
      }
    }
#pragma unroll
    for (int s = 0; s < SLICES; ++s) merged[s] = sum_of(merged[s], next[s]);
  }
}

// Items are rows of units where SLICES is D / 128, else slices of 128 values of them; `warps` of them share one.
template <int D, int SLICES, int PIECES>
__device__ __forceinline__ void merge_items(const DecodeParams &p, const MergeList &list, const MergedUnit *units,
                                            int warps, MergeShared &shared) {
  constexpr int kItems = D / 128 / SLICES;  // of a row
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int at_once = kMergeWarps / warps, nth = warp % warps, items = list.units * list.rows * kItems;
  const float kv_scale = tensor_scale(p);
#pragma unroll 1
  for (int first = static_cast<int>(blockIdx.x) * at_once; first < items;
       first += static_cast<int>(gridDim.x) * at_once) {
    const int item = first + warp / warps, slice = item % kItems * SLICES, n = item / kItems % list.rows;
    const MergedUnit unit = units[min(item / kItems / list.rows, list.units - 1)];
    const int sequence = unit.unit / list.tiles, row = unit.unit % list.tiles * list.tile_rows + n;
    const SequenceRecord record = p.sequences[sequence];
    const bool exists = item < items && row < record.q_len * p.num_heads, behind = unit.prefix_row >= 0;
    const int token = row / p.num_heads, head = row - token * p.num_heads;
    Merged merged[SLICES];
    if (exists) {
      const int of_prefix = behind ? unit.prefix_last - unit.prefix_first + 1 : 0;
      const int pieces = of_prefix + unit.last_worker - unit.first_worker + 1, share = (pieces + warps - 1) / warps;
      const auto partial_of = [&](int piece) {
        const bool own = piece >= of_prefix;
        const int first_worker = own ? unit.first_worker : unit.prefix_first,
                  last_worker = own ? unit.last_worker : unit.prefix_last;
        if (first_worker == last_worker) {  // of a sequence behind a prefix only
          const int64_t result = static_cast<int64_t>(record.q_begin + token) * p.num_heads + head;
          const float *const kept = p.kept + (2 * result + own) * kept_floats(D);
          return PartialRow{kept, kept + D};
        }
        const int worker = first_worker + (own ? piece - of_prefix : piece), place = own ? n : unit.prefix_row + n;
        const float *const partial = p.partials + partial_floats(list.tile_rows, D, 1) * slot_of(worker, first_worker);
        return PartialRow{partial + place * D, partial + list.tile_rows * D + 2 * place};
      };
      merge_row<SLICES, PIECES>(min(nth * share, pieces), min((nth + 1) * share, pieces), slice * 128, partial_of,
                                merged);
    }
    if (SLICES == 1 && warps > 1) {
      shared.from_warp[warp][lane] = merged[0];
      __syncthreads();
      if (nth == 0) {
        for (int w = 1; w < warps; ++w) merged[0] = sum_of(merged[0], shared.from_warp[warp + w][lane]);
      }
      __syncthreads();
    }
    if (exists && nth == 0) {
      // What is behind a prefix has seen it.
      const int limit = p.causal ? record.length - record.q_len + token + 1 : record.length;
      const RowInfo info{record.q_begin + token, head, behind ? 1 : limit};
      const OutputRow out(p, info, merged[0].sum, kv_scale);
      float4 values[SLICES];
#pragma unroll
      for (int s = 0; s < SLICES; ++s) values[s] = merged[s].value;
      out.store(slice * 128 + 4 * lane, values);
      if (slice == 0 && lane == 0) out.store_lse(info, merged[0].top, merged[0].sum);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kMergeThreads)
    merge_pieces(const __grid_constant__ DecodeParams p, const MergeList *merges) {
  extern __shared__ __align__(16) char shared_raw[];
  MergeShared &shared = *reinterpret_cast<MergeShared *>(shared_raw);
  allow_next_kernel();
  // The plan was read by the kernel before this one, which has begun: it needs no waiting for.
  const MergeList list = *merges;
  const MergedUnit *const units = reinterpret_cast<const MergedUnit *>(merges + 1);
  wait_for_previous_kernel();
  if (list.units == 0) return;
  constexpr int kSlices = D / 128;
  const int all_warps = static_cast<int>(gridDim.x) * kMergeWarps, rows = list.units * list.rows;
  if (2 * rows >= all_warps) return merge_items<D, kSlices, 4>(p, list, units, 1, shared);
  int warps = 1;
  while (warps < kMergeWarps && rows * kSlices * warps * 2 <= all_warps && warps * 8 < list.most_pieces) warps *= 2;
  merge_items<D, 1, 8>(p, list, units, warps, shared);
}

Kernel merge_pieces_kernel(int d_latent) {
  if (d_latent == 512) return {reinterpret_cast<const void *>(&merge_pieces<512>), kMergeThreads, sizeof(MergeShared)};
  if (d_latent == 256) return {reinterpret_cast<const void *>(&merge_pieces<256>), kMergeThreads, sizeof(MergeShared)};
  return Kernel{};
}

}  // namespace etap::sm90
