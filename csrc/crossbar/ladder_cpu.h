// One tile on its way through the ladder: memory, loading, the admittance of a row of devices.
#pragma once
#include <cmath>

#include "../core/scratch.h"
#include "crossbar.h"
#include "row_line.h"
#include "sweep_cpu.h"

namespace pyaccel::crossbar::PYACCEL_ISA {

typedef Vec<double> Wide;
constexpr int kWide = Simd<double>::lanes;

// The tile as the ladder sees it: at least as many rows as columns. A wider tile is read along both axes backwards, with
// driver and sense, row and column wires exchanged: F(flip(G)^T, Rs, Rcol, Rrow, Rd) = flip(F(G, Rd, Rrow, Rcol, Rs))^T.
struct View {
  int64_t rows, columns, base, down, across;  // element (i, j) is at base + i*down + j*across
  Resistances ohm;
  bool flipped;

  View(const Tiles& t, const Resistances& r) {
    flipped = t.columns > t.rows;
    rows = flipped ? t.columns : t.rows;
    columns = flipped ? t.rows : t.columns;
    base = flipped ? t.rows * t.columns - 1 : 0;
    down = flipped ? -1 : t.columns;
    across = flipped ? -t.columns : 1;
    ohm = flipped ? Resistances{r.sense, r.wire_col, r.wire_row, r.driver} : r;
  }
  int64_t at(int64_t i, int64_t j) const { return base + i * down + j * across; }
};

// What is known of kWide rows at a time, for every column j: index j, lanes are rows.
struct RowLines {
  Wide* g;         // conductance
  Wide* own;       // S[j, j]
  Wide* coupling;  // see row_line.h
  Wide* fall;      // voltage at node j over that at node j - 1 (at the driver for j = 0) when only the drive acts
  Wide* drive;     // Norton current into column j for one volt on the row
  int64_t block = -1;
  static constexpr int64_t arrays = 5;
};

template <class E>
void prepare(const View& view, const E* tile, int64_t first, const RowLines& line) {
  const int64_t n = view.columns;
  const double wire = view.ohm.wire_row, driver = view.ohm.driver;
  for (int64_t j = 0; j < n; ++j) {
    Wide g{};
    for (int64_t l = 0; l < std::min<int64_t>(kWide, view.rows - first); ++l)
      g[l] = static_cast<double>(tile[view.at(first + l, j)]);
    line.g[j] = g;
  }
  Wide right{};
  for (int64_t j = n - 1; j >= 0; --j) {  // `own` keeps the admittance looking right until the left side is known
    line.own[j] = right;
    const Wide x = line.g[j] + right;
    line.fall[j] = fall(x, j > 0 ? wire : driver);
    right = x * line.fall[j];
  }
  Wide left = Wide{} + driver, volt = Wide{} + 1.0;
  for (int64_t j = 0; j < n; ++j) {
    const Wide g = line.g[j], beyond = line.own[j];
    line.own[j] = own_admittance(left, g, beyond);
    line.coupling[j] = coupling(left, g, beyond);
    volt *= line.fall[j];
    line.drive[j] = g * volt;
    left = left_of_next(left, g, wire);
  }
}

// y += S_i, and column i of x := S_i 1. `v`: n doubles (padded), the voltages of the row for one volt on each column.
template <class S>
void add_row(const View& view, const RowLines& line, int64_t i, const Block<S>& y, const Block<S>& x, double* v) {
  typedef S Narrow __attribute__((vector_size(sizeof(S) * kWide)));
  typedef S Loose __attribute__((vector_size(sizeof(S) * kWide), aligned(alignof(S)), may_alias));
  const int64_t n = view.columns, lane = i % kWide;
  std::memset(v, 0, static_cast<size_t>(padded<S>(n)) * sizeof(double));
  for (int64_t k = 0; k < n; ++k) {
    const double g = line.g[k][lane];
    S* row = y.row(k);
    if (k > 0) {
      const double through = line.fall[k][lane];
      v[k - 1] = line.coupling[k - 1][lane];
      for (int64_t c = 0; c < k; c += kWide) {
        const Wide moved = load_vec(v + c) * through;
        store_vec<false>(v + c, moved);
        Loose* to = reinterpret_cast<Loose*>(row + c);
        *to = *to - __builtin_convertvector(moved * g, Narrow);
      }
    }
    row[k] += static_cast<S>(line.own[k][lane]);
    for (int64_t c = k / kBlock<S> * kBlock<S>; c < k; ++c) y.row(c)[k] = row[c];  // the diagonal block is kept whole
    x.row(k)[i] = static_cast<S>(line.drive[k][lane]);
  }
}

// Pieces of one thread's scratch memory, cut off one after another.
struct Carver {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

template <class S>
struct Ladder {
  int64_t n;  // columns, padded
  Block<S> y, x;
  Work<S> work;
  RowLines line;
  double* v;

  // Working memory for sweeps with right sides of `copies` matrices of one column a row.
  Ladder(const View& view, int64_t copies, Carver& space) {
    const int64_t right = copies * padded<S>(view.rows);
    n = padded<S>(view.columns);
    y = {nullptr, distance<S>(n)};
    x = {nullptr, distance<S>(padded<S>(view.rows))};
    y.at = space.take<S>(n * y.ld);
    x.at = space.take<S>(n * x.ld);
    work.panel = {space.take<S>(16 * y.ld), y.ld};
    work.update = {space.take<S>(16 * y.ld), y.ld};
    work.right = {space.take<S>(8 * distance<S>(right)), distance<S>(right)};
    work.strip = space.take<S>(n * kWidest * Simd<S>::lanes);
    line.g = space.take<Wide>(n);
    line.own = space.take<Wide>(n);
    line.coupling = space.take<Wide>(n);
    line.fall = space.take<Wide>(n);
    line.drive = space.take<Wide>(n);
    v = space.take<double>(n + kWide);
  }
  static int64_t bytes(const View& view, int64_t copies) {
    const int64_t n = padded<S>(view.columns), right = copies * padded<S>(view.rows), lanes = Simd<S>::lanes;
    return static_cast<int64_t>(sizeof(S)) * ((n + 16) * (n + 16) + (n + 8) * (right + 16) + 32 * (n + 16) + n * kWidest * lanes) +
           static_cast<int64_t>(sizeof(Wide)) * RowLines::arrays * n + 8 * (n + kWide) + 64 * 16;
  }

  void reset() {
    std::memset(y.at, 0, static_cast<size_t>(n * y.ld) * sizeof(S));
    std::memset(x.at, 0, static_cast<size_t>(n * x.ld) * sizeof(S));
  }
  // Row i joins: the ladder's state is then Y and J (columns 0 .. i of x) of rows 0 .. i.
  template <class E>
  void join(const View& view, const E* tile, int64_t i) {
    lines_of(view, tile, i);
    add_row(view, line, i, y, x, v);
  }
  template <class E>
  void lines_of(const View& view, const E* tile, int64_t i) {
    const int64_t block = i / kWide;
    if (line.block == block) return;
    prepare(view, tile, block * kWide, line);
    line.block = block;
  }
  // One segment of every column wire, over the first `filled` columns of x.
  void segment(S ohm, bool light, int64_t filled) {
    if (ohm == S(0)) return;
    constexpr int64_t lanes = Simd<S>::lanes;
    if (light) {
      sweep_light(y, n, ohm, work);
      apply(y, n, ohm, x, filled, work);
    } else {
      sweep(y, n, ohm, x, (filled + lanes - 1) / lanes * lanes, work);
    }
  }
};

// How hard the wires and the sense resistors are loaded by a tile: resistance times an upper bound of |Y|, the largest
// sum of a column. Also finds what is no conductance.
struct Load {
  double wire = 0, sense = 0;
  Fault fault;
};

template <class E>
Load load_of(const View& view, const E* tile, int64_t index, int64_t columns) {
  Load load;
  double largest = 0;
  for (int64_t j = 0; j < view.columns; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < view.rows; ++i) {
      const double g = static_cast<double>(tile[view.at(i, j)]);
      if (!(g >= 0) || std::isinf(g)) {
        const int64_t place = view.at(i, j);
        load.fault = {Fault::conductance, index, place / columns, place % columns, g};
        return load;
      }
      sum += g;
    }
    largest = std::max(largest, sum);
  }
  load.wire = view.ohm.wire_col * largest;
  load.sense = view.ohm.sense * largest;
  if (std::max(load.wire, load.sense) > kLargestLoad)
    load.fault = {Fault::load, index, 0, 0, std::max(load.wire, load.sense)};
  return load;
}

// Below this the correction of one wire segment is small beside what it corrects.
constexpr double kLightWire = 0.25;
// Float32 sums keep the stated accuracy up to these; beyond, a float32 tile is summed in float64.
constexpr double kFloatSense = 16;

}  // namespace pyaccel::crossbar::PYACCEL_ISA
