// What the CUDA threads of the quantised products do, phase by phase: pure functions of (block, thread), used by the
// kernels and run on the CPU by csrc/tests/qmac_tiles_test.cpp, barriers between phases being loops there.
//
// A block computes kRows x kColumns sums. Rows are outputs; columns are batch rows (linear) or output pixels of all
// images (convolution). A step is kStep codes of K, one byte each in shared memory, rows kPitch bytes apart: 20 words, so
// that the 8 rows x 4 words that a warp reads at once fall into 32 different banks.
#pragma once
#include <cstdint>

#include "../core/host_device.h"
#include "qmac.h"

namespace pyaccel::qmac::index {

constexpr int kRows = 64, kColumns = 64, kStep = 64, kPitch = 80, kThreads = 128;
constexpr int kTileBytes = kPitch * (kRows + kColumns);
constexpr int64_t kStretch = 65536;  // codes of K whose 8x8-bit products fit an unsigned 32-bit sum

// One limb pair over one stretch of K, of one group. Counts fit 32 bits where a comment does not say otherwise.
struct Tile {
  int weight_bits = 8, weight_limb = 0;
  int activation_bits = 8, activation_limb = 0;
  int outputs = 0;          // of the group
  int64_t columns = 0;      // batch, or batch * pixels
  int length = 0;           // K
  int first = 0, last = 0;  // stretch; `first` is a multiple of 32
  const uint32_t* weights = nullptr;  // the group's first row
  int64_t weight_words = 0;           // of a row
  const void* activations = nullptr;  // linear: packed words; convolution: codes
  int64_t activation_words = 0;       // linear: of a row
  // Convolution; channels = 0: linear.
  int channels = 0, all_channels = 0, first_channel = 0;  // of the group; of an image; where the group starts
  int height = 0, width = 0, kernel_height = 1, kernel_width = 1;
  int stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int out_height = 1, out_width = 1;
};

// Four codes as bytes from a packed row, codes `code` .. code + 3 (`code` % 4 == 0); zero beyond the row's words.
PYACCEL_HD uint32_t four_codes(const uint32_t* row, int64_t words, int64_t code, int bits, int limb) {
  if (bits == 16) {
    uint32_t four = 0;
    for (int i = 0; i < 2; ++i) {
      const int64_t at = code / 2 + i;
      const uint32_t two = at < words ? row[at] >> (8 * limb) : 0;
      four |= ((two & 0xff) | (two >> 8 & 0xff00)) << (16 * i);
    }
    return four;
  }
  const int64_t bit = code * bits, at = bit >> 5;
  uint32_t x = at < words ? row[at] >> (bit & 31) : 0;
  if (bits == 8) return x;
  if (bits == 4) {
    x &= 0xffff;
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
  }
  if (bits == 2) {
    x &= 0xff;
    x = (x | x << 12) & 0x000f000f;
    return (x | x << 6) & 0x03030303;
  }
  x &= 0xf;
  x = (x | x << 14) & 0x00030003;
  return (x | x << 7) & 0x01010101;
}

// Bytes of a word that belong to codes below `last`.
PYACCEL_HD uint32_t keep_below(uint32_t four, int64_t code, int64_t last) {
  const int64_t left = last - code;
  return left >= 4 ? four : left <= 0 ? 0 : four & ((1u << (8 * left)) - 1);
}

// Phase 1a: the block's weights, half a row of the step a thread. Rows beyond the last are left as they are: their sums
// are never stored.
PYACCEL_HD void load_weights(const Tile& t, int row_block, int step_first, int thread, uint8_t* shared) {
  const int row = thread / 2, half = thread % 2 * (kStep / 2), output = row_block * kRows + row;
  if (output >= t.outputs) return;
  const uint32_t* from = t.weights + output * t.weight_words;
  uint32_t* to = reinterpret_cast<uint32_t*>(shared + row * kPitch + half);
  for (int i = 0; i < kStep / 8; ++i) to[i] = four_codes(from, t.weight_words, step_first + half + 4 * i, t.weight_bits, t.weight_limb);
}

PYACCEL_HD uint32_t pixel_code(const Tile& t, int64_t image, int channel, int y, int x) {
  if (y < 0 || y >= t.height || x < 0 || x >= t.width) return 0;
  const int64_t at = ((image * t.all_channels + t.first_channel + channel) * t.height + y) * t.width + x;
  if (t.activation_bits == 16) return static_cast<uint32_t>(static_cast<const int32_t*>(t.activations)[at]) >> (8 * t.activation_limb) & 0xff;
  return static_cast<const uint8_t*>(t.activations)[at];
}

// Phase 1b: the block's activations, half a column of the step a thread; zero beyond the stretch and the last column, so
// that nothing there counts, whatever the weights hold.
PYACCEL_HD void load_activations(const Tile& t, int64_t column_block, int step_first, int thread, uint8_t* shared) {
  const int place = thread % kColumns, half = thread / kColumns * (kStep / 2);
  const int64_t column = column_block * kColumns + place;
  uint32_t* to = reinterpret_cast<uint32_t*>(shared + kRows * kPitch + place * kPitch + half);
  const bool there = column < t.columns;
  if (t.channels == 0) {
    const uint32_t* from = static_cast<const uint32_t*>(t.activations) + (there ? column : 0) * t.activation_words;
    for (int i = 0; i < kStep / 8; ++i) {
      const int code = step_first + half + 4 * i;
      const uint32_t four = there ? four_codes(from, t.activation_words, code, t.activation_bits, t.activation_limb) : 0;
      to[i] = keep_below(four, code, t.last);
    }
    return;
  }
  const int64_t pixels = int64_t{t.out_height} * t.out_width, image = there ? column / pixels : 0;
  const int inside = there ? static_cast<int>(column - image * pixels) : 0;
  const int top = inside / t.out_width * t.stride[0] - t.padding[0], left = inside % t.out_width * t.stride[1] - t.padding[1];
  int k = step_first + half;
  int s = k % t.kernel_width, r = k / t.kernel_width % t.kernel_height, c = k / (t.kernel_width * t.kernel_height);
  for (int i = 0; i < kStep / 8; ++i) {
    uint32_t four = 0;
    for (int j = 0; j < 4; ++j, ++k) {
      if (there && k < t.last) four |= pixel_code(t, image, c, top + r * t.dilation[0], left + s * t.dilation[1]) << (8 * j);
      if (++s == t.kernel_width) {
        s = 0;
        if (++r == t.kernel_height) r = 0, ++c;
      }
    }
    to[i] = four;
  }
}

// Phase 2: a warp multiplies 32 rows x 32 columns by tensor-core products of 16 x 8 x 32 bytes. Fragments of lane l: A
// holds rows l/4 and l/4 + 8, words l%4 and l%4 + 4; B column l/4, the same words; sums: rows l/4 (+8), columns 2(l%4), +1.
constexpr int kWarpRows = 32, kWarpColumns = 32, kTilesDown = kWarpRows / 16, kTilesAcross = kWarpColumns / 8;
PYACCEL_HD int warp_row(int warp) { return warp / 2 * kWarpRows; }
PYACCEL_HD int warp_column(int warp) { return warp % 2 * kWarpColumns; }

struct FragmentA {
  uint32_t word[4];
};
struct FragmentB {
  uint32_t word[2];
};
PYACCEL_HD uint32_t shared_word(const uint8_t* shared, int row, int word) {
  return *reinterpret_cast<const uint32_t*>(shared + row * kPitch + 4 * word);
}
// `slice`: 32 of the step's codes.
PYACCEL_HD FragmentA fragment_a(const uint8_t* shared, int row, int slice, int lane) {
  const int first = row + lane / 4, word = slice * 8 + lane % 4;
  return {{shared_word(shared, first, word), shared_word(shared, first + 8, word), shared_word(shared, first, word + 4),
           shared_word(shared, first + 8, word + 4)}};
}
PYACCEL_HD FragmentB fragment_b(const uint8_t* shared, int column, int slice, int lane) {
  const int at = kRows + column + lane / 4, word = slice * 8 + lane % 4;
  return {{shared_word(shared, at, word), shared_word(shared, at, word + 4)}};
}

// Phase 3: where sum `i` (0..3) of a lane's 16 x 8 tile belongs.
PYACCEL_HD int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
PYACCEL_HD int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Element of P for an output of the group and a column; -1: outside.
struct Place {
  int outputs = 0;
  int64_t columns = 0;
  int first_output = 0, all_outputs = 0;
  int64_t pixels = 0;  // 0: linear, P [columns, outputs]
};
PYACCEL_HD int64_t place_of(const Place& p, int output, int64_t column) {
  if (output >= p.outputs || column >= p.columns) return -1;
  if (p.pixels == 0) return column * p.all_outputs + output;
  const int64_t image = column / p.pixels;
  return (image * p.all_outputs + p.first_output + output) * p.pixels + (column - image * p.pixels);
}

// Small batches: one warp sums two rows of weights over 16-byte pieces of packed words (see stream_cuda.cu).
// Masked words need no shift: mask m picks the codes at bit m*bits of every byte, so a byte is code << (m * bits).
PYACCEL_HD uint32_t byte_mask(int bits, int m) { return ((1u << bits) - 1) * 0x01010101u << (bits * m); }
// Activation byte that meets byte `byte` of weight word `word` under mask m: code (word * 4 + byte) * (8 / bits) + m.
PYACCEL_HD int64_t masked_code(int64_t word, int byte, int bits, int m) { return (word * 4 + byte) * (8 / bits) + m; }

}  // namespace pyaccel::qmac::index
