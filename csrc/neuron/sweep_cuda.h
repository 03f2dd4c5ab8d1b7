// What the LIF and BNTT kernels share: a sweep forward through time, a recomputing sweep that keeps u in shared memory,
// and the walk back. Device code; the arithmetic of a step is that of lif_math.h.
//
// Decisions. One thread owns V neighbouring neurons and walks through time with their state in registers; K rows are
// loaded before the first is used, so that enough bytes are in flight (about 23 KB a multiprocessor for 4.3 TB/s). u of
// a segment lies in shared memory as [row][thread][V], own slots only: no barrier, no bank conflict, loops stay rolled,
// any T. (u in registers: 140-244 of them, T and every option a template; not built.) Reset and detach are numbers
// (lif_math.h); delay and surrogate are branches around the loops; templates only on the type, on V and on how lanes
// lie to channels. State rounds as on the CPU: one rounding an operation. Gradients may fuse (fused_cuda.h): 15 instead
// of 20 instructions a neuron-step on the walk back.
#pragma once
#include "../core/cuda_vector.h"
#include "fused_cuda.h"
#include "index.h"
#include "lif_math.h"

namespace pyaccel::neuron::cuda {

using namespace ::pyaccel::cuda;
using index::kRowBytes;
using index::Lanes;

template <class T, int V>
constexpr int kBackwardThreads = kRowBytes / (V * static_cast<int>(sizeof(State<T>)));
constexpr int kForwardThreads = 256;

// Steps loaded ahead: 32 to 64 bytes a thread and tensor.
template <class T, int V>
constexpr int kAhead = sizeof(T) == 8 ? 2 : (sizeof(T) * V >= 16 ? 4 : 8);

// ------------------------------------------------------------------------------------------------ parameters
template <class S, int V, Lanes lanes>
struct Cells {
  static constexpr int count = lanes == Lanes::one_channel ? 1 : V;
  Cell<S> cell[count];
  S inverse[count];  // 1 / threshold

  PYACCEL_DEVICE const Cell<S>& operator[](int i) const { return cell[count == 1 ? 0 : i]; }
  // The same numbers for the walk back.
  PYACCEL_DEVICE Cell<Fused<S>> fused(int i) const {
    const Cell<S>& c = (*this)[i];
    return {c.leak, c.threshold, c.keep, c.drop, c.through_u, c.through_one};
  }
  PYACCEL_DEVICE Fused<S> inverse_of(int i) const { return inverse[count == 1 ? 0 : i]; }
};

// `channel_of(i)`: the channel of lane i.
template <class S, int V, Lanes lanes, class ChannelOf>
PYACCEL_DEVICE Cells<S, V, lanes> load_cells(const Neuron& neuron, const ChannelOf& channel_of) {
  Cells<S, V, lanes> cells;
  const S* leaks = static_cast<const S*>(neuron.leak.per_channel);
  const S* thresholds = static_cast<const S*>(neuron.threshold.per_channel);
  S leak = static_cast<S>(neuron.leak.value), threshold = static_cast<S>(neuron.threshold.value);
#pragma unroll
  for (int i = 0; i < cells.count; ++i) {
    if (leaks != nullptr || thresholds != nullptr) {
      const uint32_t channel = channel_of(i);
      if (leaks != nullptr) leak = leaks[channel];
      if (thresholds != nullptr) threshold = thresholds[channel];
    }
    cells.cell[i] = make_cell<S>(neuron, leak, threshold);
    cells.inverse[i] = S(1) / threshold;
  }
  return cells;
}

template <class S, int V>
PYACCEL_DEVICE void load_state(const void* from, int64_t at, S (&v)[V]) {
  if (from != nullptr) {
    const Pack<S, V> pack = load<Access::constant, V>(static_cast<const S*>(from) + at);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = pack.lane[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = 0;
  }
}

template <Access access, class S, int V>
PYACCEL_DEVICE void store_state(S* to, const S (&v)[V]) {
  Pack<S, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.lane[i] = v[i];
  store<access>(to, pack);
}

// ------------------------------------------------------------------------------------------------- input current
// What the neurons of a thread receive at step t: `fetch` starts the loads of the element type, several steps ahead;
// `at` completes them when the step is taken; `value` is the current of lane i.
template <class T, int V, Access access>
struct Plain {
  using Item = Pack<T, V>;
  const T* x;  // of the thread's first neuron
  uint32_t row;

  PYACCEL_DEVICE Item fetch(int t) const { return load<access, V>(x + index::at_step(t, row)); }
  PYACCEL_DEVICE const Item& at(int, const Item& item) const { return item; }
  PYACCEL_DEVICE State<T> value(const Item& item, int i) const { return to_state(item.lane[i]); }
};

// y = scale*(x - mean): subtracted first, since scale*x + shift cancels where the mean is large.
template <class T, int V, Lanes lanes, Access access>
struct Normalised {
  using S = State<T>;
  static constexpr bool across = lanes == Lanes::across_channels;
  struct Item {
    Pack<T, V> x;
    Pack<S, 2> mean_scale;  // one channel
  };
  struct Complete {
    Pack<T, V> x;
    Pack<S, across ? V : 1> mean, scale;
  };
  const T* x;
  const S* table;  // see index::coefficient, from the thread's channel on
  uint32_t row, channels;
  int steps;

  PYACCEL_DEVICE Item fetch(int t) const {
    Item item;
    item.x = load<access, V>(x + index::at_step(t, row));
    if constexpr (!across)
      item.mean_scale = load<Access::constant, 2>(table + index::at_step(t, channels) * index::kFields);
    return item;
  }
  PYACCEL_DEVICE Complete at(int t, const Item& item) const {
    if constexpr (across) {  // from L1: not worth the registers of loading ahead
      return {item.x, load<Access::constant, V>(table + index::at_step(t, channels)),
              load<Access::constant, V>(table + index::at_step(steps + t, channels))};
    } else {
      return {item.x, {{item.mean_scale.lane[0]}}, {{item.mean_scale.lane[1]}}};
    }
  }
  PYACCEL_DEVICE S value(const Complete& c, int i) const {
    const int k = across ? i : 0;
    return c.scale.lane[k] * (to_state(c.x.lane[i]) - c.mean.lane[k]);
  }
};

// The thread's share of the table: where its channel starts.
template <class S>
PYACCEL_DEVICE const S* table_at(const void* table, uint32_t channel, bool across) {
  return static_cast<const S*>(table) + static_cast<int64_t>(channel) * (across ? 1 : index::kFields);
}

// ------------------------------------------------------------------------------------------------------- forward
// Where a forward sweep writes. Idle threads of the last block come along, because packing shuffles need whole warps.
template <class T, int V>
struct ForwardOutput {
  using S = State<T>;
  T* spikes;       // at the thread's neuron, or null
  uint8_t* bits;   // at the thread's byte, or null
  S* checkpoints;  // at the thread's neuron
  int64_t row, bits_row;
  int every, next;  // next step whose incoming state is kept; never: beyond the last step
  bool active;

  PYACCEL_DEVICE void keep_state(int t, const S (&v)[V]) {
    if (t != next) return;
    if (active) store_state<Access::streaming>(checkpoints, v);
    checkpoints += row;
    next += every;
  }

  PYACCEL_DEVICE void emit(const bool (&fired)[V]) {
    if (bits != nullptr) {
      constexpr unsigned sharing = 8 / V;  // threads that fill one byte
      const unsigned place = threadIdx.x % sharing;
      unsigned byte = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) byte |= (active && fired[i] ? 1u : 0u) << i;
      byte <<= place * V;
#pragma unroll
      for (unsigned apart = 1; apart < sharing; apart *= 2)
        byte |= __shfl_xor_sync(0xffffffffu, byte, static_cast<int>(apart));
      if (active && place == 0) *bits = static_cast<uint8_t>(byte);
      bits += bits_row;
    }
    if (spikes != nullptr) {
      Pack<T, V> pack;
#pragma unroll
      for (int i = 0; i < V; ++i) pack.lane[i] = one_or_zero<T>(fired[i]);
      if (active) store(spikes, pack);
      spikes += row;
    }
  }
};

template <bool delay, int K, class S, int V, class Cells, class Source, class Output>
PYACCEL_DEVICE void forward_sweep(const Cells& cells, const Source& source, Output& output, int steps, S (&v)[V]) {
  using Item = typename Source::Item;
  const auto step = [&](int t, const Item& item) {
    output.keep_state(t, v);
    const auto& current = source.at(t, item);
    bool fired[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const S x = source.value(current, i);
      if constexpr (delay) {
        fired[i] = fires(cells[i], v[i]);
        v[i] = delayed_step(cells[i], v[i], x);
      } else {
        const S u = integrate(cells[i], v[i], x);
        fired[i] = fires(cells[i], u);
        v[i] = after_reset(cells[i], u);
      }
    }
    output.emit(fired);
  };
  int t = 0;
#pragma unroll 1
  for (; t + K <= steps; t += K) {
    Item items[K];
#pragma unroll
    for (int k = 0; k < K; ++k) items[k] = source.fetch(t + k);
#pragma unroll
    for (int k = 0; k < K; ++k) step(t + k, items[k]);
  }
#pragma unroll 1
  for (; t < steps; ++t) step(t, source.fetch(t));
}

// ------------------------------------------------------------------------------------------------------ backward
// Rows of u in shared memory, seen by one thread. Row 0: the state before the segment. Row i + 1: what step i left, u
// before the reset (prompt) or the state u (delayed).
template <class S, int V>
struct Rows {
  S* mine;
  static constexpr int stride = kRowBytes / static_cast<int>(sizeof(S));

  PYACCEL_DEVICE Pack<S, V> get(int i) const { return load<Access::coherent, V>(mine + i * stride); }
  PYACCEL_DEVICE void put(int i, const S (&v)[V]) const { store_state<Access::coherent>(mine + i * stride, v); }
};

template <bool delay, int K, class S, int V, class Cells, class Source>
PYACCEL_DEVICE void recompute(const Cells& cells, const Source& source, const Rows<S, V>& rows, int first_step,
                              int count, S (&v)[V]) {
  using Item = typename Source::Item;
  rows.put(0, v);
  const auto step = [&](int i, const Item& item) {
    const auto& current = source.at(first_step + i, item);
    S u[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const S x = source.value(current, k);
      if constexpr (delay) {
        v[k] = u[k] = delayed_step(cells[k], v[k], x);
      } else {
        u[k] = integrate(cells[k], v[k], x);
        v[k] = after_reset(cells[k], u[k]);
      }
    }
    rows.put(i + 1, u);
  };
  int i = 0;
#pragma unroll 1
  for (; i + K <= count; i += K) {
    Item items[K];
#pragma unroll
    for (int k = 0; k < K; ++k) items[k] = source.fetch(first_step + i + k);
#pragma unroll
    for (int k = 0; k < K; ++k) step(i + k, items[k]);
  }
#pragma unroll 1
  for (; i < count; ++i) step(i, source.fetch(first_step + i));
}

// Sums of what each step adds to dL/dleak and dL/dthreshold of the thread's neurons. A kernel that cannot learn
// (`able` false) saves their registers.
template <class S, int V, bool able>
struct Learned {
  static constexpr bool wanted = false;
};
template <class S, int V>
struct Learned<S, V, true> {
  bool wanted = false, soft_through = false;
  S leak[V] = {}, threshold[V] = {};
};

// Back through the segment. `carry`: gradient of the state after the step (prompt: v, delayed: u).
// `gradients.fetch(i)` starts the loads of step i, `.of(item, lane)` is dL/ds, `.emit(i, item, delta)` takes dL/du.
template <bool delay, int K, class S, int V, bool able, class Cells, class Slope, class Gradients>
PYACCEL_DEVICE void walk_back(const Cells& cells, const Slope& slope, const Rows<S, V>& rows, int count,
                              const Gradients& gradients, S (&carry)[V], Learned<S, V, able>& learned) {
  using Item = typename Gradients::Item;
  using F = Fused<S>;
  const auto step = [&](int i, const Item& item) {
    const Pack<S, V> u = rows.get(delay ? i : i + 1);
    S delta[V], next[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Cell<F> cell = cells.fused(k);
      const F inverse = cells.inverse_of(k), at = u.lane[k], g = gradients.of(item, k), d = carry[k];
      if constexpr (delay) {
        delta[k] = d.value;
        next[k] = delayed_back(cell, slope, inverse, at, g, d).value;
      } else {
        delta[k] = back(cell, slope, inverse, at, g, d).value;
        next[k] = cells[k].leak * delta[k];
      }
    }
    if constexpr (able) {
      if (learned.wanted) {
        const Pack<S, V> before = rows.get(i);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Cell<F> cell = cells.fused(k);
          const F inverse = cells.inverse_of(k), at = u.lane[k], g = gradients.of(item, k), d = carry[k];
          if constexpr (delay) {
            const S kept = fires(cells[k], u.lane[k]) ? cells[k].keep * u.lane[k] : u.lane[k];
            learned.leak[k] += delta[k] * kept;
            learned.threshold[k] += delayed_threshold_share(cell, slope, inverse, at, g, d, learned.soft_through).value;
          } else {
            const S v = i == 0 ? before.lane[k] : after_reset(cells[k], before.lane[k]);
            learned.leak[k] += delta[k] * v;
            learned.threshold[k] += threshold_share(cell, slope, inverse, at, g, d, learned.soft_through).value;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) carry[k] = next[k];
    gradients.emit(i, item, delta);
  };
  int i = count - 1;
#pragma unroll 1
  for (; i >= K - 1; i -= K) {
    Item items[K];
#pragma unroll
    for (int k = 0; k < K; ++k) items[k] = gradients.fetch(i - k);
#pragma unroll
    for (int k = 0; k < K; ++k) step(i - k, items[k]);
  }
#pragma unroll 1
  for (; i >= 0; --i) step(i, gradients.fetch(i));
}

// Calls run(slope): one copy of its loop a surrogate (branches inside the steps of wide kernels took six times the
// code); not hoisted: one loop in all, for kernels that are not worth the copies.
template <class S, bool hoisted, class F>
PYACCEL_DEVICE void with_slope(const Neuron& neuron, const F& run) {
  const S scale = static_cast<S>(neuron.scale), width = static_cast<S>(neuron.width);
  if constexpr (!hoisted) {
    run(AnySlope<S>{neuron.surrogate, scale, width});
  } else {
    switch (neuron.surrogate) {
      case Surrogate::triangle: return run(Slope<Surrogate::triangle, S>{scale, width});
      case Surrogate::rectangle: return run(Slope<Surrogate::rectangle, S>{scale, width});
      case Surrogate::atan: return run(Slope<Surrogate::atan, S>{scale, width});
      case Surrogate::sigmoid: return run(Slope<Surrogate::sigmoid, S>{scale, width});
      default: return run(Slope<Surrogate::fast_sigmoid, S>{scale, width});
    }
  }
}

// --------------------------------------------------------------------------------------------------------- host
// Calls run(T{}) with the element type; the types are those that reach this family.
template <class F>
void with_type(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::f32: return run(float{});
    case Dtype::f64: return run(double{});
    case Dtype::f16: return run(__half{});
    case Dtype::bf16: return run(__nv_bfloat16{});
    default: throw std::invalid_argument(std::string("neuron kernels take floating-point tensors, got ") + name(dtype));
  }
}

// Every pointer (null counts) may be the start of 16-byte accesses.
template <class... Pointers>
bool all_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace pyaccel::neuron::cuda
