// The delayed neuron with the spike-time surrogate on CUDA, forward and backward (contract: neuron.h).
//
// Floor in bytes a neuron-step: forward 8.1 (float32) and 4.1 (16-bit): read x, write s and a bit; backward the same:
// read g and a bit, write gx. Forward is the LIF sweep with a counter beside the state. Backward needs, at every step,
// the time since the neuron's last spike: the bits of 32 steps fill one word a neuron, and the highest bit below a step
// is its last spike. What lies before the 32 steps is looked up once, backwards to the last spike of each neuron. Eight
// neurons a thread backward: one byte of bits a step.
#include "../core/cuda_launch.h"
#include "neuron_cuda.h"
#include "sweep_cuda.h"

namespace pyaccel::neuron::cuda {
namespace {

constexpr int32_t kNever = 999;  // the official code starts with a last spike at step -1000
constexpr int kStdbThreads = 128;

template <class T, int V>
struct StdbOutput : ForwardOutput<T, V> {
  int32_t since[V];
  PYACCEL_DEVICE void emit(const bool (&fired)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) since[i] = fired[i] ? 1 : since[i] + 1;
    ForwardOutput<T, V>::emit(fired);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kForwardThreads, 4) stdb_forward_kernel(const StdbForward f) {
  using S = State<T>;
  const uint32_t row = static_cast<uint32_t>(f.sequence.neurons);
  const int steps = static_cast<int>(f.sequence.steps);
  const uint32_t mine = index::first_neuron(blockIdx.x, kForwardThreads, threadIdx.x, V);
  const bool active = mine < row;
  const uint32_t n = active ? mine : 0;
  Neuron options;  // soft reset
  options.leak.value = f.leak.get();
  options.threshold.value = f.threshold.get();
  const auto cells = load_cells<S, V, Lanes::one_channel>(options, [](int) { return 0u; });
  S v[V];
  load_state(f.membrane, n, v);
  StdbOutput<T, V> output;
  output.spikes = static_cast<T*>(f.spikes) + n;
  output.bits = f.bits == nullptr ? nullptr : f.bits + n / 8;
  output.checkpoints = nullptr;
  output.row = row;
  output.bits_row = index::packed_row(row);
  output.every = 0;
  output.next = steps;
  output.active = active;
#pragma unroll
  for (int i = 0; i < V; ++i) output.since[i] = kNever;
  if (f.since != nullptr) {
    const Pack<int32_t, V> since = load<Access::constant, V>(f.since + n);
#pragma unroll
    for (int i = 0; i < V; ++i) output.since[i] = since.lane[i];
  }
  const Plain<T, V, Access::streaming> source{static_cast<const T*>(f.current) + n, row};
  forward_sweep<true, kAhead<T, V>>(cells, source, output, steps, v);
  if (!active) return;
  store_state<Access::coherent>(static_cast<S*>(f.membrane_out) + n, v);
  store_state<Access::coherent>(f.since_out + n, output.since);
}

// phi / alpha for a number of steps since the last spike.
template <class S>
struct TimeSlope {
  S beta;
  bool underflows;
  S denormal[16];  // exp(-since)^beta for 88..103, where float32 has lost digits

  explicit TimeSlope(const StdbBackward& b)
      : beta(static_cast<S>(b.beta)),
        underflows(b.form == StdbForm::fp32_underflow) {
    for (int i = 0; i < 16; ++i) {
      // The exponential as float32 holds it: a few units of its smallest number, 2^-149.
      const double held = std::nearbyint(std::exp(-88.0 - i) * 0x1p149) * 0x1p-149;
      denormal[i] = static_cast<S>(std::pow(held, b.beta));
    }
  }
  PYACCEL_DEVICE S operator()(int32_t since) const {
    S phi = exp_of(Fused<S>(-(static_cast<S>(since) * beta))).value;
    if (underflows && since >= 88) phi = since >= 104 ? S(0) : denormal[since - 88];
    return phi;
  }
};

// Bits of the neurons of one thread, all in one byte.
template <int V>
struct BitReader {
  const uint8_t* bits;  // at the thread's byte
  int64_t row;          // bytes a step
  unsigned shift;       // of the thread's neuron in its byte
  PYACCEL_DEVICE unsigned at(int t) const { return bits[index::at_step(t, row)] >> shift & ((1u << V) - 1); }
};

template <class T, int V>
__global__ void __launch_bounds__(kStdbThreads, 5)
    stdb_backward_kernel(const StdbBackward b, const __grid_constant__ TimeSlope<State<T>> slope) {
  using S = State<T>;
  constexpr int K = sizeof(T) * V >= 32 ? 2 : 4;
  constexpr int kWord = 32;  // steps of a word
  const uint32_t row = static_cast<uint32_t>(b.sequence.neurons);
  const int steps = static_cast<int>(b.sequence.steps);
  const uint32_t n = index::first_neuron(blockIdx.x, kStdbThreads, threadIdx.x, V);
  if (n >= row) return;
  const BitReader<V> reader{b.bits + n / 8, index::packed_row(row), n % 8};
  const T* const g = b.grad_spikes == nullptr ? nullptr : static_cast<const T*>(b.grad_spikes) + n;
  T* const gx = static_cast<T*>(b.grad_current) + n;
  const S leak = static_cast<S>(b.leak.get()), height = static_cast<S>(b.alpha / b.threshold.get());
  S delta[V];
  load_state(b.grad_membrane, n, delta);
#pragma unroll 1
  for (int first = (steps - 1) / kWord * kWord; first >= 0; first -= kWord) {
    const int count = min(kWord, steps - first);
    // Time since the last spike before the word.
    int32_t before[V];
#pragma unroll
    for (int i = 0; i < V; ++i)
      before[i] = first + (b.since != nullptr ? b.since[n + static_cast<uint32_t>(i)] : kNever);
    unsigned missing = (1u << V) - 1;
#pragma unroll 1
    for (int t = first - 1; t >= 0 && missing != 0; --t) {
      const unsigned fired = reader.at(t) & missing;
#pragma unroll
      for (int i = 0; i < V; ++i)
        if ((fired >> i & 1u) != 0) before[i] = first - t;
      missing &= ~fired;
    }
    unsigned word[V] = {};
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const unsigned fired = reader.at(first + i);
#pragma unroll
      for (int k = 0; k < V; ++k) word[k] |= (fired >> k & 1u) << i;
    }
#pragma unroll 1
    for (int last = count - 1; last >= 0; last -= K) {
      Pack<T, V> packs[K] = {};
#pragma unroll
      for (int j = 0; j < K; ++j)
        if (g != nullptr && j <= last) packs[j] = load<Access::streaming, V>(g + index::at_step(first + last - j, row));
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int i = last - j;
        if (i < 0) continue;
        Pack<T, V> out;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const unsigned earlier = word[k] & ((1u << i) - 1);
          const int32_t since = earlier != 0 ? i - (31 - __clz(static_cast<int>(earlier))) : i + before[k];
          out.lane[k] = from_state<T>(delta[k]);
          delta[k] = fma(to_state(packs[j].lane[k]), slope(since) * height, leak * delta[k]);
        }
        store(gx + index::at_step(first + i, row), out);
      }
    }
  }
  if (b.grad_membrane_in != nullptr) store_state<Access::coherent>(static_cast<S*>(b.grad_membrane_in) + n, delta);
}

}  // namespace

void stdb_forward(const StdbForward& f, int device, void* stream) {
  const int64_t row = f.sequence.neurons;
  if (row == 0) return;
  index::check_row("stdb_forward", row);
  const DeviceGuard guard(device);
  const bool aligned = all_aligned(f.current, f.membrane, f.since, f.spikes, f.membrane_out, f.since_out);
  with_type(f.sequence.dtype, [&]<class T>(T) {
    constexpr int V = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));
    const bool wide = V > 1 && aligned && row % V == 0;
    launch("stdb_forward", wide ? stdb_forward_kernel<T, V> : stdb_forward_kernel<T, 1>,
           {index::row_blocks(row, kForwardThreads, wide ? V : 1), kForwardThreads}, {device, stream}, f);
  });
}

void stdb_backward(const StdbBackward& b, int device, void* stream) {
  const int64_t row = b.sequence.neurons;
  if (row == 0) return;
  index::check_row("stdb_backward", row);
  const DeviceGuard guard(device);
  const bool aligned = all_aligned(b.grad_spikes, b.grad_membrane, b.grad_current, b.grad_membrane_in);
  with_type(b.sequence.dtype, [&]<class T>(T) {
    constexpr int V = sizeof(T) == 8 ? 1 : 8;
    const bool wide = V > 1 && aligned && row % V == 0;
    launch("stdb_backward", wide ? stdb_backward_kernel<T, V> : stdb_backward_kernel<T, 1>,
           {index::row_blocks(row, kStdbThreads, wide ? V : 1), kStdbThreads}, {device, stream}, b,
           TimeSlope<State<T>>(b));
  });
}

}  // namespace pyaccel::neuron::cuda
