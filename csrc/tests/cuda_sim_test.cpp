// The LIF, STDB, encoder and packing kernels, their sources unchanged, on the simulator of cuda_sim/, against plain
// loops. Random cases over types, layouts, alignments, lengths and options, threads in three orders; then negative
// controls. g++ -std=c++20 -O1 -ffp-contract=off -Wno-unknown-pragmas -Icsrc/tests/cuda_sim
// csrc/tests/cuda_sim_test.cpp
#define PYACCEL_LIF_SMALL_ROW 0
#include "../neuron/encode_cuda.cu"
#include "../neuron/lif_cuda.cu"
#include "../neuron/pack_cuda.cu"
#include "../neuron/stdb_cuda.cu"
#include "cuda_sim/reference.h"
#include "cuda_sim/simulator.h"

namespace {

using namespace check;

// ---------------------------------------------------------------------------------------------------- LIF
template <class T>
void lif_case() {
  using S = State<T>;
  static const int64_t outers[] = {1, 3, 40, 133}, channel_counts[] = {1, 3, 8}, inners[] = {1, 4, 7, 16};
  Sequence q{dtype_of<T>(), one_of(kSteps), 0, one_of(channel_counts), one_of(inners)};
  const int64_t row = q.neurons = one_of(outers) * q.channels * q.inner, steps = q.steps;
  Options o = random_options(q.channels, true);
  Neuron neuron = o.neuron;
  const Tables<S> tables(o, neuron);
  const bool shifted = pick(4) == 0, packed = coin(), with_state = coin(), with_g = pick(5) != 0, with_gm = coin();
  const int64_t every = steps > 32 ? (coin() ? 32 : 7) : coin() ? 3 : 0;
  const int64_t kept = every > 0 && steps > 0 ? (steps - 1) / every : 0;
  context = "lif " + std::string(name(q.dtype)) + " T=" + std::to_string(steps) + " N=" + std::to_string(row) +
            " C=" + std::to_string(q.channels) + " inner=" + std::to_string(q.inner) +
            " reset=" + std::to_string(static_cast<int>(neuron.reset)) +
            " detach=" + std::to_string(neuron.detach_reset) + " delay=" + std::to_string(neuron.delay) +
            " surrogate=" + std::to_string(static_cast<int>(neuron.surrogate)) + " every=" + std::to_string(every) +
            " shifted=" + std::to_string(shifted) + " packed=" + std::to_string(packed);

  Array<T> x(steps * row, shifted), spikes(steps * row, shifted), g(steps * row), gx(steps * row, shifted);
  Array<S> state(row), out(row), checkpoints(kept * row), gm(row), gm_in(row), leak(row), threshold(row);
  Array<uint8_t> bits(steps * ((row + 7) / 8));
  fill_normal(x, 0.3, 0.8);
  fill_normal(g, 0, 1);
  fill_normal(state, 0.2, 0.5);
  fill_normal(gm, 0, 1);

  LifForward f{neuron, q, x.data()};
  f.membrane = with_state ? state.data() : nullptr;
  f.spikes = packed ? static_cast<void*>(bits.data()) : spikes.data();
  f.membrane_out = out.data();
  f.checkpoints = checkpoints.data();
  f.checkpoint_every = every;
  f.packed = packed;
  neuron::cuda::lif_forward(f, 0, nullptr);

  LifBackward b{neuron, q, x.data()};
  b.membrane = f.membrane;
  b.checkpoints = checkpoints.data();
  b.checkpoint_every = every;
  b.grad_spikes = with_g ? g.data() : nullptr;
  b.grad_membrane = with_gm ? gm.data() : nullptr;
  b.grad_current = gx.data();
  const bool wants_membrane = coin(), wants_leak = coin(), wants_threshold = coin();
  b.grad_membrane_in = wants_membrane ? gm_in.data() : nullptr;
  b.grad_leak = wants_leak ? leak.data() : nullptr;
  b.grad_threshold = wants_threshold ? threshold.data() : nullptr;
  neuron::cuda::lif_backward(b, 0, nullptr);

  std::vector<T> want_spikes(static_cast<size_t>(steps * row));
  std::vector<bool> fired(static_cast<size_t>(steps * row));
  std::vector<S> want_out(static_cast<size_t>(row)), want_kept(static_cast<size_t>(kept * row));
  std::vector<double> want_gx(static_cast<size_t>(steps * row)), want_gm(want_out.size()), want_leak(want_out.size()),
      want_threshold(want_out.size());
  for (int64_t n = 0; n < row; ++n) {
    const int64_t channel = n / q.inner % q.channels;
    const size_t at = static_cast<size_t>(n);
    const auto trace =
        run_neuron(cell_of<S>(o, channel), neuron.delay, with_state ? state[n] : S(0), column(x, steps, row, n));
    const auto r = run_back(o, channel, trace, gradient_column(g, with_g, steps, row, n), with_gm ? gm[n] : 0.0);
    for (int64_t t = 0; t < steps; ++t) {
      const size_t i = static_cast<size_t>(t * row + n);
      fired[i] = trace.fired[static_cast<size_t>(t)];
      want_spikes[i] = spike_of<T>(fired[i]);
      want_gx[i] = r.delta[static_cast<size_t>(t)];
    }
    for (int64_t k = 0; k < kept; ++k)
      want_kept[static_cast<size_t>(k * row + n)] = trace.before[static_cast<size_t>((k + 1) * every)];
    want_out[at] = trace.last;
    want_gm[at] = r.membrane;
    want_leak[at] = r.leak;
    want_threshold[at] = r.threshold;
  }
  if (packed) expect_equal(bits, bits_of(fired, steps, row), "packed spikes");
  else expect_equal(spikes, want_spikes, "spikes");
  expect_equal(out, want_out, "membrane");
  expect_equal(checkpoints, want_kept, "checkpoints");
  expect_close(gx, want_gx, tolerance<T>(), "gradient of the current");
  if (wants_membrane) expect_close(gm_in, want_gm, tolerance<S>(), "gradient of the membrane");
  if (wants_leak) expect_close(leak, want_leak, tolerance<S>(), "gradient of the leak");
  if (wants_threshold) expect_close(threshold, want_threshold, tolerance<S>(), "gradient of the threshold");
}

// ------------------------------------------------------------------------------------------------ encoder
template <class T>
void encode_case() {
  using S = State<T>;
  static const int64_t channel_counts[] = {1, 2, 3, 5}, inners[] = {1, 3, 4, 16, 49}, sample_counts[] = {1, 2, 70};
  Encode e{dtype_of<T>(), pick(6), one_of(sample_counts), 0, one_of(channel_counts), one_of(inners), coin()};
  e.pixels = e.channels * e.inner;
  e.gain = coin() ? 1 : 0.6;
  e.seed = random_bits();
  e.stream = static_cast<uint32_t>(random_bits());
  e.first_step = static_cast<uint32_t>(pick(1000));
  const bool shifted = pick(4) == 0, with_ids = coin();
  Array<T> image(e.samples * e.pixels, shifted), spikes(e.steps * e.samples * e.pixels, shifted);
  Array<int64_t> ids(e.samples);
  fill_normal(image, 0.1, 0.6);
  if (image.size() > 6) {
    image[1] = from_state<T>(S(NAN));
    image[2] = from_state<T>(S(0));
    image[3] = from_state<T>(S(-INFINITY));
  }
  for (int64_t i = 0; i < e.samples; ++i) ids[i] = static_cast<int64_t>(random_bits() % 100000);
  e.sample_ids = with_ids ? ids.data() : nullptr;
  e.image = image.data();
  e.spikes = spikes.data();
  context = "encode " + std::string(name(e.dtype)) + " C=" + std::to_string(e.channels) +
            " inner=" + std::to_string(e.inner) + " last=" + std::to_string(e.channels_last) +
            " shifted=" + std::to_string(shifted);
  neuron::cuda::encode(e, 0, nullptr);

  std::vector<T> want(static_cast<size_t>(spikes.size()));
  for (int64_t t = 0; t < e.steps; ++t)
    for (int64_t s = 0; s < e.samples; ++s)
      for (int64_t p = 0; p < e.pixels; ++p) {
        const int64_t place = s * e.pixels + (e.channels_last ? p / e.inner + p % e.inner * e.channels : p);
        const uint64_t sample = static_cast<uint64_t>(with_ids ? ids[s] : s);
        const auto words = philox::draw(e.seed, sample << 32 | static_cast<uint64_t>(p / 4), e.stream,
                                        philox::kEncoder + ((e.first_step + static_cast<uint32_t>(t)) << 8));
        const S v = to_state(image[place]), chance = static_cast<S>(e.gain) * std::fabs(v);
        const double bound = std::isnan(chance) ? 0 : std::floor(std::min<double>(chance, 1) * 4294967296.0);
        const bool fires = static_cast<double>(words.w[p % 4]) < bound;
        want[static_cast<size_t>(t * e.samples * e.pixels + place)] =
            from_state<T>(static_cast<S>(fires ? (v < 0 ? -1 : 1) : 0));
      }
  expect_equal(spikes, want, "spikes");
}

// ------------------------------------------------------------------------------------------------ packing
template <class T>
void pack_case() {
  using S = State<T>;
  static const int64_t lengths[] = {1, 7, 8, 9, 64, 129, 4096};
  const int64_t rows = pick(5), length = one_of(lengths), pitch = (length + 7) / 8;
  const int planes = 1 + pick(4);
  const bool shifted = pick(3) == 0;
  context = "pack " + std::string(name(dtype_of<T>())) + " rows=" + std::to_string(rows) +
            " length=" + std::to_string(length) + " planes=" + std::to_string(planes);
  const int low = planes % 2 == 0 ? -(1 << (planes - 1)) : 0, unit = planes >= 3 ? 4 : 1;
  Array<T> spikes(rows * length, shifted), back(rows * length, shifted);
  Array<uint8_t> bytes(planes * rows * pitch);
  std::vector<uint8_t> want_bytes(static_cast<size_t>(bytes.size()));
  std::vector<T> want;
  for (int64_t i = 0; i < spikes.size(); ++i) {
    const int code = low + pick(1 << planes);
    want.push_back(from_state<T>(static_cast<S>(code) / static_cast<S>(unit)));
    spikes[i] = want.back();
    for (int k = 0; k < planes; ++k)
      want_bytes[static_cast<size_t>((k * rows + i / length) * pitch + i % length / 8)] |=
          static_cast<uint8_t>((code >> k & 1) << (i % length % 8));
  }
  neuron::cuda::pack({dtype_of<T>(), planes, rows, length, spikes.data(), bytes.data()}, 0, nullptr);
  neuron::cuda::unpack({dtype_of<T>(), planes, rows, length, bytes.data(), back.data()}, 0, nullptr);
  expect_equal(bytes, want_bytes, "bits");
  expect_equal(back, want, "unpacked");
}

// ------------------------------------------------------------------------------------------- STDB neuron
template <class T>
void stdb_case() {
  using S = State<T>;
  static const int64_t rows[] = {1, 7, 8, 129, 1024}, lengths[] = {0, 1, 5, 32, 33, 64, 150};
  const Sequence q{dtype_of<T>(), one_of(lengths), one_of(rows)};
  const int64_t row = q.neurons, steps = q.steps;
  const bool shifted = pick(4) == 0, with_state = coin(), with_since = coin(), with_g = pick(5) != 0, with_gm = coin();
  context = "stdb " + std::string(name(q.dtype)) + " T=" + std::to_string(steps) + " N=" + std::to_string(row) +
            " shifted=" + std::to_string(shifted) + " since=" + std::to_string(with_since);
  Array<T> x(steps * row, shifted), spikes(steps * row, shifted), g(steps * row, shifted), gx(steps * row, shifted);
  Array<S> state(row), out(row), gm(row), gm_in(row);
  Array<int32_t> since(row), since_out(row);
  Array<uint8_t> bits(steps * ((row + 7) / 8));
  fill_normal(x, 0.05, 0.3);
  fill_normal(g, 0, 1);
  fill_normal(state, 0.2, 0.5);
  fill_normal(gm, 0, 1);
  for (int64_t n = 0; n < row; ++n) since[n] = 1 + pick(120);
  // In memory of the device as often as not: kernels read them there.
  const double leak = 0.95, threshold = 0.8;
  const bool held = coin();
  StdbForward f{q, {held ? 7 : leak, held ? &leak : nullptr}, {held ? 7 : threshold, held ? &threshold : nullptr}, x.data()};
  f.membrane = with_state ? state.data() : nullptr;
  f.since = with_since ? since.data() : nullptr;
  f.spikes = spikes.data();
  f.membrane_out = out.data();
  f.since_out = since_out.data();
  f.bits = bits.data();
  neuron::cuda::stdb_forward(f, 0, nullptr);
  StdbBackward b{q,       f.leak,     f.threshold, 0.3, 0.05, coin() ? StdbForm::exact : StdbForm::fp32_underflow,
                 f.since, bits.data()};
  b.grad_spikes = with_g ? g.data() : nullptr;
  b.grad_membrane = with_gm ? gm.data() : nullptr;
  b.grad_current = gx.data();
  b.grad_membrane_in = gm_in.data();
  neuron::cuda::stdb_backward(b, 0, nullptr);

  Options o;
  o.neuron.leak.value = leak;
  o.neuron.threshold.value = threshold;
  std::vector<bool> fired(static_cast<size_t>(steps * row));
  std::vector<T> want_spikes(fired.size());
  std::vector<S> want_out;
  std::vector<int32_t> want_since;
  std::vector<double> want_gx(fired.size()), want_gm;
  for (int64_t n = 0; n < row; ++n) {
    const auto trace = run_neuron(cell_of<S>(o, 0), true, with_state ? state[n] : S(0), column(x, steps, row, n));
    const auto gs = gradient_column(g, with_g, steps, row, n);
    std::vector<int32_t> count{with_since ? since[n] : 999};
    for (const bool spike : trace.fired) count.push_back(spike ? 1 : count.back() + 1);
    double delta = with_gm ? gm[n] : 0;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const size_t i = static_cast<size_t>(t * row + n);
      const int32_t c = count[static_cast<size_t>(t)];
      double phi = std::exp(-0.05 * c);
      if (b.form == StdbForm::fp32_underflow && c >= 88)
        phi = c >= 104 ? 0 : std::pow(std::nearbyint(std::exp(-static_cast<double>(c)) * 0x1p149) * 0x1p-149, 0.05);
      fired[i] = trace.fired[static_cast<size_t>(t)];
      want_spikes[i] = spike_of<T>(fired[i]);
      want_gx[i] = delta;
      delta = gs[static_cast<size_t>(t)] * phi * 0.3 / 0.8 + static_cast<double>(static_cast<S>(leak)) * delta;
    }
    want_gm.push_back(delta);
    want_out.push_back(trace.last);
    want_since.push_back(count.back());
  }
  expect_equal(spikes, want_spikes, "spikes");
  expect_equal(bits, bits_of(fired, steps, row), "bits");
  expect_equal(out, want_out, "membrane");
  expect_equal(since_out, want_since, "steps since the last spike");
  expect_close(gx, want_gx, tolerance<T>(), "gradient of the current");
  expect_close(gm_in, want_gm, tolerance<S>(), "gradient of the membrane");
}

// ------------------------------------------------------------------------------------------ negative controls
void reverse_without_barrier(int* to, bool barrier) {
  int* const shared = pyaccel::cuda::dynamic_shared<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncthreads();
  to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
void half_at_barrier() {
  if (threadIdx.x < 16) __syncthreads();
}
void write_behind(int bytes) {
  pyaccel::cuda::dynamic_shared<char>()[bytes] = 0;
}

int64_t wrong_reversed(bool barrier) {
  std::vector<int> to(64, -1);
  pyaccel::cuda::launch("control", reverse_without_barrier, {1, 64, 64 * sizeof(int)}, {}, to.data(), barrier);
  int64_t wrong = 0;
  for (int i = 0; i < 64; ++i) wrong += to[static_cast<size_t>(i)] != 63 - i;
  return wrong;
}

void controls() {
  context = "negative controls";
  expect(wrong_reversed(true) == 0, "a correct kernel must pass");
  expect(wrong_reversed(false) > 0, "a missing barrier must show");
  expect(sim::aborts([] { pyaccel::cuda::launch("control", half_at_barrier, {1, 64, 0}, {}); }),
         "a divergent barrier must abort");
  expect(sim::aborts([] { pyaccel::cuda::launch("control", write_behind, {1, 32, 64}, {}, 64); }),
         "a write behind the shared memory must abort");
  // The comparison itself: a leak off by 1e-4 must change bits of the state.
  Array<float> x(9 * 50), spikes(9 * 50), out(50);
  fill_normal(x, 0.3, 0.8);
  std::vector<float> want;
  LifForward f{{}, {Dtype::f32, 9, 50}, x.data()};
  f.neuron.leak.value = 0.9001;
  f.neuron.threshold.value = 0.75;
  f.spikes = spikes.data();
  f.membrane_out = out.data();
  neuron::cuda::lif_forward(f, 0, nullptr);
  int64_t different = 0;
  Neuron right = f.neuron;
  right.leak.value = 0.9;
  for (int64_t n = 0; n < 50; ++n) {
    const auto cell = make_cell<float>(right, 0.9f, 0.75f);
    different += run_neuron(cell, false, 0.0f, column(x, 9, 50, n)).last != out[n];
  }
  expect(different > 25, "a wrong leak must show");
  // Refusals.
  LifBackward b{{}, {Dtype::f32, 40, 8}};
  bool refused = false;
  try {
    neuron::cuda::lif_backward(b, 0, nullptr);
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("at most 32 steps") != std::string::npos;
  }
  expect(refused, "40 steps without checkpoints must be refused");
  f.sequence.neurons = int64_t{1} << 31;
  refused = false;
  try {
    neuron::cuda::lif_forward(f, 0, nullptr);
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("split the batch") != std::string::npos;
  }
  expect(refused, "a row of 2^31 neurons must be refused");
  bool reported = false;
  try {
    pyaccel::cuda::launch("too_wide", half_at_barrier, {1, 2048, 0}, {});
  } catch (const std::runtime_error& error) {
    reported = std::string(error.what()).find("too_wide: CUDA error") != std::string::npos;
  }
  expect(reported, "a refused launch must name its kernel");
}

}  // namespace

int main() {
  for (int i = 0; i < 90; ++i) {
    sim::order = static_cast<sim::Order>(i % 3);
    lif_case<float>();
    lif_case<double>();
    lif_case<__half>();
    lif_case<__nv_bfloat16>();
  }
  for (int i = 0; i < 60; ++i) {
    encode_case<float>();
    encode_case<double>();
    encode_case<__half>();
    encode_case<__nv_bfloat16>();
    pack_case<float>();
    pack_case<double>();
    pack_case<__half>();
    pack_case<__nv_bfloat16>();
    stdb_case<float>();
    stdb_case<double>();
    stdb_case<__half>();
    stdb_case<__nv_bfloat16>();
  }
  const int before = check::failures;
  sim::order = sim::Order::forward;
  controls();
  std::printf("cuda_sim_test: %d launches, %d failures in kernels, %d in controls\n", sim::launches, before,
              check::failures - before);
  return check::failures == 0 ? 0 : 1;
}
