// Quantised linear layers and convolutions on CUDA by int8 tensor cores (contract: qmac.h; the phases: index.h).
//
// `mma.sync` multiplies unsigned by unsigned bytes on sm_80 and later, so no shift by 128 is needed. Codes of any width are
// unpacked to bytes on their way into shared memory; a convolution gathers its patches there and never writes them out.
// 16-bit codes run as limbs, K beyond 65,536 in stretches: one launch each, which adds to P. Floor: the tensor cores' rate;
// a block of 64 x 64 sums re-reads each operand every 64 rows, from L2.
// Small batches of a linear layer stream the packed weights (stream_cuda.cu). Q: one warp a row, one thread a pixel.
#include "../core/cuda_launch.h"
#include "index.h"
#include "qmac_cuda.h"
#include "stream_cuda.h"

namespace pyaccel::qmac::cuda {
namespace {

using namespace index;
using pyaccel::cuda::DeviceGuard;
using pyaccel::cuda::Grid;
using pyaccel::cuda::launch;
using pyaccel::cuda::Queue;

__device__ __forceinline__ void multiply(uint32_t (&sum)[4], const FragmentA& a, const FragmentB& b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
}

// blockIdx.x = column block * row_blocks + row block. T: int32 or int64 sums; sums of a stretch are unsigned 32-bit.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) product_kernel(const Tile t, const Place place, const int row_blocks, const int shift,
                                                              const bool accumulate, T* p) {
  __shared__ __align__(16) uint8_t shared[kTileBytes];
  const int64_t column_block = blockIdx.x / row_blocks;
  const int row_block = static_cast<int>(blockIdx.x % row_blocks);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  uint32_t sum[kTilesDown][kTilesAcross][4] = {};
  for (int step = t.first; step < t.last; step += kStep) {
    load_weights(t, row_block, step, thread, shared);
    load_activations(t, column_block, step, thread, shared);
    __syncthreads();
#pragma unroll
    for (int slice = 0; slice < kStep / 32; ++slice) {
      FragmentA a[kTilesDown];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) a[i] = fragment_a(shared, warp_row(warp) + 16 * i, slice, lane);
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        const FragmentB b = fragment_b(shared, warp_column(warp) + 8 * j, slice, lane);
#pragma unroll
        for (int i = 0; i < kTilesDown; ++i) multiply(sum[i][j], a[i], b);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kTilesDown; ++i)
#pragma unroll
    for (int j = 0; j < kTilesAcross; ++j)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int output = row_block * kRows + warp_row(warp) + 16 * i + sum_row(lane, n);
        const int64_t column = column_block * kColumns + warp_column(warp) + 8 * j + sum_column(lane, n);
        const int64_t at = place_of(place, output, column);
        if (at < 0) continue;
        const T part = static_cast<T>(static_cast<T>(sum[i][j][n]) << shift);
        p[at] = accumulate ? p[at] + part : part;
      }
}

template <class T>
__global__ void __launch_bounds__(256) row_sums_kernel(const Linear f, const int64_t words) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / 32;
  if (row >= f.batch) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  unsigned long long sum = 0;
  for (int64_t code = 4 * lane; code < f.length; code += 128)
    for (int limb = 0; limb < (f.activation_bits == 16 ? 2 : 1); ++limb) {
      const uint32_t four = keep_below(four_codes(f.activations + row * words, words, code, f.activation_bits, limb), code, f.length);
      sum += static_cast<unsigned long long>((four & 0xff) + (four >> 8 & 0xff) + (four >> 16 & 0xff) + (four >> 24)) << (8 * limb);
    }
  for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
  if (lane == 0) static_cast<T*>(f.q)[row] = static_cast<T>(sum);
}

// One thread a pixel of one group: patches of neighbours overlap, so most reads hit the first-level cache.
template <class T>
__global__ void __launch_bounds__(256) patch_sums_kernel(const Conv f, const int64_t pixels) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= f.batch * f.groups * pixels) return;
  const int64_t plane = i / pixels, inside = i - plane * pixels, channels = f.channels / f.groups;
  const int64_t top = inside / f.out_width * f.stride[0] - f.padding[0], left = inside % f.out_width * f.stride[1] - f.padding[1];
  T sum = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t r = 0; r < f.kernel[0]; ++r)
      for (int64_t s = 0; s < f.kernel[1]; ++s) {
        const int64_t y = top + r * f.dilation[0], x = left + s * f.dilation[1];
        if (y < 0 || y >= f.height || x < 0 || x >= f.width) continue;
        const int64_t at = ((plane * channels + c) * f.height + y) * f.width + x;
        sum += f.activation_bits == 16 ? static_cast<T>(static_cast<const int32_t*>(f.activations)[at])
                                       : static_cast<T>(static_cast<const uint8_t*>(f.activations)[at]);
      }
  static_cast<T*>(f.q)[i] = sum;
}

// Every pair of limbs, every stretch of K: one launch each; integer sums, so their order does not matter.
void multiply_all(const char* name, Tile t, const Place& place, int64_t length, int sum_bytes, void* p, const Queue& queue) {
  const int64_t row_blocks = (t.outputs + kRows - 1) / kRows, column_blocks = (t.columns + kColumns - 1) / kColumns;
  const Grid grid{row_blocks * column_blocks, kThreads};
  bool accumulate = false;
  for (int64_t first = 0; first < length; first += kStretch)
    for (t.weight_limb = 0; t.weight_limb < (t.weight_bits == 16 ? 2 : 1); ++t.weight_limb)
      for (t.activation_limb = 0; t.activation_limb < (t.activation_bits == 16 ? 2 : 1); ++t.activation_limb) {
        t.first = static_cast<int>(first);
        t.last = static_cast<int>(first + kStretch < length ? first + kStretch : length);
        const int shift = 8 * (t.weight_limb + t.activation_limb), rows = static_cast<int>(row_blocks);
        if (sum_bytes == 4) launch(name, product_kernel<int32_t>, grid, queue, t, place, rows, shift, accumulate, static_cast<int32_t*>(p));
        else launch(name, product_kernel<int64_t>, grid, queue, t, place, rows, shift, accumulate, static_cast<int64_t*>(p));
        accumulate = true;
      }
}

void check_fits(const char* name, int64_t value, const char* what) {
  if (value > INT32_MAX - 2 * kStep)
    throw std::invalid_argument(std::string(name) + ": a CUDA kernel takes fewer than 2^31 " + what + ", got " + std::to_string(value));
}

}  // namespace

void linear(const Linear& f, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  check_fits("quantized_linear", f.outputs, "outputs");
  check_fits("quantized_linear", f.length, "codes a row");
  const int64_t activation_words = words_of(f.length, f.activation_bits);
  launch("quantized_linear", f.sum_bytes == 4 ? row_sums_kernel<int32_t> : row_sums_kernel<int64_t>,
         Grid{(f.batch * 32 + 255) / 256, 256}, queue, f, activation_words);
  if (f.outputs == 0) return;
  if (f.length == 0) {
    pyaccel::cuda::check(cudaMemsetAsync(f.p, 0, static_cast<size_t>(f.batch * f.outputs * f.sum_bytes), static_cast<cudaStream_t>(stream)),
                         "quantized_linear");
    return;
  }
  if (stream_linear(f, device, stream)) return;
  Tile t;
  t.weight_bits = f.weight_bits;
  t.activation_bits = f.activation_bits;
  t.outputs = static_cast<int>(f.outputs);
  t.columns = f.batch;
  t.length = static_cast<int>(f.length);
  t.weights = f.weights;
  t.weight_words = words_of(f.length, f.weight_bits);
  t.activations = f.activations;
  t.activation_words = activation_words;
  multiply_all("quantized_linear", t, Place{t.outputs, f.batch, 0, t.outputs, 0}, f.length, f.sum_bytes, f.p, queue);
}

void convolution(const Conv& f, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const int64_t pixels = f.out_height * f.out_width, channels = f.channels / f.groups, length = channels * f.kernel[0] * f.kernel[1];
  check_fits("quantized_conv2d", f.height * f.width, "pixels an image");
  check_fits("quantized_conv2d", length, "weights an output");
  launch("quantized_conv2d", f.sum_bytes == 4 ? patch_sums_kernel<int32_t> : patch_sums_kernel<int64_t>,
         Grid{(f.batch * f.groups * pixels + 255) / 256, 256}, queue, f, pixels);
  Tile t;
  t.weight_bits = f.weight_bits;
  t.activation_bits = f.activation_bits;
  t.outputs = static_cast<int>(f.outputs / f.groups);
  t.columns = f.batch * pixels;
  t.length = static_cast<int>(length);
  t.weight_words = words_of(length, f.weight_bits);
  t.activations = f.activations;
  t.channels = static_cast<int>(channels);
  t.all_channels = static_cast<int>(f.channels);
  t.height = static_cast<int>(f.height);
  t.width = static_cast<int>(f.width);
  t.kernel_height = static_cast<int>(f.kernel[0]);
  t.kernel_width = static_cast<int>(f.kernel[1]);
  for (int d = 0; d < 2; ++d) {
    t.stride[d] = static_cast<int>(f.stride[d]);
    t.padding[d] = static_cast<int>(f.padding[d]);
    t.dilation[d] = static_cast<int>(f.dilation[d]);
  }
  t.out_height = static_cast<int>(f.out_height);
  t.out_width = static_cast<int>(f.out_width);
  for (int64_t group = 0; group < f.groups; ++group) {
    t.weights = f.weights + group * t.outputs * t.weight_words;
    t.first_channel = static_cast<int>(group * channels);
    const Place place{t.outputs, t.columns, static_cast<int>(group * t.outputs), static_cast<int>(f.outputs), pixels};
    multiply_all("quantized_conv2d", t, place, length, f.sum_bytes, f.p, queue);
  }
}

}  // namespace pyaccel::qmac::cuda
