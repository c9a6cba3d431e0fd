#pragma once

namespace etap::sm90 {

// How KV blocks get into shared memory.
enum class KvCopy {
  kTma,        // 16-bit rows in pages of at least eight tokens: boxes through the copy engine
  kGather,     // 16-bit rows in smaller pages: 16 bytes at a time
  kE4m3,       // FP8 rows with one scale a tensor
  kE4m3Group,  // with a scale for each token and 128 values beside the cache
  kE4m3_656    // with the scales in the row, and a BF16 rope part or (528 bytes) none
};

constexpr bool is_e4m3(KvCopy copy) { return copy != KvCopy::kTma && copy != KvCopy::kGather; }

// Threads that announce a filled slot.
constexpr int arrivals(KvCopy copy) { return copy == KvCopy::kTma ? 1 : 128; }

}  // namespace etap::sm90
