// Merges the partial results of a cut unit: the CTAs that share it do, each its part of the rows, once all parts are
// there. For 256 consumer threads.
//
//     CTA 3        CTA 4        CTA 5           each writes rows of sums to L2, and counts
//     part 0       part 1       part 2
//       |            |            |             waits for the last one (a CTA goes through all of its pieces first)
//     rows 0-5     rows 6-10    rows 11-15      out = sum_i w_i O_i / sum_i w_i l_i,   w_i = 2^(m_i - max m)
//
// Reason for the shape. A second kernel that merges costs 3 us and more (docs/tuning-log.md), and where one CTA merged
// all, the others would look on. Waiting must not need the others to be running, though: kernels of two streams may
// hold the SMs that the other's CTAs wait for. So nobody waits for long: a CTA that gives up says so, and whoever
// brings the last part, which waits for nobody, takes its rows over. The rows' sums are the same whoever merges them,
// and parts are added in their order: the same bits on every run.
//
// A counter holds the parts that have come in all runs since the plan, and in its upper half the CTAs that gave up.
#pragma once

#include "output.cuh"

namespace etap::sm90 {

constexpr long long kPatience = 100000;  // ns

// The cut units of a CTA, at most its first and its last, in shared memory.
struct CutUnits {
  PieceEnd end[2];
  int count;
  int ready;
};

// Rows of several parts, ITEMS float4s a thread, PARTS parts of each at once.
template <int D, int ITEMS, int PARTS>
__device__ __forceinline__ void merge_items(const DecodeParams &p, const PieceEnd &unit, int begin, int end) {
  constexpr int kOfRow = D / 4;
  const float kv_scale = tensor_scale(p);
#pragma unroll 1
  for (int base = begin + static_cast<int>(threadIdx.x) - 128; base < end; base += ITEMS * kConsumers) {
    float4 total[ITEMS];
    RowSums sums[ITEMS];
    const auto index_of = [&](int item) {
      const int index = base + item * kConsumers;
      return index < end ? index : base;
    };
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      total[k] = make_float4(0.f, 0.f, 0.f, 0.f);
      sums[k] = RowSums{kNoMaximum, 0.f};
    }
#pragma unroll 1
    for (int first = 0; first < unit.parts; first += PARTS) {
      float4 v[ITEMS][PARTS];
      float2 s[ITEMS][PARTS];
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int n = index_of(k) / kOfRow, d = index_of(k) % kOfRow * 4;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
          const int part = min(first + i, unit.parts - 1);
          const int row = (part == 0 ? unit.first_row : unit.next_row + (part - 1) * unit.row_step) + n;
          v[k][i] = __ldcg(reinterpret_cast<const float4 *>(p.partials + static_cast<int64_t>(row) * D + d));
          s[k][i] = __ldcg(p.stats + row);
        }
      }
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        float top = sums[k].top;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) top = fmaxf(top, s[k][i].x);
        const float before = exp2_approx(sums[k].top - top);
        sums[k] = RowSums{top, sums[k].sum * before};
        total[k] = make_float4(total[k].x * before, total[k].y * before, total[k].z * before, total[k].w * before);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
          if (first + i >= unit.parts) continue;
          const float weight = exp2_approx(s[k][i].x - top);
          sums[k].sum += weight * s[k][i].y;
          total[k] = make_float4(total[k].x + weight * v[k][i].x, total[k].y + weight * v[k][i].y,
                                 total[k].z + weight * v[k][i].z, total[k].w + weight * v[k][i].w);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      if (base + k * kConsumers >= end) continue;
      const int n = index_of(k) / kOfRow, d = index_of(k) % kOfRow * 4, in_sequence = unit.row_begin + n;
      const int token = in_sequence / p.num_heads, head = in_sequence - token * p.num_heads;
      const int limit = seen_by(unit.sequence, token, p.causal);
      const int64_t q_row = unit.sequence.q_begin + token;
      store_values(p, q_row, head, d, {total[k].x, total[k].y, total[k].z, total[k].w}, sums[k], limit, kv_scale);
      if (d == 0) store_lse(p, q_row, head, sums[k], limit);
    }
  }
}

// The rows that belong to parts part_begin .. part_end - 1.
template <int D>
__device__ __forceinline__ void merge_rows(const DecodeParams &p, const PieceEnd &unit, int part_begin, int part_end) {
  const int items = unit.rows * (D / 4);
  const int begin = items * part_begin / unit.parts, end = items * part_end / unit.parts;
  if (unit.parts <= 4) {
    merge_items<D, 2, 4>(p, unit, begin, end);
  } else {
    merge_items<D, 1, 8>(p, unit, begin, end);
  }
}

// After a piece's results are written, and with the barrier that ends it: rows, Q, sums and `end` may be written over
// after it.
template <int D>
__device__ __forceinline__ void close_piece(const DecodeParams &p, const PieceEnd &end, CutUnits &cut) {
  const bool announces = end.partial_row >= 0 && end.block_end == end.share_end;
  const int mine = end.part + 1 - end.first_part;
  const bool all_mine = mine == end.parts;
  named_barrier<kBarrierConsumers, kConsumers>();
  if (!announces) return;
  if (all_mine) {
    merge_rows<D>(p, end, 0, end.parts);
    named_barrier<kBarrierConsumers, kConsumers>();
  } else if (threadIdx.x == 128) {
    PieceEnd &kept = cut.end[cut.count++];
    kept = end;
    const unsigned long long before = count_parts(p.counters + end.counter, mine);
    const uint32_t came = static_cast<uint32_t>(before);
    kept.target = (came / end.parts + 1) * end.parts;
    kept.left = came + mine == kept.target ? static_cast<int>(before >> 32) : -1;
  }
}

// For one thread. False: it has given up, and another CTA takes its rows over.
__device__ __forceinline__ bool wait_for_parts(const DecodeParams &p, const PieceEnd &unit) {
  unsigned long long *const counter = p.counters + unit.counter;
  const auto complete = [&unit](unsigned long long count) {
    return static_cast<int>(static_cast<uint32_t>(count) - unit.target) >= 0;
  };
  if (unit.left >= 0) return true;
  const long long begin = nanoseconds();
  do {
    if (complete(load_acquire(counter))) return true;
  } while (nanoseconds() - begin < kPatience);
  const int tile_rows = p.group_rows / p.team;
  const auto flag_of = [&](int part) {
    return p.flags + (part == 0 ? unit.first_row : unit.next_row + (part - 1) * unit.row_step) / tile_rows;
  };
  for (int part = unit.first_part; part <= unit.part; ++part) *flag_of(part) = 1;
  if (!complete(count_parts(counter, 1ull << 32))) return false;
  count_parts(counter, ~0ull << 32);  // the last part came meanwhile, and whoever brought it doesn't know of this
  for (int part = unit.first_part; part <= unit.part; ++part) *flag_of(part) = 0;
  return true;
}

// When all pieces are done.
template <int D>
__device__ __forceinline__ void merge_cut_units(const DecodeParams &p, CutUnits &cut) {
  named_barrier<kBarrierConsumers, kConsumers>();
#pragma unroll 1
  for (int i = 0; i < cut.count; ++i) {
    const PieceEnd &unit = cut.end[i];
    if (threadIdx.x == 128) cut.ready = wait_for_parts(p, unit);
    named_barrier<kBarrierConsumers, kConsumers>();
    if (cut.ready) merge_rows<D>(p, unit, unit.first_part, unit.part + 1);
    if (unit.left > 0) {  // CTAs gave up before this one brought the last part
      const int tile_rows = p.group_rows / p.team;
#pragma unroll 1
      for (int part = 0; part < unit.parts; ++part) {
        uint32_t *const flag =
            p.flags + (part == 0 ? unit.first_row : unit.next_row + (part - 1) * unit.row_step) / tile_rows;
        const bool taken = __ldcg(flag) != 0;
        named_barrier<kBarrierConsumers, kConsumers>();  // all have read it
        if (taken) merge_rows<D>(p, unit, part, part + 1);
        if (threadIdx.x == 128) *flag = 0;
      }
      if (threadIdx.x == 128)
        count_parts(p.counters + unit.counter, 0ull - (static_cast<unsigned long long>(unit.left) << 32));
    }
    named_barrier<kBarrierConsumers, kConsumers>();
  }
}

}  // namespace etap::sm90
