// CUDA kernels of the sram family: the contracts of sram.h, on device pointers. Asynchronous on `stream` (a
// cudaStream_t); nothing is allocated and nothing synchronises. std::runtime_error names the kernel whose launch failed.
#pragma once
#include "sram.h"

namespace pyaccel::sram::cuda {

void flip(const Flip& f, int device, void* stream);
void noise(const Noise& f, int device, void* stream);
void noise_backward(const NoiseBackward& f, int device, void* stream);

}  // namespace pyaccel::sram::cuda
