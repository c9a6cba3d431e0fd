// The seam between the C API and the devices. The API (api.cc, validate.cc) knows devices only through this table;
// a device sees arguments that are already validated for everything that does not depend on the device.
#pragma once

#include "etap.h"

struct etap_plan {
  etap_problem problem;  // normalised: num_sms, total_q filled in
  etap_decision decision;
  size_t workspace_bytes;
  const struct etap_device *device;
};

struct etap_device {
  int32_t (*count)();
  etap_status (*describe)(int32_t index, etap_device_info *info);
  // Supported? Fills the decision, or fails with a message.
  etap_status (*decide)(const etap_problem &problem, etap_decision *decision);
  size_t (*workspace_bytes)(const etap_problem &problem, const etap_decision &decision);
  etap_status (*plan)(const etap_plan &plan, const etap_plan_args &args);
  etap_status (*shared)(const etap_plan &plan, const void *workspace, void *stream, etap_shared *shared);
  etap_status (*run)(const etap_plan &plan, const etap_run_args &args);
  etap_status (*merge)(const etap_merge_args &args);
};

namespace etap {

extern const etap_device cpu_device;   // cpu/cpu_device.cc
extern const etap_device cuda_device;  // sm90/device.cu, or cuda_absent.cc in a build without CUDA

// Stores the thread's last message (printf style) and returns `status`. Defined in error.cc.
etap_status fail(etap_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Goes on with decision->reason (printf style); what has no room is cut off. Defined in error.cc.
void explain(etap_decision *decision, const char *format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace etap
