// Neurons as plain loops over lif_math.h, and random options, for the simulator's tests.
#pragma once
#include "../../neuron/lif_math.h"
#include "check.h"

namespace check {

using namespace pyaccel;
using namespace pyaccel::neuron;
using pyaccel::cuda::from_state;
using pyaccel::cuda::State;
using pyaccel::cuda::to_state;

struct Options {
  Neuron neuron;
  std::vector<double> leaks, thresholds;  // a channel
};

template <class S>
struct Tables {
  Array<S> leak, threshold;
  Tables(const Options& o, Neuron& n)
      : leak(static_cast<int64_t>(o.leaks.size())), threshold(static_cast<int64_t>(o.thresholds.size())) {
    for (int64_t i = 0; i < leak.size(); ++i) leak[i] = static_cast<S>(o.leaks[static_cast<size_t>(i)]);
    for (int64_t i = 0; i < threshold.size(); ++i) threshold[i] = static_cast<S>(o.thresholds[static_cast<size_t>(i)]);
    if (leak.size() > 0) n.leak.per_channel = leak.data();
    if (threshold.size() > 0) n.threshold.per_channel = threshold.data();
  }
};

inline Options random_options(int64_t channels, bool delay_allowed) {
  Options o;
  Neuron& n = o.neuron;
  n.leak.value = 0.9;
  n.threshold.value = 0.75;
  n.reset = static_cast<Reset>(pick(3));
  n.detach_reset = coin();
  n.delay = delay_allowed && coin();
  n.surrogate = static_cast<Surrogate>(pick(5));
  n.scale = 0.7;
  n.width = n.surrogate == Surrogate::fast_sigmoid ? 5 : 1.5;
  if (coin())
    for (int64_t c = 0; c < channels; ++c) o.leaks.push_back(0.5 + 0.5 * static_cast<double>(c % 7) / 7);
  if (coin())
    for (int64_t c = 0; c < channels; ++c) o.thresholds.push_back(0.5 + static_cast<double>(c % 5) / 5);
  return o;
}

// The parameters of one channel, as the kernels see them (rounded to S).
template <class S>
Cell<S> cell_of(const Options& o, int64_t channel) {
  const auto at = [&](const std::vector<double>& list, double value) {
    return static_cast<S>(list.empty() ? value : list[static_cast<size_t>(channel)]);
  };
  return make_cell<S>(o.neuron, at(o.leaks, o.neuron.leak.value), at(o.thresholds, o.neuron.threshold.value));
}

// ------------------------------------------------------------------------------------------- plain loops
// One neuron through time. State arithmetic in S, as the kernels must do it to the bit.
template <class S>
struct Trace {
  std::vector<S> before, u;  // state before each step; u before the reset (prompt) or after the step (delayed)
  std::vector<bool> fired;
  S last;
};
template <class S>
Trace<S> run_neuron(const Cell<S>& c, bool delay, S v, const std::vector<S>& x) {
  Trace<S> t;
  for (const S in : x) {
    t.before.push_back(v);
    if (delay) {
      t.fired.push_back(fires(c, v));
      v = delayed_step(c, v, in);
      t.u.push_back(v);
    } else {
      const S u = integrate(c, v, in);
      t.fired.push_back(fires(c, u));
      t.u.push_back(u);
      v = after_reset(c, u);
    }
  }
  t.last = v;
  return t;
}

struct Gradients {
  std::vector<double> delta;
  double membrane, leak = 0, threshold = 0;
};
// Gradients in double, from u as the forward pass had it.
template <class S>
Gradients run_back(const Options& o, int64_t channel, const Trace<S>& trace, const std::vector<double>& g,
                   double carry) {
  const Cell<S> narrow = cell_of<S>(o, channel);
  const Cell<double> c{narrow.leak, narrow.threshold, narrow.keep, narrow.drop, narrow.through_u, narrow.through_one};
  const double inverse = 1 / c.threshold, scale = o.neuron.scale, width = o.neuron.width;
  const auto slope = [&](double u, double inv) -> double {
    switch (o.neuron.surrogate) {
      case Surrogate::triangle: return Slope<Surrogate::triangle, double>{scale, width}(u, inv);
      case Surrogate::rectangle: return Slope<Surrogate::rectangle, double>{scale, width}(u, inv);
      case Surrogate::atan: return Slope<Surrogate::atan, double>{scale, width}(u, inv);
      case Surrogate::sigmoid: {
        const double s = 1 / (1 + std::exp(-width * (u * inv - 1)));
        return scale * width * s * (1 - s) * inv;
      }
      default: return Slope<Surrogate::fast_sigmoid, double>{scale, width}(u, inv);
    }
  };
  const bool through = !o.neuron.detach_reset && o.neuron.reset == Reset::soft;
  Gradients r;
  r.delta.resize(g.size());
  for (size_t i = g.size(); i-- > 0;) {
    const double before = trace.before[i], u = trace.u[i];
    if (o.neuron.delay) {
      r.delta[i] = carry;
      r.leak += carry * (fires(c, before) ? c.keep * before : before);
      r.threshold += delayed_threshold_share(c, slope, inverse, before, g[i], carry, through);
      carry = delayed_back(c, slope, inverse, before, g[i], carry);
    } else {
      r.delta[i] = back(c, slope, inverse, u, g[i], carry);
      r.leak += r.delta[i] * before;
      r.threshold += threshold_share(c, slope, inverse, u, g[i], carry, through);
      carry = c.leak * r.delta[i];
    }
  }
  r.membrane = carry;
  return r;
}

template <class T>
std::vector<State<T>> column(const Array<T>& x, int64_t steps, int64_t row, int64_t n) {
  std::vector<State<T>> values;
  for (int64_t t = 0; t < steps; ++t) values.push_back(to_state(x[t * row + n]));
  return values;
}
template <class T>
std::vector<double> gradient_column(const Array<T>& g, bool given, int64_t steps, int64_t row, int64_t n) {
  std::vector<double> values(static_cast<size_t>(steps), 0.0);
  if (given)
    for (int64_t t = 0; t < steps; ++t) values[static_cast<size_t>(t)] = static_cast<double>(to_state(g[t * row + n]));
  return values;
}

template <class T>
T spike_of(bool fired) {
  return from_state<T>(static_cast<State<T>>(fired ? 1 : 0));
}

// Bits of [steps, row] spikes, rows padded to bytes.
inline std::vector<uint8_t> bits_of(const std::vector<bool>& spikes, int64_t steps, int64_t row) {
  const int64_t pitch = (row + 7) / 8;
  std::vector<uint8_t> bytes(static_cast<size_t>(steps * pitch), 0);
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t n = 0; n < row; ++n)
      if (spikes[static_cast<size_t>(t * row + n)])
        bytes[static_cast<size_t>(t * pitch + n / 8)] |= static_cast<uint8_t>(1 << (n % 8));
  return bytes;
}

constexpr int64_t kSteps[] = {0, 1, 2, 4, 5, 8, 9, 25, 32, 33, 70};

}  // namespace check
