// Marks arithmetic that the CPU loops and the CUDA kernels share.
#pragma once
#if defined(__CUDACC__)
#define PYACCEL_HD __host__ __device__ __forceinline__
#else
#define PYACCEL_HD inline __attribute__((always_inline))
#endif
