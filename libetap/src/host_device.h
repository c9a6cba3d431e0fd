// Functions that run on the host and on the CUDA device.
#pragma once

#ifdef __CUDACC__
#define ETAP_HD __host__ __device__ __forceinline__
#else
#define ETAP_HD inline
#endif
