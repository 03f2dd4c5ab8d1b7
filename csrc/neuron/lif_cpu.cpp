// LIF over time on the CPU, forward and backward (contract and floors: neuron.h).
//
// Loop nest: a thread owns a range of neuron blocks; a block walks through time in groups of kSteps steps; within a
// group, kSideBySide vectors of neurons advance together, so that their recurrences hide each other's latency. The state
// of the block stays in L1 between groups.
// Versions and what each bought (T=25, N=2^20, over the copy that must be made): one step at a time 1.4;
// past-the-cache stores 1.05 (the largest gain, harmful where the data fits the L3, hence `stream`); several steps a
// group alone nothing, several steps and several vectors side by side 0.2 in the L3; prefetching the rows of the next
// group to L2, across phases and blocks where the hardware cannot follow, 0.1 in backward.
// Backward recomputes u into a per-thread scratch that stays in L2, then walks back.
#include <algorithm>
#include <cstring>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "cells_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::neuron::PYACCEL_ISA {
namespace {

// Steps of one group. On Zen 3 more than two stall: rows are often a multiple of 4 KiB apart, and a load whose low
// address bits are those of a store in flight waits for it.
constexpr int64_t kSteps = PYACCEL_VECTOR_BYTES == 64 ? 4 : 2;
// Rows of the scratch lie this much more than a block apart, or they too would share their low address bits.
constexpr int64_t kPad = 32;
// One tensor larger than this leaves the caches before anybody reads it: write past them.
constexpr int64_t kStreamBytes = 12 << 20;

template <class E>
PYACCEL_INLINE void prefetch(const E* p) {
  __builtin_prefetch(p, 0, 2);
}

// ---------------------------------------------------------------------------------------------------- forward
// Where spikes go: as values, as values past the caches, as bits.
enum class Out { plain, past, packed };

template <class V, int width, bool delay, Out out, class E, class P>
PYACCEL_INLINE void advance(const P& parameters, const E* x, const E* ahead, E* s, uint8_t* bytes, int64_t row, int64_t bytes_a_row,
                            int64_t steps, typename StateOf<E>::type* state, int64_t j) {
  using S = typename StateOf<E>::type;
  constexpr int lanes = lanes_of<S, V>;
  constexpr int per_line = std::max(1, 64 / static_cast<int>(lanes * sizeof(E)));
  V v[width];
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) v[r] = load_as<V>(state + j + r * lanes);
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t at = k * row + j;
    uint32_t bits = 0;
#pragma GCC unroll 8
    for (int r = 0; r < width; ++r) {
      const Cell<V> cell = parameters.template cell<V>(j + r * lanes);
      const V in = load_as<V>(x + at + r * lanes);
      if (width > 1 && r % per_line == 0) prefetch(ahead + at + r * lanes);
      const V u = delay ? v[r] : integrate(cell, v[r], in);
      const auto fired = fires(cell, u);
      if constexpr (out == Out::packed) bits |= mask_bits(fired) << (r * lanes % 32);
      else spikes_as<out == Out::past>(s + at + r * lanes, fired);
      v[r] = delay ? delayed_step(cell, u, in) : after_reset(cell, u);
    }
    if constexpr (out == Out::packed) {
      uint8_t* to = bytes + k * bytes_a_row + j / 8;
      if constexpr (lanes > 1) std::memcpy(to, &bits, static_cast<size_t>(lanes * width / 8));
      else *to = static_cast<uint8_t>((j % 8 == 0 ? 0 : *to) | bits << (j % 8));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) store_as<false>(state + j + r * lanes, v[r]);
}

// `at(V{}, width, j)` over a block: vectors side by side, then the last neurons one by one.
template <class S, class F>
PYACCEL_INLINE void over_block(int64_t count, const F& at) {
  constexpr int wide = Simd<S>::lanes * kSideBySide;
  int64_t j = 0;
  for (; j + wide <= count; j += wide) at(Vec<S>{}, std::integral_constant<int, kSideBySide>{}, j);
  for (; j < count; ++j) at(S{}, std::integral_constant<int, 1>{}, j);
}

template <class S>
PYACCEL_INLINE void start_state(S* state, const void* from, int64_t first, int64_t count) {
  if (from != nullptr) std::memcpy(state, static_cast<const S*>(from) + first, static_cast<size_t>(count) * sizeof(S));
  else std::memset(state, 0, static_cast<size_t>(count) * sizeof(S));
}

// Per-neuron copies of the channel values of one block, so that the loops read them like any row.
template <class S>
void spread(const Sequence& sequence, const Neuron& neuron, int64_t first, int64_t count, S* leaks, S* thresholds) {
  for (int64_t j = 0; j < count;) {
    const int64_t n = first + j, channel = n / sequence.inner % sequence.channels;
    const int64_t end = std::min(count, j + sequence.inner - n % sequence.inner);
    const S leak = value_of<S>(neuron.leak, channel), threshold = value_of<S>(neuron.threshold, channel);
    for (; j < end; ++j) leaks[j] = leak, thresholds[j] = threshold;
  }
}

template <class S, bool per_channel>
PYACCEL_INLINE Parameters<S, per_channel> parameters_of(const Sequence& sequence, const Neuron& neuron, int64_t first,
                                                        int64_t count, S* space) {
  Parameters<S, per_channel> p{neuron, static_cast<S>(neuron.leak.value), static_cast<S>(neuron.threshold.value)};
  if constexpr (per_channel) {
    spread(sequence, neuron, first, count, space, space + count);
    p.leaks = space;
    p.thresholds = space + count;
  }
  return p;
}

template <class E, bool per_channel, bool delay, Out out>
void forward(const LifForward& f, int64_t block, int threads) {
  using S = typename StateOf<E>::type;
  const int64_t row = f.sequence.neurons, T = f.sequence.steps, bytes_a_row = (row + 7) / 8;
  const int64_t blocks = (row + block - 1) / block;
  parallel_shares(blocks, threads, [&](int64_t begin, int64_t end, int) {
    S* state = static_cast<S*>(scratch(0, static_cast<size_t>(3 * block) * sizeof(S)));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, row - first);
      const auto parameters = parameters_of<S, per_channel>(f.sequence, f.neuron, first, count, state + block);
      const E* x = static_cast<const E*>(f.current) + first;
      E* s = out == Out::packed ? nullptr : static_cast<E*>(f.spikes) + first;
      uint8_t* bytes = out == Out::packed ? static_cast<uint8_t*>(f.spikes) + first / 8 : nullptr;
      start_state(state, f.membrane, first, count);
      for (int64_t t = 0; t < T;) {
        if (f.checkpoint_every > 0 && t > 0 && t % f.checkpoint_every == 0)
          std::memcpy(static_cast<S*>(f.checkpoints) + (t / f.checkpoint_every - 1) * row + first, state,
                      static_cast<size_t>(count) * sizeof(S));
        const int64_t steps = std::min(kSteps, T - t);
        // What comes after this group: its next rows, or the first rows of the next block.
        const E* ahead = t + 2 * steps <= T ? x + (t + steps) * row : b + 1 < end ? x + count : x;
        over_block<S>(count, [&](auto v, auto width, int64_t j) PYACCEL_LAMBDA_INLINE {
          advance<decltype(v), width.value, delay, out>(parameters, x + t * row, ahead, s == nullptr ? s : s + t * row,
                                                        bytes == nullptr ? bytes : bytes + t * bytes_a_row, row, bytes_a_row, steps,
                                                        state, j);
        });
        t += steps;
      }
      std::memcpy(static_cast<S*>(f.membrane_out) + first, state, static_cast<size_t>(count) * sizeof(S));
    }
    if (out == Out::past) finish_streams();
  });
}

// --------------------------------------------------------------------------------------------------- backward
// u of steps t.. of the block, recomputed: prompt neuron u[t]; delayed neuron the state before the step, u[t-1].
template <class V, int width, bool delay, class E, class P>
PYACCEL_INLINE void recompute(const P& parameters, const E* x, int64_t row, int64_t steps, const E* ahead,
                              typename StateOf<E>::type* state, typename StateOf<E>::type* us, int64_t us_row, int64_t j) {
  using S = typename StateOf<E>::type;
  constexpr int lanes = lanes_of<S, V>;
  constexpr int per_line = std::max(1, 64 / static_cast<int>(lanes * sizeof(E)));
  V v[width];
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) v[r] = load_as<V>(state + j + r * lanes);
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < width; ++r) {
      const Cell<V> cell = parameters.template cell<V>(j + r * lanes);
      const V in = load_as<V>(x + k * row + j + r * lanes);
      if (width > 1 && r % per_line == 0) prefetch(ahead + k * row + j + r * lanes);
      if constexpr (delay) {
        store_as<false>(us + k * us_row + j + r * lanes, v[r]);
        v[r] = delayed_step(cell, v[r], in);
      } else {
        const V u = integrate(cell, v[r], in);
        store_as<false>(us + k * us_row + j + r * lanes, u);
        v[r] = after_reset(cell, u);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) store_as<false>(state + j + r * lanes, v[r]);
}

// The partial gradients of leak and threshold, where somebody wants them.
template <class S>
struct Partials {
  S* leak = nullptr;
  S* threshold = nullptr;
  bool soft_through = false;  // the soft reset is not detached
};

// Steps t+steps-1 down to t; pointers are those of step t; `dstate` carries the gradient of the state (prompt: v, delayed: u).
// `before`: the state before the segment's first step, for dL/dleak of that step (prompt neuron).
template <class V, int width, bool delay, bool partial, class E, class P, class Phi>
PYACCEL_INLINE void retreat(const P& parameters, const Phi& phi, const E* g, E* gx, int64_t row, int64_t steps, const E* ahead,
                            const typename StateOf<E>::type* us, int64_t us_row, typename StateOf<E>::type* dstate, bool stream,
                            const Partials<typename StateOf<E>::type>& partials, const typename StateOf<E>::type* before,
                            int64_t j) {
  using S = typename StateOf<E>::type;
  constexpr int lanes = lanes_of<S, V>;
  constexpr int per_line = std::max(1, 64 / static_cast<int>(lanes * sizeof(E)));
  V d[width];
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) d[r] = load_as<V>(dstate + j + r * lanes);
  for (int64_t k = steps - 1; k >= 0; --k) {
#pragma GCC unroll 8
    for (int r = 0; r < width; ++r) {
      const int64_t i = j + r * lanes;
      const Cell<V> cell = parameters.template cell<V>(i);
      const V inverse = parameters.template inverse<V>(i);
      const V u = load_as<V>(us + k * us_row + i);
      const V gs = g != nullptr ? load_as<V>(g + k * row + i) : V{};
      if (width > 1 && r % per_line == 0) prefetch(ahead + k * row + i);
      V out, next;
      if constexpr (delay) {
        out = d[r];
        next = delayed_back<!partial>(cell, phi, inverse, u, gs, d[r]);
      } else {
        out = back<!partial>(cell, phi, inverse, u, gs, d[r]);
        next = cell.leak * out;
      }
      if (stream) store_as<true>(gx + k * row + i, out);
      else store_as<false>(gx + k * row + i, out);
      if constexpr (partial) {
        if (partials.leak != nullptr) {
          V last;
          if constexpr (delay) last = fires(cell, u) ? cell.keep * u : u;
          else last = k == 0 && before != nullptr ? load_as<V>(before + i) : after_reset(cell, load_as<V>(us + (k - 1) * us_row + i));
          store_as<false>(partials.leak + i, load_as<V>(partials.leak + i) + out * last);
        }
        if (partials.threshold != nullptr) {
          V share;
          if constexpr (delay) share = delayed_threshold_share(cell, phi, inverse, u, gs, d[r], partials.soft_through);
          else share = threshold_share(cell, phi, inverse, u, gs, d[r], partials.soft_through);
          store_as<false>(partials.threshold + i, load_as<V>(partials.threshold + i) + share);
        }
      }
      d[r] = next;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) store_as<false>(dstate + j + r * lanes, d[r]);
}

// One block and one segment of time [t0, t1): recompute, then back.
template <class E, bool delay, bool partial, class P, class Phi>
void backward_segment(const P& parameters, const Phi& phi, const LifBackward& f, bool stream, int64_t first, int64_t count, int64_t t0, int64_t t1,
                      typename StateOf<E>::type* us, int64_t us_row, typename StateOf<E>::type* state,
                      typename StateOf<E>::type* dstate, const Partials<typename StateOf<E>::type>& partials) {
  using S = typename StateOf<E>::type;
  const int64_t row = f.sequence.neurons;
  const E* x = static_cast<const E*>(f.current) + first;
  const E* g = f.grad_spikes != nullptr ? static_cast<const E*>(f.grad_spikes) + first : nullptr;
  E* gx = static_cast<E*>(f.grad_current) + first;
  const S* before = state;
  S* walking = state;
  if constexpr (partial) {  // keep the state before the segment
    walking = state + count;
    std::memcpy(walking, state, static_cast<size_t>(count) * sizeof(S));
  }
  for (int64_t t = t0; t < t1;) {
    const int64_t steps = std::min(kSteps, t1 - t);
    // Next come the following rows of x; behind the last of them, the last rows of g, backwards.
    const E* ahead = t + 2 * steps <= t1 ? x + (t + steps) * row : g != nullptr ? g + std::max(t0, t1 - steps) * row : x + t * row;
    over_block<S>(count, [&](auto v, auto width, int64_t j) PYACCEL_LAMBDA_INLINE {
      recompute<decltype(v), width.value, delay>(parameters, x + t * row, row, steps, ahead, walking, us + (t - t0) * us_row,
                                                 us_row, j);
    });
    t += steps;
  }
  for (int64_t t = t1; t > t0;) {
    const int64_t steps = std::min(kSteps, t - t0);
    t -= steps;
    const E* from = g != nullptr ? g : x;
    const E* ahead = t - steps >= t0 ? from + (t - steps) * row : from + t * row;
    over_block<S>(count, [&](auto v, auto width, int64_t j) PYACCEL_LAMBDA_INLINE {
      retreat<decltype(v), width.value, delay, partial>(parameters, phi, g != nullptr ? g + t * row : nullptr, gx + t * row, row,
                                                        steps, ahead, us + (t - t0) * us_row, us_row, dstate, stream, partials,
                                                        t == t0 ? before : nullptr, j);
    });
  }
}

template <class E, bool delay, bool partial, class Phi>
void backward(const LifBackward& f, const Phi& phi, int64_t block, bool stream, int threads) {
  using S = typename StateOf<E>::type;
  const int64_t row = f.sequence.neurons, T = f.sequence.steps;
  const int64_t segment = f.checkpoint_every > 0 ? f.checkpoint_every : T;
  const int64_t blocks = (row + block - 1) / block;
  parallel_shares(blocks, threads, [&](int64_t begin, int64_t end, int) {
    S* state = static_cast<S*>(scratch(0, static_cast<size_t>(7 * block) * sizeof(S)));
    const int64_t us_row = block + kPad;
    S* us = static_cast<S*>(scratch(1, static_cast<size_t>(us_row * segment) * sizeof(S)));
    S* dstate = state + 2 * block;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, row - first);
      const auto parameters = parameters_of<S, partial>(f.sequence, f.neuron, first, count, state + 3 * block);
      Partials<S> partials;
      if constexpr (partial) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(S);
        if (f.grad_leak != nullptr) partials.leak = static_cast<S*>(std::memset(state + 5 * block, 0, bytes));
        if (f.grad_threshold != nullptr) partials.threshold = static_cast<S*>(std::memset(state + 6 * block, 0, bytes));
        partials.soft_through = !f.neuron.detach_reset && f.neuron.reset == Reset::soft;
      }
      start_state(dstate, f.grad_membrane, first, count);
      for (int64_t t1 = T; t1 > 0;) {
        const int64_t index = (t1 - 1) / segment, t0 = index * segment;
        const void* from = index == 0 ? f.membrane : static_cast<const S*>(f.checkpoints) + (index - 1) * row;
        start_state(state, from, first, count);
        backward_segment<E, delay, partial>(parameters, phi, f, stream, first, count, t0, t1, us, us_row, state, dstate, partials);
        t1 = t0;
      }
      const size_t bytes = static_cast<size_t>(count) * sizeof(S);
      if (f.grad_membrane_in != nullptr) std::memcpy(static_cast<S*>(f.grad_membrane_in) + first, dstate, bytes);
      if (partials.leak != nullptr) std::memcpy(static_cast<S*>(f.grad_leak) + first, partials.leak, bytes);
      if (partials.threshold != nullptr) std::memcpy(static_cast<S*>(f.grad_threshold) + first, partials.threshold, bytes);
    }
    if (stream) finish_streams();
  });
}

// A block must leave every thread something to do.
int64_t fitted(int64_t block, int64_t neurons) {
  const int64_t share = (neurons / omp_get_max_threads() + 63) / 64 * 64;
  return std::max<int64_t>(64, std::min(block, share));
}

// Past-the-cache stores need every row of the tensor aligned to the vector.
bool can_stream(const void* base, const Sequence& sequence) {
  return aligned(base) && sequence.neurons * size_of(sequence.dtype) % PYACCEL_VECTOR_BYTES == 0;
}

bool has_channels(const Neuron& neuron) { return neuron.leak.per_channel != nullptr || neuron.threshold.per_channel != nullptr; }

}  // namespace

void lif_forward(const LifForward& f) {
  const int64_t bytes = f.sequence.steps * f.sequence.neurons * size_of(f.sequence.dtype);
  const bool past = !f.packed && bytes > kStreamBytes && can_stream(f.spikes, f.sequence);
  const int64_t block = fitted(bytes > kStreamBytes ? 4096 : 1024, f.sequence.neurons);
  const int threads = threads_for(2 * bytes, (f.sequence.neurons + block - 1) / block);
  with_element(f.sequence.dtype, [&](auto e) {
    with_flag(has_channels(f.neuron), [&](auto per_channel) {
      with_flag(f.neuron.delay, [&](auto delay) {
        using E = decltype(e);
        if (f.packed) forward<E, per_channel.value, delay.value, Out::packed>(f, block, threads);
        else if (past) forward<E, per_channel.value, delay.value, Out::past>(f, block, threads);
        else forward<E, per_channel.value, delay.value, Out::plain>(f, block, threads);
      });
    });
  });
}

void lif_backward(const LifBackward& f) {
  const int64_t bytes = f.sequence.steps * f.sequence.neurons * size_of(f.sequence.dtype);
  const bool large = bytes > kStreamBytes;
  const bool stream = large && can_stream(f.grad_current, f.sequence);
  // u of a block must stay in L2, beside what is prefetched into it.
  const int64_t segment = std::max<int64_t>(1, f.checkpoint_every > 0 ? f.checkpoint_every : f.sequence.steps);
  const int64_t wanted = 128 * 1024 / (segment * size_of(state_of(f.sequence.dtype))) / 256 * 256;
  const int64_t block = fitted(std::clamp<int64_t>(wanted, 512, 2048), f.sequence.neurons);
  const int threads = threads_for(3 * bytes, (f.sequence.neurons + block - 1) / block);
  // Learnable neurons and resets with gradient share one instantiation: per-neuron parameter arrays, any surrogate.
  const bool partial = f.grad_leak != nullptr || f.grad_threshold != nullptr || has_channels(f.neuron) || !f.neuron.detach_reset;
  with_element(f.sequence.dtype, [&](auto e) {
    with_flag(f.neuron.delay, [&](auto delay) {
      with_flag(partial, [&](auto learnable) {
        using E = decltype(e);
        constexpr bool fast = !learnable.value && (std::is_same_v<E, float> || std::is_same_v<E, Bf16>);
        with_slope<typename StateOf<E>::type, fast>(
            f.neuron, [&](const auto& phi) { backward<E, delay.value, learnable.value>(f, phi, block, stream, threads); });
      });
    });
  });
}

}  // namespace pyaccel::neuron::PYACCEL_ISA
