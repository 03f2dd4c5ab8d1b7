// Small matrix products in registers: the inner loops of the ladder and of the tiled product.
#pragma once
#include <type_traits>

#include "../core/simd.h"

namespace pyaccel::crossbar::PYACCEL_ISA {

using namespace ::pyaccel::PYACCEL_ISA;

// a * b + c. Fused where the instruction set has it: this family promises accuracy, not equal bits, between instruction sets.
template <class V>
PYACCEL_INLINE V fused(V a, V b, V c) {
  [[maybe_unused]] constexpr bool single = sizeof(a[0]) == 4;
#if PYACCEL_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) {
    if constexpr (single) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#endif
#if PYACCEL_VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32) {
    if constexpr (single) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#endif
  return a * b + c;
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
// The same for a depth known to the compiler.
template <int width, int depth, class S>
PYACCEL_INLINE void multiply_add_panel(Vec<S> (&acc)[kRows][width], const S* a, int64_t row, int64_t next, const S* b, int64_t ldb) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) multiply_add_step<width>(acc, a + k * next, row, b + k * ldb);
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
typedef double Quad __attribute__((vector_size(32)));  // a row of a 4 x 4 block
typedef double LooseQuad __attribute__((vector_size(32), aligned(8), may_alias));

template <int lane, class V>
PYACCEL_INLINE V all_lanes(V v) {
  if constexpr (sizeof(v[0]) == 8) return __builtin_shufflevector(v, v, lane, lane, lane, lane);
  else return __builtin_shufflevector(v, v, lane, lane, lane, lane, lane, lane, lane, lane);
}
// v with one lane from w: a blend, where an assignment to the element would go through the stack.
template <int lane, class V>
PYACCEL_INLINE V with_lane(V v, V w) {
  constexpr auto from = [](int i) { return i == lane ? i + 32 / static_cast<int>(sizeof(v[0])) : i; };
  if constexpr (sizeof(v[0]) == 8) return __builtin_shufflevector(v, w, from(0), from(1), from(2), from(3));
  else return __builtin_shufflevector(v, w, from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7));
}
// f(0), f(1) .. f(count - 1) with the index known to the compiler.
template <int count, class F>
PYACCEL_INLINE void unrolled(const F& f) {
  if constexpr (count > 0) {
    unrolled<count - 1>(f);
    f(std::integral_constant<int, count - 1>{});
  }
}

// m = m^-1 for a positive definite block, a row a vector: Gauss-Jordan in place, no pivot search needed.
template <int size, class V>
PYACCEL_INLINE void invert_rows(V (&m)[size]) {
  typedef std::remove_cvref_t<decltype(m[0][0])> S;
  unrolled<size>([&](auto pivot) PYACCEL_LAMBDA_INLINE {
    constexpr int p = pivot.value;
    const V inverse = (S(1) / m[p][p]) - V{};
    m[p] = with_lane<p>(m[p] * inverse, inverse);
    unrolled<size>([&](auto other) PYACCEL_LAMBDA_INLINE {
      constexpr int k = other.value;
      if constexpr (k != p) m[k] = fused(-all_lanes<p>(m[k]), m[p], with_lane<p>(m[k], V{}));
    });
  });
}

template <int size, class V>
PYACCEL_INLINE void add_identity(V (&m)[size]) {
  typedef std::remove_cvref_t<decltype(m[0][0])> S;
  unrolled<size>([&](auto row) PYACCEL_LAMBDA_INLINE { m[row.value] = with_lane<row.value>(m[row.value], m[row.value] + S(1)); });
}

// sum +- a b, 4 x 4.
template <int sign>
PYACCEL_INLINE void multiply4(const Quad (&a)[4], const Quad (&b)[4], Quad (&sum)[4]) {
  unrolled<4>([&](auto row) PYACCEL_LAMBDA_INLINE {
    constexpr int r = row.value;
    unrolled<4>([&](auto depth) PYACCEL_LAMBDA_INLINE {
      const Quad f = all_lanes<depth.value>(a[r]);
      sum[r] = fused(sign > 0 ? f : -f, b[depth.value], sum[r]);
    });
  });
}
PYACCEL_INLINE void transpose4(const Quad (&r)[4], Quad (&to)[4]) {
  const Quad s0 = __builtin_shufflevector(r[0], r[2], 0, 1, 4, 5), s1 = __builtin_shufflevector(r[1], r[3], 0, 1, 4, 5);
  const Quad s2 = __builtin_shufflevector(r[0], r[2], 2, 3, 6, 7), s3 = __builtin_shufflevector(r[1], r[3], 2, 3, 6, 7);
  to[0] = __builtin_shufflevector(s0, s1, 0, 4, 2, 6);
  to[1] = __builtin_shufflevector(s0, s1, 1, 5, 3, 7);
  to[2] = __builtin_shufflevector(s2, s3, 0, 4, 2, 6);
  to[3] = __builtin_shufflevector(s2, s3, 1, 5, 3, 7);
}

PYACCEL_INLINE void transpose8(const double* from, int64_t ldf, double* to, int64_t ldt) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const int i0 = 4 * (part / 2), j0 = 4 * (part % 2);
    Quad r[4], t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const LooseQuad*>(from + (i0 + i) * ldf + j0);
    transpose4(r, t);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) *reinterpret_cast<LooseQuad*>(to + (j0 + i) * ldt + i0) = t[i];
  }
}

// g = (I + r * a)^-1 for a symmetric positive semidefinite 8 x 8 block. One register a row in float32; in float64 by
// 4 x 4 blocks [P Q; Q^T T], so that each stays in registers too: with C = P^-1 Q and the Schur complement T' = T - Q^T C,
// the inverse is [P^-1 + C T'^-1 C^T, -C T'^-1; its transpose, T'^-1].
PYACCEL_INLINE void invert8(const float* a, int64_t lda, float r, float* g) {
  typedef float Row __attribute__((vector_size(32)));
  typedef float Loose __attribute__((vector_size(32), aligned(4), may_alias));
  Row m[8];
  unrolled<8>([&](auto row) PYACCEL_LAMBDA_INLINE {
    constexpr int p = row.value;
    m[p] = *reinterpret_cast<const Loose*>(a + p * lda) * r;
  });
  add_identity(m);
  invert_rows(m);
  unrolled<8>([&](auto row) PYACCEL_LAMBDA_INLINE { *reinterpret_cast<Loose*>(g + 8 * row.value) = m[row.value]; });
}
PYACCEL_INLINE void invert8(const double* a, int64_t lda, double r, double* g) {
  const auto block = [&](int i, int j, Quad(&to)[4]) PYACCEL_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) to[k] = *reinterpret_cast<const LooseQuad*>(a + (4 * i + k) * lda + 4 * j) * r;
  };
  const auto keep = [&](const Quad(&from)[4], int i, int j) PYACCEL_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) *reinterpret_cast<LooseQuad*>(g + 8 * (4 * i + k) + 4 * j) = from[k];
  };
  Quad first[4], corner[4], crossed[4], across[4] = {}, last[4];
  block(0, 0, first);
  add_identity(first);
  invert_rows(first);
  block(0, 1, corner);
  multiply4<1>(first, corner, across);  // C
  transpose4(corner, crossed);
  block(1, 1, last);
  add_identity(last);
  multiply4<-1>(crossed, across, last);
  invert_rows(last);
  keep(last, 1, 1);
  Quad off[4] = {};
  multiply4<-1>(across, last, off);  // -C T'^-1
  keep(off, 0, 1);
  transpose4(across, crossed);
  multiply4<-1>(off, crossed, first);
  keep(first, 0, 0);
  transpose4(off, crossed);
  keep(crossed, 1, 0);
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
      for (int q = 0; q < parts; ++q) sum[q] = fused(g[8 * p + k] - Part{}, Part(*reinterpret_cast<const Loose*>(a + k * lda + q * wide)), sum[q]);
#pragma GCC unroll 2
    for (int q = 0; q < parts; ++q) *reinterpret_cast<Loose*>(g + 8 * p + q * wide) = sum[q] * -r;
  }
}

}  // namespace pyaccel::crossbar::PYACCEL_ISA
