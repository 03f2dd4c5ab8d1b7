// A number whose products are fused into the sum they are added to: a*b + c rounds once and is one instruction.
// For gradients only, where a quarter of the instructions of lif_math.h goes; neuron state must round like the CPU.
#pragma once
#include <math.h>

#include "../core/cuda_vector.h"
#include "lif_math.h"

namespace pyaccel::neuron::cuda {

// Within two units in the last place, 0 for divisors beyond 2^126: surrogates are 0 there. IEEE division is a
// subroutine.
PYACCEL_DEVICE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
PYACCEL_DEVICE double quotient(double a, double b) {
  return a / b;
}

template <class S>
struct Fused {
  S value = 0;

  // Not yet rounded: becomes a Fused when nothing is added to it.
  struct Product {
    S a, b;
    PYACCEL_DEVICE operator Fused() const { return Fused(a * b); }
    PYACCEL_DEVICE friend Fused operator-(Product p) { return Fused(-p.a * p.b); }
    PYACCEL_DEVICE friend Fused operator+(Product p, Fused c) { return Fused(fma(p.a, p.b, c.value)); }
    PYACCEL_DEVICE friend Fused operator-(Product p, Fused c) { return Fused(fma(p.a, p.b, -c.value)); }
    PYACCEL_DEVICE friend Fused operator+(Fused c, Product p) { return p + c; }
    PYACCEL_DEVICE friend Fused operator-(Fused c, Product p) { return Fused(fma(-p.a, p.b, c.value)); }
    PYACCEL_DEVICE friend Fused operator+(Product p, Product q) { return p + Fused(q); }
    PYACCEL_DEVICE friend Product operator*(Product p, Fused c) { return {p.a * p.b, c.value}; }
    PYACCEL_DEVICE friend Product operator*(Fused c, Product p) { return {c.value, p.a * p.b}; }
    PYACCEL_DEVICE friend Fused operator/(Product p, Fused c) { return Fused(quotient(p.a * p.b, c.value)); }
    PYACCEL_DEVICE friend Fused operator/(Product p, Product q) { return Fused(quotient(p.a * p.b, q.a * q.b)); }
  };

  Fused() = default;
  PYACCEL_DEVICE Fused(S v) : value(v) {}

  PYACCEL_DEVICE friend Product operator*(Fused a, Fused b) { return {a.value, b.value}; }
  PYACCEL_DEVICE friend Fused operator+(Fused a, Fused b) { return Fused(a.value + b.value); }
  PYACCEL_DEVICE friend Fused operator-(Fused a, Fused b) { return Fused(a.value - b.value); }
  PYACCEL_DEVICE friend Fused operator/(Fused a, Product p) { return Fused(quotient(a.value, p.a * p.b)); }
  PYACCEL_DEVICE friend Fused operator-(Fused a) { return Fused(-a.value); }
  PYACCEL_DEVICE friend bool operator>(Fused a, Fused b) { return a.value > b.value; }
  PYACCEL_DEVICE friend bool operator<(Fused a, Fused b) { return a.value < b.value; }
  PYACCEL_DEVICE Fused& operator+=(Fused other) {
    value += other.value;
    return *this;
  }
  PYACCEL_DEVICE Fused& operator+=(Product p) {
    value = fma(p.a, p.b, value);
    return *this;
  }
};

}  // namespace pyaccel::neuron::cuda

// lif_math.h for these numbers. exp: inside a surrogate only, a few units in the last place and no effect on spikes.
// magnitude: a modifier of the operand instead of a comparison and a select.
namespace pyaccel::neuron {

template <>
PYACCEL_HD cuda::Fused<float> exp_of(cuda::Fused<float> x) {
#if defined(__CUDA_ARCH__)
  return __expf(x.value);
#else
  return ::expf(x.value);
#endif
}
template <>
PYACCEL_HD cuda::Fused<double> exp_of(cuda::Fused<double> x) {
  return ::exp(x.value);
}
template <>
PYACCEL_HD cuda::Fused<float> magnitude(cuda::Fused<float> a) {
  return ::fabsf(a.value);
}
template <>
PYACCEL_HD cuda::Fused<double> magnitude(cuda::Fused<double> a) {
  return ::fabs(a.value);
}

}  // namespace pyaccel::neuron
