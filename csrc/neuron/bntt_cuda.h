// What the forward and the backward half of BNTT share: sizes, scratch, folding of partial sums. See bntt_cuda.cu.
#pragma once
#include "../core/cuda_launch.h"
#include "neuron_cuda.h"
#include "sweep_cuda.h"

namespace pyaccel::neuron::cuda {

// Calls run.operator()<T, V, lanes>() with what suits the shape. One choice holds for every kernel of a call: the
// layout of the coefficients and the number of chunks go with it.
template <class F>
void with_layout(const BnttShape& shape, bool aligned, const F& run) {
  with_type(shape.dtype, [&]<class T>(T) {
    if constexpr (sizeof(T) < 8) {
      if (index::bntt_lanes(shape, aligned) == 4) {
        if (index::lanes_of(shape, 4) == Lanes::across_channels)
          return run.template operator()<T, 4, Lanes::across_channels>();
        return run.template operator()<T, 4, Lanes::one_channel>();
      }
    }
    run.template operator()<T, 1, Lanes::one_channel>();
  });
}

inline uint32_t checked_row(const char* what, const BnttShape& s) {
  const int64_t row = s.outer * s.channels * s.inner;
  index::check_row(what, row);
  return static_cast<uint32_t>(row);
}

// Mean and scale into the table, from statistics that are given: f.mean, f.var, f.weight, f.eps.
void bntt_coefficients(const BnttForward& f, void* table, bool aligned, const Queue& queue);
// The forward sweep over the first `steps` steps. The state before steps `every`, 2*every, ... goes to `checkpoints`
// where every > 0; f.spikes and f.membrane_out may be null.
void bntt_scan(const BnttForward& f, const void* table, int64_t steps, void* checkpoints, int64_t every, bool aligned,
               const Queue& queue);

// ------------------------------------------------------------------------------------------------------- device
// A block of kFoldThreads folds the slots of 32 channels of one step, in an order that depends on nothing but the
// shape.
constexpr int kFoldColumns = 32, kFoldRows = 16, kFoldThreads = kFoldColumns * kFoldRows;

inline Grid fold_grid(int64_t steps, int64_t channels) {
  return {steps * index::ceil_div(channels, kFoldColumns), kFoldThreads,
          2 * kFoldThreads * static_cast<int>(sizeof(double))};
}

struct FoldPlace {
  int step;
  uint32_t channel;
  bool owner;  // this thread has the sums
};
PYACCEL_DEVICE FoldPlace fold_place(uint32_t channels) {
  const uint32_t across = (channels + kFoldColumns - 1) / kFoldColumns;
  const uint32_t channel = blockIdx.x % across * kFoldColumns + threadIdx.x % kFoldColumns;
  return {static_cast<int>(blockIdx.x / across), channel, threadIdx.x < kFoldColumns && channel < channels};
}

// Every thread of the block calls it; the owner gets the two sums.
template <class S>
PYACCEL_DEVICE void fold_slots(const FoldPlace& place, const S* slots, int steps, uint32_t chunks, uint32_t channels,
                               double (&sum)[2]) {
  const auto part = dynamic_shared<double[kFoldRows][kFoldColumns]>();
  const uint32_t r = threadIdx.x / kFoldColumns, column = threadIdx.x % kFoldColumns;
  sum[0] = sum[1] = 0;
  if (place.channel < channels) {
#pragma unroll 4
    for (uint32_t k = r; k < chunks; k += kFoldRows) {
      sum[0] += slots[index::slot(0, place.step, k, place.channel, steps, chunks, channels)];
      sum[1] += slots[index::slot(1, place.step, k, place.channel, steps, chunks, channels)];
    }
  }
  part[0][r][column] = sum[0];
  part[1][r][column] = sum[1];
  __syncthreads();
  if (r != 0) return;
  for (int k = 1; k < kFoldRows; ++k) {
    sum[0] += part[0][k][column];
    sum[1] += part[1][k][column];
  }
}

// 1 / sqrt(var + eps) from the statistics as stored, so that backward recomputes what forward used.
template <class S>
PYACCEL_DEVICE S inverse_deviation(S var, double eps) {
  return S(1) / sqrt(var + static_cast<S>(eps));
}

// Sums over the threads of a warp that share a column. Wide threads within a channel have the warp to themselves.
template <int V, Lanes lanes, class S>
PYACCEL_DEVICE S sum_columns(S value, uint32_t columns) {
  if constexpr (V > 1 && lanes == Lanes::one_channel) {
#pragma unroll
    for (int apart = 16; apart >= 1; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  } else {
#pragma unroll 1
    for (int apart = 16; apart >= static_cast<int>(columns); apart /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, apart);
  }
  return value;
}

}  // namespace pyaccel::neuron::cuda
