// Standard normal draws in SIMD lanes: Philox blocks side by side, then Box and Muller (definition: reference/philox.py).
#pragma once
#include "../core/philox.h"
#include "../core/simd.h"

namespace pyaccel::crossbar::PYACCEL_ISA {

using namespace ::pyaccel::PYACCEL_ISA;

constexpr int kDraws = 4 * Simd<float>::lanes;  // normals of one call

typedef uint64_t Wide64 __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));

// High and low words of a 32x32-bit product in every lane: even and odd lanes go through the 64-bit multiplier in turn.
PYACCEL_INLINE void multiply_words(WordVec a, uint32_t constant, WordVec& high, WordVec& low) {
  const Wide64 lanes = __builtin_bit_cast(Wide64, a);
  const Wide64 even = (lanes & 0xffffffffu) * uint64_t{constant}, odd = (lanes >> 32) * uint64_t{constant};
  low = __builtin_bit_cast(WordVec, (even & 0xffffffffu) | (odd << 32));
  high = __builtin_bit_cast(WordVec, (even >> 32) | (odd & ~uint64_t{0xffffffffu}));
}

// ln u for u in [2^-24, 1): u = 2^e m, m in [sqrt(1/2), sqrt(2)), a polynomial in m - 1 (Cephes logf), error 1e-7 relative.
PYACCEL_INLINE Vec<float> log_of(Vec<float> u) {
  const WordVec bits = __builtin_bit_cast(WordVec, u);
  Vec<float> e = __builtin_convertvector(__builtin_bit_cast(IntVec, bits >> 23) - 126, Vec<float>);
  Vec<float> m = __builtin_bit_cast(Vec<float>, (bits & 0x7fffffu) | 0x3f000000u);  // [1/2, 1)
  const auto low = m < Vec<float>{} + 0.70710678f;
  e = low ? e - 1.0f : e;
  m = (low ? m + m : m) - 1.0f;
  Vec<float> p = m * 7.0376836e-2f - 1.1514610e-1f;
  p = p * m + 1.1676998e-1f;
  p = p * m - 1.2420141e-1f;
  p = p * m + 1.4249323e-1f;
  p = p * m - 1.6668057e-1f;
  p = p * m + 2.0000714e-1f;
  p = p * m - 2.4999994e-1f;
  p = p * m + 3.3333331e-1f;
  const Vec<float> z = m * m;
  const Vec<float> tail = p * m * z + e * -2.12194440e-4f - z * 0.5f;
  return m + tail + e * 0.693359375f;
}

// cos and sin of 2 pi v, v in (0, 1): the nearest quarter turn taken off exactly, polynomials on a quarter (Cephes).
PYACCEL_INLINE void circle(Vec<float> v, Vec<float>& cosine, Vec<float>& sine) {
  const Vec<float> quarter = (v * 4.0f + 12582912.0f) - 12582912.0f;
  const Vec<float> a = (v * 4.0f - quarter) * 1.57079633f;
  const Vec<float> z = a * a;
  const Vec<float> s = ((z * -1.9515296e-4f + 8.3321609e-3f) * z - 1.6666655e-1f) * z * a + a;
  const Vec<float> c = ((z * 2.4433157e-5f - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - z * 0.5f + 1.0f;
  const IntVec q = __builtin_convertvector(quarter, IntVec) & 3;
  const Vec<float> x = (q & 1) != 0 ? s : c, y = (q & 1) != 0 ? c : s;
  cosine = (q == 1) | (q == 2) ? -x : x;
  sine = q >= 2 ? -y : y;
}

PYACCEL_INLINE Vec<float> root(Vec<float> x) {
#if PYACCEL_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif PYACCEL_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// out[0 .. kDraws): the normals of counters `block`, block + 1, ...
PYACCEL_INLINE void draw_normals(uint64_t key, uint64_t block, uint32_t stream, uint32_t domain, float* out) {
  constexpr int lanes = Simd<float>::lanes;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  WordVec c0, c1, c2 = WordVec{} + stream, c3 = WordVec{} + domain;
  for (int i = 0; i < lanes; ++i) {
    c0[i] = static_cast<uint32_t>(block + static_cast<uint64_t>(i));
    c1[i] = static_cast<uint32_t>((block + static_cast<uint64_t>(i)) >> 32);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    WordVec high0, low0, high1, low1;
    multiply_words(c0, 0xD2511F53u, high0, low0);
    multiply_words(c2, 0xCD9E8D57u, high1, low1);
    const WordVec n0 = high1 ^ c1 ^ k0, n2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const WordVec words[4] = {c0, c1, c2, c3};
  Vec<float> uniform[4], normal[4];
  for (int w = 0; w < 4; ++w)
    uniform[w] = (__builtin_convertvector(__builtin_bit_cast(IntVec, words[w] >> 9), Vec<float>) + 0.5f) * 0x1p-23f;
  for (int pair = 0; pair < 4; pair += 2) {
    const Vec<float> radius = root(log_of(uniform[pair]) * -2.0f);
    Vec<float> cosine, sine;
    circle(uniform[pair + 1], cosine, sine);
    normal[pair] = radius * cosine;
    normal[pair + 1] = radius * sine;
  }
  for (int i = 0; i < lanes; ++i)
    for (int w = 0; w < 4; ++w) out[4 * i + w] = normal[w][i];
}

}  // namespace pyaccel::crossbar::PYACCEL_ISA
