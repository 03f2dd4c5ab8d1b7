// CUDA kernels of the crossbar family: the contracts of crossbar.h, on device pointers. Asynchronous on `stream` (a
// cudaStream_t); nothing is allocated and nothing synchronises. A tile with a bad conductance, or too ill-conditioned, comes
// back as NaN: reporting it would wait for the device. std::runtime_error names the kernel whose launch failed.
#pragma once
#include <cstdint>

#include "crossbar.h"

namespace pyaccel::crossbar::cuda {

// Scratch of a block, and what the launches want in all: blocks work on tile after tile in scratch of their own, so any
// whole number of blocks is enough, and results do not depend on it.
int64_t scratch_bytes_of_a_block(const Tiles& tiles, const Resistances& ohm, bool gradient);
int64_t scratch_bytes(const Tiles& tiles, const Resistances& ohm, bool gradient);

// `scratch`: 16-byte aligned, `bytes` long, alive until the work is done.
void matrix(const Matrix& f, void* scratch, int64_t bytes, int device, void* stream);
void matrix_gradient(const MatrixGradient& f, void* scratch, int64_t bytes, int device, void* stream);
void matmul(const Matmul& f, int device, void* stream);
void quantize(const Quantize& f, int device, void* stream);

}  // namespace pyaccel::crossbar::cuda
