#include "sm90/decode_params.h"

#include <algorithm>
#include <climits>
#include <cmath>

#include "kv_format.h"

namespace etap::sm90 {
namespace {

int log2_of(int power_of_two) { return power_of_two <= 1 ? 0 : 1 + log2_of(power_of_two / 2); }

}  // namespace

KvCopy kv_copy(const etap_problem &problem) {
  const KvFormat &format = kv_format(problem);
  if (!format.e4m3) return problem.page_size < 8 || problem.topk > 0 ? KvCopy::kGather : KvCopy::kTma;
  switch (format.scales) {
    case GroupScales::kNone:
      return KvCopy::kE4m3;
    case GroupScales::kBeside:
#ifdef ETAP_MORE_FORMATS
    case GroupScales::kAtEnd:
#endif
      return KvCopy::kE4m3Group;
    case GroupScales::kInRow:
      break;
  }
  return KvCopy::kE4m3_656;
}

KvBoxes kv_boxes(const etap_problem &problem, const etap_run_args &args) {
  KvBoxes kv{};
  kv.value_bytes = kv_format(problem).element_bytes;
  const uint64_t value_bytes = static_cast<uint64_t>(kv.value_bytes);
  kv.dims[0] = static_cast<uint64_t>(kv_row_bytes(problem)) / value_bytes;
  kv.dims[1] = static_cast<uint64_t>(problem.page_size);
  kv.dims[2] = args.num_pages > 0 ? static_cast<uint64_t>(args.num_pages) : uint64_t{1} << 31;
  // A stride that is never taken must still be a legal one.
  const uint64_t row_bytes = static_cast<uint64_t>(args.kv_row_stride) * value_bytes,
                 page_bytes = static_cast<uint64_t>(args.kv_page_stride) * value_bytes;
  kv.strides[0] = row_bytes > 0 ? row_bytes : kv.dims[0] * value_bytes;
  kv.strides[1] = page_bytes > 0 ? page_bytes : kv.dims[0] * value_bytes;
  kv.box[0] = 64;
  kv.box[1] = static_cast<uint32_t>(std::min(problem.page_size, kBlockTokens));
  return kv;
}

DecodeParams decode_params(const etap_plan &plan, const etap_run_args &args, const Workspace &layout) {
  const etap_problem &problem = plan.problem;
  DecodeParams p{};
  char *const workspace = static_cast<char *>(args.workspace);
  p.records = reinterpret_cast<const WorkerRecord *>(workspace + layout.records);
  p.sequences = reinterpret_cast<const SequenceRecord *>(workspace + layout.sequences);
  p.counters = reinterpret_cast<int *>(workspace + layout.counters);
  p.partials = reinterpret_cast<float *>(workspace + layout.partials);
  p.q_rows = reinterpret_cast<const int32_t *>(workspace + layout.q_rows);
  p.kept = reinterpret_cast<float *>(workspace + layout.kept);
  p.q_bf16 = problem.q_dtype == ETAP_BF16;
  p.q_nope = args.q_nope;
  p.q_rope = args.q_rope;
  p.q_nope_row_stride = args.q_nope_row_stride;
  p.q_nope_head_stride = args.q_nope_head_stride;
  p.q_rope_row_stride = args.q_rope_row_stride;
  p.q_rope_head_stride = args.q_rope_head_stride;
  constexpr int64_t kVector = 8;  // 16 bytes
  p.q_vectors =
      args.q_nope_row_stride % kVector == 0 && args.q_nope_head_stride % kVector == 0 &&
      (problem.d_rope == 0 || (args.q_rope_row_stride % kVector == 0 && args.q_rope_head_stride % kVector == 0));
  p.kv = static_cast<const char *>(args.kv_cache);
  const int64_t kv_bytes = kv_format(problem).element_bytes;
  p.kv_page_bytes = args.kv_page_stride * kv_bytes;
  p.kv_row_bytes = args.kv_row_stride * kv_bytes;
  p.num_pages = args.kv_cache == nullptr ? 0u
                : args.num_pages > 0     ? static_cast<uint32_t>(args.num_pages)
                                         : uint32_t{1} << 31;
  p.block_table = args.block_table;
  p.block_table_stride = args.block_table_stride;
  const int64_t columns = args.block_table == nullptr || args.kv_cache == nullptr ? 0
                          : args.block_table_columns > 0                          ? args.block_table_columns
                                                                                  : INT_MAX;
  p.token_limit = columns > INT_MAX / problem.page_size ? INT_MAX : static_cast<int>(columns) * problem.page_size;
  p.page_shift = problem.topk > 0 ? 0 : log2_of(problem.page_size);
  bool gapless = false;  // lists over a pool whose slots are one stride apart: pages of one token
  if (problem.topk > 0) {
    p.lists = true;
    p.block_table = args.slots;
    p.block_table_stride = args.slots_stride;
    p.token_limit = args.kv_cache == nullptr ? 0 : problem.topk;
    p.slots_a_page = static_cast<uint32_t>(problem.page_size);
    const bool scales_apart = args.kv_group_scales != nullptr &&
                              args.kv_group_scales_page_stride != problem.page_size * args.kv_group_scales_row_stride;
    gapless = args.kv_page_stride == problem.page_size * args.kv_row_stride && !scales_apart;
    if (gapless) {
      const int64_t slots = static_cast<int64_t>(p.num_pages) * problem.page_size;
      p.num_pages = static_cast<uint32_t>(std::min(slots, INT64_C(1) << 31));
      p.kv_page_bytes = p.kv_row_bytes;
      p.slots_a_page = 1;
    }
  }
  p.kv_scale_ptr = args.kv_scale_ptr;
  p.kv_scale = args.kv_scale == 0.f ? 1.f : args.kv_scale;
  p.kv_group_scales = args.kv_group_scales;
  p.kv_group_scales_page_stride = gapless ? args.kv_group_scales_row_stride : args.kv_group_scales_page_stride;
  p.kv_group_scales_row_stride = args.kv_group_scales_row_stride;
#ifdef ETAP_MORE_FORMATS
  if (kv_format(problem).scales == GroupScales::kAtEnd) {
    p.kv_group_scales = reinterpret_cast<const float *>(p.kv + problem.d_latent + problem.d_rope);
    p.kv_group_scales_page_stride = p.kv_page_bytes / 4;
    p.kv_group_scales_row_stride = p.kv_row_bytes / 4;
  }
#endif
  p.out = args.out;
  p.out_row_stride = args.out_row_stride;
  p.out_head_stride = args.out_head_stride;
  p.lse = args.lse;
  p.lse_row_stride = args.lse_row_stride;
  p.lse_head_stride = args.lse_head_stride;
  p.scale_log2 = args.softmax_scale * 1.4426950408889634f;
  p.lse_factor = args.lse_base == ETAP_LSE_BASE_2 ? 1.f : 0.6931471805599453f;
  p.empty_lse = args.empty_lse == ETAP_EMPTY_LSE_PLUS_INF ? INFINITY : -INFINITY;
  p.num_heads = Divisor(problem.num_heads);
  p.batch = problem.batch;
  p.merged_after = plan.decision.cluster_size == 1;
  p.total_q = (problem.flags & ETAP_RAGGED) != 0 ? problem.total_q : 0;
  p.tiles = Divisor(plan.decision.num_tiles);
  p.chunks_log2 = std::max(layout.shape.chunks_log2, 0);
  p.out_dtype = problem.out_dtype;
  p.narrow = layout.shape.narrow;
  p.partial_row = row_floats(problem.d_latent, p.narrow);
  const int64_t out_bytes = problem.out_dtype == ETAP_FP32 ? 4 : 2;
  p.out_vectors = reinterpret_cast<uintptr_t>(args.out) % (4 * out_bytes) == 0 && args.out_row_stride % 4 == 0 &&
                  args.out_head_stride % 4 == 0;
  p.causal = (problem.flags & ETAP_CAUSAL) != 0;
  p.tree_mask = (problem.flags & ETAP_TREE_MASK) != 0 ? args.tree_mask : nullptr;
  p.tree_mask_stride = args.tree_mask_stride;
  return p;
}

DecodeParams sharing_params(const DecodeParams &params, void *workspace, const Workspace &layout) {
  DecodeParams p = params;
  p.records = at<const WorkerRecord>(workspace, layout.sharing_records);
  p.tiles = Divisor(1);
  p.merged_after = true;
  p.second = true;
  return p;
}

}  // namespace etap::sm90
