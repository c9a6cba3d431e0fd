// What lies where in the workspace of the CUDA device.
//
//     header | worker records | sequence records | unit blocks | counters | partial results
#pragma once

#include <cstddef>

#include "sm90/schedule/planner.h"

namespace etap::sm90 {

struct Workspace {
  size_t workers, sequences, unit_blocks, counters, partials, bytes;  // offsets, and the total
};

// Floats of one partial result: O^T of a tile, and the maximum and sum of its rows once for each CTA of the cluster
// that has them.
ETAP_HD size_t partial_floats(int tile_rows, int d_latent, int cluster) {
  return static_cast<size_t>(tile_rows) * (d_latent + 2 * cluster);
}

inline Workspace workspace_layout(int batch, int tiles, int tile_rows, int d_latent, int workers, int cluster) {
  const auto aligned = [](size_t n) { return (n + 255) / 256 * 256; };
  Workspace w;
  w.workers = 0;
  w.sequences = aligned(sizeof(WorkerRecord) * workers);
  w.unit_blocks = w.sequences + aligned(sizeof(SequenceRecord) * (static_cast<size_t>(batch) + 1));
  w.counters = w.unit_blocks + aligned(sizeof(int) * static_cast<size_t>(batch) * tiles);
  w.partials = w.counters + aligned(sizeof(int) * static_cast<size_t>(workers) * cluster);
  const size_t partial = partial_floats(tile_rows, d_latent, cluster / ctas_of_tile(tile_rows));
  w.bytes = w.partials + aligned(sizeof(float) * 2 * workers * partial);
  return w;
}

}  // namespace etap::sm90
