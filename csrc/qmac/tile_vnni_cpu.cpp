// Tiles of products with AVX-512 VNNI (`vpdpbusd`), VBMI (`vpermb`) and VPOPCNTDQ (`vpopcntd`), each chosen behind a check
// of its own (contract and layouts: tile_cpu.h). The rest of the AVX-512 level does not need these extensions.
//
// vpdpbusd multiplies unsigned by signed bytes: the narrower side goes where signed ones are expected; where both have 8
// bits the weights are shifted by 128 (their top bit flipped) and the caller adds 128 Q. vpermb looks up 64 entries, so a
// digit holds 6 bits: 3 two-bit or 6 one-bit codes, 192 or 384 products an instruction. vpopcntd counts 512 one-bit
// products in three instructions (and, count, add), a little ahead of the lookup for 1x1 bit, and far behind it for 2x2.
// -DPYACCEL_EMULATE_VNNI builds this file for 256-bit vectors with the instructions written out, so that the algorithms
// (shift, digits of 6 bits, panels; =2: counts instead of digits for 1x1) can be tested on machines without them.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if PYACCEL_VECTOR_BYTES == 64
#pragma GCC target("avx512vnni,avx512vbmi,avx512vpopcntdq")
#endif
#include "rows_cpu.h"
#include "tile_cpu.h"

#if PYACCEL_VECTOR_BYTES == 64 || (defined(PYACCEL_EMULATE_VNNI) && PYACCEL_VECTOR_BYTES == 32)
#include <algorithm>

namespace pyaccel::qmac::PYACCEL_ISA {
namespace {

#if PYACCEL_VECTOR_BYTES == 64
PYACCEL_INLINE Ints add_products(Ints sum, Bytes a, Bytes b) {
  return __builtin_bit_cast(Ints, _mm512_dpbusd_epi32(__builtin_bit_cast(__m512i, sum), __builtin_bit_cast(__m512i, a),
                                                      __builtin_bit_cast(__m512i, b)));
}
struct Table {
  Bytes part;
};
PYACCEL_INLINE Table load_table(const uint8_t* p) { return {load_any<Bytes>(p)}; }
PYACCEL_INLINE Bytes look_up(const Table& table, Bytes index) {
  return __builtin_bit_cast(Bytes, _mm512_maskz_permutexvar_epi8(~0ull, __builtin_bit_cast(__m512i, index), __builtin_bit_cast(__m512i, table.part)));
}
bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
bool has_vbmi() { return __builtin_cpu_supports("avx512vbmi"); }
PYACCEL_INLINE Ints count_ones(Ints x) { return __builtin_bit_cast(Ints, _mm512_popcnt_epi32(__builtin_bit_cast(__m512i, x))); }
bool has_counts() { return __builtin_cpu_supports("avx512vpopcntdq"); }
#else
PYACCEL_INLINE Ints add_products(Ints sum, Bytes a, Bytes b) {
  for (int i = 0; i < kInts; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += a[4 * i + j] * static_cast<int8_t>(b[4 * i + j]);
  return sum;
}
struct Table {
  const uint8_t* part;
};
PYACCEL_INLINE Table load_table(const uint8_t* p) { return {p}; }
PYACCEL_INLINE Bytes look_up(const Table& table, Bytes index) {
  Bytes found;
  for (int i = 0; i < kBytes; ++i) found[i] = table.part[index[i] & 63];
  return found;
}
bool has_vnni() { return true; }
bool has_vbmi() { return true; }
PYACCEL_INLINE Ints count_ones(Ints x) {
  for (int i = 0; i < kInts; ++i) x[i] = __builtin_popcount(static_cast<uint32_t>(x[i]));
  return x;
}
bool has_counts() { return PYACCEL_EMULATE_VNNI == 2; }
#endif

template <int R, int C, bool lanes_signed>
void quads_tile(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* out) {
  Ints sum[R][C] = {};
  for (int64_t s = 0; s < steps; ++s) {
    Bytes lane[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) lane[c] = load_any<Bytes>(panel + (s * C + c) * kBytes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Bytes row = __builtin_bit_cast(Bytes, Ints{} + load_any<int32_t>(r + i * stride + 4 * s));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] = lanes_signed ? add_products(sum[i][c], row, lane[c]) : add_products(sum[i][c], lane[c], row);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store_any(out + (i * C + c) * kInts, sum[i][c]);
}

// One-bit codes, 32 to a word: outputs in the lanes, so that no sum runs across a register.
template <int R, int C>
void words_tile(const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* out) {
  Ints sum[R][C] = {};
  for (int64_t s = 0; s < steps; ++s) {
    Ints lane[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) lane[c] = load_any<Ints>(panel + (s * C + c) * kBytes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Ints row = Ints{} + load_any<int32_t>(r + i * stride + 4 * s);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] += count_ones(row & lane[c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store_any(out + (i * C + c) * kInts, sum[i][c]);
}

template <int bits>
struct Tables {
  alignas(64) uint8_t entry[64][64];
  constexpr Tables() : entry() {
    constexpr int mask = (1 << bits) - 1;
    for (int x = 0; x < 64; ++x)
      for (int y = 0; y < 64; ++y)
        for (int at = 0; at < 6; at += bits) entry[x][y] = static_cast<uint8_t>(entry[x][y] + (x >> at & mask) * (y >> at & mask));
  }
};

// Byte sums over `depth` steps, then 16-bit sums of even and odd bytes in the first-level cache (see tile_cpu.cpp).
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
        const Table table = load_table(tables.entry[r[i * stride + s]]);
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

constexpr int kQuadRows = 6, kDigitRows = 4, kWordRows = 8, kVectors = 4, kWordVectors = 2;

template <bool lanes_signed>
void quads(int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t, int32_t* out) {
  switch (rows) {
    case 1: return quads_tile<1, kVectors, lanes_signed>(r, stride, panel, steps, out);
    case 2: return quads_tile<2, kVectors, lanes_signed>(r, stride, panel, steps, out);
    case 3: return quads_tile<3, kVectors, lanes_signed>(r, stride, panel, steps, out);
    case 4: return quads_tile<4, kVectors, lanes_signed>(r, stride, panel, steps, out);
    case 5: return quads_tile<5, kVectors, lanes_signed>(r, stride, panel, steps, out);
    default: return quads_tile<6, kVectors, lanes_signed>(r, stride, panel, steps, out);
  }
}
template <int bits>
void digits(int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t depth, int32_t* out) {
  switch (rows) {
    case 1: return digits_tile<1, kVectors, bits>(r, stride, panel, steps, depth, out);
    case 2: return digits_tile<2, kVectors, bits>(r, stride, panel, steps, depth, out);
    case 3: return digits_tile<3, kVectors, bits>(r, stride, panel, steps, depth, out);
    default: return digits_tile<4, kVectors, bits>(r, stride, panel, steps, depth, out);
  }
}

void words(int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t, int32_t* out) {
  switch (rows) {
    case 1: return words_tile<1, kWordVectors>(r, stride, panel, steps, out);
    case 2: return words_tile<2, kWordVectors>(r, stride, panel, steps, out);
    case 3: return words_tile<3, kWordVectors>(r, stride, panel, steps, out);
    case 4: return words_tile<4, kWordVectors>(r, stride, panel, steps, out);
    case 5: return words_tile<5, kWordVectors>(r, stride, panel, steps, out);
    case 6: return words_tile<6, kWordVectors>(r, stride, panel, steps, out);
    case 7: return words_tile<7, kWordVectors>(r, stride, panel, steps, out);
    default: return words_tile<8, kWordVectors>(r, stride, panel, steps, out);
  }
}

}  // namespace

bool choose_vnni(int row_bits, int lane_bits, bool lanes_are_weights, Product& product) {
  product = {};
  if (row_bits == 1 && lane_bits == 1 && has_counts()) {
    product.layout = Layout::words;
    product.codes = 32;
    product.max_rows = kWordRows;
    product.step_bytes = kWordVectors * kBytes;
    product.lanes = product.step_bytes / 4;
    product.tile = words;
    return true;
  }
  product.step_bytes = kVectors * kBytes;
  if (row_bits == lane_bits && row_bits <= 2) {
    if (!has_vbmi()) return false;
    const int largest = (1 << row_bits) - 1;
    product.layout = Layout::digits;
    product.digit_bits = 6;
    product.codes = 6 / row_bits;
    product.depth = 255 / (product.codes * largest * largest);
    product.max_rows = kDigitRows;
    product.lanes = product.step_bytes;
    product.tile = row_bits == 1 ? digits<1> : digits<2>;
    return true;
  }
  if (!has_vnni()) return false;
  const bool lanes_signed = row_bits == lane_bits ? lanes_are_weights : lane_bits < row_bits;
  product.layout = Layout::quads;
  product.codes = 4;
  product.max_rows = kQuadRows;
  product.lanes = product.step_bytes / 4;
  product.lanes_signed = lanes_signed && lane_bits == 8;
  product.rows_signed = !lanes_signed && row_bits == 8;
  product.tile = lanes_signed ? quads<true> : quads<false>;
  return true;
}

}  // namespace pyaccel::qmac::PYACCEL_ISA
#endif
