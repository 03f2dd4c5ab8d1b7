// The tiled matrix-vector product of a crossbar with converters, on the CPU (contract: crossbar.h).
//
// Floor: that of a GEMM of the same size, batch * inputs * outputs multiply-adds (twice where two arrays are read apart).
// A piece is one strip of columns (3 vectors) by up to 256 samples. Tile after tile its weights are packed into L1 (rows of a
// [inputs, outputs] matrix are far apart: without packing they crowd into a few cache sets), the partial sums of a
// 4-sample register block are made from zero, get their noise, pass the ADC in registers, and only codes are added up.
#include <algorithm>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "kernels_cpu.h"
#include "normal_cpu.h"
#include "product_cpu.h"

namespace pyaccel::crossbar::PYACCEL_ISA {
namespace {

constexpr int kStrip = 3;             // vectors of a strip
constexpr int64_t kSamples = 256;     // of a piece
constexpr int64_t kAhead = 12;        // rows of weights fetched ahead while packing

// Half to even by the adder: adding 1.5 * 2^23 (2^52) leaves no bits behind the point. NaN stays NaN.
template <class S>
PYACCEL_INLINE Vec<S> code_of(Vec<S> v, Vec<S> inverse, S top) {
  constexpr S shift = sizeof(S) == 4 ? S(12582912.0) : S(6755399441055744.0);
  Vec<S> scaled = v * inverse;
  const Vec<S> high = Vec<S>{} + top;
  scaled = scaled > high ? high : scaled;
  scaled = scaled < -high ? -high : scaled;
  return (scaled + shift) - shift;
}

template <class S>
struct Piece {
  static constexpr int lanes = Simd<S>::lanes, width = kStrip * lanes;
  const Matmul& f;
  int64_t first_sample, samples, first_column, columns;
  S *weights, *tail, *sums;  // [tile, width], [kRows, tile], [samples rounded up, width]
  Vec<S> inverse[kStrip], step[kStrip];

  void pack(const S* plus, const S* minus, int64_t first, int64_t depth) const {
    for (int64_t k = 0; k < depth; ++k) {
      const S* p = plus + (first + k) * f.outputs + first_column;
      const S* m = minus != nullptr ? minus + (first + k) * f.outputs + first_column : nullptr;
      S* to = weights + k * width;
      prefetch_row(p + kAhead * f.outputs);
      if (m != nullptr) prefetch_row(m + kAhead * f.outputs);
      if (columns == width) {
        for (int c = 0; c < width; c += lanes)
          store_vec<false>(to + c, m != nullptr ? load_vec(p + c) - load_vec(m + c) : load_vec(p + c));
      } else {
        for (int64_t c = 0; c < width; ++c) to[c] = c < columns ? (m != nullptr ? p[c] - m[c] : p[c]) : S(0);
      }
    }
  }

  // Rows are far apart: no hardware prefetcher follows. Beyond the matrix it is only a hint.
  static void prefetch_row(const S* p) {
    __builtin_prefetch(p);
    __builtin_prefetch(p + width / 2);
    __builtin_prefetch(p + width - 1);
  }

  void add_noise(Vec<S> (&acc)[kRows][kStrip], int64_t read, int64_t row) const {
    for (int64_t r = 0; r < std::min<int64_t>(kRows, samples - row); ++r) {
      const int64_t index = (read * f.batch + first_sample + row + r) * f.outputs + first_column;
      alignas(64) float draws[kDraws];
      static_assert(kStrip * Simd<float>::lanes + 3 <= kDraws);
      draw_normals(f.seed, static_cast<uint64_t>(index) / 4, f.stream, philox::kReadNoise, draws);
      for (int v = 0; v < kStrip; ++v)
        for (int l = 0; l < lanes; ++l)
          acc[r][v][l] += static_cast<S>(f.read_noise) * static_cast<S>(draws[index % 4 + v * lanes + l]);
    }
  }

  // One array of one tile: all samples, added to (sign) the sums.
  template <bool adc, bool noise>
  void accumulate(int64_t first, int64_t depth, int64_t read, S sign) const {
    const S* x = static_cast<const S*>(f.x) + first_sample * f.inputs + first;
    const S top = static_cast<S>(f.adc.top);
    for (int64_t row = 0; row < samples; row += kRows) {
      const S* a = x + row * f.inputs;
      int64_t distance = f.inputs;
      if (row + kRows > samples) {
        for (int64_t r = 0; r < kRows; ++r)
          for (int64_t k = 0; k < depth; ++k) tail[r * depth + k] = row + r < samples ? a[r * f.inputs + k] : S(0);
        a = tail;
        distance = depth;
      }
      Vec<S> acc[kRows][kStrip] = {};
      multiply_add<kStrip>(acc, a, distance, int64_t{1}, weights, int64_t{width}, depth);
      if constexpr (noise) add_noise(acc, read, row);  // its address taken, acc would leave the registers for all
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kStrip; ++v) {
          S* to = sums + (row + r) * width + v * lanes;
          const Vec<S> value = adc ? code_of(acc[r][v], inverse[v], top) : acc[r][v];
          store_vec<false>(to, load_vec(to) + value * sign);
        }
    }
  }

  void tile(int64_t first, int64_t depth, int64_t read, S sign) const {
    if (f.read_noise != 0) {
      f.adc.top > 0 ? accumulate<true, true>(first, depth, read, sign) : accumulate<false, true>(first, depth, read, sign);
    } else {
      f.adc.top > 0 ? accumulate<true, false>(first, depth, read, sign) : accumulate<false, false>(first, depth, read, sign);
    }
  }

  void run() {
    const S *plus = static_cast<const S*>(f.positive), *minus = static_cast<const S*>(f.negative);
    for (int v = 0; v < kStrip; ++v)
      for (int l = 0; l < lanes; ++l) {
        const int64_t c = f.adc.per_column ? std::min(first_column + v * lanes + l, f.outputs - 1) : 0;
        inverse[v][l] = f.adc.top > 0 ? static_cast<const S*>(f.adc.inverse)[c] : S(1);
        step[v][l] = f.adc.top > 0 ? static_cast<const S*>(f.adc.step)[c] : S(1);
      }
    std::fill(sums, sums + (samples + kRows) * width, S(0));
    int64_t read = 0;
    for (int64_t first = 0; first < f.inputs; first += f.tile) {
      const int64_t depth = std::min(f.tile, f.inputs - first);
      pack(plus, f.apart ? nullptr : minus, first, depth);
      tile(first, depth, read++, S(1));
      if (f.apart) {
        pack(minus, nullptr, first, depth);
        tile(first, depth, read++, S(-1));
      }
    }
    for (int64_t row = 0; row < samples; ++row) {
      S* y = static_cast<S*>(f.y) + (first_sample + row) * f.outputs + first_column;
      for (int64_t c = 0; c < columns; ++c) y[c] = sums[row * width + c] * step[c / lanes][c % lanes];
    }
  }
};

template <class S>
void run(const Matmul& f) {
  constexpr int64_t width = Piece<S>::width;
  const int64_t strips = (f.outputs + width - 1) / width;
  const int64_t depth = std::min(f.tile, f.inputs);
  // Samples of a piece: enough to pay for packing, few enough to give every thread a piece.
  const int64_t wanted = (f.batch * strips / omp_get_max_threads() / std::max<int64_t>(1, strips) + kRows - 1) / kRows * kRows;
  const int64_t share = std::clamp<int64_t>(strips >= omp_get_max_threads() ? kSamples : wanted, 64, kSamples);
  const int64_t chunks = (f.batch + share - 1) / share;
  const int64_t work = f.batch * f.inputs * f.outputs;
  parallel_shares(strips * chunks, threads_for(work, strips * chunks), [&](int64_t begin, int64_t end, int) {
    const size_t floats = static_cast<size_t>(depth * width + kRows * depth + (share + kRows) * width);
    S* space = static_cast<S*>(scratch(0, floats * sizeof(S)));
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t sample = piece % chunks * share, column = piece / chunks * width;
      Piece<S> p{f, sample, std::min(share, f.batch - sample), column, std::min(width, f.outputs - column),
                 space, space + depth * width, space + depth * width + kRows * depth, {}, {}};
      p.run();
    }
  });
}

template <class S>
void convert(const Quantize& f) {
  constexpr int64_t lanes = Simd<S>::lanes;
  const S *x = static_cast<const S*>(f.x), top = static_cast<S>(f.converter.top);
  const S step = *static_cast<const S*>(f.converter.step);
  const Vec<S> inverse = *static_cast<const S*>(f.converter.inverse) - Vec<S>{};
  S* out = static_cast<S*>(f.out);
  const int64_t vectors = (f.count + lanes - 1) / lanes;
  parallel_shares(vectors, threads_for(2 * f.count * static_cast<int64_t>(sizeof(S)), vectors), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * lanes; i < end * lanes; i += lanes) {
      if (i + lanes <= f.count) {
        store_vec<false>(out + i, code_of(load_vec(x + i), inverse, top) * step);
        continue;
      }
      Vec<S> last{};
      for (int64_t l = 0; i + l < f.count; ++l) last[l] = x[i + l];
      last = code_of(last, inverse, top) * step;
      for (int64_t l = 0; i + l < f.count; ++l) out[i + l] = last[l];
    }
  });
}

}  // namespace

void matmul(const Matmul& f) { f.dtype == Dtype::f64 ? run<double>(f) : run<float>(f); }

void quantize(const Quantize& f) { f.dtype == Dtype::f64 ? convert<double>(f) : convert<float>(f); }

void normal(const Normal& f) {
  const int64_t first_block = f.first / 4, blocks = (f.first + f.count + 3) / 4 - first_block, lanes = Simd<float>::lanes;
  const int64_t pieces = (blocks + lanes - 1) / lanes;
  parallel_shares(pieces, threads_for(64 * f.count, pieces), [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      alignas(64) float draws[kDraws];
      const int64_t block = first_block + piece * lanes;
      draw_normals(f.seed, static_cast<uint64_t>(block), f.stream, f.domain, draws);
      const int64_t offset = 4 * block - f.first;  // of draws[0] in out
      for (int64_t i = std::max<int64_t>(0, -offset); i < kDraws && offset + i < f.count; ++i) f.out[offset + i] = draws[i];
    }
  });
}

}  // namespace pyaccel::crossbar::PYACCEL_ISA
