// stream.cu - the stream ceiling: how fast this GPU can bring the KV rows of a decode batch into shared memory.
//
// A kernel of decode attention must read every KV row of the batch once. The kernels here do that and nothing else: one
// persistent CTA an SM walks its even share of the batch's tokens through the block table and copies the rows into a
// ring of shared memory that nobody reads. Their time is the yardstick for etap_run: what arithmetic, softmax and
// the merge of splits add shows as the distance to it.
//
//     pages   one bulk copy (cp.async.bulk) for each piece of a page, up to `rows_per_copy` rows; pages of >= 16 rows
//     rows    one bulk copy for each row: what a token-granular gather costs on the bulk path; any page size
//     async   16-byte cp.async by every thread: the same gather on the ordinary load path; any page size
//
// The library knows nothing of this file, and it nothing of the library. Arguments are trusted: it is a probe.
#include <cuda_runtime.h>

#include <cstdint>

#define PROBE_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kRingBytes = 220 * 1024;  // of the 227 KB an SM offers; barriers are static
constexpr int kMaxStages = 64;
constexpr int kWarp = 32;

// What one CTA copies: `tokens` rows from token `start` of sequence `seq` on, `first` of them in that sequence and the
// rest in the next ones.
struct __align__(16) Piece {
  int32_t seq;
  int32_t start;
  int32_t first;
  int32_t tokens;
};

struct Params {
  const uint8_t *kv;       // [num_pages, page_size, row]
  int64_t page_stride;     // bytes
  int64_t row_stride;      // bytes
  const int32_t *table;    // [batch, >= ceil(length / page_size)]
  int64_t table_stride;    // entries
  const int32_t *lengths;  // [batch]
  const Piece *pieces;     // [CTAs]
  int page_shift;          // log2(page_size)
  int row_bytes;           // a multiple of 16
  int rows_per_copy;
  int stages;
};

// Walks the sequences of a piece: each run is the part of the piece that lies in one sequence.
struct Run {
  const int32_t *table;  // of this sequence
  int begin, end;        // tokens
};

template <class Body>
__device__ void for_each_run(const Params &p, Body body) {
  const Piece piece = p.pieces[blockIdx.x];
  if (piece.tokens == 0) return;
  body(Run{p.table + piece.seq * p.table_stride, piece.start, piece.start + piece.first});
  int left = piece.tokens - piece.first;
  for (int seq = piece.seq + 1; left > 0; ++seq) {
    const int count = min(p.lengths[seq], left);
    if (count <= 0) continue;
    body(Run{p.table + seq * p.table_stride, 0, count});
    left -= count;
  }
}

__device__ uint32_t smem(const void *pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// A ring of stages filled by bulk copies. Nobody reads them, so a stage is free again once its bytes have landed.
// Every call is made by one converged warp.
class BulkRing {
 public:
  __device__ BulkRing(uint64_t *full, int stages) : full_(full), stages_(stages) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(full + i)));
      asm volatile("fence.mbarrier_init.release.cluster;");
    }
    __syncwarp();
  }

  // Waits for the next stage and announces the bytes that will fill it.
  __device__ int acquire(int bytes) {
    if (threadIdx.x == 0) {
      if (wrapped_) wait(slot_, phase_ ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(full_ + slot_)), "r"(bytes));
    }
    __syncwarp();
    const int slot = slot_;
    if (++slot_ == stages_) {
      slot_ = 0;
      phase_ ^= 1;
      wrapped_ = true;
    }
    return slot;
  }

  __device__ void copy(int slot, void *to, const void *from, int bytes) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem(to)),
        "l"(from), "r"(bytes), "r"(smem(full_ + slot))
        : "memory");
  }

  // Shared memory must not go away under copies in flight.
  __device__ void drain() const {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < stages_; ++i) {
      if (i < slot_) {
        wait(i, phase_);
      } else if (wrapped_) {
        wait(i, phase_ ^ 1);
      }
    }
  }

 private:
  __device__ void wait(int slot, uint32_t parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(smem(full_ + slot)),
        "r"(parity)
        : "memory");
  }

  uint64_t *full_;
  int stages_;
  int slot_ = 0;
  uint32_t phase_ = 0;  // of the stage at slot_: the parity that its next fill completes
  bool wrapped_ = false;
};

extern __shared__ __align__(128) uint8_t ring_memory[];

__global__ void __launch_bounds__(kWarp, 1) stream_pages(const __grid_constant__ Params p) {
  __shared__ uint64_t full[kMaxStages];
  BulkRing ring(full, p.stages);
  const int stage_bytes = p.rows_per_copy * p.row_bytes;
  const int page_size = 1 << p.page_shift;
  const bool dense = p.row_stride == p.row_bytes;

  for_each_run(p, [&](const Run &run) {
    const int last_page = (run.end - 1) >> p.page_shift;
    auto fetch = [&](int from) { return run.table[min(from + static_cast<int>(threadIdx.x), last_page)]; };
    int first = run.begin >> p.page_shift;  // the lanes hold the numbers of 32 pages from this one on
    int pages = fetch(first);
    for (int token = run.begin; token < run.end;) {
      const int page = token >> p.page_shift;
      if (page - first >= kWarp) pages = fetch(first = page);
      const int row = token & (page_size - 1);
      const int rows = min(min(p.rows_per_copy, page_size - row), run.end - token);
      const uint8_t *from = p.kv + __shfl_sync(~0u, pages, page - first) * p.page_stride + row * p.row_stride;
      const int slot = ring.acquire(rows * p.row_bytes);
      uint8_t *to = ring_memory + slot * stage_bytes;
      if (dense) {
        if (threadIdx.x == 0) ring.copy(slot, to, from, rows * p.row_bytes);
      } else {
        for (int i = threadIdx.x; i < rows; i += kWarp) {
          ring.copy(slot, to + i * p.row_bytes, from + i * p.row_stride, p.row_bytes);
        }
      }
      token += rows;
    }
  });
  ring.drain();
}

__device__ const uint8_t *row_address(const Params &p, int page, int token) {
  return p.kv + page * p.page_stride + (token & ((1 << p.page_shift) - 1)) * p.row_stride;
}

__global__ void __launch_bounds__(kWarp, 1) stream_rows(const __grid_constant__ Params p) {
  __shared__ uint64_t full[kMaxStages];
  BulkRing ring(full, p.stages);
  const int stage_bytes = kWarp * p.row_bytes;

  for_each_run(p, [&](const Run &run) {
    auto page_of = [&](int token) { return run.table[min(token, run.end - 1) >> p.page_shift]; };
    int page = page_of(run.begin + threadIdx.x);
    for (int token = run.begin; token < run.end; token += kWarp) {
      const int mine = token + threadIdx.x;
      const int next_page = page_of(mine + kWarp);
      const int slot = ring.acquire(min(kWarp, run.end - token) * p.row_bytes);
      if (mine < run.end) {
        ring.copy(slot, ring_memory + slot * stage_bytes + threadIdx.x * p.row_bytes, row_address(p, page, mine),
                  p.row_bytes);
      }
      page = next_page;
    }
  });
  ring.drain();
}

// Each warp copies groups of four rows into its own part of the ring, kGroups groups in flight. Four rows of 1152 bytes
// are nine full-warp instructions.
constexpr int kAsyncWarps = 8;
constexpr int kGroupRows = 4;

template <int kRowBytes>
__global__ void __launch_bounds__(kAsyncWarps *kWarp, 1) stream_async(const __grid_constant__ Params p) {
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kGroupChunks = kGroupRows * kChunks;
  constexpr int kGroups = kRingBytes / (kAsyncWarps * kGroupRows * kRowBytes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t mine = smem(ring_memory) + warp * (kGroups * kGroupRows * kRowBytes);
  constexpr int kStep = kAsyncWarps * kGroupRows;  // tokens between two groups of a warp

  int group = 0;
  for_each_run(p, [&](const Run &run) {
    // Lane i of four holds the page of row i of the group; the next group's is fetched while this one is copied.
    auto page_of = [&](int token) { return run.table[min(token + lane % kGroupRows, run.end - 1) >> p.page_shift]; };
    int token = run.begin + warp * kGroupRows;
    int pages = page_of(token);
    for (; token < run.end; token += kStep) {
      const int next_pages = page_of(token + kStep);
      const uint32_t to = mine + group * (kGroupRows * kRowBytes);
#pragma unroll
      for (int first = 0; first < kGroupChunks; first += kWarp) {
        const int chunk = first + lane;
        const int row = chunk / kChunks;
        const int page = __shfl_sync(~0u, pages, row % kGroupRows);
        if (chunk < kGroupChunks && token + row < run.end) {
          const uint8_t *from = row_address(p, page, token + row) + chunk % kChunks * 16;
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + chunk * 16), "l"(from) : "memory");
        }
      }
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.wait_group %0;" ::"n"(kGroups - 1) : "memory");
      group = group + 1 == kGroups ? 0 : group + 1;
      pages = next_pages;
    }
  });
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// CTA i of n copies tokens [i * total / n, (i + 1) * total / n) of the whole batch.
__global__ void cut_evenly(const int32_t *lengths, int batch, Piece *pieces, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  int64_t total = 0;
  for (int b = 0; b < batch; ++b) total += max(lengths[b], 0);
  const int64_t begin = i * total / count;
  const int tokens = static_cast<int>((i + 1) * total / count - begin);
  int64_t start = begin;
  int seq = 0;
  while (tokens > 0 && start >= max(lengths[seq], 0)) start -= max(lengths[seq++], 0);
  const int first = tokens > 0 ? min(lengths[seq] - static_cast<int>(start), tokens) : 0;
  pieces[i] = Piece{seq, static_cast<int>(start), first, tokens};
}

using Kernel = void (*)(Params);

Kernel async_kernel(int row_bytes) {
  switch (row_bytes) {
    case 320:
      return stream_async<320>;  // (256, 64) E4M3
    case 512:
      return stream_async<512>;  // (512, 0) E4M3
    case 576:
      return stream_async<576>;  // (512, 64) E4M3
    case 640:
      return stream_async<640>;  // (256, 64) 16-bit
    case 656:
      return stream_async<656>;  // (512, 64) E4M3 with scales and BF16 rope
    case 1024:
      return stream_async<1024>;  // (512, 0) 16-bit
    case 1152:
      return stream_async<1152>;  // (512, 64) 16-bit
    default:
      return nullptr;
  }
}

}  // namespace

enum ProbeMode { PROBE_PAGES = 0, PROBE_ROWS = 1, PROBE_ASYNC = 2 };

// Bytes of device memory for the pieces of `num_ctas` CTAs.
PROBE_API int64_t etap_probe_plan_bytes(int num_ctas) { return num_ctas * static_cast<int64_t>(sizeof(Piece)); }

// Cuts a batch, lengths [batch] on the device, for `num_ctas` CTAs. Returns a cudaError_t, as all functions here.
PROBE_API int etap_probe_plan(const int32_t *lengths, int batch, void *pieces, int num_ctas, cudaStream_t stream) {
  cut_evenly<<<(num_ctas + 127) / 128, 128, 0, stream>>>(lengths, batch, static_cast<Piece *>(pieces), num_ctas);
  return cudaGetLastError();
}

// Copies the batch once with one CTA an SM. Strides of the pool are in bytes, that of the table in entries.
PROBE_API int etap_probe_stream(int mode, const void *kv, int64_t page_stride, int64_t row_stride, int row_bytes,
                                int page_size, const int32_t *table, int64_t table_stride, const int32_t *lengths,
                                const void *pieces, int num_ctas, int rows_per_copy, cudaStream_t stream) {
  Params p{};
  p.kv = static_cast<const uint8_t *>(kv);
  p.page_stride = page_stride;
  p.row_stride = row_stride;
  p.table = table;
  p.table_stride = table_stride;
  p.lengths = lengths;
  p.pieces = static_cast<const Piece *>(pieces);
  p.page_shift = __builtin_ctz(page_size);
  p.row_bytes = row_bytes;

  Kernel kernel = nullptr;
  int threads = kWarp;
  switch (mode) {
    case PROBE_PAGES:
      kernel = stream_pages;
      p.rows_per_copy = rows_per_copy < page_size ? rows_per_copy : page_size;
      break;
    case PROBE_ROWS:
      kernel = stream_rows;
      p.rows_per_copy = kWarp;
      break;
    case PROBE_ASYNC:
      kernel = async_kernel(row_bytes);
      threads = kAsyncWarps * kWarp;
      p.rows_per_copy = kGroupRows;
      break;
    default:
      break;
  }
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const int stages = kRingBytes / (p.rows_per_copy * row_bytes);
  p.stages = stages < kMaxStages ? stages : kMaxStages;
  if (p.stages < 2) return cudaErrorInvalidValue;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
  if (status != cudaSuccess) return status;
  kernel<<<num_ctas, threads, kRingBytes, stream>>>(p);
  return cudaGetLastError();
}

PROBE_API const char *etap_probe_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
