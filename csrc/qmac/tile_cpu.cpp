// Tiles of products by `vpmaddwd`, `vpmaddubsw` and `vpshufb` (contract and layouts: tile_cpu.h).
#include "tile_cpu.h"

#include <algorithm>

#include "rows_cpu.h"

namespace pyaccel::qmac::PYACCEL_ISA {
namespace {

// Sums of the products of neighbouring 16-bit codes; exact for codes of 8 bits.
PYACCEL_INLINE Ints multiply_pairs(Shorts a, Shorts b) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Ints, _mm512_madd_epi16(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b)));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(Ints, _mm256_madd_epi16(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, b)));
#elif defined(__x86_64__)
  return __builtin_bit_cast(Ints, _mm_madd_epi16(__builtin_bit_cast(__m128i, a), __builtin_bit_cast(__m128i, b)));
#else
  const Ints x = __builtin_bit_cast(Ints, a), y = __builtin_bit_cast(Ints, b);
  return (x & 0xffff) * (y & 0xffff) + (x >> 16) * (y >> 16);
#endif
}

// Registers: 12 sums of 16 with the lanes in 2 vectors (32 registers hold twice as many). Each step: R + C loads.
template <int R, int C>
void pairs_tile(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* out, int64_t out_stride, bool add) {
  Ints sum[R][C] = {};
  for (int64_t s = 0; s < steps; ++s) {
    Shorts lane[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) lane[c] = load_any<Shorts>(panel + (s * C + c) * kBytes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Shorts row = __builtin_bit_cast(Shorts, Ints{} + load_any<int32_t>(r + i * stride + 4 * s));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] += multiply_pairs(row, lane[c]);
    }
  }
  if (add)
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] += load_any<Ints>(out + i * out_stride + c * kInts);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store_any(out + i * out_stride + c * kInts, sum[i][c]);
}

#if PYACCEL_VECTOR_BYTES >= 32
#define PYACCEL_HAS_BYTE_PRODUCTS

// Sums of the products of neighbouring bytes, `a` unsigned and `b` signed, saturated to 16 bits: the caller sees to it
// that nothing saturates.
PYACCEL_INLINE Shorts multiply_bytes(Bytes a, Bytes b) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Shorts, _mm512_maddubs_epi16(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b)));
#else
  return __builtin_bit_cast(Shorts, _mm256_maddubs_epi16(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, b)));
#endif
}
// Byte i of each 16 replaced by table[index i & 15] of the same 16.
PYACCEL_INLINE Bytes look_up(Bytes table, Bytes index) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Bytes, _mm512_shuffle_epi8(__builtin_bit_cast(__m512i, table), __builtin_bit_cast(__m512i, index)));
#else
  return __builtin_bit_cast(Bytes, _mm256_shuffle_epi8(__builtin_bit_cast(__m256i, table), __builtin_bit_cast(__m256i, index)));
#endif
}

// Lanes past the end of a row hold whatever lies there and may wrap; nobody reads their sums.
PYACCEL_INLINE Shorts add_wrapping(Shorts a, Shorts b) {
  typedef uint16_t Unsigned __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
  return __builtin_bit_cast(Shorts, __builtin_bit_cast(Unsigned, a) + __builtin_bit_cast(Unsigned, b));
}

// 16-bit sums over `depth` steps, then one vpmaddwd with ones into 32 bits.
template <int R, int C, bool lanes_signed>
void quads_tile(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t depth, int32_t* out) {
  Ints sum[R][C] = {};
  const Shorts ones = Shorts{} + int16_t{1};
  for (int64_t first = 0; first < steps; first += depth) {
    const int64_t last = std::min(steps, first + depth);
    Shorts narrow[R][C] = {};
    for (int64_t s = first; s < last; ++s) {
      Bytes lane[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) lane[c] = load_any<Bytes>(panel + (s * C + c) * kBytes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Bytes row = __builtin_bit_cast(Bytes, Ints{} + load_any<int32_t>(r + i * stride + 4 * s));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
          narrow[i][c] = add_wrapping(narrow[i][c], lanes_signed ? multiply_bytes(row, lane[c]) : multiply_bytes(lane[c], row));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] += multiply_pairs(narrow[i][c], ones);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store_any(out + (i * C + c) * kInts, sum[i][c]);
}

// table[x][y]: the sum of products of the codes in x with those in y, repeated over the vector; one aligned load a row.
template <int bits>
struct Tables {
  alignas(64) uint8_t entry[16][kBytes];
  constexpr Tables() : entry() {
    for (int x = 0; x < 16; ++x)
      for (int y = 0; y < kBytes; ++y)
        for (int at = 0; at < 4; at += bits) {
          constexpr int mask = (1 << bits) - 1;
          entry[x][y] = static_cast<uint8_t>(entry[x][y] + (x >> at & mask) * ((y & 15) >> at & mask));
        }
  }
};

// Byte sums over `depth` steps; then even and odd bytes go to 16-bit sums in the first-level cache. A panel holds lane j
// of a vector on byte 2j (first half) or 2j - kBytes + 1 (second half), so that those sums come out in order.
template <int R, int C, int bits>
void digits_tile(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t depth, int32_t* out) {
  static constexpr Tables<bits> tables;
  Halves even[R][C] = {}, odd[R][C] = {};
  for (int64_t first = 0; first < steps; first += depth) {
    const int64_t last = std::min(steps, first + depth);
    Bytes sum[R][C] = {};
    for (int64_t s = first; s < last; ++s) {
      Bytes lane[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) lane[c] = load_any<Bytes>(panel + (s * C + c) * kBytes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Bytes table = load_any<Bytes>(tables.entry[r[i * stride + s]]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[i][c] += look_up(table, lane[c]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Halves both = __builtin_bit_cast(Halves, sum[i][c]);
        even[i][c] += both & 0xff;
        odd[i][c] += both >> 8;
      }
  }
  typedef uint16_t Part __attribute__((vector_size(kBytes / 2)));
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c)
      for (int half = 0; half < 2; ++half) {
        Part part[2];
        memcpy(part, half ? &odd[i][c] : &even[i][c], kBytes);
        int32_t* to = out + (i * C + c) * kBytes + half * kBytes / 2;
        store_any(to, __builtin_convertvector(part[0], Ints));
        store_any(to + kInts, __builtin_convertvector(part[1], Ints));
      }
}
#endif

// The tile function for 1..R rows behind one address.
#define PYACCEL_ROWS(function, ...)                                                                                     \
  [](int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, [[maybe_unused]] int64_t depth,   \
     int32_t* out) {                                                                                                    \
    switch (rows) {                                                                                                     \
      case 1: return function(1, __VA_ARGS__);                                                                          \
      case 2: return function(2, __VA_ARGS__);                                                                          \
      case 3: return function(3, __VA_ARGS__);                                                                          \
      case 4: return function(4, __VA_ARGS__);                                                                          \
      case 5: return function(5, __VA_ARGS__);                                                                          \
      default: return function(6, __VA_ARGS__);                                                                         \
    }                                                                                                                   \
  }

template <class Tile>
Product product_of(Layout layout, int max_rows, int vectors, int lane_bytes, int codes, int64_t depth, Tile tile) {
  Product p;
  p.layout = layout;
  p.max_rows = max_rows;
  p.step_bytes = vectors * kBytes;
  p.lanes = p.step_bytes / lane_bytes;
  p.codes = codes;
  p.depth = depth;
  p.tile = tile;
  return p;
}

// As many sums as the registers hold. A convolution fills panels eight lanes at a time, so lanes come in eights.
constexpr int kPairRows = kBytes == 32 ? 4 : 6, kPairVectors = kBytes == 64 ? 4 : kBytes == 32 ? 3 : 2;
constexpr int kQuadRows = kBytes == 64 ? 4 : 3, kQuadVectors = kBytes == 64 ? 3 : 2;
constexpr int kDigitRows = kBytes == 64 ? 4 : 3, kDigitVectors = kBytes == 64 ? 4 : 3;
static_assert(kPairVectors * kInts % 8 == 0 && kQuadVectors * kInts % 8 == 0);

#ifdef PYACCEL_HAS_BYTE_PRODUCTS
template <bool lanes_signed, int R>
PYACCEL_INLINE void quads(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t depth, int32_t* out) {
  if constexpr (R <= kQuadRows) quads_tile<R, kQuadVectors, lanes_signed>(r, stride, panel, steps, depth, out);
}
template <int bits, int R>
PYACCEL_INLINE void digits(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t depth, int32_t* out) {
  if constexpr (R <= kDigitRows) digits_tile<R, kDigitVectors, bits>(r, stride, panel, steps, depth, out);
}
#define PYACCEL_QUADS(R, lanes_signed) quads<lanes_signed, R>(r, stride, panel, steps, depth, out)
#define PYACCEL_DIGITS(R, bits) digits<bits, R>(r, stride, panel, steps, depth, out)
#endif
// Six rows at most: more are compiled for no product.
template <int R>
PYACCEL_INLINE void pairs(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* out, int64_t out_stride, bool add) {
  if constexpr (R <= kPairRows) pairs_tile<R, kPairVectors>(r, stride, panel, steps, out, out_stride, add);
}
#define PYACCEL_PAIRS(R, ignored) pairs<R>(r, stride, panel, steps, out, kPairVectors * kInts, false)
void pairs_into(int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* out, int64_t out_stride, bool add) {
  switch (rows) {
    case 1: return pairs<1>(r, stride, panel, steps, out, out_stride, add);
    case 2: return pairs<2>(r, stride, panel, steps, out, out_stride, add);
    case 3: return pairs<3>(r, stride, panel, steps, out, out_stride, add);
    case 4: return pairs<4>(r, stride, panel, steps, out, out_stride, add);
    case 5: return pairs<5>(r, stride, panel, steps, out, out_stride, add);
    default: return pairs<6>(r, stride, panel, steps, out, out_stride, add);
  }
}

}  // namespace

#if PYACCEL_VECTOR_BYTES != 64 && !(defined(PYACCEL_EMULATE_VNNI) && PYACCEL_VECTOR_BYTES == 32)
bool choose_vnni(int, int, bool, Product&) { return false; }
#endif

Product choose_product(int row_bits, int lane_bits, bool lanes_are_weights) {
  Product product;
  if (choose_vnni(row_bits, lane_bits, lanes_are_weights, product)) return product;
#ifdef PYACCEL_HAS_BYTE_PRODUCTS
  if (row_bits == lane_bits && row_bits <= 2) {
    const int codes = 4 / row_bits, largest = (1 << row_bits) - 1;
    product = row_bits == 1 ? product_of(Layout::digits, kDigitRows, kDigitVectors, 1, codes, 255 / (codes * largest * largest),
                                         PYACCEL_ROWS(PYACCEL_DIGITS, 1))
                            : product_of(Layout::digits, kDigitRows, kDigitVectors, 1, codes, 255 / (codes * largest * largest),
                                         PYACCEL_ROWS(PYACCEL_DIGITS, 2));
    product.digit_bits = 4;
    return product;
  }
  const int64_t depth = INT16_MAX / (2 * ((1 << row_bits) - 1) * ((1 << lane_bits) - 1));
  if (depth > 0) {  // the narrower side goes where signed bytes are expected: its codes stay below 128
    if (lane_bits <= row_bits)
      return product_of(Layout::quads, kQuadRows, kQuadVectors, 4, 4, depth, PYACCEL_ROWS(PYACCEL_QUADS, true));
    return product_of(Layout::quads, kQuadRows, kQuadVectors, 4, 4, depth, PYACCEL_ROWS(PYACCEL_QUADS, false));
  }
#endif
  product = product_of(Layout::pairs, kPairRows, kPairVectors, 4, 2, 1, PYACCEL_ROWS(PYACCEL_PAIRS, 0));
  product.tile_into = pairs_into;
  return product;
}

}  // namespace pyaccel::qmac::PYACCEL_ISA
