// Series resistance on every port of an admittance matrix: Y becomes (I + R Y)^-1 Y, and right sides X become
// (I + R Y)^-1 X. Exact for any R, eight ports (a panel) at a time; R = 0 changes nothing.
//
// With panel b, Y_b its rows, G = (I + R Y_bb)^-1, H = G Y_b:
//   the other rows:   Y_r -= R Y_rb H     (their panel columns become Y_rb G, never computed as a difference)
//   the panel's rows: Y_b  = H;  X_b = G X_b, and X_r -= R Y_rb (G X_b)
// `light`: R |Y| is well below 1, so G is close to I. H is then Y_b - K Y_b with K = I - G = R G Y_bb, and the panel columns
// take the same small correction as all others: every element of Y is rounded at its own size, once for two panels.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "product_cpu.h"

namespace pyaccel::crossbar::PYACCEL_ISA {

// A matrix in scratch memory: rows `ld` apart.
template <class S>
struct Block {
  S* at = nullptr;
  int64_t ld = 0;
  S* row(int64_t r) const { return at + r * ld; }
};

template <class S>
constexpr int64_t kPad = std::max<int64_t>(8, Simd<S>::lanes);
template <class S>
PYACCEL_INLINE int64_t padded(int64_t n) {
  return (n + kPad<S> - 1) / kPad<S> * kPad<S>;
}
// Row distance: rows 512 bytes apart would crowd into a few sets of the L1 cache.
template <class S>
PYACCEL_INLINE int64_t distance(int64_t n) {
  return n * static_cast<int64_t>(sizeof(S)) % 512 == 0 ? n + 64 / static_cast<int64_t>(sizeof(S)) : n;
}

// Working memory of one thread: two panels of Y, the same times -R G, a panel of X, a strip of corrections.
template <class S>
struct Work {
  Block<S> panel, update;  // 16 rows each
  Block<S> right;          // 8 rows
  S* strip = nullptr;             // n x (kWidest vectors)
};

// to[r..r+3][0..) += (columns r..r+3 of a)^T * b: products summed from zero, added once (one rounding at the size of `to`).
template <int depth, class S>
PYACCEL_INLINE void add_product(S* to, int64_t ld, const S* a, int64_t lda, const S* b, int64_t ldb, int64_t vectors) {
  constexpr int lanes = Simd<S>::lanes;
  in_blocks(vectors, [&](auto width, int64_t first) PYACCEL_LAMBDA_INLINE {
    constexpr int w = width.value;
    Vec<S> acc[kRows][w] = {};
    multiply_add_panel<w, depth>(acc, a, 1, lda, b + first * lanes, ldb);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < w; ++v) {
        S* place = to + r * ld + (first + v) * lanes;
        store_vec<false>(place, load_vec(place) + acc[r][v]);
      }
  });
}

// Y is symmetric and kept by blocks: of row r only the first valid<S>(r) columns are valid, the rest is undefined.
template <class S>
constexpr int64_t kBlock = Simd<S>::lanes <= kRows ? kRows : 8;
template <class S>
constexpr int64_t valid(int64_t r) {
  return (r / kBlock<S> + 1) * kBlock<S>;
}
template <class S>
constexpr int64_t vectors(int64_t r) {  // that hold them
  return (valid<S>(r) + Simd<S>::lanes - 1) / Simd<S>::lanes;
}

// panel = rows b .. b+7 of Y, whole: what is not valid comes from below the diagonal.
template <class S>
PYACCEL_INLINE void take_panel(const Block<S>& y, int64_t n, int64_t b, const Block<S>& panel) {
  for (int64_t p = 0; p < 8; ++p) std::memcpy(panel.row(p), y.row(b + p), static_cast<size_t>(b + 8) * sizeof(S));
  if constexpr (kBlock<S> == 4)
    for (int64_t p = 0; p < 4; ++p)
      for (int64_t c = 4; c < 8; ++c) panel.row(p)[b + c] = panel.row(c)[b + p];
  for (int64_t r = b + 8; r < n; r += 8) transpose8(y.row(r) + b, y.ld, panel.at + r, panel.ld);
}

// From the panel: Y's rows b .. b+7 become H, and update = -R H. g: G, or -K where light.
template <bool light, class S>
PYACCEL_INLINE void reduce_panel(const Block<S>& y, int64_t n, S ohm, int64_t b, const Block<S>& panel, const Block<S>& update, S* g) {
  constexpr int lanes = Simd<S>::lanes;
  invert8(panel.at + b, panel.ld, ohm, g);
  if constexpr (light) less_identity(g, panel.at + b, panel.ld, ohm);
  for (int64_t half = 0; half < 8; half += kRows) {
    S* h = y.row(b + half);  // right of the diagonal block it is not valid, but cheaper written than not
    in_blocks(n / lanes, [&](auto width, int64_t first) PYACCEL_LAMBDA_INLINE {
      constexpr int w = width.value;
      Vec<S> acc[kRows][w] = {};
      multiply_add_panel<w, 8>(acc, g + 8 * half, 8, 1, panel.at + first * lanes, panel.ld);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < w; ++v) {
          const int64_t column = (first + v) * lanes;
          if constexpr (light) acc[r][v] += load_vec(panel.row(half + r) + column);
          store_vec<false>(h + r * y.ld + column, acc[r][v]);
          store_vec<false>(update.row(half + r) + column, acc[r][v] * -ohm);
        }
    });
  }
}

// `columns` of x: a multiple of the lanes.
template <class S>
void sweep(const Block<S>& y, int64_t n, S ohm, const Block<S>& x, int64_t columns, const Work<S>& work) {
  constexpr int lanes = Simd<S>::lanes;
  const Block<S> &panel = work.panel, &update = work.update, &right = work.right;
  S g[64];
  for (int64_t b = 0; b < n; b += 8) {
    take_panel(y, n, b, panel);
    reduce_panel<false>(y, n, ohm, b, panel, update, g);
    for (int64_t p = 0; p < 8; ++p) std::memcpy(update.row(p) + b, g + 8 * p, 8 * sizeof(S));
    for (int64_t r = b + 8; r < n; ++r) std::memset(y.row(r) + b, 0, 8 * sizeof(S));
    for (int64_t half = 0; half < 8; half += kRows) {
      in_blocks(columns / lanes, [&](auto width, int64_t first) PYACCEL_LAMBDA_INLINE {
        constexpr int w = width.value;
        Vec<S> acc[kRows][w] = {};
        multiply_add_panel<w, 8>(acc, g + 8 * half, 8, 1, x.row(b) + first * lanes, x.ld);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < w; ++v) store_vec<false>(right.row(half + r) + (first + v) * lanes, acc[r][v]);
      });
    }
    for (int64_t p = 0; p < 8; ++p) {
      std::memcpy(x.row(b + p), right.row(p), static_cast<size_t>(columns) * sizeof(S));
      for (int64_t c = 0; c < columns; c += lanes) store_vec<false>(right.row(p) + c, load_vec(right.row(p) + c) * -ohm);
    }
    for (int64_t r = 0; r < n; r += kRows) {
      if (r == b) r += 8;
      if (r >= n) break;
      add_product<8>(y.row(r), y.ld, panel.at + r, panel.ld, update.at, update.ld, vectors<S>(r));
      add_product<8>(x.row(r), x.ld, panel.at + r, panel.ld, right.at, right.ld, columns / lanes);
    }
  }
}

// Y alone, for light loads: panels by twos, so that every element of Y is read and written once for sixteen ports. The
// second panel meets the first before it is reduced, and the first one's rows meet the second.
template <class S>
void sweep_light(const Block<S>& y, int64_t n, S ohm, const Work<S>& work) {
  const Block<S> &panel = work.panel, &update = work.update;
  const Block<S> second{panel.row(8), panel.ld}, change{update.row(8), update.ld};
  S g[64];
  for (int64_t b = 0; b < n; b += 16) {
    take_panel(y, n, b, panel);
    reduce_panel<true>(y, n, ohm, b, panel, update, g);
    if (b + 8 == n) {
      for (int64_t r = 0; r < b; r += kRows) add_product<8>(y.row(r), y.ld, panel.at + r, panel.ld, update.at, update.ld, vectors<S>(r));
      break;
    }
    take_panel(y, n, b + 8, second);
    for (int64_t p = 0; p < 8; p += kRows)
      add_product<8>(second.row(p), second.ld, panel.at + b + 8 + p, panel.ld, update.at, update.ld, n / Simd<S>::lanes);
    reduce_panel<true>(y, n, ohm, b + 8, second, change, g);
    for (int64_t r = b; r < b + 8; r += kRows)
      add_product<8>(y.row(r), y.ld, second.at + r, second.ld, change.at, change.ld, vectors<S>(r));
    for (int64_t r = 0; r < n; r += kRows) {
      if (r == b) r += 16;
      if (r >= n) break;
      add_product<16>(y.row(r), y.ld, panel.at + r, panel.ld, update.at, update.ld, vectors<S>(r));
    }
  }
}

// x -= R * y * x with the swept y: (I + R Y)^-1 x, for loads R |Y| well below 1, where the correction is small and
// nothing cancels. The whole correction is summed from zero: one rounding at the size of x.
template <class S>
void apply(const Block<S>& y, int64_t n, S ohm, const Block<S>& x, int64_t columns, const Work<S>& work) {
  constexpr int lanes = Simd<S>::lanes;
  in_blocks((columns + lanes - 1) / lanes, [&](auto width, int64_t first) PYACCEL_LAMBDA_INLINE {
    constexpr int w = width.value;
    S* strip = work.strip;
    S* from = x.at + first * lanes;
    for (int64_t r = 0; r < n; r += kRows) {
      Vec<S> acc[kRows][w] = {};
      const int64_t split = valid<S>(r);  // left of it y's own rows, right of it the transposed ones
      multiply_add<w>(acc, y.row(r), y.ld, int64_t{1}, from, x.ld, split);
      multiply_add<w>(acc, y.row(split) + r, int64_t{1}, y.ld, from + split * x.ld, x.ld, n - split);
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < w; ++v) store_vec<false>(strip + ((r + k) * w + v) * lanes, acc[k][v]);
    }
    for (int64_t r = 0; r < n; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < w; ++v) {
        S* place = from + r * x.ld + v * lanes;
        store_vec<false>(place, load_vec(place) - load_vec(strip + (r * w + v) * lanes) * ohm);
      }
  });
}

}  // namespace pyaccel::crossbar::PYACCEL_ISA
