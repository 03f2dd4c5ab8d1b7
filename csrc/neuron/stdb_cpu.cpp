// The delayed neuron with the spike-time surrogate on the CPU (contract: neuron.h). Floors: forward 8 bytes an element
// and a bit, backward 8 and a bit (read g, write gx); the current is not kept, so training holds 1/32 of what a membrane
// history would take.
// Backward walks the bits forward once to find each neuron's `since` at the start of every segment of time, then takes
// the segments from the last to the first: `since` of one segment is rebuilt into scratch and read backwards.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "cells_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::neuron::PYACCEL_ISA {
namespace {

constexpr int64_t kBlock = 512;   // neurons of a block: a multiple of 64, so that blocks never share a byte of bits
constexpr int64_t kSegment = 64;  // steps whose `since` is held in scratch
constexpr int32_t kNever = 999;   // the official code starts with a last spike at step -1000

template <class S>
using Count = std::remove_cvref_t<decltype((Vec<S>{} > Vec<S>{})[0])>;  // an integer as wide as S
template <class S>
using Counts = decltype(Vec<S>{} > Vec<S>{});

void start_since(const int32_t* from, int64_t first, int64_t count, int32_t* to) {
  if (from != nullptr) std::copy_n(from + first, count, to);
  else std::fill_n(to, count, kNever);
}

// at(vector, j) for whole vectors, at(scalar, j) for the rest.
template <class S, class F>
PYACCEL_INLINE void over(int64_t count, const F& at) {
  int64_t j = 0;
  for (; j + Simd<S>::lanes <= count; j += Simd<S>::lanes) at(Vec<S>{}, j);
  for (; j < count; ++j) at(S{}, j);
}

template <class E>
void forward(const StdbForward& f) {
  using S = typename StateOf<E>::type;
  const int64_t row = f.sequence.neurons, T = f.sequence.steps, bytes_a_row = (row + 7) / 8;
  Neuron options;
  options.delay = true;
  const S leak = static_cast<S>(f.leak.get()), threshold = static_cast<S>(f.threshold.get());
  const int64_t blocks = (row + kBlock - 1) / kBlock;
  const int threads = threads_for(2 * T * row * static_cast<int64_t>(sizeof(E)), blocks);
  parallel_shares(blocks, threads, [&](int64_t begin, int64_t end, int) {
    alignas(64) S state[kBlock];
    alignas(64) uint8_t fired_now[kBlock];
    int32_t since[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kBlock, count = std::min(kBlock, row - first);
      if (f.membrane != nullptr) std::memcpy(state, static_cast<const S*>(f.membrane) + first, static_cast<size_t>(count) * sizeof(S));
      else std::fill_n(state, count, S(0));
      start_since(f.since, first, count, since);
      for (int64_t t = 0; t < T; ++t) {
        const E* x = static_cast<const E*>(f.current) + t * row + first;
        E* s = static_cast<E*>(f.spikes) + t * row + first;
        std::memset(fired_now, 0, (static_cast<size_t>(count) + 7) / 8);
        over<S>(count, [&](auto v, int64_t j) PYACCEL_LAMBDA_INLINE {
          using V = decltype(v);
          const Cell<V> cell = make_cell<S>(options, V{} + leak, V{} + threshold);
          const V u = load_as<V>(state + j);
          const auto fired = fires(cell, u);
          spikes_as<false>(s + j, fired);
          store_as<false>(state + j, delayed_step(cell, u, load_as<V>(x + j)));
          const uint32_t bits = mask_bits(fired) << (j % 8);  // fewer lanes than 8 fill a byte in several goes; 16 lanes start on one
          fired_now[j / 8] = static_cast<uint8_t>(fired_now[j / 8] | bits);
          if constexpr (lanes_of<S, V> > 8) fired_now[j / 8 + 1] = static_cast<uint8_t>(bits >> 8);
        });
        for (int64_t j = 0; j < count; ++j) since[j] = (fired_now[j / 8] >> (j % 8) & 1) != 0 ? 1 : since[j] + 1;
        if (f.bits != nullptr) std::memcpy(f.bits + t * bytes_a_row + first / 8, fired_now, (static_cast<size_t>(count) + 7) / 8);
      }
      std::memcpy(static_cast<S*>(f.membrane_out) + first, state, static_cast<size_t>(count) * sizeof(S));
      std::copy_n(since, count, f.since_out + first);
    }
  });
}

// phi / threshold for `since` counted in lanes as wide as S.
template <class S>
struct TimeSlope {
  S height, beta;
  bool underflows;
  S denormal[16];  // exp(-since)^beta for 88..103, where float32 has lost digits

  explicit TimeSlope(const StdbBackward& f)
      : height(static_cast<S>(f.alpha / f.threshold.get())), beta(static_cast<S>(f.beta)), underflows(f.form == StdbForm::fp32_underflow) {
    for (int i = 0; i < 16; ++i) {
      // The exponential as float32 holds it: a few units of its smallest number, 2^-149.
      const double held = std::nearbyint(std::exp(-88.0 - i) * 0x1p149) * 0x1p-149;
      denormal[i] = static_cast<S>(std::pow(held, f.beta));
    }
  }
  template <class V, class C>
  PYACCEL_INLINE V operator()(C since) const {
    V phi;
    if constexpr (sizeof(V) == sizeof(S)) {
      phi = exp_of(-(static_cast<S>(since) * beta));
      if (underflows && since >= 88) phi = since >= 104 ? S(0) : denormal[since - 88];
    } else {
      phi = exp_of(-(__builtin_convertvector(since, V) * beta));
      if (underflows && mask_bits(since > C{} + 87) != 0)
        for (int i = 0; i < Simd<S>::lanes; ++i)
          if (since[i] >= 88) phi[i] = since[i] >= 104 ? S(0) : denormal[since[i] - 88];
    }
    return phi * height;
  }
};

template <class E>
void backward(const StdbBackward& f) {
  using S = typename StateOf<E>::type;
  using C = Count<S>;
  const int64_t row = f.sequence.neurons, T = f.sequence.steps, bytes_a_row = (row + 7) / 8;
  const int64_t segments = (T + kSegment - 1) / kSegment, blocks = (row + kBlock - 1) / kBlock;
  const TimeSlope<S> slope(f);
  const S leak = static_cast<S>(f.leak.get());
  const int threads = threads_for(2 * T * row * static_cast<int64_t>(sizeof(E)), blocks);
  parallel_shares(blocks, threads, [&](int64_t begin, int64_t end, int) {
    // starts[k]: `since` before segment k; held[t]: `since` at step t of the segment in hand.
    C* starts = static_cast<C*>(scratch(0, static_cast<size_t>(segments * kBlock) * sizeof(C)));
    C* held = static_cast<C*>(scratch(1, static_cast<size_t>((kSegment + 1) * kBlock) * sizeof(C)));
    alignas(64) S delta[kBlock];
    int32_t first_since[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kBlock, count = std::min(kBlock, row - first);
      const auto advance = [&](int64_t t, const C* from, C* to) PYACCEL_LAMBDA_INLINE {
        const uint8_t* bits = f.bits + t * bytes_a_row + first / 8;
        for (int64_t j = 0; j < count; ++j) to[j] = (bits[j / 8] >> (j % 8) & 1) != 0 ? C(1) : from[j] + 1;
      };
      start_since(f.since, first, count, first_since);
      std::copy_n(first_since, count, starts);
      for (int64_t k = 0; k + 1 < segments; ++k) {
        std::copy_n(starts + k * kBlock, count, held);
        for (int64_t t = k * kSegment; t < (k + 1) * kSegment; ++t) advance(t, held, held);
        std::copy_n(held, count, starts + (k + 1) * kBlock);
      }
      if (f.grad_membrane != nullptr) std::memcpy(delta, static_cast<const S*>(f.grad_membrane) + first, static_cast<size_t>(count) * sizeof(S));
      else std::fill_n(delta, count, S(0));
      for (int64_t k = segments - 1; k >= 0; --k) {
        const int64_t t0 = k * kSegment, t1 = std::min(T, t0 + kSegment);
        std::copy_n(starts + k * kBlock, count, held);
        for (int64_t t = t0; t + 1 < t1; ++t) advance(t, held + (t - t0) * kBlock, held + (t - t0 + 1) * kBlock);
        for (int64_t t = t1 - 1; t >= t0; --t) {
          const E* g = f.grad_spikes != nullptr ? static_cast<const E*>(f.grad_spikes) + t * row + first : nullptr;
          E* gx = static_cast<E*>(f.grad_current) + t * row + first;
          const C* since = held + (t - t0) * kBlock;
          over<S>(count, [&](auto v, int64_t j) PYACCEL_LAMBDA_INLINE {
            using V = decltype(v);
            const V d = load_as<V>(delta + j);
            store_as<false>(gx + j, d);
            V next = d * leak;
            if (g != nullptr) {
              if constexpr (sizeof(V) == sizeof(S)) next = load(g + j) * slope.template operator()<V>(since[j]) + next;
              else next = load_as<V>(g + j) * slope.template operator()<V>(__builtin_bit_cast(Counts<S>, load_vec(reinterpret_cast<const S*>(since + j)))) + next;
            }
            store_as<false>(delta + j, next);
          });
        }
      }
      if (f.grad_membrane_in != nullptr)
        std::memcpy(static_cast<S*>(f.grad_membrane_in) + first, delta, static_cast<size_t>(count) * sizeof(S));
    }
  });
}

}  // namespace

void stdb_forward(const StdbForward& f) {
  with_element(f.sequence.dtype, [&](auto e) { forward<decltype(e)>(f); });
}

void stdb_backward(const StdbBackward& f) {
  with_element(f.sequence.dtype, [&](auto e) { backward<decltype(e)>(f); });
}

}  // namespace pyaccel::neuron::PYACCEL_ISA
