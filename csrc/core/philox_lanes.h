// Philox4x32-10 with one counter in every 64-bit lane (philox.h has the scalar form).
//
// The products P0 = M0*c0 and P1 = M1*c2 stay whole: the multiplier reads only the low half of a lane, so the next
// c0 = (P1 >> 32) ^ (P1 of the round before) ^ k0 needs no masking. What the upper halves hold does not matter.
#pragma once
#include "simd.h"

namespace pyaccel::PYACCEL_ISA {

typedef uint64_t Wide __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
constexpr int kWideLanes = PYACCEL_VECTOR_BYTES / 8;

// Product of the low halves, 64 bits a lane.
PYACCEL_INLINE Wide multiply_low(Wide a, Wide b) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Wide, _mm512_maskz_mul_epu32(0xff, __builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b)));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(Wide, _mm256_mul_epu32(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, b)));
#elif defined(__x86_64__)
  return __builtin_bit_cast(Wide, _mm_mul_epu32(__builtin_bit_cast(__m128i, a), __builtin_bit_cast(__m128i, b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

PYACCEL_INLINE Wide xor3(Wide a, Wide b, Wide c) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Wide, _mm512_ternarylogic_epi64(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b),
                                                            __builtin_bit_cast(__m512i, c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

// The halves of every lane exchanged.
PYACCEL_INLINE Wide swap_halves(Wide a) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Wide, _mm512_maskz_shuffle_epi32(0xffff, __builtin_bit_cast(__m512i, a), _MM_PERM_CDAB));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(Wide, _mm256_shuffle_epi32(__builtin_bit_cast(__m256i, a), 0xB1));
#elif defined(__x86_64__)
  return __builtin_bit_cast(Wide, _mm_shuffle_epi32(__builtin_bit_cast(__m128i, a), 0xB1));
#else
  return (a << 32) | (a >> 32);
#endif
}

constexpr uint64_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;

struct PhiloxKeys {
  uint32_t k0[10], k1[10];
  explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      k0[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      k1[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

// Products of the last round and of the one before; the output words are made from them, in the form that is wanted.
struct PhiloxEnd {
  Wide p0, p1, before0, before1;
  uint32_t k0, k1;

  // (c0, c1) and (c2, c3) of each lane in memory order, every byte XORed with `bias`.
  PYACCEL_INLINE void pairs(uint8_t bias, Wide& c01, Wide& c23) const {
    const uint64_t all = bias * uint64_t{0x0101010101010101};
    c01 = xor3(swap_halves(p1), before1 & 0xffffffffu, Wide{} + (k0 ^ all));
    c23 = xor3(swap_halves(p0), before0 & 0xffffffffu, Wide{} + (k1 ^ all));
  }
  // The four words in the low halves; the upper halves are to be ignored.
  PYACCEL_INLINE void words(Wide w[4]) const {
    w[0] = xor3(p1 >> 32, before1, Wide{} + k0);
    w[1] = p1;
    w[2] = xor3(p0 >> 32, before0, Wide{} + k1);
    w[3] = p0;
  }
};

// Philox of 64-bit counters, one a lane, for `groups` vectors side by side: one alone waits on its own chain.
template <int groups>
PYACCEL_INLINE void philox_lanes(const PhiloxKeys& keys, const Wide (&counter)[groups], uint32_t stream, uint32_t domain, PhiloxEnd (&end)[groups]) {
  const Wide m0 = Wide{} + kPhilox0, m1 = Wide{} + kPhilox1;
  Wide p0[groups], p1[groups], before0[groups], before1[groups];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    p0[g] = multiply_low(counter[g], m0);
    p1[g] = Wide{} + kPhilox1 * stream;
    before0[g] = Wide{} + domain;
    before1[g] = counter[g] >> 32;
  }
#pragma GCC unroll 9
  for (int round = 0; round < 9; ++round) {
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      const Wide c0 = xor3(p1[g] >> 32, before1[g], Wide{} + keys.k0[round]);
      const Wide c2 = xor3(p0[g] >> 32, before0[g], Wide{} + keys.k1[round]);
      before0[g] = p0[g];
      before1[g] = p1[g];
      p0[g] = multiply_low(c0, m0);
      p1[g] = multiply_low(c2, m1);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) end[g] = {p0[g], p1[g], before0[g], before1[g], keys.k0[9], keys.k1[9]};
}
PYACCEL_INLINE PhiloxEnd philox_lanes(const PhiloxKeys& keys, Wide counter, uint32_t stream, uint32_t domain) {
  const Wide counters[1] = {counter};
  PhiloxEnd end[1];
  philox_lanes(keys, counters, stream, domain, end);
  return end[0];
}

// Many counters in a row that agree in their upper 32 bits: what rounds 1 and 2 then have in common is worked out once.
// Round 1 multiplies the stream by M1: one number. So round 2 multiplies one number by M0; and M0*counter grows by a
// constant. Saves 3 of 20 multiplications.
class PhiloxRun {
 public:
  PhiloxRun(const PhiloxKeys& keys, uint32_t high, uint32_t stream, uint32_t domain) : keys_(keys) {
    const uint64_t p1 = kPhilox1 * stream;
    const uint64_t p0 = kPhilox0 * static_cast<uint32_t>(static_cast<uint32_t>(p1 >> 32) ^ high ^ keys.k0[0]);
    c2_first_ = domain ^ keys.k1[0];
    c0_second_ = static_cast<uint32_t>(p1) ^ keys.k0[1];
    c2_second_ = static_cast<uint32_t>(p0 >> 32) ^ keys.k1[1];
    c2_third_ = static_cast<uint32_t>(p0) ^ keys.k1[2];
  }

  // `products`: M0 * (low 32 bits of the counter), for `groups` vectors side by side: one alone waits on its own chain.
  template <int groups>
  PYACCEL_INLINE void draw(const Wide (&products)[groups], PhiloxEnd (&end)[groups]) const {
    const Wide m0 = Wide{} + kPhilox0, m1 = Wide{} + kPhilox1;
    Wide p0[groups], p1[groups], before0[groups], before1[groups];
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      before1[g] = multiply_low((products[g] >> 32) ^ c2_first_, m1);
      p0[g] = multiply_low((before1[g] >> 32) ^ c0_second_, m0);
      p1[g] = multiply_low(products[g] ^ c2_second_, m1);
    }
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      const Wide c0 = xor3(p1[g] >> 32, before1[g], Wide{} + keys_.k0[2]), c2 = (p0[g] >> 32) ^ c2_third_;
      before0[g] = p0[g];
      before1[g] = p1[g];
      p0[g] = multiply_low(c0, m0);
      p1[g] = multiply_low(c2, m1);
    }
#pragma GCC unroll 6
    for (int round = 3; round < 9; ++round) {
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) {
        const Wide c0 = xor3(p1[g] >> 32, before1[g], Wide{} + keys_.k0[round]);
        const Wide c2 = xor3(p0[g] >> 32, before0[g], Wide{} + keys_.k1[round]);
        before0[g] = p0[g];
        before1[g] = p1[g];
        p0[g] = multiply_low(c0, m0);
        p1[g] = multiply_low(c2, m1);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) end[g] = {p0[g], p1[g], before0[g], before1[g], keys_.k0[9], keys_.k1[9]};
  }

 private:
  const PhiloxKeys& keys_;
  uint64_t c2_first_, c0_second_, c2_second_, c2_third_;
};

}  // namespace pyaccel::PYACCEL_ISA
