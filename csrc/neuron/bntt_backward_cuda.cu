// BNTT + LIF on CUDA, backward (contract: neuron.h).
//
// Pass 1 recomputes u, walks back to delta and sums S1, S2 a (step, channel, block of 512 positions); they are folded
// in fixed order in double; pass 2 recomputes again and writes gx (no delta is stored: 16-bit delta would be rounded).
// x is read again by plain loads where its line should still be in L2: y = u - leak*v would spare that, but loses (x -
// mean) where the weight is small, and weights tend to 0. Floor in bytes a neuron-step: 8 + 12 (float32), 4 + 6
// (16-bit). Blocks lie within a channel, or over channels where inner is 1; delta overwrites u in shared memory, and
// after a barrier each warp adds whole rows: no atomics, same sums every time. Beyond 32 steps the scan first stores
// the state between segments in the scratch (x is read a third time). Launches: coefficients, pass 1, fold, pass 2 (and
// one fold for gradients of leak and threshold).
#include "bntt_cuda.h"

namespace pyaccel::neuron::cuda {
namespace {

struct Backward {
  BnttBackward b;
  index::ChannelGrid grid;
  const void* table;
  const void* checkpoints;
  void* slots;
  uint32_t row;
  int segment, segments;
};

// Pass 1: delta takes the place of u.
template <class T, int V>
struct KeepDelta {
  using S = State<T>;
  using Item = Pack<T, V>;
  const T* g;  // of the segment's first step, or null
  uint32_t row;
  Rows<S, V> rows;

  PYACCEL_DEVICE Item fetch(int i) const {
    if (g == nullptr) return Item{};
    return load<Access::streaming, V>(g + index::at_step(i, row));
  }
  PYACCEL_DEVICE S of(const Item& item, int k) const { return to_state(item.lane[k]); }
  PYACCEL_DEVICE void emit(int i, const Item&, const S (&delta)[V]) const { rows.put(i + 1, delta); }
};

// Pass 2: gx = scale*(delta - shift - (x - mean)*tilt); scale*delta where the statistics were given.
template <class T, int V, Lanes lanes>
struct WriteGradient {
  using S = State<T>;
  static constexpr bool across = lanes == Lanes::across_channels;
  struct Item {
    Pack<T, V> g, x;
  };
  const T* g;  // of the segment's first step, or null
  const T* x;
  T* gx;
  const S* table;  // of the segment's first step and the thread's channel
  uint32_t row, channels;
  int64_t field;  // elements between fields of the table (across)
  bool batch;

  PYACCEL_DEVICE Item fetch(int i) const {
    const int64_t at = index::at_step(i, row);
    Item item{};
    if (g != nullptr) item.g = load<Access::streaming, V>(g + at);
    if (batch) item.x = load<Access::streaming, V>(x + at);
    return item;
  }
  PYACCEL_DEVICE S of(const Item& item, int k) const { return to_state(item.g.lane[k]); }
  PYACCEL_DEVICE void emit(int i, const Item& item, const S (&delta)[V]) const {
    Pack<T, V> pack;
    if constexpr (across) {
      const S* from = table + index::at_step(i, channels);
      const Pack<S, V> scale = load<Access::constant, V>(from + field);
      Pack<S, V> mean{}, shift{}, tilt{};
      if (batch) {
        mean = load<Access::constant, V>(from);
        shift = load<Access::constant, V>(from + 2 * field);
        tilt = load<Access::constant, V>(from + 3 * field);
      }
#pragma unroll
      for (int k = 0; k < V; ++k)
        pack.lane[k] = value(item, k, delta[k], mean.lane[k], scale.lane[k], shift.lane[k], tilt.lane[k]);
    } else {
      const Pack<S, 4> c = load<Access::constant, 4>(table + index::at_step(i, channels) * index::kFields);
#pragma unroll
      for (int k = 0; k < V; ++k) pack.lane[k] = value(item, k, delta[k], c.lane[0], c.lane[1], c.lane[2], c.lane[3]);
    }
    store(gx + index::at_step(i, row), pack);
  }
  PYACCEL_DEVICE T value(const Item& item, int k, S delta, S mean, S scale, S shift, S tilt) const {
    const S rest = batch ? fma(-tilt, to_state(item.x.lane[k]) - mean, delta - shift) : delta;
    return from_state<T>(scale * rest);
  }
};

// The place of the block and of the thread of number `thread` in it.
template <class S, int V, Lanes lanes>
struct Place {
  static constexpr bool across = lanes == Lanes::across_channels;
  static constexpr int sums = across ? V : 1;
  uint32_t column_block, chunk;

  PYACCEL_DEVICE explicit Place(const index::ChannelGrid& grid)
      : column_block(blockIdx.x % grid.column_blocks), chunk(blockIdx.x / grid.column_blocks) {}
};

// Pass 1: S1 and S2 of steps first .. first + count - 1 of this block, one slot each. Row i + 1 holds delta of step i.
template <class T, int V, Lanes lanes>
PYACCEL_DEVICE void sum_rows(const Backward& a, const Place<State<T>, V, lanes>& place, const State<T>* block_rows,
                             int first, int count) {
  using S = State<T>;
  using P = Place<S, V, lanes>;
  constexpr int warps = kBackwardThreads<T, V> / 32;  // a row is `warps` groups of 32 threads
  constexpr int together = warps < 4 ? warps : 4;
  constexpr int stride = kRowBytes / static_cast<int>(sizeof(S));
  constexpr uint32_t nowhere = 0xffffffffu;
  const index::ChannelGrid& grid = a.grid;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t channel = grid.channel(place.column_block, lane);  // columns divide 32: the same in every group
  const bool writes = lane < grid.columns && channel < grid.channels;
  uint32_t offsets[together];
  const auto locate = [&](int group) {
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const uint32_t position = grid.position(place.chunk, lane + 32 * static_cast<uint32_t>(group + j), 0);
      offsets[j] = grid.inside(channel, position) ? grid.offset(channel, position) : nowhere;
    }
  };
  locate(0);
  const int64_t step_means = P::across ? grid.channels : int64_t{grid.channels} * index::kFields;
  const S* means = table_at<S>(a.table, channel < grid.channels ? channel : 0, P::across) + first * step_means;
  const T* x = static_cast<const T*>(a.b.current) + index::at_step(first, a.row);
  const int steps = static_cast<int>(a.b.shape.steps);
  const int64_t between = index::slot(1, 0, 0, 0, steps, grid.chunks, grid.channels);
  S* slots = static_cast<S*>(a.slots) + index::slot(0, first, place.chunk, channel, steps, grid.chunks, grid.channels);
#pragma unroll 1
  for (int i = static_cast<int>(warp); i < count; i += warps) {
    const S* row = block_rows + (i + 1) * stride + lane * V;
    const auto mean = load<Access::constant, P::sums>(means + i * step_means);
    S s1[P::sums] = {}, s2[P::sums] = {};
#pragma unroll 1
    for (int group = 0; group < warps; group += together) {
      if constexpr (warps > together) locate(group);
      Pack<T, V> packs[together];
#pragma unroll
      for (int j = 0; j < together; ++j)
        if (offsets[j] != nowhere) packs[j] = load<Access::streaming, V>(x + index::at_step(i, a.row) + offsets[j]);
#pragma unroll
      for (int j = 0; j < together; ++j) {
        if (offsets[j] == nowhere) continue;
        const Pack<S, V> delta = load<Access::coherent, V>(row + (group + j) * 32 * V);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const int to = P::across ? k : 0;
          s1[to] += delta.lane[k];
          s2[to] = fma(delta.lane[k], to_state(packs[j].lane[k]) - mean.lane[to], s2[to]);
        }
      }
    }
    S* slot = slots + static_cast<int64_t>(i) * grid.chunks * grid.channels;
#pragma unroll
    for (int k = 0; k < P::sums; ++k) {
      s1[k] = sum_columns<V, lanes>(s1[k], grid.columns);
      s2[k] = sum_columns<V, lanes>(s2[k], grid.columns);
      if (writes) slot[k] = s1[k];
      if (writes) slot[between + k] = s2[k];
    }
  }
}

// Pass 2: the block's sums of dL/dleak (row 0) and dL/dthreshold (row 1), one slot each.
template <class T, int V, Lanes lanes>
PYACCEL_DEVICE void sum_learned(const Backward& a, const Place<State<T>, V, lanes>& place, const State<T>* block_rows) {
  using S = State<T>;
  using P = Place<S, V, lanes>;
  constexpr int warps = kBackwardThreads<T, V> / 32, stride = kRowBytes / static_cast<int>(sizeof(S));
  const uint32_t lane = threadIdx.x % 32, which = threadIdx.x / 32;
  if (which >= 2) return;
  const uint32_t channel = a.grid.channel(place.column_block, lane);
  S sum[P::sums] = {};
#pragma unroll
  for (int j = 0; j < warps; ++j) {
    const Pack<S, V> pack =
        load<Access::coherent, V>(block_rows + which * stride + (j * 32 + static_cast<int>(lane)) * V);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[P::across ? k : 0] += pack.lane[k];
  }
#pragma unroll
  for (int k = 0; k < P::sums; ++k) {
    sum[k] = sum_columns<V, lanes>(sum[k], a.grid.columns);
    if (lane < a.grid.columns && channel < a.grid.channels)
      static_cast<S*>(a.slots)[index::slot(which, 0, place.chunk, channel + static_cast<uint32_t>(k), 1, a.grid.chunks,
                                           a.grid.channels)] = sum[k];
  }
}

// Lanes across channels hold coefficients of their own. Resident blocks: as many as shared memory lets in, or fewer
// where registers are the better use; steps ahead in pass 2: two tensors are loaded.
template <int V, Lanes lanes>
constexpr int kResident = lanes == Lanes::across_channels ? 3
                          : V == 1                        ? 2
                                                          : 4;
template <class T, Lanes lanes>
constexpr int kAheadFinal = lanes == Lanes::across_channels && sizeof(T) == 4 ? 2 : 4;

// `final`: pass 2. `able`: with gradients of leak and threshold.
template <class T, int V, Lanes lanes, bool final, bool able>
__global__ void __launch_bounds__(kBackwardThreads<T, V>, kResident<V, lanes>) bntt_backward_kernel(const Backward a) {
  using S = State<T>;
  using P = Place<S, V, lanes>;
  constexpr int K = final ? kAheadFinal<T, lanes> : kAhead<T, V>;
  S* const block_rows = dynamic_shared<S>();
  const BnttBackward& b = a.b;
  const int steps = static_cast<int>(b.shape.steps);
  const uint32_t channels = a.grid.channels;
  const P place(a.grid);
  const uint32_t own_channel = a.grid.channel(place.column_block, threadIdx.x);
  const uint32_t position = a.grid.position(place.chunk, threadIdx.x, 0);
  const bool inside = a.grid.inside(own_channel, position);
  const uint32_t channel = inside ? own_channel : 0, n = inside ? a.grid.offset(channel, position) : 0;
  const Rows<S, V> rows{block_rows + threadIdx.x * V};
  const auto cells = load_cells<S, V, lanes>(b.neuron, [&](int i) { return channel + static_cast<uint32_t>(i); });
  const S* const table = table_at<S>(a.table, channel, P::across);
  const T* const x = static_cast<const T*>(b.current) + n;
  const Normalised<T, V, lanes, Access::constant> source{x, table, a.row, channels, steps};
  Learned<S, V, able> learned;
  if constexpr (able) {
    learned.wanted = true;
    learned.soft_through = !b.neuron.detach_reset && b.neuron.reset == Reset::soft;
  }
  S carry[V];
  load_state(b.grad_membrane, n, carry);
#pragma unroll 1
  for (int k = a.segments - 1; k >= 0; --k) {
    const int first = k * a.segment, count = min(a.segment, steps - first);
    const int64_t at = index::at_step(first, a.row) + n;
    const T* const g = b.grad_spikes == nullptr ? nullptr : static_cast<const T*>(b.grad_spikes) + at;
    if (inside) {
      S v[V];
      if (k == 0) load_state(b.membrane, n, v);
      else load_state(a.checkpoints, index::at_step(k - 1, a.row) + n, v);
      recompute<false, K>(cells, source, rows, first, count, v);
      with_slope<S, (V > 1 && !able)>(b.neuron, [&](const auto& slope) {
        if constexpr (final) {
          const WriteGradient<T, V, lanes> gradients{
              g,
              x + index::at_step(first, a.row),
              static_cast<T*>(b.grad_current) + at,
              table + index::at_step(first, channels) * (P::across ? 1 : index::kFields),
              a.row,
              channels,
              index::at_step(steps, channels),
              b.batch_statistics};
          walk_back<false, K>(cells, slope, rows, count, gradients, carry, learned);
        } else {
          walk_back<false, K>(cells, slope, rows, count, KeepDelta<T, V>{g, a.row, rows}, carry, learned);
        }
      });
    }
    if constexpr (!final) {
      __syncthreads();
      sum_rows<T, V, lanes>(a, place, block_rows, first, count);
      __syncthreads();
    }
  }
  if constexpr (final) {
    if (inside && b.grad_membrane_in != nullptr)
      store_state<Access::coherent>(static_cast<S*>(b.grad_membrane_in) + n, carry);
    if constexpr (able) {
      rows.put(0, learned.leak);  // zero in idle threads
      rows.put(1, learned.threshold);
      __syncthreads();
      sum_learned<T, V, lanes>(a, place, block_rows);
    }
  }
}

// S1 and S2 folded, or given; then what depends on them.
template <class S>
struct FinishSums {
  const S* slots;  // null: the sums are given
  S* sums;         // [2, T, C], written or (given) read; or null
  const S* var;
  S* grad_weight;  // or null
  S* table;        // shift and tilt, or null
  int steps;
  uint32_t chunks, channels;
  double inverse_count, eps;
  bool across;
};

template <class S>
__global__ void __launch_bounds__(kFoldThreads, 2) bntt_finish_sums_kernel(const FinishSums<S> a) {
  const FoldPlace place = fold_place(a.channels);
  const int64_t at = index::at_step(place.step, a.channels) + place.channel;
  const int64_t second = index::at_step(a.steps, a.channels);
  double sum[2];
  if (a.slots != nullptr) fold_slots(place, a.slots, a.steps, a.chunks, a.channels, sum);
  if (!place.owner) return;
  if (a.slots == nullptr) {
    sum[0] = a.sums[at];
    sum[1] = a.sums[second + at];
  } else if (a.sums != nullptr) {
    a.sums[at] = static_cast<S>(sum[0]);
    a.sums[second + at] = static_cast<S>(sum[1]);
  }
  const S inverse = inverse_deviation(a.var[at], a.eps);
  if (a.grad_weight != nullptr) a.grad_weight[at] = static_cast<S>(sum[1]) * inverse;
  if (a.table == nullptr) return;
  a.table[index::coefficient(2, place.step, place.channel, a.steps, a.channels, a.across)] =
      static_cast<S>(sum[0] * a.inverse_count);
  a.table[index::coefficient(3, place.step, place.channel, a.steps, a.channels, a.across)] =
      static_cast<S>(sum[1] * a.inverse_count) * inverse * inverse;
}

template <class S>
__global__ void __launch_bounds__(kFoldThreads, 2)
    bntt_finish_learned_kernel(const S* slots, const uint32_t chunks, const uint32_t channels, S* leak, S* threshold) {
  const FoldPlace place = fold_place(channels);
  double sum[2];
  fold_slots(place, slots, 1, chunks, channels, sum);
  if (!place.owner) return;
  if (leak != nullptr) leak[place.channel] = static_cast<S>(sum[0]);
  if (threshold != nullptr) threshold[place.channel] = static_cast<S>(sum[1]);
}

// The forward call that backward repeats parts of.
BnttForward forward_of(const BnttBackward& b) {
  BnttForward f;
  f.neuron = b.neuron;
  f.shape = b.shape;
  f.eps = b.eps;
  f.current = b.current;
  f.weight = b.weight;
  f.membrane = b.membrane;
  f.batch_statistics = false;
  f.mean = const_cast<void*>(b.mean);  // read, as batch_statistics says
  f.var = const_cast<void*>(b.var);
  return f;
}

template <class T, int V, Lanes lanes>
void run_passes(const BnttBackward& b, State<T>* scratch, bool aligned, const Queue& queue) {
  using S = State<T>;
  constexpr int threads = kBackwardThreads<T, V>;
  const BnttShape& s = b.shape;
  const index::BnttScratch layout = index::bntt_scratch(s, true);
  const int64_t segment = index::bntt_segment(s.steps), segments = segment == 0 ? 0 : index::segments(s.steps, segment);
  S* const slots = scratch + layout.slots;
  S* const checkpoints = scratch + layout.checkpoints;
  const Backward a{b,
                   index::backward_grid(s, V),
                   scratch,
                   checkpoints,
                   slots,
                   checked_row("bntt_backward", s),
                   static_cast<int>(segment),
                   static_cast<int>(segments)};
  const Grid grid{a.grid.blocks(), threads, (static_cast<int>(segment) + 1) * kRowBytes};
  const BnttForward f = forward_of(b);
  bntt_coefficients(f, scratch, aligned, queue);
  if (segments > 1) bntt_scan(f, scratch, (segments - 1) * segment + 1, checkpoints, segment, aligned, queue);

  const bool given = b.phase == BnttPhase::sums_given;
  if (given || b.batch_statistics || b.grad_weight != nullptr || b.sums != nullptr) {
    if (!given) launch("bntt_backward (sums)", bntt_backward_kernel<T, V, lanes, false, false>, grid, queue, a);
    const double count = given ? b.count : static_cast<double>(s.outer * s.inner);
    const FinishSums<S> finish{given ? nullptr : slots,
                               static_cast<S*>(b.sums),
                               static_cast<const S*>(b.var),
                               static_cast<S*>(b.grad_weight),
                               scratch,
                               static_cast<int>(s.steps),
                               a.grid.chunks,
                               a.grid.channels,
                               1.0 / count,
                               b.eps,
                               lanes == Lanes::across_channels};
    launch("bntt_backward (finish)", bntt_finish_sums_kernel<S>, fold_grid(s.steps, s.channels), queue, finish);
  }
  if (b.phase == BnttPhase::sums_only) return;
  if (b.grad_leak == nullptr && b.grad_threshold == nullptr) {
    launch("bntt_backward", bntt_backward_kernel<T, V, lanes, true, false>, grid, queue, a);
    return;
  }
  Grid learning = grid;
  learning.shared = std::max(learning.shared, 2 * kRowBytes);
  launch("bntt_backward", bntt_backward_kernel<T, V, lanes, true, true>, learning, queue, a);
  launch("bntt_backward (parameters)", bntt_finish_learned_kernel<S>, fold_grid(1, s.channels), queue,
         static_cast<const S*>(slots), a.grid.chunks, a.grid.channels, static_cast<S*>(b.grad_leak),
         static_cast<S*>(b.grad_threshold));
}

}  // namespace

void bntt_backward(const BnttBackward& b, void* scratch, int device, void* stream) {
  const BnttShape& s = b.shape;
  if (index::is_empty(s)) return;
  checked_row("bntt_backward", s);
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const bool aligned =
      all_aligned(b.current, b.membrane, b.grad_spikes, b.grad_membrane, b.grad_current, b.grad_membrane_in);
  with_layout(s, aligned, [&]<class T, int V, Lanes lanes>() {
    run_passes<T, V, lanes>(b, static_cast<State<T>*>(scratch), aligned, queue);
  });
}

}  // namespace pyaccel::neuron::cuda
