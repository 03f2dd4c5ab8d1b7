// What a linear layer and a convolution share: operands brought into the layout of a product, and the loop over the
// tiles of a block. Everything in the namespace of its level.
#pragma once
#include <algorithm>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "rows_cpu.h"
#include "tile_cpu.h"

namespace pyaccel::qmac::PYACCEL_ISA {

constexpr int64_t kPanelBytes = 28 * 1024;   // of one tile: it stays in the first-level cache beside its rows
constexpr int64_t kRowBlockBytes = 96 * 1024;  // rows that pass a tile's panel: they stay in the second level
constexpr int kTilesPerBlock = 8;
constexpr int kMaxLanes = 256, kMaxRows = 8;

PYACCEL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYACCEL_INLINE int limbs_of(int bits) { return bits == 16 ? 2 : 1; }
PYACCEL_INLINE int limb_bits(int bits) { return bits == 16 ? 8 : bits; }

// The stretch of K that one panel holds: a multiple of 32 steps, so that it starts at a whole word of codes.
PYACCEL_INLINE int64_t block_steps(const Product& p) { return std::max<int64_t>(32, kPanelBytes / p.step_bytes / 32 * 32); }
PYACCEL_INLINE int64_t row_step_bytes(const Product& p) { return p.layout == Layout::digits ? 1 : 4; }
PYACCEL_INLINE int64_t row_stride(const Product& p, int64_t length) {
  const int64_t lines = ceil_div(ceil_div(length, p.codes) * row_step_bytes(p) + 8, 64);
  return 64 * (lines | 1);  // odd: rows of a tile fall into different cache sets
}

// Digits `first` .. of a packed row whose codes fill `total_bits` bits; what lies beyond counts as zero.
inline void digits_row(int digit_bits, const uint32_t* row, int64_t total_bits, int64_t first, int64_t count, uint8_t* to) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(row);
  const int64_t whole = std::clamp<int64_t>(total_bits / digit_bits - first, 0, count);
  if (digit_bits == 4) {
    spread_row<4>(from + first / 2, whole, to);
  } else {
    const int64_t bytes = (total_bits + 7) / 8;
    for (int64_t j = 0; j < whole; ++j) {
      const int64_t bit = (first + j) * digit_bits, at = bit / 8;
      const int both = from[at] | (at + 1 < bytes ? from[at + 1] << 8 : 0);
      to[j] = static_cast<uint8_t>(both >> (bit % 8) & ((1 << digit_bits) - 1));
    }
  }
  for (int64_t j = whole; j < count; ++j) {
    const int64_t bit = (first + j) * digit_bits, left = total_bits - bit;
    int digit = 0;
    for (int64_t i = 0; i < std::min<int64_t>(left, digit_bits); ++i)
      digit |= (from[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
    to[j] = static_cast<uint8_t>(digit);
  }
}

// `steps` steps of a packed row in the product's layout, from code `first` * p.codes on; zeros beyond `length`.
// Up to 8 bytes beyond the steps are overwritten.
inline void layout_row(const Product& p, bool is_signed, int bits, const uint32_t* row, int64_t length, int limb, int64_t first,
                       int64_t steps, uint8_t* to) {
  if (p.layout == Layout::digits) return digits_row(p.digit_bits, row, length * bits, first, steps, to);
  if (p.layout == Layout::words) {
    const int64_t words = (length + 31) / 32, whole = std::clamp<int64_t>(words - first, 0, steps);
    memcpy(to, row + first, static_cast<size_t>(4 * whole));
    memset(to + 4 * whole, 0, static_cast<size_t>(4 * (steps - whole)));
    if (whole > 0 && first + whole == words && length % 32 != 0)
      store_any(to + 4 * (whole - 1), row[words - 1] & ((1u << (length % 32)) - 1));
    return;
  }
  const int64_t start = first * p.codes, count = std::clamp<int64_t>(length - start, 0, steps * p.codes);
  uint8_t* bytes = to;
  if (p.layout == Layout::pairs) bytes += steps * 2;  // unpacked behind, widened forward
  unpack_row(bits, row, start, count, limb, bytes);
  if (count < steps * p.codes) memset(bytes + count, 0, static_cast<size_t>(steps * p.codes - count));
  if (is_signed)
    for (int64_t j = 0; j < steps * p.codes; j += 8) store_any(bytes + j, load_any<uint64_t>(bytes + j) ^ 0x8080808080808080ull);
  if (p.layout == Layout::pairs) {
    typedef uint8_t Codes __attribute__((vector_size(8)));
    typedef uint16_t Wide __attribute__((vector_size(16)));
    int64_t j = 0;
    for (; j + 8 <= steps * 2; j += 8) store_any(to + 2 * j, __builtin_convertvector(load_any<Codes>(bytes + j), Wide));
    for (; j < steps * 2; ++j) {
      const uint16_t code = bytes[j];
      memcpy(to + 2 * j, &code, 2);
    }
  }
}

// ---- results
// Columns first .. first + count of a block, `offset` elements from a row's base.
struct Run {
  int64_t first, count, offset;
};
struct Target {
  void* p = nullptr;  // where row 0 of the operand lies
  int sum_bytes = 4;
  int64_t row_stride = 0;  // in elements
  const Run* runs = nullptr;
  int64_t run_count = 0;
};

template <class T>
PYACCEL_INLINE void add_run(T* p, const int32_t* sum, int64_t count, int shift, bool accumulate) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    for (; i + kInts <= count; i += kInts) {
      const Ints s = load_any<Ints>(sum + i) << shift;
      store_any(p + i, accumulate ? load_any<Ints>(p + i) + s : s);
    }
  }
  for (; i < count; ++i) p[i] = static_cast<T>((accumulate ? p[i] : 0) + (static_cast<T>(sum[i]) << shift));
}

template <class T>
inline void add_tile(const Target& t, int64_t first_row, int rows, int64_t first_column, int lanes, const int32_t* tile, int shift,
                     bool accumulate) {
  for (int64_t k = 0; k < t.run_count; ++k) {
    const Run& run = t.runs[k];
    const int64_t begin = std::max(run.first, first_column), end = std::min(run.first + run.count, first_column + lanes);
    if (begin >= end) continue;
    for (int r = 0; r < rows; ++r)
      add_run(static_cast<T*>(t.p) + (first_row + r) * t.row_stride + run.offset + begin - run.first,
              tile + r * lanes + begin - first_column, end - begin, shift, accumulate);
  }
}

// Where row 0 of `lanes` whole columns lies in P, or null where they are not all of one run.
inline int32_t* place_of(const Target& t, int64_t first_column, int lanes) {
  for (int64_t k = 0; k < t.run_count; ++k) {
    const Run& run = t.runs[k];
    if (run.first <= first_column && first_column + lanes <= run.first + run.count)
      return static_cast<int32_t*>(t.p) + run.offset + first_column - run.first;
  }
  return nullptr;
}

// rows x (tiles * lanes) products over `steps` steps. r: row 0 at the block's first step.
inline void multiply_block(const Product& p, const uint8_t* r, int64_t stride, int64_t first_row, int64_t last_row,
                           const uint8_t* panels, int64_t tiles, int64_t steps, const Target& target, int shift, bool accumulate) {
  alignas(64) int32_t sums[kMaxRows * kMaxLanes];
  const int64_t row_bytes = std::max<int64_t>(1, steps * row_step_bytes(p));
  const int64_t block = std::max<int64_t>(1, kRowBlockBytes / row_bytes / p.max_rows) * p.max_rows;
  for (int64_t begin = first_row; begin < last_row; begin += block) {
    const int64_t end = std::min(last_row, begin + block);
    for (int64_t t = 0; t < tiles; ++t) {
      const uint8_t* panel = panels + t * steps * p.step_bytes;
      int32_t* place = p.tile_into != nullptr && target.sum_bytes == 4 && shift == 0 ? place_of(target, t * p.lanes, p.lanes) : nullptr;
      for (int64_t row = begin; row < end; row += p.max_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(p.max_rows, end - row));
        if (place != nullptr) {
          p.tile_into(rows, r + row * stride, stride, panel, steps, place + row * target.row_stride, target.row_stride, accumulate);
          continue;
        }
        p.tile(rows, r + row * stride, stride, panel, steps, p.depth, sums);
        if (target.sum_bytes == 4) add_tile<int32_t>(target, row, rows, t * p.lanes, p.lanes, sums, shift, accumulate);
        else add_tile<int64_t>(target, row, rows, t * p.lanes, p.lanes, sums, shift, accumulate);
      }
    }
  }
}

// What P starts from where a product shifts one side by 128: 128 * (sum of the other side's codes), once a limb of the
// shifted side; Q holds that sum.
PYACCEL_INLINE int64_t shift_factor(int shifted_bits) { return shifted_bits == 16 ? 128 * 257 : 128; }

}  // namespace pyaccel::qmac::PYACCEL_ISA
