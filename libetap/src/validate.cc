#include "validate.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>

#include "kv_format.h"

namespace etap {
namespace {

constexpr int32_t kMaxBatch = 65536;
constexpr int32_t kMaxTopk = 65536;
constexpr int32_t kMaxDrafts = 256;
constexpr uint32_t kMaxStructSize = 4096;  // a larger `size` is an uninitialised field, not a newer caller
constexpr uintptr_t kDataAlignment = 16;
constexpr uintptr_t kWorkspaceAlignment = 256;

static_assert(sizeof(etap_device_info) >= first_released<etap_device_info>::size, "structs only grow");
static_assert(sizeof(etap_problem) >= first_released<etap_problem>::size, "structs only grow");
static_assert(sizeof(etap_decision) >= first_released<etap_decision>::size, "structs only grow");
static_assert(sizeof(etap_plan_args) >= first_released<etap_plan_args>::size, "structs only grow");
static_assert(sizeof(etap_shared) >= first_released<etap_shared>::size, "structs only grow");
static_assert(sizeof(etap_run_args) >= first_released<etap_run_args>::size, "structs only grow");
static_assert(sizeof(etap_merge_args) >= first_released<etap_merge_args>::size, "structs only grow");

etap_status invalid(const char *name, int64_t value, const char *allowed) {
  return fail(ETAP_INVALID_ARGUMENT, "%s is %" PRId64 "; allowed: %s", name, value, allowed);
}

etap_status check_range(const char *name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT, "%s is %" PRId64 "; allowed: %" PRId64 " to %" PRId64, name, value, low, high);
}

etap_status check_pointer(const char *name, const void *pointer, uintptr_t alignment) {
  if (pointer == nullptr) return fail(ETAP_INVALID_ARGUMENT, "%s is NULL; it must point to data", name);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT, "%s is %p; it must be aligned to %d bytes", name, pointer,
              static_cast<int>(alignment));
}

etap_status check_null(const char *name, const void *pointer, const char *why) {
  if (pointer == nullptr) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT, "%s is %p; it must be NULL %s", name, pointer, why);
}

etap_status check_stride(const char *name, int64_t stride, int64_t smallest, const char *what) {
  if (stride < 0) return invalid(name, stride, "0 or more (strides are never negative)");
  if (stride >= smallest) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT, "%s is %" PRId64 "; allowed: at least %" PRId64 ", %s", name, stride, smallest,
              what);
}

etap_status check_multiple_of_16_bytes(const char *name, int64_t stride, int64_t element_bytes) {
  if (stride % (16 / element_bytes) == 0) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT, "%s is %" PRId64 " elements of %d bytes; allowed: multiples of 16 bytes", name,
              stride, static_cast<int>(element_bytes));
}

etap_status check_finite(const char *name, float value) {
  if (isfinite(value)) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT, "%s is %g; it must be finite", name, static_cast<double>(value));
}

// Results [rows, num_heads, d] must not lie on each other: whichever of the two dimensions is the inner one.
etap_status check_output_strides(const char *row_name, int64_t row_stride, int64_t rows, const char *head_name,
                                 int64_t head_stride, int64_t heads, int64_t d) {
  ETAP_CHECK(check_stride(row_name, row_stride, rows > 1 ? d : 0, "so that rows do not overlap"));
  ETAP_CHECK(check_stride(head_name, head_stride, heads > 1 ? d : 0, "so that heads do not overlap"));
  if (rows == 1 || heads == 1) return ETAP_OK;
  const bool rows_outside = row_stride >= head_stride;
  const int64_t outer = rows_outside ? row_stride : head_stride;
  const int64_t inner = rows_outside ? head_stride : row_stride;
  const int64_t inner_count = rows_outside ? heads : rows;
  if (inner <= (INT64_MAX - d) / inner_count && outer >= (inner_count - 1) * inner + d) return ETAP_OK;
  return fail(ETAP_INVALID_ARGUMENT,
              "%s is %" PRId64 " and %s is %" PRId64 "; with %" PRId64 " rows of %" PRId64 " heads of %" PRId64
              " values the results would overlap",
              row_name, row_stride, head_name, head_stride, rows, heads, d);
}

etap_status check_workspace(const etap_plan &plan, const void *workspace, size_t bytes) {
  ETAP_CHECK(check_pointer("workspace", workspace, kWorkspaceAlignment));
  if (bytes >= plan.workspace_bytes) return ETAP_OK;
  return fail(ETAP_WORKSPACE_TOO_SMALL, "workspace_bytes is %zu; allowed: at least %zu, as etap_workspace_size says",
              bytes, plan.workspace_bytes);
}

etap_status check_batch(const etap_plan &plan, int32_t batch) {
  if (batch == plan.problem.batch) return ETAP_OK;
  return fail(ETAP_PLAN_MISMATCH, "batch is %d, but the plan was made for %d", batch, plan.problem.batch);
}

int64_t element_bytes(int32_t dtype) { return dtype == ETAP_FP32 ? 4 : 2; }

// Strides between pages and between tokens, of `values` elements each. Where there is only one, its stride is never
// taken.
etap_status check_token_strides(const char *page_name, int64_t page_stride, int64_t num_pages, const char *row_name,
                                int64_t row_stride, int64_t page_size, int64_t values, const char *what) {
  ETAP_CHECK(check_stride(page_name, page_stride, num_pages == 1 ? 0 : values, what));
  return check_stride(row_name, row_stride, page_size == 1 ? 0 : values, what);
}

// NULL is a pool of no pages, in which no stride is taken.
etap_status check_kv_cache(const etap_problem &p, const etap_run_args &args) {
  if (args.kv_cache == nullptr) {
    if (args.num_pages == 0) return ETAP_OK;
    return fail(ETAP_INVALID_ARGUMENT, "kv_cache is NULL and num_pages is %" PRId64 "; allowed: 0 pages, or data",
                args.num_pages);
  }
  ETAP_CHECK(check_pointer("kv_cache", args.kv_cache, kDataAlignment));
  ETAP_CHECK(check_range("num_pages", args.num_pages, 0, INT64_C(1) << 31));
  const int64_t element_bytes = kv_format(p).element_bytes, row = kv_row_bytes(p) / element_bytes;
  ETAP_CHECK(check_token_strides("kv_page_stride", args.kv_page_stride, args.num_pages, "kv_row_stride",
                                 args.kv_row_stride, p.page_size, row, "one KV row"));
  ETAP_CHECK(check_multiple_of_16_bytes("kv_page_stride", args.kv_page_stride, element_bytes));
  return check_multiple_of_16_bytes("kv_row_stride", args.kv_row_stride, element_bytes);
}

etap_status check_group_scales(const etap_problem &p, const etap_run_args &args) {
  if (kv_format(p).scales != GroupScales::kBeside)
    return check_null("kv_group_scales", args.kv_group_scales, "unless kv_format is ETAP_KV_E4M3_GROUP");
  if (args.kv_cache == nullptr) return ETAP_OK;
  ETAP_CHECK(check_pointer("kv_group_scales", args.kv_group_scales, alignof(float)));
  return check_token_strides("kv_group_scales_page_stride", args.kv_group_scales_page_stride, args.num_pages,
                             "kv_group_scales_row_stride", args.kv_group_scales_row_stride, p.page_size,
                             p.d_latent / 128, "the scales of one token");
}

etap_status check_slots(const etap_run_args &args) {
  ETAP_CHECK(check_null("block_table", args.block_table, "with topk"));
  if (args.block_table_columns != 0) return invalid("block_table_columns", args.block_table_columns, "0 with topk");
  ETAP_CHECK(check_pointer("slots", args.slots, alignof(int32_t)));
  return check_stride("slots_stride", args.slots_stride, 0, "");
}

etap_status check_tree_mask(const etap_problem &p, const etap_run_args &args) {
  if (!(p.flags & ETAP_TREE_MASK)) return check_null("tree_mask", args.tree_mask, "without ETAP_TREE_MASK");
  ETAP_CHECK(check_pointer("tree_mask", args.tree_mask, alignof(uint32_t)));
  return check_stride("tree_mask_stride", args.tree_mask_stride, 0, "");
}

// NULL is a table of no columns.
template <typename Args>
etap_status check_block_table(const Args &args) {
  if (args.block_table == nullptr) {
    if (args.block_table_columns == 0) return ETAP_OK;
    return fail(ETAP_INVALID_ARGUMENT,
                "block_table is NULL and block_table_columns is %" PRId64 "; allowed: 0 columns, or data",
                args.block_table_columns);
  }
  ETAP_CHECK(check_pointer("block_table", args.block_table, alignof(int32_t)));
  ETAP_CHECK(check_stride("block_table_stride", args.block_table_stride, 0, ""));
  return check_range("block_table_columns", args.block_table_columns, 0, INT64_C(1) << 31);
}

}  // namespace

etap_status check_struct(const char *type, const void *caller, uint32_t known_size, uint32_t first_size,
                         bool tail_must_be_zero) {
  if (caller == nullptr) return fail(ETAP_INVALID_ARGUMENT, "the %s is NULL; it must point to a struct", type);
  const uint32_t size = *static_cast<const uint32_t *>(caller);
  if (size < first_size || size > kMaxStructSize)
    return fail(ETAP_ABI_MISMATCH, "%s.size is %u; allowed: %u (sizeof(%s)), or what another release has, %u to %u",
                type, size, known_size, type, first_size, kMaxStructSize);
  if (!tail_must_be_zero) return ETAP_OK;
  for (uint32_t i = known_size; i < size; ++i)
    if (static_cast<const char *>(caller)[i] != 0)
      return fail(ETAP_ABI_MISMATCH,
                  "%s.size is %u and byte %u is set; this libetap knows %u bytes of it, the rest must be 0", type, size,
                  i, known_size);
  return ETAP_OK;
}

etap_status validate_problem(const etap_problem &p) {
  ETAP_CHECK(check_range("num_heads", p.num_heads, 1, 128));
  bool widths_known = false;
#define WIDTHS(latent, rope) widths_known |= p.d_latent == latent && p.d_rope == rope;
#include "widths.def"
#undef WIDTHS
#define WIDTHS(latent, rope) ", (" #latent ", " #rope ")"
  static constexpr char kWidths[] =
#include "widths.def"
      ;
#undef WIDTHS
  if (!widths_known)
    return fail(ETAP_INVALID_ARGUMENT, "(d_latent, d_rope) is (%d, %d); allowed: %s", p.d_latent, p.d_rope,
                kWidths + 2);
  if (p.topk > 0 && p.page_size < 1) return invalid("page_size", p.page_size, "1 and more with topk");
  if (p.topk <= 0 && (p.page_size < 1 || p.page_size > 256 || (p.page_size & (p.page_size - 1)) != 0))
    return invalid("page_size", p.page_size, "a power of two from 1 to 256");
  if (p.q_dtype != ETAP_BF16 && p.q_dtype != ETAP_FP16)
    return invalid("q_dtype", p.q_dtype, "ETAP_BF16 (0), ETAP_FP16 (1)");
  if (p.kv_format < 0 || p.kv_format >= kNumFormats)
    return invalid("kv_format", p.kv_format, "ETAP_KV_BF16 (0) to ETAP_KV_E4M3_528 (5)");
  if ((p.kv_format == ETAP_KV_BF16 && p.q_dtype != ETAP_BF16) ||
      (p.kv_format == ETAP_KV_FP16 && p.q_dtype != ETAP_FP16))
    return fail(ETAP_INVALID_ARGUMENT, "q_dtype is %d and kv_format is %d; a 16-bit KV cache must have the type of q",
                p.q_dtype, p.kv_format);
  if (p.kv_format == ETAP_KV_E4M3_656 && (p.d_latent != 512 || p.d_rope != 64))
    return fail(ETAP_INVALID_ARGUMENT, "(d_latent, d_rope) is (%d, %d); allowed with ETAP_KV_E4M3_656: (512, 64)",
                p.d_latent, p.d_rope);
  if (p.kv_format == ETAP_KV_E4M3_528 && (p.d_latent != 512 || p.d_rope != 0))
    return fail(ETAP_INVALID_ARGUMENT, "(d_latent, d_rope) is (%d, %d); allowed with ETAP_KV_E4M3_528: (512, 0)",
                p.d_latent, p.d_rope);
  ETAP_CHECK(check_range("out_dtype", p.out_dtype, ETAP_BF16, ETAP_FP32));
  ETAP_CHECK(check_range("batch", p.batch, 1, kMaxBatch));
  ETAP_CHECK(check_range("max_query_len", p.max_query_len, 1, INT32_MAX / kMaxBatch));
  if (p.flags & ~(ETAP_CAUSAL | ETAP_RAGGED | ETAP_BATCH_INVARIANT | ETAP_TREE_MASK | ETAP_SHARED_PREFIXES |
                  ETAP_FP8_FAST))
    return invalid("flags", p.flags,
                   "ETAP_CAUSAL (1), ETAP_RAGGED (2), ETAP_BATCH_INVARIANT (4), ETAP_TREE_MASK (8), "
                   "ETAP_SHARED_PREFIXES (16), ETAP_FP8_FAST (32), or-ed");
  if ((p.flags & ETAP_SHARED_PREFIXES) && (p.flags & ETAP_BATCH_INVARIANT))
    return invalid(
        "flags", p.flags,
        "no ETAP_BATCH_INVARIANT (4) with ETAP_SHARED_PREFIXES (16), as what is shared depends on the batch");
  if (p.flags & ETAP_TREE_MASK) {
    if (p.flags & ETAP_CAUSAL)
      return invalid("flags", p.flags, "no ETAP_CAUSAL (1) with ETAP_TREE_MASK (8), whose bits say what a row sees");
    if (p.max_query_len > kMaxDrafts) return invalid("max_query_len", p.max_query_len, "1 to 256 with ETAP_TREE_MASK");
  }
  if (p.flags & ETAP_RAGGED) {
    ETAP_CHECK(check_range("total_q", p.total_q, 1, INT32_MAX));
  } else if (p.total_q != 0) {
    return invalid("total_q", p.total_q, "0 without ETAP_RAGGED");
  }
  const int64_t rows = p.flags & ETAP_RAGGED ? p.total_q : static_cast<int64_t>(p.batch) * p.max_query_len;
  if (rows * p.num_heads > INT32_MAX)
    return fail(ETAP_INVALID_ARGUMENT, "num_heads is %d with %" PRId64 " query rows; allowed: a product below 2^31",
                p.num_heads, rows);
  ETAP_CHECK(check_range("num_sms", p.num_sms, 0, INT32_MAX));
  if (p.force_tile < 0 || p.force_tile % 8 != 0) return invalid("force_tile", p.force_tile, "0 or a multiple of 8");
  ETAP_CHECK(check_range("force_cluster", p.force_cluster, 0, 8));
  if (p.reserved != 0) return invalid("reserved", p.reserved, "0");
  ETAP_CHECK(check_range("topk", p.topk, 0, kMaxTopk));
  if (p.topk == 0) return ETAP_OK;
  if (p.max_query_len != 1) return invalid("max_query_len", p.max_query_len, "1 with topk, whose lists are one a row");
  if (p.flags & ~ETAP_BATCH_INVARIANT)
    return invalid("flags", p.flags, "0 or ETAP_BATCH_INVARIANT (4) with topk, whose lists say what a row sees");
  return ETAP_OK;
}

etap_status validate_plan_args(const etap_plan &plan, const etap_plan_args &args) {
  ETAP_CHECK(check_batch(plan, args.batch));
  if (plan.problem.topk == 0 || args.cache_seqlens != nullptr)
    ETAP_CHECK(check_pointer("cache_seqlens", args.cache_seqlens, alignof(int32_t)));
  if (plan.problem.flags & ETAP_RAGGED) {
    ETAP_CHECK(check_pointer("cu_seqlens_q", args.cu_seqlens_q, alignof(int32_t)));
  } else {
    ETAP_CHECK(check_null("cu_seqlens_q", args.cu_seqlens_q, "without ETAP_RAGGED"));
  }
  if (plan.problem.flags & ETAP_SHARED_PREFIXES) {
    ETAP_CHECK(check_block_table(args));
  } else {
    ETAP_CHECK(check_null("block_table", args.block_table, "without ETAP_SHARED_PREFIXES"));
  }
  return check_workspace(plan, args.workspace, args.workspace_bytes);
}

etap_status validate_shared(const etap_plan &plan, const void *workspace, size_t workspace_bytes) {
  if (!(plan.problem.flags & ETAP_SHARED_PREFIXES))
    return invalid("flags", plan.problem.flags, "what has ETAP_SHARED_PREFIXES (16), for there is nothing shared else");
  return check_workspace(plan, workspace, workspace_bytes);
}

etap_status validate_run_args(const etap_plan &plan, const etap_run_args &args) {
  const etap_problem &p = plan.problem;
  ETAP_CHECK(check_batch(plan, args.batch));

  ETAP_CHECK(check_pointer("q_nope", args.q_nope, kDataAlignment));
  ETAP_CHECK(check_stride("q_nope_row_stride", args.q_nope_row_stride, 0, ""));
  ETAP_CHECK(check_stride("q_nope_head_stride", args.q_nope_head_stride, 0, ""));
  if (p.d_rope > 0) {
    ETAP_CHECK(check_pointer("q_rope", args.q_rope, kDataAlignment));
    ETAP_CHECK(check_stride("q_rope_row_stride", args.q_rope_row_stride, 0, ""));
    ETAP_CHECK(check_stride("q_rope_head_stride", args.q_rope_head_stride, 0, ""));
  } else {
    ETAP_CHECK(check_null("q_rope", args.q_rope, "when d_rope is 0"));
  }

  ETAP_CHECK(check_kv_cache(p, args));
  if (p.topk > 0) {
    ETAP_CHECK(check_slots(args));
  } else {
    ETAP_CHECK(check_null("slots", args.slots, "without topk"));
    ETAP_CHECK(check_block_table(args));
  }
  ETAP_CHECK(check_tree_mask(p, args));

  ETAP_CHECK(check_finite("softmax_scale", args.softmax_scale));
  constexpr float kLargestScale = FLT_MAX / 1.5f;  // the kernels count in powers of two: times log2(e), 1.4427
  if (!(fabsf(args.softmax_scale) <= kLargestScale))
    return fail(ETAP_INVALID_ARGUMENT,
                "softmax_scale is %g; allowed: up to %g, its product with log2(e) must be finite",
                static_cast<double>(args.softmax_scale), static_cast<double>(kLargestScale));
  ETAP_CHECK(check_finite("kv_scale", args.kv_scale));
  if (!kv_format(p).e4m3) {
    if (args.kv_scale != 0.0f && args.kv_scale != 1.0f)
      return fail(ETAP_INVALID_ARGUMENT, "kv_scale is %g; allowed with a 16-bit KV cache: 0 or 1",
                  static_cast<double>(args.kv_scale));
    ETAP_CHECK(check_null("kv_scale_ptr", args.kv_scale_ptr, "with a 16-bit KV cache"));
  } else if (args.kv_scale_ptr != nullptr) {
    ETAP_CHECK(check_pointer("kv_scale_ptr", args.kv_scale_ptr, alignof(float)));
  }
  ETAP_CHECK(check_group_scales(p, args));

  ETAP_CHECK(check_pointer("out", args.out, static_cast<uintptr_t>(element_bytes(p.out_dtype))));
  ETAP_CHECK(check_output_strides("out_row_stride", args.out_row_stride, p.total_q, "out_head_stride",
                                  args.out_head_stride, p.num_heads, p.d_latent));
  ETAP_CHECK(check_range("lse_base", args.lse_base, ETAP_LSE_BASE_E, ETAP_LSE_BASE_2));
  if (args.lse != nullptr) {
    ETAP_CHECK(check_pointer("lse", args.lse, alignof(float)));
    ETAP_CHECK(check_output_strides("lse_row_stride", args.lse_row_stride, p.total_q, "lse_head_stride",
                                    args.lse_head_stride, p.num_heads, 1));
  }
  ETAP_CHECK(check_range("empty_lse", args.empty_lse, ETAP_EMPTY_LSE_MINUS_INF, ETAP_EMPTY_LSE_PLUS_INF));
  return check_workspace(plan, args.workspace, args.workspace_bytes);
}

etap_status validate_merge_args(const etap_merge_args &args) {
  ETAP_CHECK(check_range("num_parts", args.num_parts, 1, INT32_MAX));
  ETAP_CHECK(check_range("rows", args.rows, 0, INT32_MAX));
  ETAP_CHECK(check_range("num_heads", args.num_heads, 1, INT32_MAX));
  if (args.d < 8 || args.d > 1024 || args.d % 8 != 0) return invalid("d", args.d, "a multiple of 8, 8 to 1024");
  ETAP_CHECK(check_range("dtype", args.dtype, ETAP_BF16, ETAP_FP32));
  ETAP_CHECK(check_range("lse_base", args.lse_base, ETAP_LSE_BASE_E, ETAP_LSE_BASE_2));
  if (args.reserved != 0) return invalid("reserved", args.reserved, "0");

  const uintptr_t element = static_cast<uintptr_t>(element_bytes(args.dtype));
  ETAP_CHECK(check_pointer("parts", args.parts, element));
  ETAP_CHECK(check_stride("parts_part_stride", args.parts_part_stride, 0, ""));
  ETAP_CHECK(check_stride("parts_row_stride", args.parts_row_stride, 0, ""));
  ETAP_CHECK(check_stride("parts_head_stride", args.parts_head_stride, 0, ""));
  ETAP_CHECK(check_pointer("parts_lse", args.parts_lse, alignof(float)));
  ETAP_CHECK(check_stride("parts_lse_part_stride", args.parts_lse_part_stride, 0, ""));
  ETAP_CHECK(check_stride("parts_lse_row_stride", args.parts_lse_row_stride, 0, ""));
  ETAP_CHECK(check_stride("parts_lse_head_stride", args.parts_lse_head_stride, 0, ""));

  ETAP_CHECK(check_pointer("out", args.out, element));
  ETAP_CHECK(check_output_strides("out_row_stride", args.out_row_stride, args.rows, "out_head_stride",
                                  args.out_head_stride, args.num_heads, args.d));
  if (args.lse != nullptr) {
    ETAP_CHECK(check_pointer("lse", args.lse, alignof(float)));
    ETAP_CHECK(check_output_strides("lse_row_stride", args.lse_row_stride, args.rows, "lse_head_stride",
                                    args.lse_head_stride, args.num_heads, 1));
  }
  return ETAP_OK;
}

}  // namespace etap
