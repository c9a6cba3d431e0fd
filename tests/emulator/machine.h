// An SM90 for tests: runs a cluster of CTAs on one thread of the host, so that the CUDA kernels, compiled as C++
// against the headers of this folder, compute on a machine without a GPU. Every CUDA thread is a fiber; warps,
// barriers, the copy engine and WGMMA are what PTX says of them, as far as the kernels use them.
//
// What is asynchronous on a GPU is late here at random: copies arrive and products are computed at any time up to the
// wait for them, and fibers run in any order. So a wait that is missing shows as a wrong result for some seed, and one
// that never ends as an error that says who waits. Time, caches and the number of registers are not modelled, FP8 sums
// are FP32.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr size_t kSharedBytes = 256 << 10;
constexpr uint32_t kWindow = 1024;  // where a CTA's dynamic shared memory begins in its address space

struct Index {
  uint32_t x;
};

// Threads that meet. A barrier can be used again at once: `results` has one place for this meeting and one for the
// next.
struct Meeting {
  int arrived = 0;
  uint64_t number = 0;
  bool results[2] = {};
};

// A WGMMA of one warp, which has 16 of the 64 rows.
struct Product {
  enum Type { bf16, fp16 } type;
  int n;
  bool a_in_registers, a_across, b_across;  // across: MN-major
  bool accumulate;
  uint64_t a, b;  // descriptors
  uint32_t registers[32][4];
  float *d[32];
  uint64_t group;
};

struct Warp {
  int index = 0;  // in the CTA
  Meeting meeting;
  uint64_t values[2][32] = {};
  Product product{};  // being put together
  std::deque<Product> products;
  uint64_t groups = 0;  // committed
};

struct Cta {
  char *memory = nullptr;  // always mapped here; in the window while one of its fibers runs
  int file = -1;
  uint32_t rank = 0;
  Meeting barriers[16];
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Cta *cta = nullptr;
  uint32_t thread = 0;
  bool done = false;
  std::function<bool()> ready;  // empty: may run
  const char *waits_for = "";
  size_t cluster_arrivals = 0;
  std::vector<std::function<void()>> copies;  // of cp.async, not yet announced
};

struct Machine {
  Index grid{1};
  uint32_t cluster_size = 1, worker = 0;
  size_t cluster_arrivals = 0;
  std::vector<Cta> ctas;
  std::vector<Fiber> fibers;
  std::vector<std::function<void()>> in_flight;  // copies, in no order
  std::mt19937 random;
  std::string error;
};

Machine &machine();
Fiber &here();

// Runs `kernel` once for every thread of a cluster. Throws std::runtime_error where nobody can go on.
void run_cluster(uint32_t worker, uint32_t num_workers, uint32_t cluster_size, int threads, uint32_t seed,
                 const std::function<void()> &kernel);

void wait_until(const char *what, std::function<bool()> ready);
// Waits for `count` threads, and says whether `mine` held for any of them. `last` runs once, when all are there.
bool meet(Meeting &meeting, int count, const char *what, bool mine = false, const std::function<void()> &last = {});
inline Warp &this_warp() { return here().cta->warps[here().thread / 32]; }
// The warp's 32 values, after all lanes have come.
const uint64_t *exchange(uint64_t mine);

// Where the swizzle of lines of 128 or 64 bytes puts the byte at `address`.
inline uint32_t swizzled(uint32_t address, uint32_t line) {
  return address ^ (address >> 7 & (line == 128 ? 7 : 3)) << 4;
}

// Shared memory of a CTA of the cluster.
char *shared_at(uint32_t address);
char *shared_at(uint32_t address, uint32_t rank);
uint32_t address_of(const void *in_window);

void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_arrive(char *barrier, int transactions = 0);
void mbarrier_complete(char *barrier, int bytes);
bool mbarrier_passed(const char *barrier, uint32_t parity);

// A copy of the copy engine or of cp.async, at some time from now on.
void copy_later(std::function<void()> copy);

void multiply(Product::Type type, int n, const uint32_t *a_registers, uint64_t a, bool a_across, uint64_t b,
              bool b_across, bool accumulate, float *d);
void commit_products();
void wait_for_products(int pending);

}  // namespace emulator
