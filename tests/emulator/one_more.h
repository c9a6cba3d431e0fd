// One of each that the library doesn't have: a tile size, a KV format, a pair of widths. `make emulator` includes this
// before every file of its two libraries, the CUDA kernels on the host and the CPU device, and one_more.py asks whether
// they are right. What it took stands between #ifdef ETAP_MORE_.. in the library's sources.
#pragma once

// catalog.def
#define ETAP_MORE_KERNELS KERNEL(e4m3_dv_split, 40)

// widths.def
#define ETAP_MORE_WIDTHS WIDTHS(256, 0)

// kv_format.h, cpu/kv_rows.h, sm90/decode_params.cc: rows of 592 bytes, as ETAP_KV_E4M3_GROUP has them, then the
// token's scales.
#define ETAP_MORE_FORMATS {"e4m3_592", 1, 592, true, GroupScales::kAtEnd}
