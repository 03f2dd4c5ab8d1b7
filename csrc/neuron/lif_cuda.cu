// LIF over time on CUDA, forward and backward (contract: neuron.h).
//
// Floor in bytes a neuron-step: forward 8 (float32) and 4 (16-bit): read x, write s; 4.1 and 2.1 with packed spikes.
// Backward 12 and 6: read x, read g, write gx; u is recomputed on chip. The sequence lies as T flat rows, so layouts do
// not matter. With T over 32 forward keeps the state every `checkpoint_every` steps (4 bytes / that, written and read).
// Choices (see sweep_cuda.h): 16 bytes of x a thread and 4 rows ahead forward; 4 neurons backward, 2 KB of shared
// memory a row and block, so 3 to 4 blocks of T = 25 to 32 on a multiprocessor. One neuron a thread where rows or
// addresses do not suit wide accesses, and for small rows, where many threads count more. float64 exists for gradient
// checks.
#include "../core/cuda_launch.h"
#include "neuron_cuda.h"
#include "sweep_cuda.h"

namespace pyaccel::neuron::cuda {
namespace {

// Bytes of a row below which wide accesses leave multiprocessors idle (132 of them, 4 blocks each).
#if defined(PYACCEL_LIF_SMALL_ROW)  // the simulator's tests reach the wide kernels with small rows
constexpr int64_t kSmallRow = PYACCEL_LIF_SMALL_ROW;
#else
constexpr int64_t kSmallRow = 2 << 20;
#endif

template <class T, int V, Lanes lanes>
__global__ void __launch_bounds__(kForwardThreads, lanes == Lanes::any ? 3 : 4)
    lif_forward_kernel(const LifForward f, const index::ChannelOf channel_of) {
  using S = State<T>;
  const uint32_t row = static_cast<uint32_t>(f.sequence.neurons);
  const int steps = static_cast<int>(f.sequence.steps);
  const uint32_t mine = index::first_neuron(blockIdx.x, kForwardThreads, threadIdx.x, V);
  const bool active = mine < row;
  const uint32_t n = active ? mine : 0;
  const auto cells = load_cells<S, V, lanes>(f.neuron, [&](int i) { return channel_of(n + static_cast<uint32_t>(i)); });
  S v[V];
  load_state(f.membrane, n, v);
  ForwardOutput<T, V> output;
  output.spikes = f.packed ? nullptr : static_cast<T*>(f.spikes) + n;
  output.bits = f.packed ? static_cast<uint8_t*>(f.spikes) + n / 8 : nullptr;
  output.checkpoints = static_cast<S*>(f.checkpoints) + n;
  output.row = row;
  output.bits_row = index::packed_row(row);
  output.every = static_cast<int>(f.checkpoint_every);
  output.next = f.checkpoint_every > 0 ? output.every : steps;
  output.active = active;
  const Plain<T, V, Access::streaming> source{static_cast<const T*>(f.current) + n, row};
  if (f.neuron.delay) {
    forward_sweep<true, kAhead<T, V>>(cells, source, output, steps, v);
  } else {
    forward_sweep<false, kAhead<T, V>>(cells, source, output, steps, v);
  }
  if (active) store_state<Access::coherent>(static_cast<S*>(f.membrane_out) + n, v);
}

template <class T, int V>
struct LifGradients {
  using Item = Pack<T, V>;
  const T* g;  // of the segment's first step, or null
  T* gx;
  uint32_t row;

  PYACCEL_DEVICE Item fetch(int i) const {
    if (g == nullptr) return Item{};
    return load<Access::streaming, V>(g + index::at_step(i, row));
  }
  PYACCEL_DEVICE State<T> of(const Item& item, int k) const { return to_state(item.lane[k]); }
  PYACCEL_DEVICE void emit(int i, const Item&, const State<T> (&delta)[V]) const {
    Pack<T, V> pack;
#pragma unroll
    for (int k = 0; k < V; ++k) pack.lane[k] = from_state<T>(delta[k]);
    store(gx + index::at_step(i, row), pack);
  }
};

// Lanes::any also means: gradients of leak and threshold where they are wanted.
template <class T, int V, Lanes lanes>
__global__ void __launch_bounds__(kBackwardThreads<T, V>, V == 1 ? 2 : 4)
    lif_backward_kernel(const LifBackward b, const int segment, const int segments, const index::ChannelOf channel_of) {
  using S = State<T>;
  constexpr bool able = lanes == Lanes::any;
  constexpr int K = able && V > 1 ? 4 : kAhead<T, V>;
  const uint32_t row = static_cast<uint32_t>(b.sequence.neurons);
  const int steps = static_cast<int>(b.sequence.steps);
  const uint32_t n = index::first_neuron(blockIdx.x, kBackwardThreads<T, V>, threadIdx.x, V);
  if (n >= row) return;
  const Rows<S, V> rows{dynamic_shared<S>() + threadIdx.x * V};
  const auto cells = load_cells<S, V, lanes>(b.neuron, [&](int i) { return channel_of(n + static_cast<uint32_t>(i)); });
  const Plain<T, V, Access::streaming> source{static_cast<const T*>(b.current) + n, row};
  Learned<S, V, able> learned;
  if constexpr (able) {
    learned.wanted = b.grad_leak != nullptr || b.grad_threshold != nullptr;
    learned.soft_through = !b.neuron.detach_reset && b.neuron.reset == Reset::soft;
  }
  S carry[V];
  load_state(b.grad_membrane, n, carry);
#pragma unroll 1
  for (int k = segments - 1; k >= 0; --k) {
    const int first = k * segment, count = min(segment, steps - first);
    S v[V];
    if (k == 0) load_state(b.membrane, n, v);
    else load_state(b.checkpoints, index::at_step(k - 1, row) + n, v);
    const int64_t at = index::at_step(first, row) + n;
    const LifGradients<T, V> gradients{b.grad_spikes == nullptr ? nullptr : static_cast<const T*>(b.grad_spikes) + at,
                                       static_cast<T*>(b.grad_current) + at, row};
    const auto sweep = [&]<bool delay>() {
      recompute<delay, K>(cells, source, rows, first, count, v);
      with_slope<S, (V > 1)>(b.neuron, [&](const auto& slope) {
        walk_back<delay, K>(cells, slope, rows, count, gradients, carry, learned);
      });
    };
    if (b.neuron.delay) sweep.template operator()<true>();
    else sweep.template operator()<false>();
  }
  if (b.grad_membrane_in != nullptr) store_state<Access::coherent>(static_cast<S*>(b.grad_membrane_in) + n, carry);
  if constexpr (able) {
    if (b.grad_leak != nullptr) store_state<Access::coherent>(static_cast<S*>(b.grad_leak) + n, learned.leak);
    if (b.grad_threshold != nullptr)
      store_state<Access::coherent>(static_cast<S*>(b.grad_threshold) + n, learned.threshold);
  }
}

// Accesses of `width` elements, where every row and address suits them.
bool wide_rows(const Sequence& s, int64_t width, bool aligned) {
  return aligned && s.neurons % width == 0 && s.neurons * size_of(s.dtype) >= kSmallRow;
}

bool lanes_differ(const Sequence& s, const Neuron& neuron, int64_t width) {
  return (neuron.leak.per_channel != nullptr || neuron.threshold.per_channel != nullptr) && s.inner % width != 0;
}

template <class T, int V, Lanes lanes>
void start_forward(const LifForward& f, const Queue& queue) {
  launch("lif_forward", lif_forward_kernel<T, V, lanes>,
         {index::row_blocks(f.sequence.neurons, kForwardThreads, V), kForwardThreads}, queue, f,
         index::channel_of(f.sequence.channels, f.sequence.inner));
}

template <class T, int V, Lanes lanes>
void start_backward(const LifBackward& b, int64_t segment, const Queue& queue) {
  constexpr int threads = kBackwardThreads<T, V>;
  const int shared = (static_cast<int>(segment) + 1) * kRowBytes;
  const int segments = segment == 0 ? 0 : static_cast<int>(index::segments(b.sequence.steps, segment));
  launch("lif_backward", lif_backward_kernel<T, V, lanes>,
         {index::row_blocks(b.sequence.neurons, threads, V), threads, shared}, queue, b, static_cast<int>(segment),
         segments, index::channel_of(b.sequence.channels, b.sequence.inner));
}

}  // namespace

void lif_forward(const LifForward& f, int device, void* stream) {
  const Sequence& s = f.sequence;
  if (s.neurons == 0) return;
  index::check_row("lif_forward", s.neurons);
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const bool aligned =
      all_aligned(f.current, f.membrane, f.membrane_out, f.checkpoints) && (f.packed || all_aligned(f.spikes));
  with_type(s.dtype, [&]<class T>(T) {
    constexpr int V = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));
    if constexpr (V > 1) {
      if (wide_rows(s, V, aligned)) {
        if (lanes_differ(s, f.neuron, V)) return start_forward<T, V, Lanes::any>(f, queue);
        return start_forward<T, V, Lanes::one_channel>(f, queue);
      }
    }
    start_forward<T, 1, Lanes::one_channel>(f, queue);
  });
}

void lif_backward(const LifBackward& b, int device, void* stream) {
  const Sequence& s = b.sequence;
  if (s.neurons == 0) return;
  index::check_row("lif_backward", s.neurons);
  const int64_t segment = b.checkpoint_every > 0 ? std::min(b.checkpoint_every, s.steps) : s.steps;
  if (segment > kLongestSegment)
    throw std::invalid_argument("lif_backward: CUDA keeps at most 32 steps on chip, got a segment of " +
                                std::to_string(segment) +
                                "; pass checkpoints of the forward pass every 32 steps or fewer");
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const bool aligned = all_aligned(b.current, b.membrane, b.checkpoints, b.grad_spikes, b.grad_membrane, b.grad_current,
                                   b.grad_membrane_in, b.grad_leak, b.grad_threshold);
  with_type(s.dtype, [&]<class T>(T) {
    if constexpr (sizeof(T) < 8) {
      if (wide_rows(s, 4, aligned)) {
        if (lanes_differ(s, b.neuron, 4) || b.grad_leak != nullptr || b.grad_threshold != nullptr)
          return start_backward<T, 4, Lanes::any>(b, segment, queue);
        return start_backward<T, 4, Lanes::one_channel>(b, segment, queue);
      }
    }
    start_backward<T, 1, Lanes::any>(b, segment, queue);
  });
}

}  // namespace pyaccel::neuron::cuda
