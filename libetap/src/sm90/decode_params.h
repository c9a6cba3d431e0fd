// What a kernel and the copy engine are told of a call, from what the caller said. Host only, no CUDA calls: the
// emulator of tests/emulator takes it too.
#pragma once

#include "device.h"
#include "sm90/params.h"
#include "sm90/schedule/workspace.h"

namespace etap::sm90 {

KvCopy kv_copy(const etap_problem &problem);

// KV as [pages, page_size, row], in boxes of 64 values (656-byte rows: bytes) of min(page_size, 64) tokens, swizzled by
// a box's width: 128 bytes, FP8 64.
struct KvBoxes {
  int value_bytes;
  uint64_t dims[3], strides[2];  // innermost first; strides in bytes
  uint32_t box[2];
};
KvBoxes kv_boxes(const etap_problem &problem, const etap_run_args &args);

// All but kv_map, which the driver encodes from kv_boxes.
DecodeParams decode_params(const etap_plan &plan, const etap_run_args &args, const Workspace &layout);

// The same call for the kernel of the plan with groups (schedule/prefixes.h).
DecodeParams sharing_params(const DecodeParams &params, void *workspace, const Workspace &layout);

}  // namespace etap::sm90
