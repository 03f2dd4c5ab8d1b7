// The qmac family: subword-parallel quantised multiply-accumulate (quanos, section 7). Plain data, borrowed pointers.
//
// Codes are unsigned, 1, 2, 4, 8 or 16 bits wide, packed little-endian: code j of a row lies in bits j*b .. j*b + b - 1
// of the row's bytes; rows are padded to whole 32-bit words. Padding bits may hold anything: no kernel lets them count.
// Each operand has a width of its own. Unpacked codes are one byte each (int32 for 16 bits).
//
//   P = sum_k w_k a_k,   Q = sum_k a_k                        exact integers, the same on every device, level, thread count
//
// Sums are int32 where the widths sum to at most 16 and K (2^kw - 1) (2^ka - 1) < 2^31, else int64 (`sum_bytes`).
#pragma once
#include <cstdint>

#include "../core/dtype.h"
#include "../core/host_device.h"

namespace pyaccel::qmac {

// `codes`: [rows, length] uint8 (16 bits: int32)  <->  `words`: [rows, words_of(length, bits)]. Floor: both once.
// Packing reports a code that needs more than `bits` bits: `in_range` is set to false, the words are then unusable.
struct Pack {
  int bits = 8;
  int64_t rows = 0, length = 0;
  void* codes = nullptr;
  uint32_t* words = nullptr;
  bool in_range = true;
};

PYACCEL_HD constexpr int64_t words_of(int64_t length, int bits) { return (length * bits + 31) / 32; }

// P [batch, outputs], Q [batch]. Floor: the packed weights once where the batch is small, else the multiplier's rate.
struct Linear {
  int activation_bits = 8, weight_bits = 8;
  int64_t batch = 0, outputs = 0, length = 0;
  const uint32_t* activations = nullptr;  // [batch, words]
  const uint32_t* weights = nullptr;      // [outputs, words]
  int sum_bytes = 4;
  void* p = nullptr;
  void* q = nullptr;
};

// P [batch, outputs, out_height, out_width], Q [batch, groups, out_height, out_width]. Padding is code 0.
// Weight rows hold the codes of [channels / groups, kernel_height, kernel_width] in that order.
// `in_range`: false where an activation code needs more than activation_bits.
struct Conv {
  int activation_bits = 8, weight_bits = 8;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t outputs = 0, groups = 1;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t out_height = 0, out_width = 0;
  const void* activations = nullptr;  // [batch, channels, height, width] uint8 (16 bits: int32)
  const uint32_t* weights = nullptr;
  int sum_bytes = 4;
  void* p = nullptr;
  void* q = nullptr;
  bool in_range = true;
};

// codes = round_half_even(clamp(x / scale, 0, 2^bits - 1)), float32 arithmetic; NaN gives 0. `levels` = 2^nominal - 1.
struct Quantize {
  int64_t count = 0;
  float scale = 1;
  float levels = 255;
  bool wide = false;  // int32 codes instead of uint8
  const float* x = nullptr;
  void* codes = nullptr;
};

// y[b, o, i] = float32(p_scale P[b, o, i] + q_scale Q[b, g(o), i] + bias[o]), every operation in float64, in this order.
struct Dequantize {
  int64_t batch = 0, outputs = 0, groups = 1, inner = 1;
  int sum_bytes = 4;
  double p_scale = 1, q_scale = 0;
  const void* p = nullptr;
  const void* q = nullptr;
  const float* bias = nullptr;  // [outputs], or null
  float* y = nullptr;
};

// int8 codes - 128 of packed 8-bit rows, and the sum of each row's codes: what the library's signed product wants.
struct Signed {
  int64_t rows = 0, length = 0;
  const uint32_t* words = nullptr;
  int8_t* codes = nullptr;  // [rows, length]
  int32_t* sums = nullptr;  // [rows]
};

}  // namespace pyaccel::qmac
