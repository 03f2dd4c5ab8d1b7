// Bit failures of packed SRAM words: parameters and contract of each kernel.
//
// Memory is a string of bits: words lie one after another, least significant bit first, so bit b of word e is flat bit
// i = e*W + b. Which bits fail is fixed to the bit (docs/sram.md), the same on every device, instruction set, thread
// count and split of the memory:
//   dense   bit i fails where U(i) < T_b; U(i) = high byte from domain 0, 24 low bits from domain 1. Nested in p.
//   sparse  each plane b, in blocks of words: a binomial count, then that many distinct words by Floyd's method.
// A failing bit flips, or reads a fixed value (domain 2).
#pragma once
#include <cstdint>
#include <vector>

#include "../core/dtype.h"

namespace pyaccel::sram {

constexpr int kMaxWordBits = 32;

// One bit position of a word.
struct Plane {
  uint64_t threshold = 0;        // T_b = round(p * 2^32), at most 2^32
  int block_log2 = 0;            // sparse: words a draw covers, 64..4096
  std::vector<uint32_t> counts;  // sparse: cumulative binomial table; empty where threshold = 0
};

struct Plan {
  int word_bits = 8;  // 1, 2, 4, 8, 16, 32
  bool sparse = false;
  Plane planes[kMaxWordBits];
};

struct Draws {
  const Plan* plan = nullptr;
  uint64_t seed = 0;
  uint32_t stream = 0;
  uint64_t first_word = 0;  // number of the first word of the memory
};

// out = in with its failures; `in` may be `out`. `bytes` of memory hold bytes*8/W words.
struct Flip {
  Draws draws;
  bool stuck = false;
  int64_t bytes = 0;
  const uint8_t* in = nullptr;
  uint8_t* out = nullptr;
};

// y = dequantise(fail(quantise(x))): q = clamp(round(x/scale), low, high), round half to even, NaN to code 0; q as a word
// of W bits (two's complement where `is_signed`) with flips; y = q*scale. Sums in float32 (float64 for float64).
struct Noise {
  Draws draws;
  Dtype dtype = Dtype::f32;
  bool is_signed = false;
  int64_t elements = 0;
  const void* scale_data = nullptr;  // one value in the state type, on x's device; null: `scale`
  double scale = 1;
  const void* x = nullptr;
  void* y = nullptr;

  int32_t high() const { return static_cast<int32_t>((int64_t{1} << (draws.plan->word_bits - (is_signed ? 1 : 0))) - 1); }
  int32_t low() const { return is_signed ? -high() : 0; }
};

// Straight-through gradient: grad_x = grad where the quantiser did not clip, else 0.
struct NoiseBackward {
  Dtype dtype = Dtype::f32;
  int32_t low = 0, high = 0;
  int64_t elements = 0;
  const void* scale_data = nullptr;
  double scale = 1;
  const void* x = nullptr;
  const void* grad = nullptr;
  void* grad_x = nullptr;
};

// `blocks` Philox blocks for counters first, first+1, ...: written to `out` (4 words each), or only XORed together
// where it is null: the raw time of the generator, which no dense kernel can beat.
struct RawPhilox {
  uint64_t seed = 0;
  uint64_t first = 0;
  uint32_t stream = 0, domain = 0;
  int64_t blocks = 0;
  uint32_t* out = nullptr;
  uint32_t* folded = nullptr;  // 4 words
};

}  // namespace pyaccel::sram
