// The tiled crossbar product with converters on CUDA (contract: crossbar.h).
//
// A block makes 64 samples x 64 outputs, a thread 4 x 4 of them: partial sums and codes in registers, 16 inputs at a time
// through shared memory, cut at the borders of row tiles, where the partial sums pass noise and ADC. float32 multiply-adds
// (not TF32), float64 for float64. Version 1, never run: predicted 50 to 60 % of the float32 rate without noise.
#include "../core/cuda_launch.h"
#include "../core/philox.h"
#include "crossbar_cuda.h"

namespace pyaccel::crossbar::cuda {

using namespace ::pyaccel::cuda;
namespace {

constexpr int kSide = 64, kDepth = 16, kThreads = 256, kOwn = 4;

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ float half_even(float v) { return rintf(v); }
__device__ __forceinline__ double half_even(double v) { return rint(v); }

// NaN stays NaN: both comparisons are false.
template <class S>
__device__ __forceinline__ S code_of(S v, S inverse, S top) {
  S scaled = v * inverse;
  scaled = scaled > top ? top : scaled;
  scaled = scaled < -top ? -top : scaled;
  return half_even(scaled);
}

// Standard normal of element `index` of the read noise: reference/philox.py, philox_normal.
__device__ __forceinline__ float normal_of(uint64_t seed, uint32_t stream, uint64_t index) {
  const philox::Words words = philox::draw(seed, index / 4, stream, philox::kReadNoise);
  const int pair = static_cast<int>(index % 4) & 2;
  const uint32_t first = pair ? words.w[2] : words.w[0], second = pair ? words.w[3] : words.w[1];
  const float u = (static_cast<float>(first >> 9) + 0.5f) * 0x1p-23f, v = (static_cast<float>(second >> 9) + 0.5f) * 0x1p-23f;
  const float radius = sqrtf(-2.0f * logf(u));
  return radius * ((index & 1) ? sinpif(2.0f * v) : cospif(2.0f * v));
}

template <class S>
__global__ void __launch_bounds__(kThreads) matmul_kernel(const Matmul f) {
  __shared__ S xs[kDepth][kSide + 1];
  __shared__ S ws[kDepth][kSide];
  const int64_t across = (f.outputs + kSide - 1) / kSide;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) / across * kSide, column0 = static_cast<int64_t>(blockIdx.x) % across * kSide;
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  const S *x = static_cast<const S*>(f.x), *plus = static_cast<const S*>(f.positive), *minus = static_cast<const S*>(f.negative);
  const S top = static_cast<S>(f.adc.top);
  S inverse[kOwn], step[kOwn], sums[kOwn][kOwn] = {};
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    int64_t c = column0 + tx + 16 * j;
    c = f.adc.per_column ? (c < f.outputs ? c : f.outputs - 1) : 0;
    inverse[j] = f.adc.top > 0 ? static_cast<const S*>(f.adc.inverse)[c] : S(1);
    step[j] = f.adc.top > 0 ? static_cast<const S*>(f.adc.step)[c] : S(1);
  }
  int64_t read = 0;
  for (int64_t first = 0; first < f.inputs; first += f.tile) {
    const int64_t end = first + f.tile < f.inputs ? first + f.tile : f.inputs;
    for (int array = 0; array < (f.apart ? 2 : 1); ++array, ++read) {
      S acc[kOwn][kOwn] = {};
      for (int64_t k0 = first; k0 < end; k0 += kDepth) {
        for (int e = static_cast<int>(threadIdx.x); e < kDepth * kSide; e += kThreads) {
          const int k = e % kDepth, r = e / kDepth;  // x: neighbours along the inputs
          const bool inside = k0 + k < end && row0 + r < f.batch;
          xs[k][r] = inside ? x[(row0 + r) * f.inputs + k0 + k] : S(0);
          const int kw = e / kSide, c = e % kSide;   // weights: neighbours along the outputs
          S weight = 0;
          if (k0 + kw < end && column0 + c < f.outputs) {
            const int64_t at = (k0 + kw) * f.outputs + column0 + c;
            weight = f.apart ? (array ? minus[at] : plus[at]) : (minus != nullptr ? plus[at] - minus[at] : plus[at]);
          }
          ws[kw][c] = weight;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
          S a[kOwn], b[kOwn];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) a[i] = xs[k][ty + 16 * i], b[i] = ws[k][tx + 16 * i];
#pragma unroll
          for (int i = 0; i < kOwn; ++i)
#pragma unroll
            for (int j = 0; j < kOwn; ++j) acc[i][j] = multiply_add(a[i], b[j], acc[i][j]);
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          S value = acc[i][j];
          if (f.read_noise != 0) {
            const int64_t index = (read * f.batch + row0 + ty + 16 * i) * f.outputs + column0 + tx + 16 * j;
            value += static_cast<S>(f.read_noise) * static_cast<S>(normal_of(f.seed, f.stream, static_cast<uint64_t>(index)));
          }
          if (f.adc.top > 0) value = code_of(value, inverse[j], top);
          sums[i][j] += array ? -value : value;
        }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t r = row0 + ty + 16 * i, c = column0 + tx + 16 * j;
      if (r < f.batch && c < f.outputs) static_cast<S*>(f.y)[r * f.outputs + c] = sums[i][j] * step[j];
    }
}

template <class S>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const Quantize f) {
  const S step = *static_cast<const S*>(f.converter.step), inverse = *static_cast<const S*>(f.converter.inverse);
  const S* x = static_cast<const S*>(f.x);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < f.count; i += static_cast<int64_t>(gridDim.x) * kThreads)
    static_cast<S*>(f.out)[i] = code_of(x[i], inverse, static_cast<S>(f.converter.top)) * step;
}

}  // namespace

void matmul(const Matmul& f, int device, void* stream) {
  const DeviceGuard guard(device);
  const Grid grid{(f.batch + kSide - 1) / kSide * ((f.outputs + kSide - 1) / kSide), kThreads, 0};
  if (f.dtype == Dtype::f64) launch("crossbar_matmul", matmul_kernel<double>, grid, {device, stream}, f);
  else launch("crossbar_matmul", matmul_kernel<float>, grid, {device, stream}, f);
}

void quantize(const Quantize& f, int device, void* stream) {
  const DeviceGuard guard(device);
  const Grid grid{f.count < 65536 * int64_t{kThreads} ? (f.count + kThreads - 1) / kThreads : 65536, kThreads, 0};
  if (f.dtype == Dtype::f64) launch("crossbar_quantize", quantize_kernel<double>, grid, {device, stream}, f);
  else launch("crossbar_quantize", quantize_kernel<float>, grid, {device, stream}, f);
}

}  // namespace pyaccel::crossbar::cuda
