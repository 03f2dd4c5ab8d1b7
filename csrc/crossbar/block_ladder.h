// The ladder of one tile for a block of threads, written as phases: block.each(count, f) runs f(0) .. f(count - 1), spread over
// the threads, and ends with a barrier. Within a phase no item reads what another writes, so the order does not matter: the
// CUDA kernel strides over the threads, and a test on the CPU runs every phase in a shuffled order.
//
// Sums in float64 for both dtypes: on data-centre GPUs float64 multiply-adds run at half the float32 rate or better, and the
// plain form is then exact to 1e-12 for any wire (the float32 form of matrix_cpu.cpp would need a second code path).
// Y is kept whole (not its triangle), the right sides beside it: row r of [Y | X], columns 0 .. n + right.
#pragma once
#include "crossbar.h"
#include "row_line.h"

namespace pyaccel::crossbar {

// The tile as the ladder sees it, at least as many rows as columns: see View in ladder_cpu.h, which says the same.
struct TileView {
  int64_t rows, columns, base, down, across;
  Resistances ohm;
  PYACCEL_HD int64_t at(int64_t i, int64_t j) const { return base + i * down + j * across; }
};

inline TileView view_of(const Tiles& t, const Resistances& r) {
  if (t.columns > t.rows)
    return {t.columns, t.rows, t.rows * t.columns - 1, -1, -t.columns, {r.sense, r.wire_col, r.wire_row, r.driver}};
  return {t.rows, t.columns, 0, t.columns, 1, r};
}

constexpr int64_t kPanel = 8, kPatch = 4;  // ports of a panel; an item of the updates is kPatch x kPatch elements

PYACCEL_HD int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory of one tile, in doubles. `fast`: what fits shared memory; `bulk`: global.
struct BlockSizes {
  int64_t n, m, ld;  // padded columns and rows; row distance of [Y | X]
  int64_t fast, bulk;

  // right: right sides beside Y in multiples of m (1 forward, 2 backward)
  BlockSizes(const TileView& v, bool gradient) {
    n = up_to(v.columns, kPanel);
    m = up_to(v.rows, kPatch);
    ld = n + (gradient ? 2 : 1) * m;
    fast = n * ld + 2 * kPanel * ld + 2 * kPanel * kPanel;
    bulk = 5 * v.rows * v.columns;
    if (gradient) bulk += v.rows * n * (n + m) + 3 * n * 2 * m;  // history; fields twice, sources
  }
};

template <class Block, class E>
struct BlockLadder {
  Block& block;
  const TileView& view;
  BlockSizes size;
  double *y, *panel, *update, *inverse;          // fast
  double *g, *own, *coupling, *fall, *drive;     // bulk: [rows, columns] each
  double *history, *fields, *next, *sources;     // bulk, gradient only
  int* fault;

  PYACCEL_HD BlockLadder(Block& b, const TileView& v, const BlockSizes& s, double* fast, double* bulk, int* flag)
      : block(b), view(v), size(s), fault(flag) {
    y = fast;
    panel = y + s.n * s.ld;
    update = panel + kPanel * s.ld;
    inverse = update + kPanel * s.ld;
    const int64_t cells = v.rows * v.columns;
    g = bulk;
    own = g + cells;
    coupling = own + cells;
    fall = coupling + cells;
    drive = fall + cells;
    history = drive + cells;
    fields = history + v.rows * s.n * (s.n + s.m);
    next = fields + s.n * 2 * s.m;
    sources = next + s.n * 2 * s.m;
  }

  PYACCEL_HD double& at(int64_t r, int64_t c) const { return y[r * size.ld + c]; }
  PYACCEL_HD double* kept_y(int64_t step) const { return history + step * size.n * (size.n + size.m); }
  PYACCEL_HD double* kept_x(int64_t step) const { return kept_y(step) + size.n * size.n; }

  // Conductances and the row lines; sets *fault for what is no conductance or too great a load.
  PYACCEL_HD void prepare(const E* tile) const {
    const int64_t n = view.columns;
    block.each(1, [&](int64_t) { *fault = 0; });
    block.each(view.rows, [&](int64_t i) {
      double right = 0;
      for (int64_t j = n - 1; j >= 0; --j) {
        const double cell = static_cast<double>(tile[view.at(i, j)]);
        if (!(cell >= 0) || cell > 1e300) *fault = 1;
        g[i * n + j] = cell;
        own[i * n + j] = right;  // looking right, until the left side is known
        const double x = cell + right, f = crossbar::fall(x, j > 0 ? view.ohm.wire_row : view.ohm.driver);
        fall[i * n + j] = f;
        right = x * f;
      }
      double left = view.ohm.driver, volt = 1;
      for (int64_t j = 0; j < n; ++j) {
        const double cell = g[i * n + j], beyond = own[i * n + j];
        own[i * n + j] = own_admittance(left, cell, beyond);
        coupling[i * n + j] = crossbar::coupling(left, cell, beyond);
        volt *= fall[i * n + j];
        drive[i * n + j] = cell * volt;
        left = left_of_next(left, cell, view.ohm.wire_row);
      }
    });
    block.each(n, [&](int64_t j) {
      double sum = 0;
      for (int64_t i = 0; i < view.rows; ++i) sum += g[i * n + j];
      if (sum * view.ohm.wire_col > kLargestLoad || sum * view.ohm.sense > kLargestLoad) *fault = 1;
    });
  }

  PYACCEL_HD void clear() const {
    block.each(size.n * size.ld, [&](int64_t e) { y[e] = 0; });
  }

  // Row i joins: Y += S_i, column i of X = S_i 1.
  PYACCEL_HD void join(int64_t i) const {
    const int64_t n = view.columns, first = i * n;
    block.each(n, [&](int64_t k) {
      at(k, k) += own[first + k];
      at(k, size.n + i) = drive[first + k];
      double along = fall[first + k];
      for (int64_t c = k - 1; c >= 0; --c) {
        const double s = g[first + k] * coupling[first + c] * along;
        at(k, c) -= s;
        at(c, k) -= s;
        along *= fall[first + c];
      }
    });
  }

  // A resistance of `ohm` in series with every column, over the first `columns` of [Y | X].
  PYACCEL_HD void sweep(double ohm, int64_t columns) const {
    if (ohm == 0) return;
    for (int64_t b = 0; b < size.n; b += kPanel) sweep_panel(ohm, b, up_to(columns, kPatch));
  }

  PYACCEL_HD void sweep_panel(double ohm, int64_t b, int64_t columns) const {
    const int64_t ld = size.ld;
    block.each(kPanel * columns, [&](int64_t e) {
      const int64_t p = e / columns, c = e % columns;
      panel[p * ld + c] = at(b + p, c);
    });
    invert(ohm, b);
    const double* gs = inverse;  // eight pivots, an even number: the result is back in the first buffer
    block.each(columns, [&](int64_t c) {
      double in[kPanel];
      for (int64_t p = 0; p < kPanel; ++p) in[p] = panel[p * ld + c];
      const bool own_columns = c >= b && c < b + kPanel;
      for (int64_t p = 0; p < kPanel; ++p) {
        double h = 0;
        for (int64_t q = 0; q < kPanel; ++q) h = __builtin_fma(gs[p * kPanel + q], in[q], h);
        at(b + p, c) = h;
        update[p * ld + c] = own_columns ? gs[p * kPanel + c - b] : -ohm * h;
      }
    });
    const int64_t across = columns / kPatch, down = size.n / kPatch;
    block.each(across * down, [&](int64_t e) {
      const int64_t r = e / across * kPatch, c = e % across * kPatch;
      if (r >= b && r < b + kPanel) return;
      const bool own_columns = c >= b && c < b + kPanel;  // they become Y_rb G: the old value is not part of it
      double sum[kPatch][kPatch];
      for (int64_t i = 0; i < kPatch; ++i)
        for (int64_t j = 0; j < kPatch; ++j) sum[i][j] = own_columns ? 0 : at(r + i, c + j);
      for (int64_t p = 0; p < kPanel; ++p)
        for (int64_t i = 0; i < kPatch; ++i)
          for (int64_t j = 0; j < kPatch; ++j)
            sum[i][j] = __builtin_fma(panel[p * ld + r + i], update[p * ld + c + j], sum[i][j]);  // Y is symmetric: Y_rb from the panel
      for (int64_t i = 0; i < kPatch; ++i)
        for (int64_t j = 0; j < kPatch; ++j) at(r + i, c + j) = sum[i][j];
    });
  }

  // inverse = (I + ohm Y_bb)^-1 by Gauss-Jordan, a phase a pivot, between two buffers.
  PYACCEL_HD void invert(double ohm, int64_t b) const {
    block.each(kPanel * kPanel, [&](int64_t e) {
      const int64_t i = e / kPanel, j = e % kPanel;
      inverse[e] = ohm * panel[i * size.ld + b + j] + (i == j ? 1.0 : 0.0);
    });
    for (int64_t p = 0; p < kPanel; ++p) {
      const double* from = inverse + (p % 2) * kPanel * kPanel;
      double* to = inverse + (1 - p % 2) * kPanel * kPanel;
      block.each(kPanel * kPanel, [&](int64_t e) {
        const int64_t i = e / kPanel, j = e % kPanel;
        const double pivot = 1 / from[p * kPanel + p];
        const double scaled = (j == p ? 1.0 : from[p * kPanel + j]) * pivot;
        to[e] = i == p ? scaled : __builtin_fma(-from[i * kPanel + p], scaled, j == p ? 0.0 : from[e]);
      });
    }
  }

  // Up to and including row `rows - 1`; `keep`: Y_swept and J of every step into the history.
  PYACCEL_HD void climb_down(bool keep) const {
    clear();
    for (int64_t i = 0; i < view.rows; ++i) {
      join(i);
      if (i + 1 == view.rows || view.ohm.wire_col == 0) continue;
      if (keep)
        block.each(size.n * size.m, [&](int64_t e) { kept_x(i)[e] = at(e / size.m, size.n + e % size.m); });
      sweep(view.ohm.wire_col, size.n + i + 1);
      if (keep) block.each(size.n * size.n, [&](int64_t e) { kept_y(i)[e] = at(e / size.n, e % size.n); });
    }
  }

  PYACCEL_HD void fill_nan(E* out) const {
    block.each(view.rows * view.columns, [&](int64_t e) { out[e] = static_cast<E>(__builtin_nan("")); });
  }

  PYACCEL_HD void solve(const E* tile, E* effective) const {
    prepare(tile);
    if (*fault) return fill_nan(effective);
    climb_down(false);
    sweep(view.ohm.sense, size.n + view.rows);
    block.each(view.rows * view.columns, [&](int64_t e) {
      const int64_t i = e / view.columns, j = e % view.columns;
      effective[view.at(i, j)] = static_cast<E>(at(j, size.n + i));
    });
  }

  // dL/dg from dL/dG': see MatrixGradient. Fields [W | U], 2m columns, ld 2m.
  PYACCEL_HD void gradient(const E* tile, const E* grad_effective, E* grad_conductance) const {
    prepare(tile);
    if (*fault) return fill_nan(grad_conductance);
    const int64_t n = size.n, m = size.m, wide = 2 * m;
    climb_down(true);
    block.each(n * m, [&](int64_t e) {
      const int64_t j = e / m, i = e % m;
      const bool real = j < view.columns && i < view.rows;
      at(j, n + m + i) = real ? static_cast<double>(grad_effective[view.at(i, j)]) : 0.0;
    });
    sweep(view.ohm.sense, n + wide);
    block.each(n * wide, [&](int64_t e) {
      const int64_t j = e / wide, l = e % wide;
      fields[e] = at(j, n + l) * (l < m ? view.ohm.sense : 1.0);
    });
    double *here = fields, *there = next;
    for (int64_t i = view.rows - 1; i >= 0; --i) {
      cells_of_row(i, here, grad_conductance);
      if (i == 0 || view.ohm.wire_col == 0) continue;
      climb_up(i - 1, here, there);
      double* swap = here;
      here = there;
      there = swap;
    }
  }

  // there = (I - R Y_swept)(here + [R J | 0]).
  PYACCEL_HD void climb_up(int64_t step, double* here, double* there) const {
    const int64_t n = size.n, m = size.m, wide = 2 * m;
    const double ohm = view.ohm.wire_col;
    block.each(n * m, [&](int64_t e) { here[e / m * wide + e % m] += ohm * kept_x(step)[e]; });
    const double* swept = kept_y(step);
    const int64_t across = wide / kPatch;
    block.each(n / kPatch * across, [&](int64_t e) {
      const int64_t r = e / across * kPatch, c = e % across * kPatch;
      double sum[kPatch][kPatch] = {};
      for (int64_t k = 0; k < n; ++k)
        for (int64_t i = 0; i < kPatch; ++i)
          for (int64_t j = 0; j < kPatch; ++j) sum[i][j] = __builtin_fma(swept[k * n + r + i], here[k * wide + c + j], sum[i][j]);
      for (int64_t i = 0; i < kPatch; ++i)
        for (int64_t j = 0; j < kPatch; ++j)
          there[(r + i) * wide + c + j] = here[(r + i) * wide + c + j] - ohm * sum[i][j];
    });
  }

  // The voltages across the devices of row i in both fields: two sweeps along the row for every input, then their products
  // summed over the inputs in a fixed order.
  PYACCEL_HD void cells_of_row(int64_t i, const double* here, E* grad_conductance) const {
    const int64_t n = view.columns, m = size.m, wide = 2 * m, first = i * n;
    block.each(view.rows, [&](int64_t l) {
      double a = 0, b = 0;
      for (int64_t j = n - 1; j >= 0; --j) {
        a = __builtin_fma(g[first + j], here[j * wide + l], a);
        b = __builtin_fma(g[first + j], here[j * wide + m + l], b);
        sources[j * wide + l] = a;
        sources[j * wide + m + l] = b;
        a *= fall[first + j];
        b *= fall[first + j];
      }
      a = l == i ? 1 : 0;
      b = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double r = j > 0 ? view.ohm.wire_row : view.ohm.driver;
        a = __builtin_fma(sources[j * wide + l], r, a) * fall[first + j];
        b = __builtin_fma(sources[j * wide + m + l], r, b) * fall[first + j];
        sources[j * wide + l] = (here[j * wide + l] - a) * (b - here[j * wide + m + l]);
      }
    });
    block.each(n, [&](int64_t j) {
      double sum = 0;
      for (int64_t l = 0; l < view.rows; ++l) sum += sources[j * wide + l];
      grad_conductance[view.at(i, j)] = static_cast<E>(sum);
    });
  }
};

}  // namespace pyaccel::crossbar
