// What the CPU loops of this family share: the parameters of a block of neurons, and the choice of loops by dtype,
// surrogate and kind of parameter.
#pragma once
#include <type_traits>

#include "../core/exp.h"
#include "../core/simd.h"
#include "lif_math.h"

namespace pyaccel::neuron {

template <class V>
PYACCEL_HD V exp_of(V x) {
  return PYACCEL_ISA::exp_negative(x);
}

}  // namespace pyaccel::neuron

namespace pyaccel::neuron::PYACCEL_ISA {

using namespace ::pyaccel::PYACCEL_ISA;

// Vectors side by side in one step of the loops: 32 floats hide the latency of the recurrence and still fit the registers.
constexpr int kSideBySide = PYACCEL_VECTOR_BYTES == 64 ? 2 : 4;

// Leak and threshold of neurons 0.. of a block: one value, or (per_channel) arrays of one value a neuron.
template <class S, bool per_channel>
struct Parameters {
  const Neuron& neuron;
  S leak, threshold;
  const S* leaks = nullptr;
  const S* thresholds = nullptr;

  template <class V>
  PYACCEL_INLINE Cell<V> cell(int64_t j) const {
    if constexpr (per_channel) return make_cell<S>(neuron, load_as<V>(leaks + j), load_as<V>(thresholds + j));
    else return make_cell<S>(neuron, V{} + leak, V{} + threshold);
  }
  template <class V>
  PYACCEL_INLINE V inverse(int64_t j) const {
    if constexpr (per_channel) return (V{} + S(1)) / load_as<V>(thresholds + j);
    else return V{} + S(1) / threshold;
  }
};

template <class S>
PYACCEL_INLINE S value_of(const Parameter& p, int64_t channel) {
  return p.per_channel != nullptr ? static_cast<const S*>(p.per_channel)[channel] : static_cast<S>(p.value);
}

template <class F>
void with_element(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::f32: return run(float{});
    case Dtype::f64: return run(double{});
    case Dtype::bf16: return run(Bf16{});
    default: return run(Half{});
  }
}

// run(slope): loops of their own a surrogate where `specialised` (the fast types), else one copy that switches inside.
template <class S, bool specialised, class F>
void with_slope(const Neuron& n, const F& run) {
  const S scale = static_cast<S>(n.scale), width = static_cast<S>(n.width);
  if constexpr (!specialised) {
    run(AnySlope<S>{n.surrogate, scale, width});
  } else {
    switch (n.surrogate) {
      case Surrogate::triangle: return run(Slope<Surrogate::triangle, S>{scale, width});
      case Surrogate::rectangle: return run(Slope<Surrogate::rectangle, S>{scale, width});
      case Surrogate::atan: return run(Slope<Surrogate::atan, S>{scale, width});
      case Surrogate::sigmoid: return run(Slope<Surrogate::sigmoid, S>{scale, width});
      default: return run(Slope<Surrogate::fast_sigmoid, S>{scale, width});
    }
  }
}

template <class F>
void with_flag(bool flag, const F& run) {
  if (flag) run(std::true_type{});
  else run(std::false_type{});
}

}  // namespace pyaccel::neuron::PYACCEL_ISA
