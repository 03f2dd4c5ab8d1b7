// Linear layers of small batches on CUDA: bound by reading the packed weights, once (contract: qmac.h).
//
// A warp sums two rows of weights, 16 bytes a lane and load, two loads of each row in flight. A word is masked without a
// shift: mask m leaves code << (m * bits) in every byte, `dp4a` adds its products into sum m, and sum m is shifted down at
// the end, where it is exact. Activations lie in shared memory in the order the masks want them, made once a block; the
// grid is a few blocks a multiprocessor that walk over the rows. Goal: 70 % of copy bandwidth at 2 and 4 bits.
#include "../core/cuda_launch.h"
#include "../core/cuda_vector.h"
#include "index.h"
#include "stream_cuda.h"

namespace pyaccel::qmac::cuda {
namespace {

using namespace index;
using pyaccel::cuda::DeviceGuard;
using pyaccel::cuda::Grid;
using pyaccel::cuda::launch;
using pyaccel::cuda::Queue;

constexpr int kStreamThreads = 256, kWarps = kStreamThreads / 32, kRowsPerWarp = 2, kBlocks = 132 * 4;
constexpr int kLargestRow = 96 * 1024;  // bytes of activations in shared memory: two blocks fit a multiprocessor

__device__ __forceinline__ void add_word(uint32_t (&sum)[8], uint32_t word, const uint32_t* activations, int bits, int masks) {
#pragma unroll
  for (int m = 0; m < 8; ++m)
    if (m < masks) sum[m] = __dp4a(word & byte_mask(bits, m), activations[m], sum[m]);
}

// activations [ceil(words / 4) * 4][masks] words in shared memory: zero where there is no code.
template <int bits>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_kernel(const Linear f, const int64_t batch_row, const int words,
                                                                   const bool wide) {
  constexpr int masks = 8 / bits;
  uint32_t* planes = pyaccel::cuda::dynamic_shared<uint32_t>();
  const int quads = (words + 3) / 4, count = quads * 4 * masks;
  const int64_t activation_words = words_of(f.length, f.activation_bits);
  const uint32_t* row = f.activations + batch_row * activation_words;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kStreamThreads) {
    uint32_t four = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const int64_t code = masked_code(i / masks, byte, bits, i % masks);
      if (code >= f.length) continue;
      const int64_t bit = code * f.activation_bits;
      four |= (row[bit / 32] >> (bit % 32) & ((1u << f.activation_bits) - 1)) << (8 * byte);
    }
    planes[i] = four;
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRowsPerWarp; first < f.outputs;
       first += static_cast<int64_t>(gridDim.x) * kWarps * kRowsPerWarp) {
    uint32_t sum[kRowsPerWarp][8] = {};
    const bool second = first + 1 < f.outputs;
    const uint32_t* rows[kRowsPerWarp] = {f.weights + first * words, f.weights + (first + (second ? 1 : 0)) * words};
    if (words % 4 == 0 && reinterpret_cast<uintptr_t>(f.weights) % 16 == 0) {
#pragma unroll 2
      for (int q = lane; q < quads; q += 32) {
        uint4 w[kRowsPerWarp];
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) w[r] = __ldcs(reinterpret_cast<const uint4*>(rows[r]) + q);
        const uint32_t* at = planes + q * 4 * masks;
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
          add_word(sum[r], w[r].x, at, bits, masks);
          add_word(sum[r], w[r].y, at + masks, bits, masks);
          add_word(sum[r], w[r].z, at + 2 * masks, bits, masks);
          add_word(sum[r], w[r].w, at + 3 * masks, bits, masks);
        }
      }
    } else {
      for (int i = lane; i < words; i += 32)
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) add_word(sum[r], rows[r][i], planes + i * masks, bits, masks);
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      unsigned long long total = 0;
#pragma unroll
      for (int m = 0; m < masks; ++m) total += sum[r][m] >> (bits * m);
      for (int k = 16; k > 0; k /= 2) total += __shfl_xor_sync(0xffffffffu, total, k);
      if (lane != 0 || (r == 1 && !second)) continue;
      const int64_t at = batch_row * f.outputs + first + r;
      if (wide) static_cast<int64_t*>(f.p)[at] = static_cast<int64_t>(total);
      else static_cast<int32_t*>(f.p)[at] = static_cast<int32_t>(total);
    }
  }
}

}  // namespace

bool stream_linear(const Linear& f, int device, void* stream) {
  if (f.batch > 4 || f.activation_bits > 8 || f.weight_bits > 8) return false;
  const int64_t words = words_of(f.length, f.weight_bits), masks = 8 / f.weight_bits;
  const int64_t bytes = (words + 3) / 4 * 16 * masks;
  // A lane's sum m: (2^kw - 1) 2^(kw m) (2^ka - 1) a code, codes / (masks * 32) and a few of them; must stay below 2^32.
  const int64_t largest = ((int64_t{1} << f.weight_bits) - 1) * ((int64_t{1} << f.activation_bits) - 1) << (8 - f.weight_bits);
  const int64_t codes = ((words + 3) / 4 * 16 + 511) / 512 * 16;  // bytes of weights a lane sees: one code each and mask
  if (bytes > kLargestRow || largest * codes >= int64_t{1} << 32) return false;
  const DeviceGuard guard(device);
  const int64_t blocks = (f.outputs + kWarps * kRowsPerWarp - 1) / (kWarps * kRowsPerWarp);
  const Grid grid{blocks < kBlocks ? blocks : kBlocks, kStreamThreads, static_cast<int>(bytes)};
  const auto kernel = f.weight_bits == 1 ? stream_kernel<1> : f.weight_bits == 2 ? stream_kernel<2>
                      : f.weight_bits == 4 ? stream_kernel<4> : stream_kernel<8>;
  for (int64_t row = 0; row < f.batch; ++row)
    launch("quantized_linear", kernel, grid, Queue{device, stream}, f, row, static_cast<int>(words), f.sum_bytes == 8);
  return true;
}

}  // namespace pyaccel::qmac::cuda
