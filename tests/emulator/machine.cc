#include "machine.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace etap::sm90 {
// What the kernels declare as extern __shared__: the window, into which the running CTA's memory is mapped.
alignas(4096) char shared_raw[emulator::kSharedBytes];
}  // namespace etap::sm90

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;

Machine *the_machine;
Fiber *running;
ucontext_t scheduler;
const Cta *mapped;
const std::function<void()> *the_kernel;

void enter() {
  try {
    (*the_kernel)();
  } catch (const std::exception &failed) {
    the_machine->error = failed.what();
  }
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

void map(const Cta &cta) {
  if (mapped == &cta) return;
  if (mmap(etap::sm90::shared_raw, kSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, cta.file, 0) ==
      MAP_FAILED)
    throw std::runtime_error("shared memory can't be mapped");
  mapped = &cta;
}

void resume(Fiber &fiber) {
  map(*fiber.cta);
  running = &fiber;
  swapcontext(&scheduler, &fiber.context);
  running = nullptr;
}

// Some of the copies, or all.
bool land_copies(Machine &m, bool all) {
  bool any = false;
  std::shuffle(m.in_flight.begin(), m.in_flight.end(), m.random);
  size_t keep = all ? 0 : m.random() % (m.in_flight.size() + 1);
  while (m.in_flight.size() > keep) {
    const std::function<void()> copy = std::move(m.in_flight.back());
    m.in_flight.pop_back();
    copy();
    any = true;
  }
  return any;
}

struct MBarrier {  // 8 bytes of shared memory
  uint16_t pending, count;
  int32_t state;  // 2 * bytes that are still to come + the phase's parity
};
static_assert(sizeof(MBarrier) == 8);
MBarrier load(const char *at) {
  MBarrier b;
  std::memcpy(&b, at, sizeof b);
  return b;
}
void settle(char *at, MBarrier b) {
  if (b.pending == 0 && b.state >> 1 == 0) {
    b.state ^= 1;
    b.pending = b.count;
  }
  std::memcpy(at, &b, sizeof b);
}

float value_of(Product::Type type, const char *at) {
  if (type == Product::e4m3) {
    __nv_fp8_e4m3 v;
    std::memcpy(&v, at, 1);
    return static_cast<float>(v);
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (type == Product::fp16) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

// Element (row, k) of a K-major operand, or of an MN-major one, whose row runs along the 128 bytes.
uint32_t element_address(uint64_t descriptor, bool across, int row, int k, int bytes) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62);
  const uint32_t width = mode == 1 ? 128 : 64;
  if (mode != 1 && mode != 2) throw std::runtime_error("a descriptor has neither 128- nor 64-byte swizzle");
  uint32_t at = start;
  if (across) {
    const int in_line = static_cast<int>(width) / bytes;
    at += row / in_line * leading + k / 8 * stride + k % 8 * width + row % in_line * bytes;
  } else {
    at += row / 8 * stride + row % 8 * width + k * bytes;
  }
  return swizzled(at, width);
}

void compute(const Warp &warp, const Product &p) {
  const int bytes = p.type == Product::e4m3 ? 1 : 2, k_count = 32 / bytes, first_row = warp.index % 4 * 16;
  const char *const memory = running->cta->memory - kWindow;
  float a[16][32], b[32][256];
  for (int k = 0; k < k_count; ++k) {
    for (int n = 0; n < p.n; ++n) b[k][n] = value_of(p.type, memory + element_address(p.b, p.b_across, n, k, bytes));
    for (int row = 0; row < 16; ++row) {
      if (p.a_in_registers) {
        // Register 2 h + x: row g + 8 x, values from 16 h bytes on; four bytes a lane.
        const int byte = k * bytes, lane = row % 8 * 4 + byte % 16 / 4;
        const uint32_t word = p.registers[lane][byte / 16 * 2 + row / 8];
        a[row][k] = value_of(p.type, reinterpret_cast<const char *>(&word) + byte % 4);
      } else {
        a[row][k] = value_of(p.type, memory + element_address(p.a, p.a_across, first_row + row, k, bytes));
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < p.n; ++n) {
      float &d = p.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
      float sum = p.accumulate ? d : 0.f;
      for (int k = 0; k < k_count; ++k) sum += a[row][k] * b[k][n];
      d = sum;
    }
  }
}

void compute_until(Warp &warp, uint64_t group) {
  while (!warp.products.empty() && warp.products.front().group < group) {
    compute(warp, warp.products.front());
    warp.products.pop_front();
  }
}

}  // namespace

Machine &machine() { return *the_machine; }
Fiber &here() { return *running; }

void run_cluster(uint32_t worker, uint32_t num_workers, uint32_t cluster_size, int threads, uint32_t seed,
                 const std::function<void()> &kernel) {
  Machine m;
  the_machine = &m;
  the_kernel = &kernel;
  mapped = nullptr;
  m.random.seed(seed);
  m.cluster_size = cluster_size;
  m.worker = worker;
  m.grid.x = num_workers * cluster_size;
  m.ctas.resize(cluster_size);
  m.fibers.resize(static_cast<size_t>(cluster_size) * threads);
  for (uint32_t c = 0; c < cluster_size; ++c) {
    Cta &cta = m.ctas[c];
    cta.rank = c;
    cta.file = memfd_create("shared", 0);
    if (cta.file < 0 || ftruncate(cta.file, kSharedBytes) != 0) throw std::runtime_error("no memory file");
    cta.memory = static_cast<char *>(mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED, cta.file, 0));
    std::memset(cta.memory, 0xff, kSharedBytes);  // NaN in every format
    cta.warps.resize(threads / 32);
    for (int w = 0; w < threads / 32; ++w) cta.warps[w].index = w;
    for (int t = 0; t < threads; ++t) {
      Fiber &fiber = m.fibers[static_cast<size_t>(c) * threads + t];
      fiber.cta = &cta;
      fiber.thread = t;
      fiber.stack.reset(new char[kStackBytes]);  // not filled: most of it is never used
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, enter, 0);
    }
  }
  size_t left = m.fibers.size();
  while (left > 0 && m.error.empty()) {
    // Warps in any order, CTA by CTA, since a change of CTA is a change of mapping.
    bool any = false, resting = false;
    std::vector<size_t> warps(m.fibers.size() / 32);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
    for (uint32_t c = 0; c < cluster_size; ++c)
      std::shuffle(warps.begin() + c * threads / 32, warps.begin() + (c + 1) * threads / 32, m.random);
    for (const size_t w : warps) {
      // Some warps rest, some run far ahead.
      const size_t rounds = m.random() % 4 == 0 ? 0 : size_t{1} << m.random() % 8;
      resting |= rounds == 0;
      bool moved = true;
      for (size_t round = 0; round < rounds && moved; ++round) {
        moved = false;
        for (size_t i = w * 32; i < w * 32 + 32 && m.error.empty(); ++i) {
          Fiber &fiber = m.fibers[i];
          if (fiber.done || (fiber.ready && !fiber.ready())) continue;
          fiber.ready = nullptr;
          resume(fiber);
          moved = any = true;
          if (fiber.done) --left;
        }
      }
    }
    any |= land_copies(m, !any && !resting);
    any |= resting;
    if (!any && left > 0 && m.error.empty()) {
      m.error = "nobody can go on:";
      std::string last;
      for (const Fiber &fiber : m.fibers) {
        const std::string line = " CTA " + std::to_string(fiber.cta->rank) + " warp " +
                                 std::to_string(fiber.thread / 32) +
                                 (fiber.done ? " has ended;" : std::string(" waits for ") + fiber.waits_for + ";");
        if (line != last) m.error += line;
        last = line;
      }
    }
  }
  for (Cta &cta : m.ctas) {
    munmap(cta.memory, kSharedBytes);
    close(cta.file);
  }
  the_machine = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

void wait_until(const char *what, std::function<bool()> ready) {
  if (ready()) return;
  running->ready = std::move(ready);
  running->waits_for = what;
  swapcontext(&running->context, &scheduler);
}

bool meet(Meeting &meeting, int count, const char *what, bool mine, const std::function<void()> &last) {
  const uint64_t number = meeting.number;
  meeting.results[number % 2] |= mine;
  if (++meeting.arrived == count) {
    if (last) last();
    meeting.arrived = 0;
    meeting.results[(number + 1) % 2] = false;
    ++meeting.number;
  } else {
    wait_until(what, [&meeting, number] { return meeting.number != number; });
  }
  return meeting.results[number % 2];
}

const uint64_t *exchange(uint64_t mine) {
  Warp &warp = this_warp();
  uint64_t *const values = warp.values[warp.meeting.number % 2];
  values[here().thread % 32] = mine;
  meet(warp.meeting, 32, "its warp");
  return values;
}

char *shared_at(uint32_t address) { return here().cta->memory + address - kWindow; }
char *shared_at(uint32_t address, uint32_t rank) { return machine().ctas[rank].memory + address - kWindow; }
uint32_t address_of(const void *in_window) {
  return static_cast<uint32_t>(static_cast<const char *>(in_window) - etap::sm90::shared_raw) + kWindow;
}

void mbarrier_init(uint32_t barrier, uint32_t count) {
  const MBarrier b{static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
  std::memcpy(shared_at(barrier), &b, sizeof b);
}
void mbarrier_arrive(char *barrier, int transactions) {
  MBarrier b = load(barrier);
  if (b.pending == 0) throw std::runtime_error("one arrival too many on a barrier");
  --b.pending;
  b.state += 2 * transactions;
  settle(barrier, b);
}
void mbarrier_complete(char *barrier, int bytes) {
  MBarrier b = load(barrier);
  b.state -= 2 * bytes;
  settle(barrier, b);
}
bool mbarrier_passed(const char *barrier, uint32_t parity) {
  return (static_cast<uint32_t>(load(barrier).state) & 1) != parity;
}

void copy_later(std::function<void()> copy) { machine().in_flight.push_back(std::move(copy)); }

void multiply(Product::Type type, int n, const uint32_t *a_registers, uint64_t a, bool a_across, uint64_t b,
              bool b_across, bool accumulate, float *d) {
  Warp &warp = this_warp();
  const uint32_t lane = here().thread % 32;
  warp.product.d[lane] = d;
  if (a_registers != nullptr) std::memcpy(warp.product.registers[lane], a_registers, 16);
  meet(warp.meeting, 32, "its warp, with a WGMMA", false, [&] {
    Product &p = warp.product;
    p.type = type, p.n = n, p.a_in_registers = a_registers != nullptr, p.a = a, p.a_across = a_across, p.b = b;
    p.b_across = b_across, p.accumulate = accumulate, p.group = warp.groups;
    warp.products.push_back(p);
    if (machine().random() % 3 == 0) compute_until(warp, UINT64_MAX);
  });
}
void commit_products() {
  Warp &warp = this_warp();
  meet(warp.meeting, 32, "its warp, with a commit", false, [&] { ++warp.groups; });
}
void wait_for_products(int pending) {
  Warp &warp = this_warp();
  meet(warp.meeting, 32, "its warp, with a wait for products", false, [&] {
    if (warp.groups > static_cast<uint64_t>(pending)) compute_until(warp, warp.groups - pending);
  });
}

}  // namespace emulator
