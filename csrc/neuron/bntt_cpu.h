// What a thread of the BNTT kernels works with: the channels in hand, their numbers as the loops read them, and sums
// whose order depends on the shape alone.
#pragma once
#include <algorithm>
#include <cmath>

#include "cells_cpu.h"
#include "neuron.h"

namespace pyaccel::neuron::PYACCEL_ISA {

constexpr int64_t kRowsAFlush = 32;         // float sums are moved to double this often

// Channels [first, first + count) and their place in memory.
struct Group {
  int64_t first, count;
  int64_t width;   // contiguous elements of a row: count * inner
  int64_t stride;  // from row to row: channels * inner
};

template <class S, class F>
PYACCEL_INLINE void over_row(int64_t width, const F& at) {
  int64_t j = 0;
  for (; j + Simd<S>::lanes <= width; j += Simd<S>::lanes) at(Vec<S>{}, j);
  for (; j < width; ++j) at(S{}, j);
}

// What the loops read of one number a channel. A copy by value, so that a broadcast stays in a register: stores of
// the loop could alias anything behind a pointer.
template <class S, bool columns>
struct View {
  Vec<S> broadcast;
  const S* values;
  template <class V>
  PYACCEL_INLINE V get(int64_t j) const {
    if constexpr (columns) return load_as<V>(values + j);
    else if constexpr (sizeof(V) == sizeof(S)) return broadcast[0];
    else return broadcast;
  }
};

// One number a channel: a single one, or spread over the columns of the group.
template <class S, bool columns>
struct PerChannel {
  S* values;
  int64_t inner;
  PYACCEL_INLINE void set(int64_t channel, S value) const {
    if constexpr (columns) std::fill_n(values + channel * inner, inner, value);
    else values[0] = value;
  }
  PYACCEL_INLINE View<S, columns> view() const { return {Vec<S>{} + values[0], values}; }
};

// The neuron as the loops read it: see make_cell.
template <class S, bool columns>
struct CellView {
  View<S, columns> leak, threshold, drop, inverse;
  S keep, through_u, through_drop;
  template <class V>
  PYACCEL_INLINE Cell<V> cell(int64_t j) const {
    const V lost = drop.template get<V>(j);
    return {leak.template get<V>(j), threshold.template get<V>(j), V{} + keep, lost, V{} + through_u, lost * through_drop};
  }
};

// `terms` sums over a slice (all rows of a group), one result a channel: partial sums in S, totals in double,
// in an order that depends on the shape alone.
template <class S, bool columns, int terms>
struct Sums {
  const Group& group;
  S* partial;      // columns: [terms, width]
  double* totals;  // [terms, columns ? width : 1]
  Vec<S> lanes[terms] = {};
  S single[terms] = {};
  int64_t rows = 0;

  PYACCEL_INLINE void clear() {
    const int64_t n = columns ? group.width : 1;
    std::fill_n(totals, terms * n, 0.0);
    if constexpr (columns) std::fill_n(partial, terms * n, S(0));
    rows = 0;
  }
  PYACCEL_INLINE void add(int term, int64_t j, Vec<S> value) {
    if constexpr (columns) {
      S* p = partial + term * group.width + j;
      store_as<false>(p, load_as<Vec<S>>(p) + value);
    } else {
      lanes[term] += value;
    }
  }
  PYACCEL_INLINE void add(int term, int64_t j, S value) {
    if constexpr (columns) partial[term * group.width + j] += value;
    else single[term] += value;
  }
  PYACCEL_INLINE void end_row() {
    if constexpr (columns) {
      if (++rows % kRowsAFlush == 0) flush();
    } else {
      for (int term = 0; term < terms; ++term) {
        totals[term] += static_cast<double>(sum_lanes<S>(lanes[term])) + static_cast<double>(single[term]);
        lanes[term] = Vec<S>{};
        single[term] = 0;
      }
    }
  }
  void flush() {
    for (int64_t i = 0; i < terms * group.width; ++i) {
      totals[i] += static_cast<double>(partial[i]);
      partial[i] = 0;
    }
  }
  // After the last row: the sum of one channel of the group.
  PYACCEL_INLINE double of(int term, int64_t channel, int64_t inner) const {
    if constexpr (!columns) return totals[term];
    double sum = 0;
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t at = term * group.width + channel * inner + i;
      sum += totals[at] + static_cast<double>(partial[at]);
    }
    return sum;
  }
};

// Everything a thread needs for one group: numbers a channel, and where sums are kept.
template <class S, bool columns>
struct Desk {
  PerChannel<S, columns> mean, scale, leak, threshold, drop, inverse, slope, offset;
  S* partial;
  double* totals;
  S keep = 0, through_u = 0, through_drop = 0;

  static int64_t bytes(int64_t width) { return width * (8 + 4) * static_cast<int64_t>(sizeof(S)) + width * 4 * 8 + 256; }
  Desk(void* memory, int64_t width, int64_t inner) {
    totals = static_cast<double*>(memory);
    S* next = reinterpret_cast<S*>(totals + 4 * width);
    for (auto* p : {&mean, &scale, &leak, &threshold, &drop, &inverse, &slope, &offset}) *p = {next, inner}, next += width;
    partial = next;
  }
  void set_neuron(const Neuron& n, const Group& group) {
    for (int64_t c = 0; c < group.count; ++c) {
      const Cell<S> cell = make_cell<S>(n, value_of<S>(n.leak, group.first + c), value_of<S>(n.threshold, group.first + c));
      leak.set(c, cell.leak);
      threshold.set(c, cell.threshold);
      drop.set(c, cell.drop);
      inverse.set(c, S(1) / cell.threshold);
      keep = cell.keep;
      through_u = cell.through_u;
    }
    through_drop = n.detach_reset ? S(0) : S(1);
  }
  PYACCEL_INLINE CellView<S, columns> neuron() const {
    return {leak.view(), threshold.view(), drop.view(), inverse.view(), keep, through_u, through_drop};
  }
};

// The factor of (x - mean): every pass and every device must round it alike, so it comes from the stored variance.
template <class S>
PYACCEL_INLINE S deviation(const void* var, int64_t at, S eps) {
  return S(1) / std::sqrt(static_cast<const S*>(var)[at] + eps);
}

}  // namespace pyaccel::neuron::PYACCEL_ISA
