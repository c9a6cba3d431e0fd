// Everything about an argument that can be judged without knowing the device.
#pragma once

#include <string.h>

#include "device.h"

// Returns from the enclosing function when `call` does not give ETAP_OK.
#define ETAP_CHECK(call)                   \
  do {                                     \
    const etap_status check_status = call; \
    if (check_status) return check_status; \
  } while (0)

namespace etap {

// Sizes at the first release: no caller can have a smaller struct.
template <typename Struct>
struct first_released;
template <>
struct first_released<etap_device_info> {
  static constexpr uint32_t size = 416;
};
template <>
struct first_released<etap_problem> {
  static constexpr uint32_t size = 72;
};
template <>
struct first_released<etap_decision> {
  static constexpr uint32_t size = 344;
};
template <>
struct first_released<etap_plan_args> {
  static constexpr uint32_t size = 48;
};
template <>
struct first_released<etap_shared> {
  static constexpr uint32_t size = 24;
};
template <>
struct first_released<etap_run_args> {
  static constexpr uint32_t size = 224;
};
template <>
struct first_released<etap_merge_args> {
  static constexpr uint32_t size = 160;
};

// Judges a caller's struct of `caller_size` bytes: not NULL, not smaller than the first release of it, and nothing but
// zeros past the `known_size` bytes that this version understands.
etap_status check_struct(const char *type, const void *caller, uint32_t known_size, uint32_t first_size,
                         bool tail_must_be_zero);

// Copies a caller's struct, of its own version, into the library's. Fields that the caller did not know are 0.
template <typename Struct>
etap_status copy_in(const char *type, const Struct *caller, Struct *copy) {
  constexpr uint32_t known = sizeof(Struct);
  etap_status status = check_struct(type, caller, known, first_released<Struct>::size, true);
  if (status != ETAP_OK) return status;
  memset(copy, 0, known);
  memcpy(copy, caller, caller->size < known ? caller->size : known);
  copy->size = known;
  return ETAP_OK;
}

// Writes a result into a caller's struct: as many fields as that has, all but its size.
template <typename Struct>
void copy_out(const Struct &result, Struct *caller) {
  constexpr size_t header = sizeof(uint32_t);
  const size_t size = caller->size < sizeof(Struct) ? caller->size : sizeof(Struct);
  memcpy(reinterpret_cast<char *>(caller) + header, reinterpret_cast<const char *>(&result) + header, size - header);
}

etap_status validate_problem(const etap_problem &problem);
etap_status validate_plan_args(const etap_plan &plan, const etap_plan_args &args);
etap_status validate_shared(const etap_plan &plan, const void *workspace, size_t workspace_bytes);
etap_status validate_run_args(const etap_plan &plan, const etap_run_args &args);
etap_status validate_merge_args(const etap_merge_args &args);

}  // namespace etap
