// Codes on CUDA: pack, unpack, quantise, dequantise, the signed form of the library's product (contracts: qmac.h).
// One word or element a thread, all bound by memory. Rounding and float64 sums are those of the CPU, bit for bit.
#include "../core/cuda_launch.h"
#include "../core/host_device.h"
#include "qmac_cuda.h"

namespace pyaccel::qmac::cuda {
namespace {

using pyaccel::cuda::DeviceGuard;
using pyaccel::cuda::Grid;
using pyaccel::cuda::launch;
using pyaccel::cuda::Queue;

constexpr int kThreads = 256;

Grid grid_for(int64_t count) { return {(count + kThreads - 1) / kThreads, kThreads}; }
__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) pack_kernel(const Pack f, const int64_t words) {
  const int64_t i = thread_index();
  if (i >= f.rows * words) return;
  const int64_t row = i / words, per_word = 32 / f.bits, first = (i - row * words) * per_word;
  const uint32_t mask = f.bits == 16 ? 0xffffu : (1u << f.bits) - 1;
  uint32_t word = 0;
  for (int64_t j = 0; j < per_word && first + j < f.length; ++j) {
    const int64_t at = row * f.length + first + j;
    const uint32_t code = f.bits == 16 ? static_cast<uint32_t>(static_cast<const int32_t*>(f.codes)[at])
                                       : static_cast<const uint8_t*>(f.codes)[at];
    word |= (code & mask) << (j * f.bits);
  }
  f.words[i] = word;
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const Pack f, const int64_t words) {
  const int64_t i = thread_index();
  if (i >= f.rows * f.length) return;
  const int64_t row = i / f.length, bit = (i - row * f.length) * f.bits;
  const uint32_t code = f.words[row * words + bit / 32] >> (bit % 32) & (f.bits == 16 ? 0xffffu : (1u << f.bits) - 1);
  if (f.bits == 16) static_cast<int32_t*>(f.codes)[i] = static_cast<int32_t>(code);
  else static_cast<uint8_t*>(f.codes)[i] = static_cast<uint8_t>(code);
}

__global__ void __launch_bounds__(kThreads) quantize_kernel(const Quantize f) {
  const int64_t i = thread_index();
  if (i >= f.count) return;
  const float scaled = __fdiv_rn(f.x[i], f.scale);
  float v = scaled > 0.0f ? scaled : 0.0f;  // NaN compares false: 0
  v = v < f.levels ? v : f.levels;
  const int32_t code = __float2int_rn(v);  // half to even
  if (f.wide) static_cast<int32_t*>(f.codes)[i] = code;
  else static_cast<uint8_t*>(f.codes)[i] = static_cast<uint8_t>(code);
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Dequantize f) {
  const int64_t i = thread_index();
  if (i >= f.batch * f.outputs * f.inner) return;
  const int64_t row = i / f.inner, b = row / f.outputs, o = row - b * f.outputs;
  const int64_t at = (b * f.groups + o / (f.outputs / f.groups)) * f.inner + (i - row * f.inner);
  double v = __dadd_rn(__dmul_rn(f.p_scale, static_cast<double>(static_cast<const T*>(f.p)[i])),
                       __dmul_rn(f.q_scale, static_cast<double>(static_cast<const T*>(f.q)[at])));
  if (f.bias != nullptr) v = __dadd_rn(v, static_cast<double>(f.bias[o]));
  f.y[i] = static_cast<float>(v);
}

// One warp a row.
__global__ void __launch_bounds__(kThreads) signed_kernel(const Signed f, const int64_t words) {
  const int64_t row = thread_index() / 32;
  if (row >= f.rows) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t sum = 0;
  for (int64_t j = lane; j < f.length; j += 32) {
    const uint32_t code = f.words[row * words + j / 4] >> (8 * (j % 4)) & 0xff;
    sum += code;
    f.codes[row * f.length + j] = static_cast<int8_t>(code ^ 0x80);
  }
  for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
  if (lane == 0) f.sums[row] = static_cast<int32_t>(sum);
}

}  // namespace

void pack(const Pack& f, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t words = words_of(f.length, f.bits);
  launch("pack_codes", pack_kernel, grid_for(f.rows * words), Queue{device, stream}, f, words);
}

void unpack(const Pack& f, int device, void* stream) {
  const DeviceGuard guard(device);
  launch("unpack_codes", unpack_kernel, grid_for(f.rows * f.length), Queue{device, stream}, f, words_of(f.length, f.bits));
}

void quantize(const Quantize& f, int device, void* stream) {
  const DeviceGuard guard(device);
  launch("quantize_codes", quantize_kernel, grid_for(f.count), Queue{device, stream}, f);
}

void dequantize(const Dequantize& f, int device, void* stream) {
  const DeviceGuard guard(device);
  launch("dequantize_sums", f.sum_bytes == 4 ? dequantize_kernel<int32_t> : dequantize_kernel<int64_t>,
         grid_for(f.batch * f.outputs * f.inner), Queue{device, stream}, f);
}

void to_signed(const Signed& f, int device, void* stream) {
  const DeviceGuard guard(device);
  launch("to_signed", signed_kernel, grid_for(f.rows * 32), Queue{device, stream}, f, words_of(f.length, 8));
}

}  // namespace pyaccel::qmac::cuda
