// The C entry points: normalise the caller's structs, validate, hand over to the device.
#include <new>

#include "validate.h"

namespace {

using etap::fail;

// nullptr, with a message, for a type that is not in etap_device_type.
const etap_device *find_device(int32_t device_type) {
  if (device_type == ETAP_DEVICE_CPU) return &etap::cpu_device;
  if (device_type == ETAP_DEVICE_CUDA) return &etap::cuda_device;
  fail(ETAP_INVALID_ARGUMENT, "device_type is %d; allowed: ETAP_DEVICE_CPU (0), ETAP_DEVICE_CUDA (1)", device_type);
  return nullptr;
}

etap_status describe(const etap_device &device, int32_t index, etap_device_info *info) {
  const int32_t count = device.count();
  const int32_t last = count > 0 ? count - 1 : 0;
  if (index < 0 || index > last) return fail(ETAP_NO_DEVICE, "device_index is %d; allowed: 0 to %d", index, last);
  *info = {};
  return device.describe(index, info);
}

etap_status require_usable(const etap_device &device, int32_t index, etap_device_info *info) {
  ETAP_CHECK(describe(device, index, info));
  if (info->usable) return ETAP_OK;
  return fail(ETAP_NO_DEVICE, "device_index %d can't be used: %s", index, info->reason);
}

// What etap_query, etap_workspace_size and etap_plan_create share: the normalised problem and all that follows from it.
etap_status resolve(const etap_problem *problem, etap_plan *plan) {
  etap_problem &p = plan->problem;
  ETAP_CHECK(etap::copy_in("etap_problem", problem, &p));
  plan->device = find_device(p.device_type);
  if (plan->device == nullptr) return ETAP_INVALID_ARGUMENT;
  ETAP_CHECK(etap::validate_problem(p));
  etap_device_info info;
  ETAP_CHECK(require_usable(*plan->device, p.device_index, &info));
  if (p.num_sms == 0 || p.num_sms > info.num_sms) p.num_sms = info.num_sms;
  if (!(p.flags & ETAP_RAGGED)) p.total_q = p.batch * p.max_query_len;
  plan->decision = {};
  ETAP_CHECK(plan->device->decide(p, &plan->decision));
  plan->workspace_bytes = plan->device->workspace_bytes(p, plan->decision);
  return ETAP_OK;
}

etap_status require_plan(const etap_plan *plan) {
  return plan != nullptr ? ETAP_OK : fail(ETAP_INVALID_ARGUMENT, "plan is NULL; it must come from etap_plan_create");
}

}  // namespace

extern "C" {

int32_t etap_version(void) { return ETAP_VERSION_MAJOR * 10000 + ETAP_VERSION_MINOR * 100 + ETAP_VERSION_PATCH; }

int32_t etap_abi_version(void) { return ETAP_ABI_VERSION; }

int32_t etap_device_count(int32_t device_type) {
  const etap_device *device = find_device(device_type);
  return device != nullptr ? device->count() : 0;
}

etap_status etap_device_query(int32_t device_type, int32_t device_index, etap_device_info *info) {
  ETAP_CHECK(
      etap::check_struct("etap_device_info", info, sizeof *info, etap::first_released<etap_device_info>::size, false));
  const etap_device *device = find_device(device_type);
  if (device == nullptr) return ETAP_INVALID_ARGUMENT;
  etap_device_info found;
  ETAP_CHECK(describe(*device, device_index, &found));
  etap::copy_out(found, info);
  return ETAP_OK;
}

etap_status etap_query(const etap_problem *problem, etap_decision *decision) {
  if (decision != nullptr)
    ETAP_CHECK(etap::check_struct("etap_decision", decision, sizeof *decision,
                                  etap::first_released<etap_decision>::size, false));
  etap_plan plan;
  ETAP_CHECK(resolve(problem, &plan));
  if (decision != nullptr) etap::copy_out(plan.decision, decision);
  return ETAP_OK;
}

etap_status etap_workspace_size(const etap_problem *problem, size_t *bytes) {
  if (bytes == nullptr) return fail(ETAP_INVALID_ARGUMENT, "bytes is NULL; it must point to a size_t");
  etap_plan plan;
  ETAP_CHECK(resolve(problem, &plan));
  *bytes = plan.workspace_bytes;
  return ETAP_OK;
}

etap_status etap_plan_create(const etap_problem *problem, etap_plan **plan) {
  if (plan == nullptr) return fail(ETAP_INVALID_ARGUMENT, "plan is NULL; it must point to an etap_plan *");
  etap_plan resolved;
  ETAP_CHECK(resolve(problem, &resolved));
  etap_plan *created = new (std::nothrow) etap_plan(resolved);
  if (created == nullptr)
    return fail(ETAP_OUT_OF_MEMORY, "%zu bytes of host memory for the plan could not be had", sizeof(etap_plan));
  *plan = created;
  return ETAP_OK;
}

void etap_plan_destroy(etap_plan *plan) { delete plan; }

etap_status etap_plan_update(const etap_plan *plan, const etap_plan_args *args) {
  ETAP_CHECK(require_plan(plan));
  etap_plan_args own;
  ETAP_CHECK(etap::copy_in("etap_plan_args", args, &own));
  ETAP_CHECK(etap::validate_plan_args(*plan, own));
  return plan->device->plan(*plan, own);
}

etap_status etap_plan_shared(const etap_plan *plan, const void *workspace, size_t workspace_bytes, void *stream,
                             etap_shared *shared) {
  ETAP_CHECK(require_plan(plan));
  ETAP_CHECK(etap::check_struct("etap_shared", shared, sizeof *shared, etap::first_released<etap_shared>::size, false));
  ETAP_CHECK(etap::validate_shared(*plan, workspace, workspace_bytes));
  etap_shared found = {};
  ETAP_CHECK(plan->device->shared(*plan, workspace, stream, &found));
  etap::copy_out(found, shared);
  return ETAP_OK;
}

etap_status etap_run(const etap_plan *plan, const etap_run_args *args) {
  ETAP_CHECK(require_plan(plan));
  etap_run_args own;
  ETAP_CHECK(etap::copy_in("etap_run_args", args, &own));
  ETAP_CHECK(etap::validate_run_args(*plan, own));
  return plan->device->run(*plan, own);
}

etap_status etap_merge(const etap_merge_args *args) {
  etap_merge_args own;
  ETAP_CHECK(etap::copy_in("etap_merge_args", args, &own));
  const etap_device *device = find_device(own.device_type);
  if (device == nullptr) return ETAP_INVALID_ARGUMENT;
  ETAP_CHECK(etap::validate_merge_args(own));
  etap_device_info info;
  ETAP_CHECK(require_usable(*device, own.device_index, &info));
  return device->merge(own);
}

}  // extern "C"
