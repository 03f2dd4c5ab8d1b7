// The BNTT kernels, their sources unchanged, on the simulator of cuda_sim/, against plain loops: see cuda_sim_test.cpp.
#include "../neuron/bntt_backward_cuda.cu"
#include "../neuron/bntt_cuda.cu"
#include "cuda_sim/reference.h"
#include "cuda_sim/simulator.h"

namespace {

using namespace check;

struct Case {
  BnttShape shape;
  Options options;
  bool shifted, with_state, packed, batch, with_g, with_gm;
  int64_t row, positions;
  double eps = 1e-3;
};

template <class T>
Case random_case() {
  static const int64_t outers[] = {1, 2, 9, 40}, channel_counts[] = {1, 3, 4, 8, 40}, inners[] = {1, 1, 4, 7, 36};
  Case c{{dtype_of<T>(), one_of(kSteps), one_of(outers), one_of(channel_counts), one_of(inners)},
         {},
         pick(4) == 0,
         coin(),
         coin(),
         pick(4) != 0,
         pick(5) != 0,
         coin(),
         0,
         0};
  const BnttShape& s = c.shape;
  c.options = random_options(s.channels, false);
  c.row = s.outer * s.channels * s.inner;
  c.positions = s.outer * s.inner;
  context =
      "bntt " + std::string(name(s.dtype)) + " T=" + std::to_string(s.steps) + " outer=" + std::to_string(s.outer) +
      " C=" + std::to_string(s.channels) + " inner=" + std::to_string(s.inner) + " batch=" + std::to_string(c.batch) +
      " shifted=" + std::to_string(c.shifted) + " reset=" + std::to_string(static_cast<int>(c.options.neuron.reset)) +
      " surrogate=" + std::to_string(static_cast<int>(c.options.neuron.surrogate));
  return c;
}

// Inputs of a case, and statistics: those of the batch as the kernel measured them, or made up.
template <class T>
struct Inputs {
  using S = State<T>;
  Array<T> x, g;
  Array<S> weight, mean, var, state, gm;
  explicit Inputs(const Case& c)
      : x(c.shape.steps * c.row, c.shifted),
        g(x.size()),
        weight(c.shape.steps * c.shape.channels),
        mean(weight.size()),
        var(weight.size()),
        state(c.row),
        gm(c.row) {
    fill_normal(x, 3, 0.8);
    fill_normal(g, 0, 1);
    fill_normal(weight, 0.6, 0.3);
    fill_normal(state, 0.2, 0.5);
    fill_normal(gm, 0, 1);
    if (c.batch) return;
    fill_normal(mean, 3, 0.1);
    for (int64_t i = 0; i < var.size(); ++i) var[i] = static_cast<S>(0.5 + 0.1 * static_cast<double>(i % 5));
  }
};

// Where the numbers of element i of [T, N] are in a table [T, C].
int64_t table_of(const BnttShape& s, int64_t row, int64_t i) {
  return i / row * s.channels + i % row / s.inner % s.channels;
}

// How many of mean and var differ from what a second look at x says.
template <class T>
int64_t wrong_statistics(const Case& c, const Inputs<T>& in, const Array<State<T>>& mean, const Array<State<T>>& var) {
  const BnttShape& s = c.shape;
  std::vector<double> means(static_cast<size_t>(mean.size())), vars(means.size());
  const double n = static_cast<double>(c.positions);
  for (int64_t i = 0; i < in.x.size(); ++i)
    means[static_cast<size_t>(table_of(s, c.row, i))] += static_cast<double>(to_state(in.x[i])) / n;
  for (int64_t i = 0; i < in.x.size(); ++i) {
    const size_t at = static_cast<size_t>(table_of(s, c.row, i));
    const double d = static_cast<double>(to_state(in.x[i])) - means[at];
    vars[at] += d * d / n;
  }
  const Tolerance limit = sizeof(T) == 8 ? Tolerance{1e-12, 1e-12} : Tolerance{1e-6, 1e-6};
  return differing(mean, means, limit) + differing(var, vars, limit);
}

// u, spikes and deltas of every neuron, with y as the kernels compute it.
template <class T>
struct Expected {
  std::vector<bool> fired;
  std::vector<State<T>> out;
  std::vector<double> delta, membrane, leak, threshold;  // the last two a channel
};
template <class T>
Expected<T> expected(const Case& c, const Inputs<T>& in) {
  using S = State<T>;
  const BnttShape& s = c.shape;
  Expected<T> e;
  e.fired.resize(static_cast<size_t>(s.steps * c.row));
  e.delta.resize(e.fired.size());
  e.leak.resize(static_cast<size_t>(s.channels));
  e.threshold.resize(e.leak.size());
  for (int64_t n = 0; n < c.row; ++n) {
    const int64_t channel = n / s.inner % s.channels;
    std::vector<S> y = column(in.x, s.steps, c.row, n);
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t at = t * s.channels + channel;
      const S scale = in.weight[at] * (S(1) / std::sqrt(in.var[at] + static_cast<S>(c.eps)));
      y[static_cast<size_t>(t)] = scale * (y[static_cast<size_t>(t)] - in.mean[at]);
    }
    const auto trace = run_neuron(cell_of<S>(c.options, channel), false, c.with_state ? in.state[n] : S(0), y);
    const auto r = run_back(c.options, channel, trace, gradient_column(in.g, c.with_g, s.steps, c.row, n),
                            c.with_gm ? in.gm[n] : 0.0);
    for (int64_t t = 0; t < s.steps; ++t) {
      e.fired[static_cast<size_t>(t * c.row + n)] = trace.fired[static_cast<size_t>(t)];
      e.delta[static_cast<size_t>(t * c.row + n)] = r.delta[static_cast<size_t>(t)];
    }
    e.out.push_back(trace.last);
    e.membrane.push_back(r.membrane);
    e.leak[static_cast<size_t>(channel)] += r.leak;
    e.threshold[static_cast<size_t>(channel)] += r.threshold;
  }
  return e;
}

template <class T>
void backward_case(const Case& c, const Neuron& neuron, const Inputs<T>& in, const Expected<T>& e) {
  using S = State<T>;
  const BnttShape& s = c.shape;
  const int64_t table = s.steps * s.channels;
  std::vector<double> s1(static_cast<size_t>(table)), s2(s1.size());
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t n = 0; n < c.row; ++n) {
      const int64_t i = t * c.row + n, at = table_of(s, c.row, i);
      s1[static_cast<size_t>(at)] += e.delta[static_cast<size_t>(i)];
      s2[static_cast<size_t>(at)] +=
          e.delta[static_cast<size_t>(i)] * (static_cast<double>(to_state(in.x[i])) - in.mean[at]);
    }
  Array<T> gx(in.x.size(), c.shifted);
  Array<S> gw(table), gm_in(c.row), leak(s.channels), threshold(s.channels), sums(2 * table);
  Array<uint4> scratch((neuron::cuda::bntt_scratch_bytes(s, true) + 15) / 16);
  const bool wants_weight = coin(), wants_membrane = coin(), wants_leak = coin(), wants_threshold = coin();
  BnttBackward b{neuron, s, c.eps, in.x.data(), in.weight.data()};
  b.membrane = c.with_state ? in.state.data() : nullptr;
  b.batch_statistics = c.batch;
  b.mean = in.mean.data();
  b.var = in.var.data();
  b.grad_spikes = c.with_g ? in.g.data() : nullptr;
  b.grad_membrane = c.with_gm ? in.gm.data() : nullptr;
  b.grad_current = gx.data();
  b.grad_weight = wants_weight ? gw.data() : nullptr;
  b.grad_membrane_in = wants_membrane ? gm_in.data() : nullptr;
  b.grad_leak = wants_leak ? leak.data() : nullptr;
  b.grad_threshold = wants_threshold ? threshold.data() : nullptr;
  double count = static_cast<double>(c.positions);
  const Tolerance of_sums = sizeof(T) == 8 ? Tolerance{1e-11, 1e-12} : Tolerance{2e-5, 4e-6};
  std::vector<double> want_gw;
  const auto weight_gradient = [&] {
    want_gw.clear();
    for (int64_t i = 0; i < table; ++i) want_gw.push_back(s2[static_cast<size_t>(i)] / std::sqrt(in.var[i] + c.eps));
  };
  weight_gradient();
  const bool two_steps = coin();
  if (two_steps) {
    b.phase = BnttPhase::sums_only;
    b.sums = sums.data();
    neuron::cuda::bntt_backward(b, scratch.data(), 0, nullptr);
    std::vector<double> want_sums = s1;
    want_sums.insert(want_sums.end(), s2.begin(), s2.end());
    expect_close(sums, want_sums, of_sums, "sums");
    for (int64_t i = 0; i < 2 * table; ++i) sums[i] += static_cast<S>(i % 3);  // another rank, as many elements
    for (int64_t i = 0; i < 2 * table; ++i)
      (i < table ? s1[static_cast<size_t>(i)] : s2[static_cast<size_t>(i - table)]) += static_cast<double>(i % 3);
    if (wants_weight) expect_close(gw, want_gw, of_sums, "gradient of the weight, own sums");
    weight_gradient();
    count *= 2;
    b.phase = BnttPhase::sums_given;
    b.count = count;
  }
  Array<uint4> fresh(scratch.size());  // nothing may be expected to survive between the two calls
  neuron::cuda::bntt_backward(b, fresh.data(), 0, nullptr);

  std::vector<double> want_gx(e.delta.size());
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t n = 0; n < c.row; ++n) {
      const int64_t i = t * c.row + n, at = table_of(s, c.row, i);
      const double variance = in.var[at] + c.eps, p = in.weight[at] / std::sqrt(variance);
      const double centred = static_cast<double>(to_state(in.x[i])) - in.mean[at];
      double rest = e.delta[static_cast<size_t>(i)];
      if (c.batch)
        rest -= s1[static_cast<size_t>(at)] / count + centred * s2[static_cast<size_t>(at)] / (count * variance);
      want_gx[static_cast<size_t>(i)] = p * rest;
    }
  Tolerance of_gx = tolerance<T>();
  if (c.batch && sizeof(T) < 8) of_gx.of_largest = 2e-5;  // the terms cancel, up to 1/sqrt(eps) times their size
  if (c.batch && sizeof(T) == 8) of_gx.of_largest = 1e-11;
  expect_close(gx, want_gx, of_gx, "gradient of the current");
  if (wants_weight) expect_close(gw, want_gw, of_sums, "gradient of the weight");
  if (wants_membrane) expect_close(gm_in, e.membrane, tolerance<S>(), "gradient of the membrane");
  if (wants_leak) expect_close(leak, e.leak, of_sums, "gradient of the leak");
  if (wants_threshold) expect_close(threshold, e.threshold, of_sums, "gradient of the threshold");
}

template <class T>
void bntt_case() {
  using S = State<T>;
  const Case c = random_case<T>();
  const BnttShape& s = c.shape;
  Inputs<T> in(c);
  Neuron neuron = c.options.neuron;
  const Tables<S> tables(c.options, neuron);
  Array<uint4> scratch((neuron::cuda::bntt_scratch_bytes(s, false) + 15) / 16);
  if (c.batch && coin()) {
    neuron::cuda::bntt_statistics({s, in.x.data(), in.mean.data(), in.var.data()}, scratch.data(), 0, nullptr);
    expect(wrong_statistics(c, in, in.mean, in.var) == 0, "statistics alone");
  }
  Array<T> spikes(in.x.size(), c.shifted);
  Array<uint8_t> bits(s.steps * ((c.row + 7) / 8));
  Array<S> out(c.row);
  BnttForward f{neuron, s, c.eps, in.x.data(), in.weight.data()};
  f.membrane = c.with_state ? in.state.data() : nullptr;
  f.batch_statistics = c.batch;
  f.mean = in.mean.data();
  f.var = in.var.data();
  f.spikes = c.packed ? static_cast<void*>(bits.data()) : spikes.data();
  f.membrane_out = out.data();
  f.packed = c.packed;
  neuron::cuda::bntt_forward(f, scratch.data(), 0, nullptr);
  if (c.batch) expect(wrong_statistics(c, in, in.mean, in.var) == 0, "statistics");

  const Expected<T> e = expected(c, in);
  std::vector<T> want_spikes;
  for (const bool fired : e.fired) want_spikes.push_back(spike_of<T>(fired));
  if (c.packed) expect_equal(bits, bits_of(e.fired, s.steps, c.row), "packed spikes");
  else expect_equal(spikes, want_spikes, "spikes");
  expect_equal(out, e.out, "membrane");
  backward_case(c, neuron, in, e);
}

// Without a neuron nothing runs and nothing is written.
void empty_case() {
  context = "bntt, empty batch";
  const BnttShape s{Dtype::f32, 3, 0, 4, 9};
  const int before = sim::launches;
  Array<uint4> scratch((neuron::cuda::bntt_scratch_bytes(s, true) + 15) / 16);
  neuron::cuda::bntt_statistics({s}, scratch.data(), 0, nullptr);
  neuron::cuda::bntt_forward({{}, s, 1e-3}, scratch.data(), 0, nullptr);
  neuron::cuda::bntt_backward({{}, s, 1e-3}, scratch.data(), 0, nullptr);
  expect(sim::launches == before, "an empty batch starts no kernel");
}

// A weight of zero must still learn: S2 may not come from y.
void zero_weight_case() {
  context = "bntt, weight zero";
  Case c{{Dtype::f32, 4, 6, 8, 4}, {}, false, false, false, true, true, false, 192, 24};
  c.options = random_options(8, false);
  c.options.neuron.surrogate = Surrogate::sigmoid;
  Inputs<float> in(c);
  for (int64_t i = 0; i < in.weight.size(); ++i) in.weight[i] = 0;
  Neuron neuron = c.options.neuron;
  const Tables<float> tables(c.options, neuron);
  Array<uint4> scratch((neuron::cuda::bntt_scratch_bytes(c.shape, true) + 15) / 16);
  neuron::cuda::bntt_statistics({c.shape, in.x.data(), in.mean.data(), in.var.data()}, scratch.data(), 0, nullptr);
  backward_case(c, neuron, in, expected(c, in));
}

void control() {
  context = "negative control";
  Array<float> a(2);
  a[0] = 1;
  a[1] = -1.001f;
  expect(differing(a, {1, -1}, tolerance<float>()) == 1, "a difference of 1e-3 must show");
  // Four positions left out of the sums, then counted.
  Case c{{Dtype::f32, 2, 300, 1, 4}, {}, false, false, false, true, true, false, 1200, 1200};
  c.options = random_options(1, false);
  Inputs<float> in(c);
  Array<float> slots(2 * 2 * 3), mean(2), var(2);
  index::ChannelGrid grid = index::statistics_grid(c.shape, 4);
  grid.positions -= 4;
  pyaccel::cuda::launch("control", neuron::cuda::bntt_statistics_kernel<float, 4, index::Lanes::one_channel>,
                        {2 * grid.blocks(), index::kStatisticsThreads, 8192}, {},
                        static_cast<const float*>(in.x.data()), grid, 1200u, 2, slots.data());
  for (int t = 0; t < 2; ++t) {
    const float from_first = slots[t] / 1200;
    mean[t] = in.x[t * 1200] + from_first;
    var[t] = slots[2 + t] / 1200 - from_first * from_first;
  }
  expect(wrong_statistics(c, in, mean, var) == 4, "positions left out must show");
}

}  // namespace

int main() {
  for (int i = 0; i < 24; ++i) {
    sim::order = static_cast<sim::Order>(i % 3);
    bntt_case<float>();
    bntt_case<double>();
    bntt_case<__half>();
    bntt_case<__nv_bfloat16>();
  }
  empty_case();
  zero_weight_case();
  control();
  std::printf("cuda_sim_bntt_test: %d launches, %d failures\n", sim::launches, check::failures);
  return check::failures == 0 ? 0 : 1;
}
