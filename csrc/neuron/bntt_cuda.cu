// BNTT + LIF on CUDA: statistics and forward (contract: neuron.h; backward: bntt_backward_cuda.cu).
//
// Two phases. Statistics: shifted sums a (step, channel, chunk of 32 KB), one slot a chunk, then folded in fixed order
// in double. Scan: the forward sweep of the LIF kernel over flat rows, on y = scale*(x - mean). Floor in bytes a
// neuron-step: 4 + 8 (float32), 2 + 4 (16-bit): x is read twice, spikes are written once. Keeping channel groups in L2
// between the phases would save the second read for contiguous images; it needs a device to decide
// (benchmarks/GPU_BACKLOG.md). No atomics; the number of chunks depends on the shape alone: results repeat from run to
// run and from card to card. Four neighbours a thread (8 bytes of a 16-bit type, 8 rows ahead): maps of 14x14 still
// divide by 4, not by 8. Launches: statistics, coefficients, scan.
#include "bntt_cuda.h"

namespace pyaccel::neuron::cuda {
namespace {

template <class T, int V, Lanes lanes>
constexpr int statistics_shared =
    index::kStatisticsThreads * 2 * static_cast<int>(sizeof(State<T>)) * (lanes == Lanes::across_channels ? V : 1);

template <class T, int V, Lanes lanes>
__global__ void __launch_bounds__(index::kStatisticsThreads, 4)
    bntt_statistics_kernel(const T* __restrict__ x, const index::ChannelGrid grid, const uint32_t row, const int steps,
                           State<T>* __restrict__ slots) {
  using S = State<T>;
  constexpr bool across = lanes == Lanes::across_channels;
  constexpr int sums = across ? V : 1, warps = index::kStatisticsThreads / 32;
  constexpr int rounds = index::kChunkBytes / (index::kStatisticsThreads * V * static_cast<int>(sizeof(T)));
  constexpr int together = rounds < 8 ? rounds : 8;
  const auto part = dynamic_shared<S[2][sums][32]>();  // [warp][sum or square][lane of V][lane of warp]
  const uint32_t column_block = blockIdx.x % grid.column_blocks, rest = blockIdx.x / grid.column_blocks;
  const uint32_t chunk = rest % grid.chunks, t = rest / grid.chunks;
  const uint32_t channel = grid.channel(column_block, threadIdx.x);
  const T* step = x + index::at_step(t, row);
  S shift[sums], sum[sums] = {}, square[sums] = {};
#pragma unroll
  for (int i = 0; i < sums; ++i)  // the first element of a slice is near its mean
    shift[i] = channel < grid.channels ? to_state(step[grid.offset(channel + static_cast<uint32_t>(i), 0)]) : S(0);
#pragma unroll 1
  for (uint32_t round = 0; round < rounds; round += together) {
    if (!grid.inside(channel, grid.position(chunk, threadIdx.x, round))) break;
    Pack<T, V> packs[together];
    bool inside[together];
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const uint32_t position = grid.position(chunk, threadIdx.x, round + static_cast<uint32_t>(k));
      inside[k] = position < grid.positions;
      if (inside[k]) packs[k] = load<Access::constant, V>(step + grid.offset(channel, position));
    }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (!inside[k]) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int to = across ? i : 0;
        const S d = to_state(packs[k].lane[i]) - shift[to];
        sum[to] += d;
        square[to] = fma(d, d, square[to]);
      }
    }
  }
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < sums; ++i) {
    part[warp][0][i][lane] = sum_columns<V, lanes>(sum[i], grid.columns);
    part[warp][1][i][lane] = sum_columns<V, lanes>(square[i], grid.columns);
  }
  __syncthreads();
  if (threadIdx.x >= grid.columns || channel >= grid.channels) return;
#pragma unroll
  for (int i = 0; i < sums; ++i) {
    S total[2] = {};
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      total[0] += part[w][0][i][lane];
      total[1] += part[w][1][i][lane];
    }
    const uint32_t c = channel + static_cast<uint32_t>(i);
    slots[index::slot(0, t, chunk, c, steps, grid.chunks, grid.channels)] = total[0];
    slots[index::slot(1, t, chunk, c, steps, grid.chunks, grid.channels)] = total[1];
  }
}

template <class S>
struct Coefficients {
  const void* x = nullptr;  // of the element type; null: mean and var are given
  const S* slots = nullptr;
  const S* weight = nullptr;
  S* mean = nullptr;
  S* var = nullptr;
  S* table = nullptr;  // null: only the statistics are wanted
  int steps = 0;
  uint32_t chunks = 0, channels = 0, row = 0, inner = 0;
  double inverse_count = 0, eps = 0;
  bool across = false;
};

template <class T>
__global__ void __launch_bounds__(kFoldThreads, 2) bntt_coefficients_kernel(const Coefficients<State<T>> a) {
  using S = State<T>;
  const FoldPlace place = fold_place(a.channels);
  const int64_t at = index::at_step(place.step, a.channels) + place.channel;
  S mean = 0, var = 0;
  if (a.x != nullptr) {
    double sum[2];
    fold_slots(place, a.slots, a.steps, a.chunks, a.channels, sum);
    if (!place.owner) return;
    const T first = static_cast<const T*>(a.x)[index::at_step(place.step, a.row) + place.channel * a.inner];
    const double from_first = sum[0] * a.inverse_count;
    const double spread = sum[1] * a.inverse_count - from_first * from_first;
    mean = static_cast<S>(static_cast<double>(to_state(first)) + from_first);
    var = static_cast<S>(spread < 0 ? 0 : spread);  // keeps NaN
    a.mean[at] = mean;
    a.var[at] = var;
  } else {
    if (!place.owner) return;
    mean = a.mean[at];
    var = a.var[at];
  }
  if (a.table == nullptr) return;
  a.table[index::coefficient(0, place.step, place.channel, a.steps, a.channels, a.across)] = mean;
  a.table[index::coefficient(1, place.step, place.channel, a.steps, a.channels, a.across)] =
      a.weight[at] * inverse_deviation(var, a.eps);
}

struct Scan {
  BnttForward f;
  const void* table;
  void* checkpoints;
  int steps, every;
  uint32_t row;
};

template <class T, int V, Lanes lanes>
__global__ void __launch_bounds__(kForwardThreads, lanes == Lanes::across_channels || sizeof(T) == 2 ? 3 : 4)
    bntt_scan_kernel(const Scan a, const index::ChannelOf channel_of) {
  using S = State<T>;
  constexpr bool across = lanes == Lanes::across_channels;
  const BnttForward& f = a.f;
  const uint32_t mine = index::first_neuron(blockIdx.x, kForwardThreads, threadIdx.x, V);
  const bool active = mine < a.row;
  const uint32_t n = active ? mine : 0, channel = channel_of(n);
  const auto cells = load_cells<S, V, lanes>(f.neuron, [&](int i) { return channel + static_cast<uint32_t>(i); });
  S v[V];
  load_state(f.membrane, n, v);
  ForwardOutput<T, V> output;
  output.spikes = f.packed || f.spikes == nullptr ? nullptr : static_cast<T*>(f.spikes) + n;
  output.bits = f.packed ? static_cast<uint8_t*>(f.spikes) + n / 8 : nullptr;
  output.checkpoints = static_cast<S*>(a.checkpoints) + n;
  output.row = a.row;
  output.bits_row = index::packed_row(a.row);
  output.every = a.every;
  output.next = a.every > 0 ? a.every : a.steps;
  output.active = active;
  const Normalised<T, V, lanes, Access::streaming> source{
      static_cast<const T*>(f.current) + n, table_at<S>(a.table, channel, across), a.row,
      static_cast<uint32_t>(f.shape.channels), static_cast<int>(f.shape.steps)};
  forward_sweep<false, kAhead<T, V>>(cells, source, output, a.steps, v);
  if (active && f.membrane_out != nullptr) store_state<Access::coherent>(static_cast<S*>(f.membrane_out) + n, v);
}

template <class T, Lanes lanes>
Coefficients<State<T>> coefficients_of(const BnttForward& f, void* table) {
  using S = State<T>;
  Coefficients<S> a;
  a.weight = static_cast<const S*>(f.weight);
  a.mean = static_cast<S*>(f.mean);
  a.var = static_cast<S*>(f.var);
  a.table = static_cast<S*>(table);
  a.steps = static_cast<int>(f.shape.steps);
  a.channels = static_cast<uint32_t>(f.shape.channels);
  a.inner = static_cast<uint32_t>(f.shape.inner);
  a.row = static_cast<uint32_t>(f.shape.outer * f.shape.channels * f.shape.inner);
  a.eps = f.eps;
  a.across = lanes == Lanes::across_channels;
  return a;
}

// mean, var, and coefficients where `table` is set.
void measure(const BnttForward& f, void* table, void* slots, bool aligned, const Queue& queue) {
  const BnttShape& s = f.shape;
  with_layout(s, aligned, [&]<class T, int V, Lanes lanes>() {
    using S = State<T>;
    auto a = coefficients_of<T, lanes>(f, table);
    const index::ChannelGrid grid = index::statistics_grid(s, V);
    launch("bntt_statistics", bntt_statistics_kernel<T, V, lanes>,
           {s.steps * grid.blocks(), index::kStatisticsThreads, statistics_shared<T, V, lanes>}, queue,
           static_cast<const T*>(f.current), grid, a.row, a.steps, static_cast<S*>(slots));
    a.x = f.current;
    a.slots = static_cast<const S*>(slots);
    a.chunks = grid.chunks;
    a.inverse_count = 1.0 / static_cast<double>(grid.positions);
    launch("bntt_statistics", bntt_coefficients_kernel<T>, fold_grid(s.steps, s.channels), queue, a);
  });
}

void* element(void* scratch, int64_t at, Dtype dtype) {
  return static_cast<char*>(scratch) + at * size_of(state_of(dtype));
}

}  // namespace

int64_t bntt_scratch_bytes(const BnttShape& shape, bool backward) {
  return index::bntt_scratch(shape, backward).total * size_of(state_of(shape.dtype));
}

void bntt_coefficients(const BnttForward& f, void* table, bool aligned, const Queue& queue) {
  with_layout(f.shape, aligned, [&]<class T, int V, Lanes lanes>() {
    launch("bntt_coefficients", bntt_coefficients_kernel<T>, fold_grid(f.shape.steps, f.shape.channels), queue,
           coefficients_of<T, lanes>(f, table));
  });
}

void bntt_scan(const BnttForward& f, const void* table, int64_t steps, void* checkpoints, int64_t every, bool aligned,
               const Queue& queue) {
  const uint32_t row = checked_row("bntt_forward", f.shape);
  const Scan a{f, table, checkpoints, static_cast<int>(steps), static_cast<int>(every), row};
  with_layout(f.shape, aligned, [&]<class T, int V, Lanes lanes>() {
    launch("bntt_forward", bntt_scan_kernel<T, V, lanes>, {index::row_blocks(row, kForwardThreads, V), kForwardThreads},
           queue, a, index::channel_of(f.shape.channels, f.shape.inner));
  });
}

void bntt_statistics(const BnttStatistics& s, void* scratch, int device, void* stream) {
  if (index::is_empty(s.shape)) return;
  checked_row("bntt_statistics", s.shape);
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  BnttForward f;
  f.shape = s.shape;
  f.current = s.current;
  f.mean = s.mean;
  f.var = s.var;
  measure(f, nullptr, element(scratch, index::bntt_scratch(s.shape, false).slots, s.shape.dtype),
          all_aligned(s.current), queue);
}

void bntt_forward(const BnttForward& f, void* scratch, int device, void* stream) {
  const BnttShape& s = f.shape;
  if (index::is_empty(s)) return;
  checked_row("bntt_forward", s);
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const bool aligned = all_aligned(f.current, f.membrane, f.membrane_out) && (f.packed || all_aligned(f.spikes));
  if (f.batch_statistics)
    measure(f, scratch, element(scratch, index::bntt_scratch(s, false).slots, s.dtype), aligned, queue);
  else bntt_coefficients(f, scratch, aligned, queue);
  bntt_scan(f, scratch, s.steps, nullptr, 0, aligned, queue);
}

}  // namespace pyaccel::neuron::cuda
