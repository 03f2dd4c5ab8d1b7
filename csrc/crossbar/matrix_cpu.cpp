// The effective conductance matrix of linear crossbar tiles, and its gradient, on the CPU (contract: crossbar.h).
//
// Ladder (2008.11298; docs/crossbar.md derives it): rows join one by one at the top of the columns. Y is the admittance of
// the rows so far seen from the column wires, J their Norton currents for one volt on each row:
//   Y += S_i, J[:, i] = S_i 1;   then one wire segment:  Y <- (I + R Y)^-1 Y,  J <- (I + R Y)^-1 J;   at the end R_sense.
// Floor: M (N^3 + N^2 M) / 2 multiply-adds a tile, 16.8 M at 64 x 64: 0.31 ms at 16 float32 multiply-adds a cycle, 3.4 GHz.
// Versions:
// 1. Y swept by panels of eight ports, lower triangle only, J by the same rank-8 updates: exact for any wire, kept for
//    heavily loaded wires, where it only adds positive terms.
// 2. Lightly loaded wires (R * column sum <= 1/4; any real crossbar): Y swept alone, then J -= R Y_swept J, one product of
//    full depth: fewer loads a multiply-add, and J is rounded once a row instead of eight times.
// 3. Light sweeps take panels by twos, so Y is read and written half as often; float64 inverts a panel by 4 x 4 blocks in
//    registers and keeps valid columns by fours: 0.94 of the time of 2 at 64 x 64 (float32: 0.97).
// Float32 sums only on light wires; elsewhere float32 tiles are summed in float64.
// Gradient: forward with every Y_swept and J kept (or every block recomputed from its first state), then two fields climb
// back through the same product: no inversion, about three times the forward.
#include <mutex>

#include "../core/parallel.h"
#include "kernels_cpu.h"
#include "ladder_cpu.h"

namespace pyaccel::crossbar::PYACCEL_ISA {
namespace {

// Results underflow where nothing flows: denormals would cost a hundred cycles each.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushToZero() {}
#endif
};

template <class E, class S>
void solve(const View& view, const E* tile, E* effective, bool light) {
  const int64_t m = view.rows, bytes = Ladder<S>::bytes(view, 1);
  Carver space{static_cast<char*>(scratch(0, static_cast<size_t>(bytes)))};
  Ladder<S> ladder(view, 1, space);
  ladder.reset();
  for (int64_t i = 0; i < m; ++i) {
    ladder.join(view, tile, i);
    if (i + 1 < m) ladder.segment(static_cast<S>(view.ohm.wire_col), light, i + 1);
  }
  ladder.segment(static_cast<S>(view.ohm.sense), false, m);
  for (int64_t j = 0; j < view.columns; ++j)
    for (int64_t i = 0; i < m; ++i) effective[view.at(i, j)] = static_cast<E>(ladder.x.row(j)[i]);
}

// dL/dg of one tile. `fields` holds W (columns 0 .. half) and U (columns half .. ) of the row under treatment.
template <class E, class S>
class Gradient {
 public:
  Gradient(const View& view, const E* tile, bool light, int64_t history_bytes) : view_(view), tile_(tile), light_(light) {
    m_ = view.rows;
    const int64_t n = padded<S>(view.columns), lanes = Simd<S>::lanes;
    half_ = padded<S>(m_);
    y_size_ = n * distance<S>(n);
    state_ = y_size_ + n * half_;
    const int64_t scalar = static_cast<int64_t>(sizeof(S)), steps = std::max<int64_t>(1, m_ - 1);
    every_ = steps;
    if (steps * state_ * scalar > history_bytes) every_ = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(steps))));
    const int64_t blocks = (steps + every_ - 1) / every_;
    const int64_t own = (blocks + every_) * state_ + n * distance<S>(2 * half_) + n * (lanes + 2 + 2 * kWidest * lanes);
    space_ = {static_cast<char*>(scratch(0, static_cast<size_t>(Ladder<S>::bytes(view, 2) + own * scalar + 8 * 64)))};
    starts_ = space_.take<S>(blocks * state_);
    history_ = space_.take<S>(every_ * state_);
    fields_ = {nullptr, distance<S>(2 * half_)};
    fields_.at = space_.take<S>(n * fields_.ld);
    sums_ = space_.take<S>(n * lanes);
    g_ = space_.take<S>(n);
    fall_ = space_.take<S>(n);
    sources_ = space_.take<S>(2 * n * kWidest * lanes);
  }

  void run(const E* grad_effective, E* grad_conductance) {
    Ladder<S> ladder(view_, 2, space_);
    wire_ = static_cast<S>(view_.ohm.wire_col);
    ladder.reset();
    loaded_ = m_ > 1 ? (m_ - 2) / every_ : 0;  // the block whose history the first pass keeps
    for (int64_t i = 0; i < m_; ++i) advance(ladder, i, true);
    // [J | dL/dG'^T] through the sense resistors: [G'^T | U]; the lowest column nodes are at W = R_sense G'^T.
    std::memset(fields_.at, 0, static_cast<size_t>(ladder.n * fields_.ld) * sizeof(S));
    for (int64_t j = 0; j < view_.columns; ++j) {
      std::memcpy(fields_.row(j), ladder.x.row(j), static_cast<size_t>(half_) * sizeof(S));
      for (int64_t i = 0; i < m_; ++i) fields_.row(j)[half_ + i] = static_cast<S>(grad_effective[view_.at(i, j)]);
    }
    const S sense = static_cast<S>(view_.ohm.sense);
    if (sense != S(0)) sweep(ladder.y, ladder.n, sense, fields_, 2 * half_, ladder.work);
    for (int64_t j = 0; j < view_.columns; ++j)
      for (int64_t i = 0; i < half_; ++i) fields_.row(j)[i] *= sense;
    for (int64_t i = m_ - 1; i >= 0; --i) {
      cells_of_row(ladder, i, grad_conductance);
      if (i > 0 && wire_ != S(0)) climb(ladder, i - 1);
    }
  }

 private:
  S* kept(int64_t step) const { return history_ + step % every_ * state_; }

  // Row i joins, then one segment of wire: step i. Keeps the state before the first row of a block, and Y_swept and J of
  // the steps of the loaded block.
  void advance(Ladder<S>& ladder, int64_t i, bool first_pass) {
    const size_t y_bytes = static_cast<size_t>(y_size_) * sizeof(S);
    if (first_pass && i % every_ == 0 && i + 1 < m_) {
      S* start = starts_ + i / every_ * state_;
      std::memcpy(start, ladder.y.at, y_bytes);
      for (int64_t j = 0; j < ladder.n; ++j)
        std::memcpy(start + y_size_ + j * half_, ladder.x.row(j), static_cast<size_t>(half_) * sizeof(S));
    }
    ladder.join(view_, tile_, i);
    if (i + 1 == m_ || wire_ == S(0)) return;
    const bool keep = i / every_ == loaded_;
    if (keep)
      for (int64_t j = 0; j < ladder.n; ++j)
        std::memcpy(kept(i) + y_size_ + j * half_, ladder.x.row(j), static_cast<size_t>(half_) * sizeof(S));
    ladder.segment(wire_, light_, i + 1);
    if (keep) std::memcpy(kept(i), ladder.y.at, y_bytes);
  }

  void load_block(Ladder<S>& ladder, int64_t block) {
    const S* start = starts_ + block * state_;
    std::memcpy(ladder.y.at, start, static_cast<size_t>(y_size_) * sizeof(S));
    for (int64_t j = 0; j < ladder.n; ++j)
      std::memcpy(ladder.x.row(j), start + y_size_ + j * half_, static_cast<size_t>(half_) * sizeof(S));
    loaded_ = block;
    for (int64_t i = block * every_; i < (block + 1) * every_; ++i) advance(ladder, i, false);
  }

  // From row step + 1 to row `step`: W = Q (W + R J), U = Q U.
  void climb(Ladder<S>& ladder, int64_t step) {
    if (step / every_ != loaded_) load_block(ladder, step / every_);
    constexpr int64_t lanes = Simd<S>::lanes;
    const S* currents = kept(step) + y_size_;
    for (int64_t j = 0; j < view_.columns; ++j)
      for (int64_t l = 0; l <= step; l += lanes) {
        S* w = fields_.row(j) + l;
        store_vec<false>(w, load_vec(w) + load_vec(currents + j * half_ + l) * wire_);
      }
    apply({kept(step), ladder.y.ld}, ladder.n, wire_, fields_, 2 * half_, ladder.work);
  }

  // The voltages across the devices of row i in both fields, from those of the column nodes: two sweeps along the row.
  void cells_of_row(Ladder<S>& ladder, int64_t i, E* grad_conductance) {
    constexpr int lanes = Simd<S>::lanes;
    const int64_t n = view_.columns;
    ladder.lines_of(view_, tile_, i);
    for (int64_t j = 0; j < n; ++j) {
      g_[j] = static_cast<S>(ladder.line.g[j][i % kWide]);
      fall_[j] = static_cast<S>(ladder.line.fall[j][i % kWide]);
    }
    std::memset(sums_, 0, static_cast<size_t>(n * lanes) * sizeof(S));
    const S driver = static_cast<S>(view_.ohm.driver), row_wire = static_cast<S>(view_.ohm.wire_row);
    in_blocks(half_ / lanes, [&](auto width, int64_t first) PYACCEL_LAMBDA_INLINE {
      constexpr int w = width.value;
      Vec<S> a[w] = {}, b[w] = {};
      const S* drive = fields_.at + first * lanes;
      const S* load = drive + half_;
      for (int64_t j = n - 1; j >= 0; --j)  // what flows in from the right of node j, as a Norton source
#pragma GCC unroll 4
        for (int v = 0; v < w; ++v) {
          const Vec<S> sa = load_vec(drive + j * fields_.ld + v * lanes) * g_[j] + a[v];
          const Vec<S> sb = load_vec(load + j * fields_.ld + v * lanes) * g_[j] + b[v];
          store_vec<false>(sources_ + (j * 2 * w + v) * lanes, sa);
          store_vec<false>(sources_ + ((j * 2 + 1) * w + v) * lanes, sb);
          a[v] = sa * fall_[j];
          b[v] = sb * fall_[j];
        }
#pragma GCC unroll 4
      for (int v = 0; v < w; ++v) a[v] = b[v] = Vec<S>{};
      const int64_t place = i - first * lanes;
      alignas(64) S volt[w * lanes] = {};
      if (place >= 0 && place < w * lanes) volt[place] = S(1);
#pragma GCC unroll 4
      for (int v = 0; v < w; ++v) a[v] = load_vec(volt + v * lanes);
      for (int64_t j = 0; j < n; ++j) {
        const S r = j > 0 ? row_wire : driver, f = fall_[j];
        Vec<S> sum = load_vec(sums_ + j * lanes);
#pragma GCC unroll 4
        for (int v = 0; v < w; ++v) {
          a[v] = (a[v] + load_vec(sources_ + (j * 2 * w + v) * lanes) * r) * f;
          b[v] = (b[v] + load_vec(sources_ + ((j * 2 + 1) * w + v) * lanes) * r) * f;
          const Vec<S> across = a[v] - load_vec(drive + j * fields_.ld + v * lanes);
          sum -= across * (b[v] - load_vec(load + j * fields_.ld + v * lanes));
        }
        store_vec<false>(sums_ + j * lanes, sum);
      }
    });
    for (int64_t j = 0; j < n; ++j) grad_conductance[view_.at(i, j)] = static_cast<E>(sum_lanes<S>(load_vec(sums_ + j * lanes)));
  }

  const View& view_;
  const E* tile_;
  bool light_;
  int64_t m_, half_, y_size_, state_, every_, loaded_ = 0;
  S wire_ = 0;
  Carver space_{nullptr};
  S *starts_, *history_, *sums_, *g_, *fall_, *sources_;
  Block<S> fields_;
};

// run(tile index, tile pointer, load) over all tiles; the first fault in order of tiles is what is returned.
template <class E, class F>
Fault over_tiles(const Tiles& tiles, const Resistances& ohm, const void* conductance, const F& run) {
  const View view(tiles, ohm);
  const int64_t size = tiles.rows * tiles.columns;
  const int64_t work = tiles.count * size * (tiles.rows + tiles.columns);  // far more than a thread costs per byte
  Fault found;
  std::mutex mutex;
  parallel_shares(tiles.count, threads_for(work, tiles.count), [&](int64_t begin, int64_t end, int) {
    const FlushToZero flush;
    for (int64_t t = begin; t < end; ++t) {
      const E* tile = static_cast<const E*>(conductance) + t * size;
      const Load load = load_of(view, tile, t, tiles.columns);
      if (load.fault.kind == Fault::none) {
        run(view, t * size, tile, load);
        continue;
      }
      const std::lock_guard<std::mutex> lock(mutex);
      if (found.kind == Fault::none || t < found.tile) found = load.fault;
      return;
    }
  });
  return found;
}

template <class F>
Fault by_type(Dtype dtype, const F& run) {
  return dtype == Dtype::f64 ? run(double{}) : run(float{});
}

bool in_float(const Load& load) { return load.wire <= kLightWire && load.sense <= kFloatSense; }

}  // namespace

Fault matrix(const Matrix& f) {
  return by_type(f.tiles.dtype, [&](auto e) {
    using E = decltype(e);
    return over_tiles<E>(f.tiles, f.ohm, f.conductance, [&](const View& view, int64_t at, const E* tile, const Load& load) {
      E* out = static_cast<E*>(f.effective) + at;
      const bool light = load.wire <= kLightWire;
      if (std::is_same_v<E, float> && in_float(load)) solve<E, E>(view, tile, out, light);
      else solve<E, double>(view, tile, out, light);
    });
  });
}

Fault matrix_gradient(const MatrixGradient& f) {
  return by_type(f.tiles.dtype, [&](auto e) {
    using E = decltype(e);
    return over_tiles<E>(f.tiles, f.ohm, f.conductance, [&](const View& view, int64_t at, const E* tile, const Load& load) {
      const E* from = static_cast<const E*>(f.grad_effective) + at;
      E* to = static_cast<E*>(f.grad_conductance) + at;
      const bool light = load.wire <= kLightWire;
      if (std::is_same_v<E, float> && in_float(load)) Gradient<E, E>(view, tile, light, f.history_bytes).run(from, to);
      else Gradient<E, double>(view, tile, light, f.history_bytes).run(from, to);
    });
  });
}

}  // namespace pyaccel::crossbar::PYACCEL_ISA
