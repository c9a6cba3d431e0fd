#include "cpu/isa.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>

namespace etap::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Kernel kernel;
}
namespace avx512 {
extern const Kernel kernel;
}
namespace avx2 {
extern const Kernel kernel;
}
#endif
namespace portable {
extern const Kernel kernel;
}

namespace {

constexpr long kMaxThreads = 1024;

struct Candidate {
  const Kernel *kernel;
  bool supported;
};

void choose_kernel(Host *host) {
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&avx512_bf16::kernel, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")},
      {&avx512::kernel, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")},
      {&avx2::kernel,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {&portable::kernel, true},
  };
  const char *wanted = getenv("ETAP_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  char allowed[64] = "";
  for (const Candidate &candidate : candidates) {
    if (!candidate.supported) continue;
    if (host->kernel == nullptr && (any || strcmp(wanted, candidate.kernel->name) == 0))
      host->kernel = candidate.kernel;
    const size_t used = strlen(allowed);
    snprintf(allowed + used, sizeof allowed - used, "%s%s", used ? ", " : "", candidate.kernel->name);
  }
  if (host->kernel == nullptr)
    snprintf(host->reason, sizeof host->reason,
             "the environment variable ETAP_CPU_ISA is \"%.32s\"; allowed on this processor: %s", wanted, allowed);
}

void count_threads(Host *host) {
  cpu_set_t set;
  const bool known =
      sched_getaffinity(0, sizeof set, &set) == 0;  // not on machines of more processors than the set has
  const long processors = known ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
  host->num_threads = static_cast<int>(std::clamp(processors, 1L, kMaxThreads));
  const char *wanted = getenv("ETAP_NUM_THREADS");
  if (wanted == nullptr || *wanted == '\0') return;
  char *end;
  const long count = strtol(wanted, &end, 10);
  if (*end == '\0' && count >= 1 && count <= kMaxThreads) {
    host->num_threads = static_cast<int>(count);
    return;
  }
  host->kernel = nullptr;
  snprintf(host->reason, sizeof host->reason,
           "the environment variable ETAP_NUM_THREADS is \"%.32s\"; allowed: 1 to %ld", wanted, kMaxThreads);
}

Host detect() {
  Host host = {};
  choose_kernel(&host);
  count_threads(&host);
  return host;
}

}  // namespace

const Host &host() {
  static const Host detected = detect();
  return detected;
}

}  // namespace etap::cpu
