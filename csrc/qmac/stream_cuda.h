// Small batches on CUDA: the packed weights pass once (see stream_cuda.cu).
#pragma once
#include "qmac.h"

namespace pyaccel::qmac::cuda {

// False where the tensor-core form serves better; Q is the caller's.
bool stream_linear(const Linear& f, int device, void* stream);

}  // namespace pyaccel::qmac::cuda
