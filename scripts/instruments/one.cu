#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "etap.h"
#include "sm90/catalog.h"
#include "sm90/kernel.h"
#include "sm90/kernels/rows_on_m.cuh"
namespace etap::sm90 { Kernel f() { return rows_on_m::instance<T1, 64, 512, 64, KvCopy::COPY1>(); } }
