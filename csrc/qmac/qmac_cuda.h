// CUDA kernels of the qmac family: the contracts of qmac.h, on device pointers. Asynchronous on `stream` (a
// cudaStream_t); nothing is allocated, nothing synchronises, nothing is read back: codes out of range are not reported.
#pragma once
#include "qmac.h"

namespace pyaccel::qmac::cuda {

void pack(const Pack& f, int device, void* stream);
void unpack(const Pack& f, int device, void* stream);
void linear(const Linear& f, int device, void* stream);
void convolution(const Conv& f, int device, void* stream);
void quantize(const Quantize& f, int device, void* stream);
void dequantize(const Dequantize& f, int device, void* stream);
void to_signed(const Signed& f, int device, void* stream);

}  // namespace pyaccel::qmac::cuda
