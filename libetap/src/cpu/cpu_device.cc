// The CPU device: the contract of etap.h on host memory.
#include <stdio.h>
#include <unistd.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/pool.h"
#include "kv_format.h"

namespace etap::cpu {
namespace {

int32_t count() { return 1; }

etap_status describe(int32_t, etap_device_info *info) {
  const Host &h = host();
  info->usable = h.kernel != nullptr;
  info->num_sms = h.num_threads;
  info->l2_bytes = std::max(sysconf(_SC_LEVEL3_CACHE_SIZE), 0L);
  snprintf(info->name, sizeof info->name, "cpu (%s)", h.kernel != nullptr ? h.kernel->name : "none");
  snprintf(info->reason, sizeof info->reason, "%s", h.reason);
  return ETAP_OK;
}

etap_status decide(const etap_problem &p, etap_decision *decision) {
  if (p.force_tile > kMaxTileRows)
    return fail(ETAP_UNSUPPORTED, "force_tile is %d; the CPU device has tiles of at most %d rows", p.force_tile,
                kMaxTileRows);
  if (p.force_cluster > 1)
    return fail(ETAP_UNSUPPORTED, "force_cluster is %d; the CPU device has no clusters", p.force_cluster);
  decide_tiles(p, decision);
  const char *isa = host().kernel->name;
  snprintf(decision->kernel, sizeof decision->kernel, "cpu_%s_%s", isa, kv_format(p).name);
  explain(decision,
          "%s is the widest instruction set allowed here; %d rows in %d tile(s) of at most %d, on up to %d thread(s)",
          isa, p.num_heads * p.max_query_len, decision->num_tiles, decision->tile_rows, decision->num_workers);
  tell_of_sharers(p, decision);
  return ETAP_OK;
}

etap_status plan(const etap_plan &plan, const etap_plan_args &args) { return make_plan(plan, args); }

etap_status check_planned(const etap_plan &plan, const void *workspace, const Header &header) {
  if (header.fingerprint == fingerprint(plan.problem)) return ETAP_OK;
  return fail(ETAP_PLAN_MISMATCH, "workspace %p holds no plan for this problem; call etap_plan_update with it first",
              workspace);
}

etap_status shared(const etap_plan &plan, const void *workspace, void *, etap_shared *shared) {
  const Header &header = *static_cast<const Header *>(workspace);
  const etap_status status = check_planned(plan, workspace, header);
  if (status == ETAP_OK) *shared = header.shared;
  return status;
}

// ---- Run ----

struct Run {
  const etap_plan *plan;
  const etap_run_args *args;
  const Kernel *kernel;
  Workspace workspace;
  float kv_scale;
  const Group *wave_begin;  // groups of the wave that runs now
  const Group *wave_end;
};

// A sequence's row of the block table, NULL when the table has no columns; with topk its list of slots.
const int32_t *table_row(const etap_run_args &args, int64_t sequence) {
  if (args.slots != nullptr) return args.slots + sequence * args.slots_stride;
  return args.block_table == nullptr ? nullptr : args.block_table + sequence * args.block_table_stride;
}

Tile tile_of(const Run &run, const Group &group) {
  const etap_problem &p = run.plan->problem;
  if (group.sequence < 0) {
    const Prefix &prefix = run.workspace.prefixes[group.prefix];
    return {&p,
            run.args,
            run.kv_scale,
            table_row(*run.args, prefix.sequence),
            prefix.tokens + prefix.query_count,  // all of it is before the queries
            0,
            prefix.query_rows,
            prefix.query_count,
            0,
            prefix.query_count * p.num_heads};
  }
  const Sequence &s = run.workspace.sequences[group.sequence];
  const int32_t rows = s.query_count * p.num_heads - group.first_row;
  return {&p,      run.args,      run.kv_scale,    table_row(*run.args, group.sequence),        s.length, s.query_begin,
          nullptr, s.query_count, group.first_row, std::min(rows, run.plan->decision.tile_rows)};
}

void run_piece(void *context, int64_t item, int worker) {
  const Run &run = *static_cast<const Run *>(context);
  const int64_t piece = run.wave_begin->first_piece + item;
  const Group *after = std::upper_bound(run.wave_begin, run.wave_end, piece,
                                        [](int64_t n, const Group &g) { return n < g.first_piece; });
  Group &group = run.workspace.groups[after - 1 - run.workspace.groups];
  const Tile tile = tile_of(run, group);
  Scratch *scratch = run.workspace.scratch + worker;
  const bool of_prefix = group.sequence < 0;
  Partial *prefix_result = group.prefix < 0 ? nullptr : run.workspace.prefix_results + group.prefix;
  const int64_t first = !of_prefix && group.prefix >= 0 ? run.workspace.prefixes[group.prefix].tokens : 0;
  const int64_t last = of_prefix ? run.workspace.prefixes[group.prefix].tokens : tile.length;
  const int64_t index = piece - group.first_piece;
  const int64_t begin = first + index * group.piece_tokens;
  const int64_t end = group.num_pieces == 1 ? last : std::min(begin + group.piece_tokens, last);
  Partial *slots = group.num_pieces > 1 ? run.workspace.slots + group.first_slot
                   : of_prefix          ? prefix_result
                                        : &scratch->partial;
  const int d = run.plan->problem.d_latent;

  run.kernel->attend(tile, begin, end, scratch, &slots[index]);
  if (group.num_pieces > 1) {
    if (__atomic_add_fetch(&group.pieces_done, 1, __ATOMIC_ACQ_REL) < group.num_pieces) return;
    group.pieces_done = 0;
    for (int32_t i = 1; i < group.num_pieces; ++i) run.kernel->add(slots[i], 0, tile.num_rows, d, &slots[0]);
    if (of_prefix) *prefix_result = slots[0];
  }
  if (of_prefix) return;
  if (group.prefix >= 0) {
    const int32_t first_row = run.workspace.sequences[group.sequence].prefix_row + tile.first_row;
    run.kernel->add(*prefix_result, first_row, tile.num_rows, d, &slots[0]);
  }
  run.kernel->finish(tile, &slots[0]);
}

// Every slot that counts within the pool; the plan has looked at the counts.
etap_status check_slots(const Run &run) {
  const etap_problem &p = run.plan->problem;
  const etap_run_args &a = *run.args;
  const bool pool_known = a.kv_cache == nullptr || a.num_pages > 0;
  const int64_t num_slots = pool_known ? a.num_pages * p.page_size : INT64_C(1) << 31;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence &s = run.workspace.sequences[b];
    const int32_t *slots = table_row(a, b);
    for (int64_t i = 0; i < s.length; ++i)
      if (slots[i] < -1 || slots[i] >= num_slots)
        return fail(ETAP_INVALID_ARGUMENT,
                    "slots[%d, %lld] is %d; allowed: -1 for none, or 0 to below num_pages * page_size, which is %lld",
                    b, static_cast<long long>(i), slots[i], static_cast<long long>(num_slots));
  }
  return ETAP_OK;
}

// Every length within the block table, every page number that a length reaches within the pool.
etap_status check_bounds(const Run &run) {
  if (run.plan->problem.topk > 0) return check_slots(run);
  const etap_problem &p = run.plan->problem;
  const etap_run_args &a = *run.args;
  const bool table_known = a.block_table == nullptr || a.block_table_columns > 0;
  const bool pool_known = a.kv_cache == nullptr || a.num_pages > 0;
  const int64_t most_tokens = table_known ? a.block_table_columns * p.page_size : INT32_MAX;
  const int64_t num_pages = pool_known ? a.num_pages : INT64_C(1) << 31;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence &s = run.workspace.sequences[b];
    if (s.query_count == 0) continue;  // nobody looks
    if (s.length > most_tokens)
      return fail(ETAP_INVALID_ARGUMENT,
                  "cache_seqlens[%d] is %lld; allowed: at most %lld, as the block table has %lld columns for pages of "
                  "%d tokens",
                  b, static_cast<long long>(s.length), static_cast<long long>(most_tokens),
                  static_cast<long long>(a.block_table_columns), p.page_size);
    const int32_t *table = table_row(a, b);
    const int64_t pages = (s.length + p.page_size - 1) / p.page_size;
    for (int64_t i = 0; i < pages; ++i)
      if (table[i] < 0 || table[i] >= num_pages)
        return fail(ETAP_INVALID_ARGUMENT,
                    "block_table[%d, %lld] is %d, and cache_seqlens[%d] of %lld tokens reaches it; allowed: page "
                    "numbers from 0 to below num_pages, which is %lld",
                    b, static_cast<long long>(i), table[i], b, static_cast<long long>(s.length),
                    static_cast<long long>(num_pages));
  }
  return ETAP_OK;
}

etap_status run(const etap_plan &plan, const etap_run_args &args) {
  Run run = {&plan, &args, host().kernel, layout(plan, args.workspace), 1.0f, nullptr, nullptr};
  const Header &header = *run.workspace.header;
  etap_status status = check_planned(plan, args.workspace, header);
  if (status == ETAP_OK) status = check_bounds(run);
  if (status != ETAP_OK) return status;
  if (args.kv_scale_ptr != nullptr) {
    run.kv_scale = *args.kv_scale_ptr;
  } else if (args.kv_scale != 0) {
    run.kv_scale = args.kv_scale;
  }

  const Group *groups_end = run.workspace.groups + header.num_groups;
  for (const Group *begin = run.workspace.groups; begin != groups_end; begin = run.wave_end) {
    run.wave_begin = begin;
    run.wave_end =
        std::upper_bound(begin, groups_end, begin->wave, [](int32_t n, const Group &g) { return n < g.wave; });
    const Group &last = run.wave_end[-1];
    const int64_t pieces = last.first_piece + last.num_pieces - begin->first_piece;
    parallel_for(pieces, header.num_workers, run_piece, &run);
  }
  return ETAP_OK;
}

// ---- Merge ----

void merge_row(void *context, int64_t row, int) {
  const etap_merge_args &args = *static_cast<const etap_merge_args *>(context);
  for (int64_t head = 0; head < args.num_heads; ++head) host().kernel->merge(args, row, head);
}

etap_status merge(const etap_merge_args &args) {
  constexpr int64_t kMinValuesPerThread = 1 << 18;  // some 50 microseconds: they pay for waking a thread
  const int64_t values = static_cast<int64_t>(args.num_parts) * args.rows * args.num_heads * args.d;
  const int64_t useful = 1 + values / kMinValuesPerThread;
  etap_merge_args own = args;
  parallel_for(args.rows, static_cast<int>(std::min<int64_t>(host().num_threads, useful)), merge_row, &own);
  return ETAP_OK;
}

}  // namespace
}  // namespace etap::cpu

const etap_device etap::cpu_device = {
    etap::cpu::count, etap::cpu::describe, etap::cpu::decide, etap::cpu::workspace_bytes,
    etap::cpu::plan,  etap::cpu::shared,   etap::cpu::run,    etap::cpu::merge};
