// The CUDA device of a build without CUDA: there is none, and it says so.
#include <stdio.h>

#include "device.h"

namespace {

constexpr char kReason[] = "libetap was built without CUDA";

int32_t count() { return 0; }

etap_status describe(int32_t, etap_device_info *info) {
  snprintf(info->name, sizeof info->name, "cuda");
  snprintf(info->reason, sizeof info->reason, "%s", kReason);
  return ETAP_OK;
}

// The API asks describe() first and goes no further; these answer the same to whoever does.
etap_status refuse() { return etap::fail(ETAP_NO_DEVICE, "%s", kReason); }
etap_status decide(const etap_problem &, etap_decision *) { return refuse(); }
size_t workspace_bytes(const etap_problem &, const etap_decision &) { return 0; }
etap_status plan(const etap_plan &, const etap_plan_args &) { return refuse(); }
etap_status shared(const etap_plan &, const void *, void *, etap_shared *) { return refuse(); }
etap_status run(const etap_plan &, const etap_run_args &) { return refuse(); }
etap_status merge(const etap_merge_args &) { return refuse(); }

}  // namespace

const etap_device etap::cuda_device = {count, describe, decide, workspace_bytes, plan, shared, run, merge};
