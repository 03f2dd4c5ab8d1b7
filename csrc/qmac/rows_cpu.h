// Rows of packed codes to bytes and back, eight codes at a time inside a 64-bit word, and the small shuffles that put
// them into the order the products want. Everything in the namespace of its level.
#pragma once
#include <cstdint>
#include <cstring>

#include "../core/simd.h"
#include "qmac.h"

namespace pyaccel::qmac::PYACCEL_ISA {

using namespace pyaccel::PYACCEL_ISA;

typedef uint8_t Bytes __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
constexpr int kBytes = PYACCEL_VECTOR_BYTES;
constexpr int kInts = kBytes / 4;

template <class V, class P>
PYACCEL_INLINE V load_any(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
PYACCEL_INLINE void store_any(P* p, const V& v) {
  memcpy(p, &v, sizeof v);
}

// ---- eight codes of `bits` (1, 2, 4) in the low bytes of a word <-> one a byte
constexpr uint64_t repeat(uint64_t ones, int every) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += every) mask |= ones << at;
  return mask;
}
template <int bits>
PYACCEL_INLINE uint64_t spread(uint64_t x) {
  constexpr int gap = 8 - bits;
  x = (x | x << (4 * gap)) & repeat((1ull << (4 * bits)) - 1, 32);
  x = (x | x << (2 * gap)) & repeat((1ull << (2 * bits)) - 1, 16);
  return (x | x << gap) & repeat((1ull << bits) - 1, 8);
}
template <int bits>
PYACCEL_INLINE uint64_t gather(uint64_t x) {
  constexpr int gap = 8 - bits;
  x = (x | x >> gap) & repeat((1ull << (2 * bits)) - 1, 16);
  x = (x | x >> (2 * gap)) & repeat((1ull << (4 * bits)) - 1, 32);
  return (x | x >> (4 * gap)) & ((1ull << (8 * bits)) - 1);
}

// `length` codes of a packed row as bytes; up to 7 bytes beyond are written with zeros.
template <int bits>
PYACCEL_INLINE void spread_row(const uint8_t* from, int64_t length, uint8_t* to) {
  int64_t j = 0;
  if constexpr (bits == 8) {
    memcpy(to, from, static_cast<size_t>(length));
    return;
  }
  for (; j + 8 <= length; j += 8) {
    uint64_t x = 0;
    memcpy(&x, from + j / 8 * bits, bits);
    x = spread<bits>(x);
    memcpy(to + j, &x, 8);
  }
  if (j < length) {
    uint64_t x = 0;
    memcpy(&x, from + j / 8 * bits, static_cast<size_t>(((length - j) * bits + 7) / 8));
    x = spread<bits>(x) & ((1ull << (8 * (length - j))) - 1);
    memcpy(to + j, &x, 8);
  }
}
PYACCEL_INLINE void spread_row(int bits, const uint8_t* from, int64_t length, uint8_t* to) {
  switch (bits) {
    case 1: return spread_row<1>(from, length, to);
    case 2: return spread_row<2>(from, length, to);
    case 4: return spread_row<4>(from, length, to);
    default: return spread_row<8>(from, length, to);
  }
}

// Codes `first` .. of a packed row as bytes, `limb` 0 (low) or 1 (high byte of 16-bit codes); `first` % 32 is 0.
PYACCEL_INLINE void unpack_row(int bits, const uint32_t* row, int64_t first, int64_t count, int limb, uint8_t* to) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(row) + first * bits / 8;
  if (bits < 16) return spread_row(bits, from, count, to);
  for (int64_t j = 0; j < count; ++j) to[j] = from[2 * j + limb];
}

// The sum of `count` bytes.
PYACCEL_INLINE int64_t sum_bytes(const uint8_t* p, int64_t count) {
  int64_t total = 0, j = 0;
#if defined(__x86_64__)
  __m128i sums = _mm_setzero_si128();
  for (; j + 16 <= count; j += 16)
    sums = _mm_add_epi64(sums, _mm_sad_epu8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j)), _mm_setzero_si128()));
  total = _mm_cvtsi128_si64(sums) + _mm_cvtsi128_si64(_mm_unpackhi_epi64(sums, sums));
#endif
  for (; j < count; ++j) total += p[j];
  return total;
}

// 8 x 8 bytes: byte j of row i to byte i of row j.
PYACCEL_INLINE void transpose8(uint64_t (&x)[8]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint64_t t = (x[i] >> 32 ^ x[i + 4]) & 0xffffffffull;
    x[i + 4] ^= t;
    x[i] ^= t << 32;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += i % 4 == 1 ? 3 : 1) {
    const uint64_t t = (x[i] >> 16 ^ x[i + 2]) & 0x0000ffff0000ffffull;
    x[i + 2] ^= t;
    x[i] ^= t << 16;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const uint64_t t = (x[i] >> 8 ^ x[i + 1]) & 0x00ff00ff00ff00ffull;
    x[i + 1] ^= t;
    x[i] ^= t << 8;
  }
}

typedef uint8_t Sixteen __attribute__((vector_size(16)));
typedef uint64_t TwoWords __attribute__((vector_size(16)));
typedef uint16_t EightHalves __attribute__((vector_size(16)));

// Eight bytes in the low half of a 16-byte vector; their bytes, or 16-bit halves, alternating with those of another.
PYACCEL_INLINE Sixteen load_eight(const uint8_t* p) {
  return __builtin_bit_cast(Sixteen, TwoWords{load_any<uint64_t>(p), 0});
}
PYACCEL_INLINE Sixteen alternate_bytes(Sixteen a, Sixteen b) {
  return __builtin_shuffle(a, b, Sixteen{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
PYACCEL_INLINE void store_alternate_halves(uint8_t* to, Sixteen a, Sixteen b) {
  const EightHalves x = __builtin_bit_cast(EightHalves, a), y = __builtin_bit_cast(EightHalves, b);
  store_any(to, __builtin_shuffle(x, y, EightHalves{0, 8, 1, 9, 2, 10, 3, 11}));
  store_any(to + 16, __builtin_shuffle(x, y, EightHalves{4, 12, 5, 13, 6, 14, 7, 15}));
}

// Eight bytes as 32-bit words. (GCC 12 takes a convertvector of them apart, byte by byte.)
typedef uint32_t EightWords __attribute__((vector_size(32)));
PYACCEL_INLINE EightWords widen_eight(const uint8_t* p) {
#if PYACCEL_VECTOR_BYTES >= 32
  return __builtin_bit_cast(EightWords, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef uint8_t EightBytes __attribute__((vector_size(8)));
  return __builtin_convertvector(load_any<EightBytes>(p), EightWords);
#endif
}

// One vector of bytes, so that its first half lands on the even positions and its second half on the odd ones.
PYACCEL_INLINE void interleave_halves(const uint8_t* from, uint8_t* to) {
#pragma GCC unroll 4
  for (int i = 0; i < kBytes / 2; i += 8)
    store_any(to + 2 * i, alternate_bytes(load_eight(from + i), load_eight(from + kBytes / 2 + i)));
}

}  // namespace pyaccel::qmac::PYACCEL_ISA
