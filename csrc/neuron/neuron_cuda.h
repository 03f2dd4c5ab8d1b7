// CUDA kernels of the neuron family: the contracts of neuron.h, on device pointers. Asynchronous on `stream` (a
// cudaStream_t); nothing is allocated and nothing synchronises, so every call can be captured in a CUDA graph once it
// has run before. Without a neuron nothing runs and nothing is written. std::runtime_error names the kernel whose
// launch failed; std::invalid_argument: a size is refused.
#pragma once
#include <cstdint>

#include "neuron.h"

namespace pyaccel::neuron::cuda {

// The longest stretch of time whose u a block keeps on chip: longer sequences need checkpoints at most this far apart.
constexpr int64_t kLongestSegment = 32;

void lif_forward(const LifForward& f, int device, void* stream);
// Without checkpoints at most kLongestSegment steps.
void lif_backward(const LifBackward& b, int device, void* stream);

// Bytes of scratch for the bntt launches: a function of the shape alone, so that sums, and with them results, do not
// depend on the card. `scratch` is 16-byte aligned, its contents do not matter, and it must live until the work is
// done.
int64_t bntt_scratch_bytes(const BnttShape& shape, bool backward);

void bntt_statistics(const BnttStatistics& s, void* scratch, int device, void* stream);
void bntt_forward(const BnttForward& f, void* scratch, int device, void* stream);
// sums_only writes sums (and grad_weight, from these sums, where it is wanted); sums_given writes everything that is
// wanted, grad_weight from the sums given.
void bntt_backward(const BnttBackward& b, void* scratch, int device, void* stream);

void encode(const Encode& e, int device, void* stream);

void stdb_forward(const StdbForward& f, int device, void* stream);
void stdb_backward(const StdbBackward& b, int device, void* stream);

// Values without a code become 0: whether there were any is not reported, since that would wait for the device.
void pack(const Planes& f, int device, void* stream);
void unpack(const Planes& f, int device, void* stream);

}  // namespace pyaccel::neuron::cuda
