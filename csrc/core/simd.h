// SIMD vectors of the width that the including file is compiled for, by the compiler's vector extension:
// one source for every instruction set; arithmetic, comparison and `mask ? a : b` work lane by lane.
// Everything here lives in the namespace of its level (see isa.h): an inline function shared between levels would be
// merged by the linker, and the AVX-512 copy could then run on a machine without it.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef PYACCEL_ISA
#error "kernel files are compiled once an instruction set, with PYACCEL_ISA and PYACCEL_VECTOR_BYTES defined"
#endif
#define PYACCEL_INLINE inline __attribute__((always_inline))
#define PYACCEL_LAMBDA_INLINE __attribute__((always_inline))

namespace pyaccel::PYACCEL_ISA {

template <class S>
struct Simd {
  static constexpr int lanes = PYACCEL_VECTOR_BYTES / static_cast<int>(sizeof(S));
  typedef S vec __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
  typedef S unaligned __attribute__((vector_size(PYACCEL_VECTOR_BYTES), aligned(alignof(S)), may_alias));
};
template <class S>
using Vec = typename Simd<S>::vec;

// Element types as stored. Conversions: to the state type S on load, rounded to nearest even on store.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
template <class E>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};

// ---- one scalar
PYACCEL_INLINE float load(const float* p) { return *p; }
PYACCEL_INLINE double load(const double* p) { return *p; }
PYACCEL_INLINE float load(const Bf16* p) { return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16); }
PYACCEL_INLINE float load(const Half* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000) << 16, rest = p->bits & 0x7fff;
  // The exponent is rebiased by a multiplication, which also makes subnormals normal; infinity and NaN are put back.
  const float magnitude = __builtin_bit_cast(float, rest << 13) * 0x1p112f;
  const uint32_t bits = rest >= 0x7c00 ? 0x7f800000u | ((rest & 0x3ff) << 13) : __builtin_bit_cast(uint32_t, magnitude);
  return __builtin_bit_cast(float, bits | sign);
}
PYACCEL_INLINE void store(float* p, float v) { *p = v; }
PYACCEL_INLINE void store(double* p, double v) { *p = v; }
PYACCEL_INLINE void store(Bf16* p, float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  p->bits = v != v ? uint16_t{0x7fc0} : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
PYACCEL_INLINE void store(Half* p, float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | sign);
}

// ---- one vector of S
typedef uint32_t WordVec __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(PYACCEL_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class S>
PYACCEL_INLINE Vec<S> load_vec(const S* p) {
  return *reinterpret_cast<const typename Simd<S>::unaligned*>(p);
}
PYACCEL_INLINE Vec<float> load_vec(const Bf16* p) {
  const HalfWords h = *reinterpret_cast<const HalfWords*>(p);
  return __builtin_bit_cast(Vec<float>, __builtin_convertvector(h, WordVec) << 16);
}
PYACCEL_INLINE Vec<float> load_vec(const Half* p) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(Vec<float>, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(Vec<float>, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < Simd<float>::lanes; ++i) v[i] = load(p + i);
  return v;
#endif
}

// `stream`: past the caches; the address must be aligned to the vector.
template <bool stream, class S>
PYACCEL_INLINE void store_bits(S* p, Vec<S> v) {
  if constexpr (stream) {
#if PYACCEL_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __builtin_bit_cast(__m512i, v));
    return;
#elif PYACCEL_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __builtin_bit_cast(__m256i, v));
    return;
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), __builtin_bit_cast(__m128i, v));
    return;
#endif
  }
  *reinterpret_cast<typename Simd<S>::unaligned*>(p) = v;
}
template <bool stream>
PYACCEL_INLINE void store_half_words(uint16_t* p, HalfWords h) {
  if constexpr (stream) {
#if PYACCEL_VECTOR_BYTES == 64
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __builtin_bit_cast(__m256i, h));
    return;
#elif PYACCEL_VECTOR_BYTES == 32
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), __builtin_bit_cast(__m128i, h));
    return;
#endif
  }
  *reinterpret_cast<HalfWords*>(p) = h;
}
template <bool stream>
PYACCEL_INLINE void store_vec(float* p, Vec<float> v) {
  store_bits<stream>(p, v);
}
template <bool stream>
PYACCEL_INLINE void store_vec(double* p, Vec<double> v) {
  store_bits<stream>(p, v);
}
template <bool stream>
PYACCEL_INLINE void store_vec(Bf16* p, Vec<float> v) {
  const WordVec u = __builtin_bit_cast(WordVec, v);
  const WordVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const WordVec quiet = WordVec{} + 0x7fc0u;
  store_half_words<stream>(&p->bits, __builtin_convertvector(v != v ? quiet : rounded, HalfWords));
}
template <bool stream>
PYACCEL_INLINE void store_vec(Half* p, Vec<float> v) {
#if PYACCEL_VECTOR_BYTES == 64
  const __m256i h = _mm512_maskz_cvtps_ph(0xffff, __builtin_bit_cast(__m512, v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  store_half_words<stream>(&p->bits, __builtin_bit_cast(HalfWords, h));
#elif PYACCEL_VECTOR_BYTES == 32
  const __m128i h = _mm256_cvtps_ph(__builtin_bit_cast(__m256, v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  store_half_words<stream>(&p->bits, __builtin_bit_cast(HalfWords, h));
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) store(p + i, v[i]);
#endif
}
// A mask as 1.0 and 0.0 of the element type: no rounding to do.
template <bool stream, class Mask>
PYACCEL_INLINE void store_spikes(float* p, Mask fired) {
  store_bits<stream>(p, __builtin_bit_cast(Vec<float>, fired & __builtin_bit_cast(Mask, Vec<float>{} + 1.0f)));
}
template <bool stream, class Mask>
PYACCEL_INLINE void store_spikes(double* p, Mask fired) {
  store_bits<stream>(p, __builtin_bit_cast(Vec<double>, fired & __builtin_bit_cast(Mask, Vec<double>{} + 1.0)));
}
template <bool stream, class Mask>
PYACCEL_INLINE void store_spikes(Bf16* p, Mask fired) {
  store_half_words<stream>(&p->bits, __builtin_convertvector(__builtin_bit_cast(WordVec, fired) & 0x3f80u, HalfWords));
}
template <bool stream, class Mask>
PYACCEL_INLINE void store_spikes(Half* p, Mask fired) {
  store_half_words<stream>(&p->bits, __builtin_convertvector(__builtin_bit_cast(WordVec, fired) & 0x3c00u, HalfWords));
}

// ---- the same code over vectors and, for tails, scalars
template <class S, class V>
constexpr int lanes_of = static_cast<int>(sizeof(V) / sizeof(S));

template <class V, class E>
PYACCEL_INLINE V load_as(const E* p) {
  if constexpr (sizeof(V) == PYACCEL_VECTOR_BYTES) return load_vec(p);
  else return load(p);
}
template <bool stream, class V, class E>
PYACCEL_INLINE void store_as(E* p, V v) {
  if constexpr (sizeof(V) == PYACCEL_VECTOR_BYTES) store_vec<stream>(p, v);
  else store(p, v);
}
template <bool stream, class E, class Mask>
PYACCEL_INLINE void spikes_as(E* p, Mask fired) {
  using S = typename StateOf<E>::type;
  if constexpr (sizeof(Mask) == PYACCEL_VECTOR_BYTES) store_spikes<stream>(p, fired);
  else store(p, fired ? S(1) : S(0));
}
template <class S, class V>
PYACCEL_INLINE S sum_lanes(V v) {
  if constexpr (sizeof(V) == sizeof(S)) {
    return v;
  } else {
    S total = 0;
    for (int i = 0; i < lanes_of<S, V>; ++i) total += v[i];
    return total;
  }
}

template <class Mask>
PYACCEL_INLINE uint32_t vector_mask_bits(Mask mask) {
  constexpr int width = static_cast<int>(sizeof(mask[0]));
  static_assert(width == 4 || width == 8);
#if defined(__x86_64__)
  asm("" : "+v"(mask));  // g++ 12 fails (internal error) where it merges this comparison with a selection by the same mask
#endif
#if PYACCEL_VECTOR_BYTES == 64
  if constexpr (width == 4) return _mm512_movepi32_mask(__builtin_bit_cast(__m512i, mask));
  else return _mm512_movepi64_mask(__builtin_bit_cast(__m512i, mask));
#elif PYACCEL_VECTOR_BYTES == 32
  if constexpr (width == 4) return static_cast<uint32_t>(_mm256_movemask_ps(__builtin_bit_cast(__m256, mask)));
  else return static_cast<uint32_t>(_mm256_movemask_pd(__builtin_bit_cast(__m256d, mask)));
#elif defined(__x86_64__)
  if constexpr (width == 4) return static_cast<uint32_t>(_mm_movemask_ps(__builtin_bit_cast(__m128, mask)));
  else return static_cast<uint32_t>(_mm_movemask_pd(__builtin_bit_cast(__m128d, mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < PYACCEL_VECTOR_BYTES / width; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}
// Bit i of the result: lane i of a comparison mask (all ones or all zeros a lane).
template <class Mask>
PYACCEL_INLINE uint32_t mask_bits(Mask mask) {
  if constexpr (std::is_same_v<Mask, bool>) return mask ? 1 : 0;
  else return vector_mask_bits(mask);
}
// A mask of S-sized lanes from bits: the inverse of mask_bits.
template <class S>
PYACCEL_INLINE auto mask_of_bits(uint32_t bits) {
  using Word = decltype(Vec<S>{} > Vec<S>{});
  Word select;
  for (int i = 0; i < Simd<S>::lanes; ++i) select[i] = 1 << i;
  const auto lane = static_cast<std::remove_cvref_t<decltype(select[0])>>(bits);
  return ((Word{} + lane) & select) == select;
}

PYACCEL_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % PYACCEL_VECTOR_BYTES == 0; }
PYACCEL_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace pyaccel::PYACCEL_ISA
