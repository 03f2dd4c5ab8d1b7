// Linear layers of small batches on the CPU: bound by reading the packed weights, once.
//
// Vectors run along K. A byte of weights holds 8 / bits codes; part m of every byte is masked out (shifted first where
// m > 0) and multiplied with activation plane m, which holds the codes that meet those: planes are made once a call.
// Part sums stay in 16 bits for as long as they fit, then widen. Up to 4 activation rows share the masking.
#include <algorithm>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "rows_cpu.h"
#include "stream_cpu.h"

namespace pyaccel::qmac::PYACCEL_ISA {

#if PYACCEL_VECTOR_BYTES < 32

bool stream(const Linear&) { return false; }  // no byte products: the tiled form is as good

#else
namespace {

constexpr int64_t kSmallBatch = 8;
constexpr int kTogether = 4;

PYACCEL_INLINE Ints multiply_pairs(Shorts a, Shorts b) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Ints, _mm512_madd_epi16(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b)));
#else
  return __builtin_bit_cast(Ints, _mm256_madd_epi16(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, b)));
#endif
}
PYACCEL_INLINE Shorts multiply_bytes(Bytes a, Bytes b) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Shorts, _mm512_maddubs_epi16(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b)));
#else
  return __builtin_bit_cast(Shorts, _mm256_maddubs_epi16(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, b)));
#endif
}
// Low and high halves of each 16 bytes, widened: the same order for both operands, so the product does not notice.
PYACCEL_INLINE Shorts widen_low(Bytes v) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Shorts, _mm512_unpacklo_epi8(__builtin_bit_cast(__m512i, v), _mm512_setzero_si512()));
#else
  return __builtin_bit_cast(Shorts, _mm256_unpacklo_epi8(__builtin_bit_cast(__m256i, v), _mm256_setzero_si256()));
#endif
}
PYACCEL_INLINE Shorts widen_high(Bytes v) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Shorts, _mm512_unpackhi_epi8(__builtin_bit_cast(__m512i, v), _mm512_setzero_si512()));
#else
  return __builtin_bit_cast(Shorts, _mm256_unpackhi_epi8(__builtin_bit_cast(__m256i, v), _mm256_setzero_si256()));
#endif
}

template <int bits>
PYACCEL_INLINE Bytes part_of(Bytes w, int m) {
  if constexpr (bits == 8) return w;
  const Halves shifted = __builtin_bit_cast(Halves, w) >> (m * bits);
  return __builtin_bit_cast(Bytes, shifted) & static_cast<uint8_t>((1 << bits) - 1);
}

// Lanes are unsigned. The sum of all: where it fits 32 bits, in any order modulo 2^32; else lane by lane.
PYACCEL_INLINE int64_t sum_narrow(Ints v) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  Four parts[kInts / 4], sum{};
  memcpy(parts, &v, sizeof v);
  for (const Four& part : parts) sum += part;
  sum += __builtin_shuffle(sum, Four{2, 3, 0, 1});
  sum += __builtin_shuffle(sum, Four{1, 0, 3, 2});
  return sum[0];
}
PYACCEL_INLINE int64_t sum_wide(Ints v) {
  int64_t total = 0;
  for (int i = 0; i < kInts; ++i) total += static_cast<uint32_t>(v[i]);
  return total;
}

// R rows of weights, `vectors` vectors long, with A activation rows. planes: [vectors][parts][A][vector].
// sign: which side is below 128 (weights 1, activations 2), or 0: neither, then 16-bit products.
template <int bits, int A, int R, int sign>
PYACCEL_INLINE void row_sums(const uint8_t* weights, int64_t row_bytes, int64_t vectors, const uint8_t* planes, int64_t depth,
                             bool wide, int64_t (&total)[R][A]) {
  constexpr int parts = 8 / bits;
  Ints sum[R][A] = {};
  const Shorts ones = Shorts{} + int16_t{1};
  const auto step = [&](const Bytes(&w)[R], int64_t v, Shorts(&narrow)[R][A]) PYACCEL_LAMBDA_INLINE {
#pragma GCC unroll 8
    for (int m = 0; m < parts; ++m) {
      Bytes part[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) part[r] = part_of<bits>(w[r], m);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) {
        const Bytes x = load_any<Bytes>(planes + ((v * parts + m) * A + a) * kBytes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          if constexpr (sign == 1) narrow[r][a] += multiply_bytes(x, part[r]);
          else if constexpr (sign == 2) narrow[r][a] += multiply_bytes(part[r], x);
          else
            sum[r][a] += multiply_pairs(widen_low(x), widen_low(part[r])) + multiply_pairs(widen_high(x), widen_high(part[r]));
        }
      }
    }
  };
  const int64_t whole = row_bytes / kBytes;
  for (int64_t first = 0; first < vectors; first += depth) {
    Shorts narrow[R][A] = {};
    for (int64_t v = first; v < std::min(whole, first + depth); ++v) {
      Bytes w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = load_any<Bytes>(weights + r * row_bytes + v * kBytes);
      step(w, v, narrow);
    }
    if (first + depth > whole && first <= whole && whole < vectors) {  // the last, partial vector: nothing is read beyond the row
      Bytes w[R] = {};
      for (int r = 0; r < R; ++r) memcpy(&w[r], weights + r * row_bytes + whole * kBytes, static_cast<size_t>(row_bytes - whole * kBytes));
      step(w, whole, narrow);
    }
    if constexpr (sign != 0)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int a = 0; a < A; ++a) sum[r][a] += multiply_pairs(narrow[r][a], ones);
  }
  for (int r = 0; r < R; ++r)
    for (int a = 0; a < A; ++a) total[r][a] = wide ? sum_wide(sum[r][a]) : sum_narrow(sum[r][a]);
}

template <int bits, int A, int R, int sign>
int64_t some_rows(const Linear& f, int64_t first_batch, const uint8_t* planes, int64_t vectors, int64_t depth, int64_t begin, int64_t end) {
  const int64_t words = words_of(f.length, f.weight_bits);
  int64_t o = begin;
  for (; o + R <= end; o += R) {
    int64_t total[R][A];
    row_sums<bits, A, R, sign>(reinterpret_cast<const uint8_t*>(f.weights + o * words), 4 * words, vectors, planes, depth,
                               f.sum_bytes == 8, total);
    for (int r = 0; r < R; ++r)
      for (int a = 0; a < A; ++a) {
        const int64_t at = (first_batch + a) * f.outputs + o + r;
        if (f.sum_bytes == 4) static_cast<int32_t*>(f.p)[at] = static_cast<int32_t>(total[r][a]);
        else static_cast<int64_t*>(f.p)[at] = total[r][a];
      }
  }
  return o;
}

// Several rows of weights at a time: that many streams from memory, and activations loaded once for all of them.
template <int bits, int A, int sign>
void all_rows(const Linear& f, int64_t first_batch, const uint8_t* planes, int64_t vectors, int64_t depth, int64_t begin, int64_t end) {
  constexpr int R = A == 1 ? 4 : 2;
  const int64_t rest = some_rows<bits, A, R, sign>(f, first_batch, planes, vectors, depth, begin, end);
  some_rows<bits, A, 1, sign>(f, first_batch, planes, vectors, depth, rest, end);
}

template <int bits, int sign>
void some_rows(const Linear& f, int64_t first_batch, int together, const uint8_t* planes, int64_t vectors, int64_t depth,
               int64_t begin, int64_t end) {
  switch (together) {
    case 1: return all_rows<bits, 1, sign>(f, first_batch, planes, vectors, depth, begin, end);
    case 2: return all_rows<bits, 2, sign>(f, first_batch, planes, vectors, depth, begin, end);
    case 3: return all_rows<bits, 3, sign>(f, first_batch, planes, vectors, depth, begin, end);
    default: return all_rows<bits, 4, sign>(f, first_batch, planes, vectors, depth, begin, end);
  }
}

void rows_of(const Linear& f, int64_t first_batch, int together, const uint8_t* planes, int64_t vectors, int64_t depth,
             int64_t begin, int64_t end) {
  switch (f.weight_bits) {
    case 1: return some_rows<1, 1>(f, first_batch, together, planes, vectors, depth, begin, end);
    case 2: return some_rows<2, 1>(f, first_batch, together, planes, vectors, depth, begin, end);
    case 4: return some_rows<4, 1>(f, first_batch, together, planes, vectors, depth, begin, end);
  }
  if (f.activation_bits <= 4) return some_rows<8, 2>(f, first_batch, together, planes, vectors, depth, begin, end);
  some_rows<8, 0>(f, first_batch, together, planes, vectors, depth, begin, end);
}

}  // namespace

bool stream(const Linear& f) {
  // Sums of a lane: 32 bits hold 4 * 65025 products of every kBytes / 4 codes for more than 2^16 vectors.
  if (f.batch > kSmallBatch || f.activation_bits > 8 || f.weight_bits > 8 || f.length > (1 << 19)) return false;
  const int parts = 8 / f.weight_bits;
  const int64_t row_bytes = 4 * words_of(f.length, f.weight_bits), vectors = (row_bytes + kBytes - 1) / kBytes;
  const int64_t largest = 2 * ((1 << f.activation_bits) - 1) * ((1 << f.weight_bits) - 1);
  const int64_t depth = largest > INT16_MAX ? vectors : std::max<int64_t>(1, INT16_MAX / largest / parts);
  const int64_t codes = vectors * kBytes * parts;
  auto* row = static_cast<uint8_t*>(scratch(0, static_cast<size_t>(codes + 64)));
  auto* planes = static_cast<uint8_t*>(scratch(1, static_cast<size_t>(codes * f.batch)));
  for (int64_t first = 0; first < f.batch; first += kTogether) {
    const int64_t together = std::min<int64_t>(kTogether, f.batch - first);
    for (int64_t a = 0; a < together; ++a) {
      unpack_row(f.activation_bits, f.activations + (first + a) * words_of(f.length, f.activation_bits), 0, f.length, 0, row);
      memset(row + f.length, 0, static_cast<size_t>(codes - f.length));
      for (int64_t j = 0; j < codes / parts; ++j) {
        const int64_t v = j / kBytes, lane = j % kBytes;
        for (int m = 0; m < parts; ++m)
          planes[first * codes + ((v * parts + m) * together + a) * kBytes + lane] = row[j * parts + m];
      }
    }
  }
  const int64_t bytes = f.outputs * row_bytes * (1 + parts * f.batch / 4);
  // Eight rows of weights stay in the first-level cache while every activation row passes.
  parallel_shares((f.outputs + 7) / 8, threads_for(bytes, (f.outputs + 7) / 8), [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t first = 0; first < f.batch; first += kTogether)
        rows_of(f, first, static_cast<int>(std::min<int64_t>(kTogether, f.batch - first)), planes + first * codes, vectors, depth,
                8 * block, std::min(8 * block + 8, f.outputs));
  });
  return true;
}
#endif

}  // namespace pyaccel::qmac::PYACCEL_ISA
