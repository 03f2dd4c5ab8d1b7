// The arithmetic of one neuron and one step, written once. V is a scalar (CUDA, tails) or a SIMD vector (CPU):
// comparisons give a mask and `mask ? a : b` selects lane by lane in both.
//
// Reset and detach are numbers, not branches: a fired neuron keeps keep*u - drop with
// soft (1, threshold), hard (0, 0), none (1, 0). Exact: keep is 0 or 1, so a soft reset rounds once, like u - threshold.
#pragma once
#include "../core/host_device.h"
#include "neuron.h"

namespace pyaccel::neuron {

template <class V>
struct Cell {
  V leak, threshold;
  V keep, drop;              // what a fired neuron keeps of u, and what it loses
  V through_u, through_one;  // undetached: ds/du of the reset takes dv * (through_u*u + through_one)
};

// S is the scalar behind V: the switches are uniform, leak and threshold may differ from lane to lane.
template <class S, class V>
PYACCEL_HD Cell<V> make_cell(const Neuron& n, V leak, V threshold) {
  const V zero{};
  Cell<V> c{leak, threshold, zero, zero, zero, zero};
  if (n.reset != Reset::hard) c.keep = zero + S(1);
  if (n.reset == Reset::soft) c.drop = threshold;
  if (!n.detach_reset && n.reset == Reset::hard) c.through_u = zero + S(1);
  if (!n.detach_reset && n.reset == Reset::soft) c.through_one = threshold;
  return c;
}

// Prompt neuron: u before the reset, then the state after it.
template <class V>
PYACCEL_HD V integrate(const Cell<V>& c, V v, V x) {
  return c.leak * v + x;
}

template <class V>
PYACCEL_HD auto fires(const Cell<V>& c, V u) {
  return u > c.threshold;
}

template <class V>
PYACCEL_HD V after_reset(const Cell<V>& c, V u) {
  return fires(c, u) ? c.keep * u - c.drop : u;
}

// Delayed neuron: the next u from the last one. The reset is not leaked: it is taken after the leak.
template <class V>
PYACCEL_HD V delayed_step(const Cell<V>& c, V u, V x) {
  const auto fired = fires(c, u);
  const V kept = fired ? c.keep * u : u;
  const V next = c.leak * kept + x;
  return fired ? next - c.drop : next;
}

// ds/du of the surrogates: phi(a) / threshold with a = u/threshold - 1.
// scale and width are folded once: see Slope.
template <class V>
PYACCEL_HD V magnitude(V a) {
  return a > -a ? a : -a;
}

template <class S>
PYACCEL_HD S exp_of(S x);  // one scalar; the CPU adds a SIMD overload

template <Surrogate kind, class S>
struct Slope {
  S scale, width;
  // `inverse` = 1 / threshold.
  template <class V>
  PYACCEL_HD V operator()(V u, V inverse) const {
    if constexpr (kind == Surrogate::triangle) {
      // The lower of a rising and a falling line, cut off at 0: five operations. What does not depend on u is hoisted.
      const V level = inverse * scale;
      const V rise = level * inverse * (S(1) / width), left = level * (S(1) - S(1) / width), right = level * (S(1) + S(1) / width);
      const V z = u * rise, up = z + left, down = right - z;
      const V lower = up < down ? up : down;
      return lower > V{} ? lower : V{};  // NaN: no slope
    } else {
      const V a = u * inverse - S(1);
      if constexpr (kind == Surrogate::rectangle) {
        const V level = (scale / width) * inverse;
        return magnitude(a) < V{} + width * S(0.5) ? level : V{};
      } else if constexpr (kind == Surrogate::atan) {
        const V z = a * (S(1.57079632679489661923) * width);
        return (scale * width * S(0.5)) * inverse / (z * z + S(1));
      } else if constexpr (kind == Surrogate::sigmoid) {
        const V e = exp_of(-(magnitude(a) * width));  // sig*(1 - sig) = e / (1 + e)^2, even in a, no overflow
        const V d = e + S(1);
        return (scale * width) * inverse * e / (d * d);
      } else {
        const V d = magnitude(a) * width + S(1);
        return scale * inverse / (d * d);
      }
    }
  }
};

// The same, chosen at run time: for instantiations that are not worth a copy of the loops a surrogate.
template <class S>
struct AnySlope {
  Surrogate kind;
  S scale, width;
  template <class V>
  PYACCEL_HD V operator()(V u, V inverse) const {
    switch (kind) {
      case Surrogate::triangle: return Slope<Surrogate::triangle, S>{scale, width}(u, inverse);
      case Surrogate::rectangle: return Slope<Surrogate::rectangle, S>{scale, width}(u, inverse);
      case Surrogate::atan: return Slope<Surrogate::atan, S>{scale, width}(u, inverse);
      case Surrogate::sigmoid: return Slope<Surrogate::sigmoid, S>{scale, width}(u, inverse);
      default: return Slope<Surrogate::fast_sigmoid, S>{scale, width}(u, inverse);
    }
  }
};

// One step back. `dv`: gradient of the state after step t; returns delta = dL/du[t].
// detached: the caller knows that through_u and through_one are 0.
template <bool detached = false, class V, class Phi>
PYACCEL_HD V back(const Cell<V>& c, const Phi& phi_of, V inverse, V u, V g, V dv) {
  const V reduced = detached ? g : g - dv * (c.through_u * u + c.through_one);
  return reduced * phi_of(u, inverse) + (fires(c, u) ? c.keep * dv : dv);
}

// The delayed neuron's step back: `u` is u[t-1], `du` = dL/du[t]; returns dL/du[t-1].
// Its reset acts on leak*u (hard) and on u[t] (soft), hence the leak beside through_u.
template <bool detached = false, class V, class Phi>
PYACCEL_HD V delayed_back(const Cell<V>& c, const Phi& phi_of, V inverse, V u, V g, V du) {
  const V leaked = c.leak * du;
  const V reduced = detached ? g : g - (leaked * c.through_u * u + du * c.through_one);
  return reduced * phi_of(u, inverse) + (fires(c, u) ? c.keep * leaked : leaked);
}

// What one step adds to dL/dthreshold: the spike moves by -u/threshold per ds/du (a = u/threshold - 1), and a soft
// reset that is not detached takes the threshold itself.
template <class V, class Phi>
PYACCEL_HD V threshold_share(const Cell<V>& c, const Phi& phi_of, V inverse, V u, V g, V dv, bool soft_through) {
  const V reduced = g - dv * (c.through_u * u + c.through_one);
  const V taken = soft_through ? (fires(c, u) ? dv : V{}) : V{};
  return -(reduced * phi_of(u, inverse) * u * inverse + taken);
}

template <class V, class Phi>
PYACCEL_HD V delayed_threshold_share(const Cell<V>& c, const Phi& phi_of, V inverse, V u, V g, V du, bool soft_through) {
  const V reduced = g - (c.leak * du * c.through_u * u + du * c.through_one);
  const V taken = soft_through ? (fires(c, u) ? du : V{}) : V{};
  return -(reduced * phi_of(u, inverse) * u * inverse + taken);
}

}  // namespace pyaccel::neuron
