// Small matrix products in registers: the inner loops of the ladder and of the tiled product.
#pragma once
#include <type_traits>

#include "../core/simd.h"

namespace pyaccel::crossbar::PYACCEL_ISA {

using namespace ::pyaccel::PYACCEL_ISA;

// Fused where the instruction set has it: this family promises accuracy, not equal bits, between instruction sets.
PYACCEL_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if PYACCEL_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif PYACCEL_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
PYACCEL_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
#if PYACCEL_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif PYACCEL_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

constexpr int kRows = 4;                                       // rows of a register block
constexpr int kWidest = PYACCEL_VECTOR_BYTES == 64 ? 4 : 3;  // and its vectors: 12 (16) sums in flight fill 16 (32) registers

template <int width, class S>
PYACCEL_INLINE void multiply_add_step(Vec<S> (&acc)[kRows][width], const S* a, int64_t row, const S* b) {
  Vec<S> bs[width];
#pragma GCC unroll 8
  for (int v = 0; v < width; ++v) bs[v] = load_vec(b + v * Simd<S>::lanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vec<S> as = a[r * row] - Vec<S>{};  // x - 0 is x to the compiler, 0 + x is not
#pragma GCC unroll 8
    for (int v = 0; v < width; ++v) acc[r][v] = fused(as, bs[v], acc[r][v]);
  }
}

// acc[r][v] += sum over k of a[r*row + k*next] * b[k*ldb + v]: broadcasts from a, vectors from b.
template <int width, class S>
PYACCEL_INLINE void multiply_add(Vec<S> (&acc)[kRows][width], const S* a, int64_t row, int64_t next, const S* b, int64_t ldb,
                                 int64_t depth) {
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4)
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) multiply_add_step<width>(acc, a + (k + i) * next, row, b + (k + i) * ldb);
  for (; k < depth; ++k) multiply_add_step<width>(acc, a + k * next, row, b + k * ldb);
}
// The same for a panel: depth 8, neighbouring a.
template <int width, class S>
PYACCEL_INLINE void multiply_add8(Vec<S> (&acc)[kRows][width], const S* a, int64_t row, int64_t next, const S* b, int64_t ldb) {
#pragma GCC unroll 1
  for (int64_t k = 0; k < 8; ++k) multiply_add_step<width>(acc, a + k * next, row, b + k * ldb);
}

// run(width, first vector) over `vectors` in blocks of at most kWidest, none of them 1 wide unless it must be.
template <class F>
PYACCEL_INLINE void in_blocks(int64_t vectors, const F& run) {
  for (int64_t done = 0; done < vectors;) {
    const int64_t left = vectors - done;
    if (left == 1) {
      run(std::integral_constant<int, 1>{}, done);
      done += 1;
    } else if (left == 2 || (left == 4 && kWidest == 3)) {
      run(std::integral_constant<int, 2>{}, done);
      done += 2;
    } else if (left >= 4 && left != 5 && kWidest == 4) {
      run(std::integral_constant<int, kWidest>{}, done);
      done += kWidest;
    } else {
      run(std::integral_constant<int, 3>{}, done);
      done += 3;
    }
  }
}

// The 8 x 8 block at `from`, transposed to `to`, by 32-byte vectors (four blocks of 4 x 4 in float64).
PYACCEL_INLINE void transpose8(const float* from, int64_t ldf, float* to, int64_t ldt) {
  typedef float Block __attribute__((vector_size(32)));
  typedef float Loose __attribute__((vector_size(32), aligned(4), may_alias));
  Block r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = *reinterpret_cast<const Loose*>(from + i * ldf);
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += (i & 1) ? 3 : 1) {
    r[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 2] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    *reinterpret_cast<Loose*>(to + i * ldt) = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    *reinterpret_cast<Loose*>(to + (i + 1) * ldt) = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
}
PYACCEL_INLINE void transpose8(const double* from, int64_t ldf, double* to, int64_t ldt) {
  typedef double Block __attribute__((vector_size(32)));
  typedef double Loose __attribute__((vector_size(32), aligned(8), may_alias));
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const int i0 = 4 * (part / 2), j0 = 4 * (part % 2);
    Block r[4], s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const Loose*>(from + (i0 + i) * ldf + j0);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      s[i] = __builtin_shufflevector(r[i], r[i + 2], 0, 1, 4, 5);
      s[i + 2] = __builtin_shufflevector(r[i], r[i + 2], 2, 3, 6, 7);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      *reinterpret_cast<Loose*>(to + (j0 + i) * ldt + i0) = __builtin_shufflevector(s[i], s[i + 1], 0, 4, 2, 6);
      *reinterpret_cast<Loose*>(to + (j0 + i + 1) * ldt + i0) = __builtin_shufflevector(s[i], s[i + 1], 1, 5, 3, 7);
    }
  }
}

// g = (I + r * a)^-1 for a symmetric positive semidefinite 8 x 8 block: Gauss-Jordan in place, no pivot search needed.
// Rows are 32-byte vectors, one in float32, two in float64: the whole block stays in registers.
template <class S>
PYACCEL_INLINE void invert8(const S* a, int64_t lda, S r, S* g) {
  constexpr int wide = 32 / static_cast<int>(sizeof(S)), parts = 8 / wide;
  typedef S Part __attribute__((vector_size(32)));
  typedef S Loose __attribute__((vector_size(32), aligned(alignof(S)), may_alias));
  typedef std::conditional_t<sizeof(S) == 4, int32_t, int64_t> Int;
  typedef Int Mask __attribute__((vector_size(32)));
  Part m[8][parts];
  Mask place[wide];  // all ones in lane p
#pragma GCC unroll 8
  for (int p = 0; p < wide; ++p) {
    place[p] = Mask{};
    place[p][p] = -1;
  }
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
#pragma GCC unroll 2
    for (int q = 0; q < parts; ++q) m[p][q] = *reinterpret_cast<const Loose*>(a + p * lda + q * wide) * r;
    const Part one = S(1) - Part{};
    m[p][p / wide] += __builtin_bit_cast(Part, __builtin_bit_cast(Mask, one) & place[p % wide]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    const int own = p / wide;
    const Mask here = place[p % wide];
    const Part inverse = (S(1) / m[p][own][p % wide]) - Part{};
#pragma GCC unroll 2
    for (int q = 0; q < parts; ++q) m[p][q] *= inverse;
    m[p][own] = here ? inverse : m[p][own];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      if (k == p) continue;
      const Part f = m[k][own][p % wide] - Part{};
      m[k][own] = __builtin_bit_cast(Part, __builtin_bit_cast(Mask, m[k][own]) & ~here);
#pragma GCC unroll 2
      for (int q = 0; q < parts; ++q) m[k][q] -= m[p][q] * f;
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p)
#pragma GCC unroll 2
    for (int q = 0; q < parts; ++q) *reinterpret_cast<Loose*>(g + 8 * p + q * wide) = m[p][q];
}

// g := g - I = -r g a, formed as a product: no difference of nearly equal numbers.
template <class S>
PYACCEL_INLINE void less_identity(S* g, const S* a, int64_t lda, S r) {
  constexpr int wide = 32 / static_cast<int>(sizeof(S)), parts = 8 / wide;
  typedef S Part __attribute__((vector_size(32)));
  typedef S Loose __attribute__((vector_size(32), aligned(alignof(S)), may_alias));
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    Part sum[parts] = {};
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
#pragma GCC unroll 2
      for (int q = 0; q < parts; ++q) sum[q] += *reinterpret_cast<const Loose*>(a + k * lda + q * wide) * g[8 * p + k];
#pragma GCC unroll 2
    for (int q = 0; q < parts; ++q) *reinterpret_cast<Loose*>(g + 8 * p + q * wide) = sum[q] * -r;
  }
}

}  // namespace pyaccel::crossbar::PYACCEL_ISA
