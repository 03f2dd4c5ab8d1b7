// exp of SIMD vectors for non-positive arguments, relative error below 2e-7 (float); double goes lane by lane.
#pragma once
#include <cmath>

#include "simd.h"

namespace pyaccel::PYACCEL_ISA {

PYACCEL_INLINE Vec<float> exp_negative(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
  const Vec<float> floor_at = Vec<float>{} - 87.0f;
  x = x > floor_at ? x : floor_at;
  // x = n ln 2 + r, |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to an integer.
  const Vec<float> n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec<float> tail = ((((r * 1.9875691e-4f + 1.3981999e-3f) * r + 8.3334519e-3f) * r + 4.1665796e-2f) * r + 1.6666665e-1f) * r + 0.5f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return (tail * r * r + r + 1.0f) * __builtin_bit_cast(Vec<float>, exponent);
}
PYACCEL_INLINE Vec<double> exp_negative(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = std::exp(x[i]);
  return x;
}
PYACCEL_INLINE float exp_negative(float x) { return exp_negative(Vec<float>{} + x)[0]; }
PYACCEL_INLINE double exp_negative(double x) { return std::exp(x); }

}  // namespace pyaccel::PYACCEL_ISA
