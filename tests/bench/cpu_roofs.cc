// What this machine can do at most, for the CPU benchmark to compare with:  cpu_roofs [THREADS]
//
//     copy_bytes_per_second   bytes read plus bytes written by memcpy between buffers far larger than the caches
//     fma_flop_per_second     2 FLOP for each lane of an FP32 fused multiply-add on registers
//
// Both on THREADS threads at once (all processors when not given): the best of several tries, as JSON.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr int kTries = 7;

// Seconds that the slowest thread needs, best of kTries.
double best_seconds(int threads, const std::function<void(int thread)> &work) {
  double best = 1e30;
  for (int i = 0; i < kTries; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (std::thread &other : others) other.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Independent chains that hide the latency of the multiply-add, and that 16 vector registers can hold.
constexpr int kChains = 12;

#define DEFINE_FMA(name, isa, bytes)                                                                  \
  __attribute__((target(isa))) float name(long iterations) {                                          \
    typedef float Vector __attribute__((vector_size(bytes)));                                         \
    const Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;                                \
    Vector chain[kChains];                                                                            \
    for (int i = 0; i < kChains; ++i) chain[i] = factor * static_cast<float>(i);                      \
    for (long n = 0; n < iterations; ++n)                                                             \
      _Pragma("GCC unroll 16") for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term; \
    Vector sum = {};                                                                                  \
    for (int i = 0; i < kChains; ++i) sum += chain[i];                                                \
    return sum[0];                                                                                    \
  }

#if defined(__x86_64__)
DEFINE_FMA(fma_avx512, "avx512f,fma", 64)
DEFINE_FMA(fma_avx2, "avx2,fma", 32)
#endif
DEFINE_FMA(fma_portable, "default", 16)

struct Fma {
  float (*run)(long iterations);
  int lanes;
};

Fma widest_fma() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {fma_avx512, 16};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fma_avx2, 8};
#endif
  return {fma_portable, 4};
}

double copy_bandwidth(int threads) {
  constexpr size_t kBytes = size_t{128} << 20;  // of each of a thread's two buffers
  std::vector<std::unique_ptr<char[]>> from(threads), to(threads);
  for (int t = 0; t < threads; ++t) {
    from[t].reset(new char[kBytes]);
    to[t].reset(new char[kBytes]);
    memset(from[t].get(), 1, kBytes);
    memset(to[t].get(), 2, kBytes);
  }
  const double seconds = best_seconds(threads, [&](int t) { memcpy(to[t].get(), from[t].get(), kBytes); });
  return 2.0 * kBytes * threads / seconds;
}

double fma_rate(int threads) {
  constexpr long kIterations = 5000000;
  const Fma fma = widest_fma();
  std::vector<float> results(threads);
  const double seconds = best_seconds(threads, [&](int t) { results[t] = fma.run(kIterations); });
  return 2.0 * fma.lanes * kChains * kIterations * threads / seconds;
}

}  // namespace

int main(int argc, char **argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  if (threads < 1) {
    fprintf(stderr, "cpu_roofs: THREADS is \"%s\"; allowed: 1 or more\n", argv[1]);
    return 2;
  }
  printf("{\"threads\": %d, \"copy_bytes_per_second\": %.4g, \"fma_flop_per_second\": %.4g}\n", threads,
         copy_bandwidth(threads), fma_rate(threads));
  return 0;
}
