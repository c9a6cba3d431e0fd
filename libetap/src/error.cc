// Status names and texts, the calling thread's last message, and the reason of a decision.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "device.h"

namespace {

thread_local char last_message[512] = "";

}  // namespace

etap_status etap::fail(etap_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_message, sizeof last_message, format, args);
  va_end(args);
  return status;
}

void etap::explain(etap_decision *decision, const char *format, ...) {
  const size_t said = strlen(decision->reason);
  va_list args;
  va_start(args, format);
  vsnprintf(decision->reason + said, sizeof decision->reason - said, format, args);
  va_end(args);
}

extern "C" {

const char *etap_last_message(void) { return last_message; }

const char *etap_status_name(int32_t status) {
  switch (status) {
#define ETAP_STATUS_NAME(name, value, text) \
  case value:                               \
    return "ETAP_" #name;
    ETAP_STATUS_LIST(ETAP_STATUS_NAME)
#undef ETAP_STATUS_NAME
    default:
      return "ETAP_UNKNOWN";
  }
}

const char *etap_status_message(int32_t status) {
  switch (status) {
#define ETAP_STATUS_TEXT(name, value, text) \
  case value:                               \
    return text;
    ETAP_STATUS_LIST(ETAP_STATUS_TEXT)
#undef ETAP_STATUS_TEXT
    default:
      return "a status that this version of libetap does not know";
  }
}

}  // extern "C"
