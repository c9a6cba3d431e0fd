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
// Its CTAs are small where there may be nothing to do: two of them, idle, share an SM with nobody, and the next kernel
// waits until all are there.
//
// Rows that a warp can take whole are taken whole; few rows are cut into slices of 128 values, and many pieces are
// shared out among warps of a CTA. The order of additions depends on the plan alone, in batch-invariant mode on the
// unit alone.
#include "sm90/merge_pieces.h"
#include "sm90/parts/piece.cuh"

namespace etap::sm90 {

template <int WARPS>
struct MergeShared {
  Merged<> from_warp[WARPS][32];
};

// Of one piece.
struct PartialRow {
  const float *values, *stats;
};

// SLICES x 32 x 4 values of a row, four a lane and slice, of pieces [begin, end) in order, PIECES at a time; all loads
// of a time are in flight at once.
template <typename Four, int SLICES, int PIECES, typename PartialOf>
__device__ __forceinline__ void merge_row(int begin, int end, int slice, PartialOf partial_of, Merged<SLICES> &merged) {
  const int mine = static_cast<int>(threadIdx.x) % PIECES, lane = static_cast<int>(threadIdx.x) % 32;
  merged = nothing_merged<SLICES>();
#pragma unroll 1
  for (int first = begin; first < end; first += PIECES) {
    float2 stats = make_float2(kNoMaximum, 0.f);
    if (first + mine < end) stats = __ldcg(reinterpret_cast<const float2 *>(partial_of(first + mine).stats));
    Four values[PIECES][SLICES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const Four *const partial = reinterpret_cast<const Four *>(partial_of(min(first + i, end - 1)).values);
#pragma unroll
      for (int s = 0; s < SLICES; ++s) values[i][s] = __ldcg(partial + 32 * (slice + s) + lane);
    }
    float top = stats.x;
#pragma unroll
    for (int delta = PIECES / 2; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, delta));
    const float weight = first + mine < end ? exp2_approx(stats.x - top) : 0.f;
    float sum = __fmul_rn(stats.y, weight);  // rounded alike whatever the compiler makes of what follows
#pragma unroll
    for (int delta = PIECES / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    Merged<SLICES> next = nothing_merged<SLICES>();
    next.top = top;
    next.sum = sum;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const float w = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
      for (int s = 0; s < SLICES; ++s) add_weighted(next.value[s], w, widen(values[i][s]));
    }
    merged = sum_of(merged, next);
  }
}

// Items are rows of units where SLICES is D / 128, else slices of 128 values of them; `warps` of them share one. Where
// there is much to merge, what the plan says of a warp's first two items is read while the kernel before is at work;
// elsewhere that is slower (8 x 8K in FP8: 22.7 us, and 23.9 so). In FP32 and of CHUNKS, each of which has the slot of
// its number, it is done always: ptxas spills without it.
template <typename Four, int D, int WARPS, int SLICES, int PIECES, bool CHUNKS>
__device__ __forceinline__ void merge_items(const DecodeParams &p, const MergeList &list, const MergedUnit *units,
                                            int warps, MergeShared<WARPS> &shared) {
  constexpr int kItems = D / 128 / SLICES;  // of a row
  constexpr int kOfRow = row_floats(D, sizeof(Four) == sizeof(uint2));
  constexpr bool kAhead = WARPS > 8 || CHUNKS || sizeof(Four) == sizeof(float4);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int at_once = WARPS / warps, nth = warp % warps, items = list.units * list.rows * kItems;
  const float kv_scale = tensor_scale(p);
  struct Planned {
    MergedUnit unit;
    SequenceRecord record;
  };
  const auto planned_of = [&](int item) {
    const MergedUnit unit = units[min(item / kItems / list.rows, list.units - 1)];
    return Planned{unit, p.sequences[unit.unit / list.tiles]};
  };
  // Rows go round the CTAs, so that few of them are for all SMs; slices of a row, of which much the same is to be
  // known, stay together.
  const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x), group = warp / warps;
  const int mine = SLICES == 1 ? cta * at_once + group : group * ctas + cta, step = at_once * ctas;
  Planned planned[2] = {};
  if constexpr (kAhead) {
    planned[0] = planned_of(mine);
    planned[1] = planned_of(step + mine);
  }
  wait_for_previous_kernel();
#pragma unroll 1
  for (int first = 0; first < items; first += step) {
    const int item = first + mine, slice = item % kItems * SLICES, n = item / kItems % list.rows;
    const Planned at = kAhead && first == 0 ? planned[0] : kAhead && first == step ? planned[1] : planned_of(item);
    const MergedUnit &unit = at.unit;
    const SequenceRecord &record = at.record;
    const int row = unit.unit % list.tiles * list.tile_rows + n;
    const bool exists = item < items && row < record.q_len * p.num_heads, behind = unit.prefix_row >= 0;
    const int token = row / p.num_heads, head = row - token * p.num_heads;
    Merged<SLICES> merged;
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
        const float *const partial =
            p.partials + partial_floats(list.tile_rows, kOfRow, 1) * slot_of(worker, first_worker, CHUNKS ? 0 : 1);
        return PartialRow{partial + place * kOfRow, partial + list.tile_rows * kOfRow + 2 * place};
      };
      merge_row<Four, SLICES, PIECES>(min(nth * share, pieces), min((nth + 1) * share, pieces), slice, partial_of,
                                      merged);
    }
    if constexpr (SLICES == 1) {
      if (warps > 1) {
        shared.from_warp[warp][lane] = merged;
        __syncthreads();
        if (nth == 0) {
          for (int w = 1; w < warps; ++w) merged = sum_of(merged, shared.from_warp[warp + w][lane]);
        }
        __syncthreads();
      }
    }
    if (exists && nth == 0) {
      // What is behind a prefix has seen it.
      const int limit = p.causal ? record.length - record.q_len + token + 1 : record.length;
      const RowInfo info{record.q_begin + token, head, behind ? 1 : limit};
      const OutputRow out(p, info, merged.sum, kv_scale);
      constexpr int kDtype = sizeof(Four) == sizeof(uint2) ? ETAP_BF16 : -1;
      out.template store<kDtype>(slice * 128 + 4 * lane, merged.value);
      if (slice == 0 && lane == 0) out.store_lse(info, merged.top, merged.sum);
    }
  }
}

// Four: as the pieces' values travel. A kernel each, since what is launched behind a decode kernel takes the place of
// its instructions in the caches. CHUNKS, of batch-invariant mode: how many rows there are may say which warp has
// which, but not what is added to what: eight chunks at a time, by one warp.
template <int D, int WARPS, typename Four, bool CHUNKS>
__global__ void __launch_bounds__(32 * WARPS)
    merge_pieces(const __grid_constant__ DecodeParams p, const MergeList *merges) {
  extern __shared__ __align__(16) char shared_raw[];
  MergeShared<WARPS> &shared = *reinterpret_cast<MergeShared<WARPS> *>(shared_raw);
  allow_next_kernel();
  // The plan was read by the kernel before this one, which has begun: it needs no waiting for.
  const MergeList list = *merges;
  const MergedUnit *const units = reinterpret_cast<const MergedUnit *>(merges + 1);
  if (list.units == 0) return wait_for_previous_kernel();
  constexpr int kSlices = D / 128;
  const int all_warps = static_cast<int>(gridDim.x) * WARPS, rows = list.units * list.rows;
  if (4 * rows >= all_warps) {
    merge_items<Four, D, WARPS, kSlices, CHUNKS ? 8 : 4, CHUNKS>(p, list, units, 1, shared);
  } else if constexpr (CHUNKS) {
    merge_items<Four, D, WARPS, 1, 8, CHUNKS>(p, list, units, 1, shared);
  } else {
    int warps = 1;
    while (warps < WARPS && rows * kSlices * warps * 2 <= all_warps && warps * 8 < list.most_pieces) warps *= 2;
    merge_items<Four, D, WARPS, 1, 8, CHUNKS>(p, list, units, warps, shared);
  }
}

template <int D, int WARPS, typename Four, bool CHUNKS>
static Kernel kernel_for() {
  return {reinterpret_cast<const void *>(&merge_pieces<D, WARPS, Four, CHUNKS>), 32 * WARPS,
          sizeof(MergeShared<WARPS>)};
}
template <int D>
static Kernel kernel_of(bool narrow, bool chunks, bool much) {
  if (!narrow) return chunks ? kernel_for<D, 8, float4, true>() : kernel_for<D, 8, float4, false>();
  if (chunks) return kernel_for<D, 8, uint2, true>();
  return much ? kernel_for<D, 16, uint2, false>() : kernel_for<D, 8, uint2, false>();  // FP32 has no registers for more
}

Kernel merge_pieces_kernel(const etap_problem &problem, const etap_decision &decision) {
  // Fewer units than half of the workers are cut, whatever lengths are usual, and of large tiles there is much to
  // merge.
  const bool much = decision.tile_rows >= 32 && 2 * int64_t{problem.batch} * decision.num_tiles <= decision.num_workers;
  const bool narrow = travels_narrow(problem), chunks = (problem.flags & ETAP_BATCH_INVARIANT) != 0;
  switch (problem.d_latent) {
    case 512:
      return kernel_of<512>(narrow, chunks, much);
    case 256:
      return kernel_of<256>(narrow, chunks, much);
    default:
      return Kernel{};
  }
}

}  // namespace etap::sm90
