// Python names of the neuron family: checks, device dispatch. Outputs are allocated by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "../core/dispatch.h"
#include "kernels_cpu.h"
#ifdef PYACCEL_CUDA
#include "neuron_cuda.h"
#endif

namespace py = pybind11;

namespace pyaccel::neuron {
namespace {

// The options of a neuron as they cross from Python: [leak, threshold, reset, detach_reset, delay, surrogate, scale, width],
// numbers all of them: an operator's schema takes one list for less than the cost of eight arguments.
using Options = std::array<double, 8>;

Neuron neuron_of(const Options& o) {
  Neuron n;
  n.leak.value = o[0];
  n.threshold.value = o[1];
  n.reset = static_cast<Reset>(o[2]);
  n.detach_reset = o[3] != 0;
  n.delay = o[4] != 0;
  n.surrogate = static_cast<Surrogate>(o[5]);
  n.scale = o[6];
  n.width = o[7];
  return n;
}

// [rows, ...]: one gap-free row behind the other.
bool rows_outermost(const Tensor& t) {
  const int64_t rows = t.shape[0], values = t.size();
  return is_dense(t, 1) && (rows <= 1 || values == 0 || t.strides[0] == values / rows);
}

struct Call {
  const char* op;
  const Tensor& current;
  Dtype state;

  Call(const char* op, const Tensor& current) : op(op), current(current), state(state_of(current.dtype)) {
    if (!current || current.ndim < 1 || !is_floating(current.dtype)) refuse(op, "current", "a floating tensor [T, ...]", current);
    if (!rows_outermost(current)) refuse(op, "current", "dense with time outermost", current);
  }
  // A tensor like `current`, one step of it in the state type, or a contiguous one; null where absent.
  void* sequence(const char* name, const Tensor& t) const {
    if (!t) return nullptr;
    if (!same_layout(required(op, name, t, current.dtype, current), 0, current, 0)) refuse(op, name, "of current's shape and strides", t);
    return t.data;
  }
  void* step(const char* name, const Tensor& t) const {
    if (!t) return nullptr;
    if (!same_layout(required(op, name, t, state, current), 0, current, 1)) refuse(op, name, "of the shape and strides of one step of current", t);
    return t.data;
  }
  void* plain(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    if (!t) return nullptr;
    return contiguous(op, name, required(op, name, t, state, current), shape).data;
  }
  // Spikes: like current, or [T, ceil(N / 8)] bytes.
  void* spikes(const Tensor& t, bool packed) const {
    if (!packed) return must("spikes", sequence("spikes", t), t);
    const int64_t steps = current.shape[0], row = steps > 0 ? current.size() / steps : 0;
    return contiguous(op, "spikes", required(op, "spikes", t, Dtype::u8, current), {steps, (row + 7) / 8}).data;
  }
  void* must(const char* name, void* data, const Tensor& t) const {
    if (!t) refuse(op, name, "given", t);
    return data;
  }
};

Sequence sequence_of(const Call& call, const Tensor& leak, const Tensor& threshold) {
  Sequence s{call.current.dtype};
  s.steps = call.current.shape[0];
  s.neurons = s.steps > 0 ? call.current.size() / s.steps : 0;
  if ((leak && leak.ndim > 0) || (threshold && threshold.ndim > 0)) {
    if (call.current.ndim < 3) refuse(call.op, "current", "[T, B, C, ...] for per-channel parameters", call.current);
    s.channels = call.current.shape[2];
    s.inner = s.channels > 1 ? call.current.strides[2] : 1;
  }
  return s;
}

// Values a channel: [C]; a 0-d tensor serves only where the sequence counts as one channel.
void set_parameter(const Call& call, const char* name, const Tensor& t, int64_t channels, Parameter& p) {
  if (!t) return;
  const bool single = t.ndim == 0 && channels == 1;
  p.per_channel = single ? required(call.op, name, t, call.state, call.current).data : call.plain(name, t, {channels});
}

BnttShape bntt_shape(const Call& call) {
  const Tensor& x = call.current;
  if (x.ndim < 3) refuse(call.op, "current", "[T, B, C, ...]", x);
  BnttShape s{x.dtype};
  s.steps = x.shape[0];
  s.channels = x.shape[2];
  int64_t pixels = 1, expected = 1;
  bool plain = true;
  for (int d = x.ndim - 1; d > 2; --d) {
    plain = plain && (x.shape[d] <= 1 || x.strides[d] == expected);
    expected *= x.shape[d];
    pixels *= x.shape[d];
  }
  plain = plain && (x.shape[2] <= 1 || x.strides[2] == expected);
  if (plain) {
    s.outer = x.shape[1];
    s.inner = pixels;
    return s;
  }
  expected = s.channels;  // channels innermost, then the pixels in order, then the batch
  bool last = x.shape[2] <= 1 || x.strides[2] == 1;
  for (int d = x.ndim - 1; d > 2; --d) {
    last = last && (x.shape[d] <= 1 || x.strides[d] == expected);
    expected *= x.shape[d];
  }
  if (!last || !(x.shape[1] <= 1 || x.strides[1] == expected)) refuse(call.op, "current", "contiguous or channels-last", x);
  s.outer = x.shape[1] * pixels;
  s.inner = 1;
  return s;
}

// What forward and backward of LIF are given alike.
template <class F>
F lif_of(const Call& call, const Tensor& membrane, const Tensor& leak, const Tensor& threshold, const Options& options, int64_t every,
         const Tensor& checkpoints) {
  F f{neuron_of(options), sequence_of(call, leak, threshold)};
  set_parameter(call, "leak", leak, f.sequence.channels, f.neuron.leak);
  set_parameter(call, "threshold", threshold, f.sequence.channels, f.neuron.threshold);
  f.current = call.current.data;
  f.membrane = call.step("membrane", membrane);
  if (every > 0) {
    f.checkpoint_every = every;
    const int64_t kept = f.sequence.steps > 0 ? (f.sequence.steps - 1) / every : 0;
    f.checkpoints = call.must("checkpoints", call.plain("checkpoints", checkpoints, {kept, f.sequence.neurons}), checkpoints);
  }
  return f;
}

// And of BNTT.
template <class F>
F bntt_of(const Call& call, const Tensor& weight, const Tensor& membrane, const Tensor& leak, const Tensor& threshold, const Options& options,
          double eps, bool batch_statistics, const Tensor& mean, const Tensor& var) {
  F f{neuron_of(options), bntt_shape(call)};
  const auto grid = {f.shape.steps, f.shape.channels};
  set_parameter(call, "leak", leak, f.shape.channels, f.neuron.leak);
  set_parameter(call, "threshold", threshold, f.shape.channels, f.neuron.threshold);
  f.eps = eps;
  f.current = call.current.data;
  f.weight = call.must("weight", call.plain("weight", weight, grid), weight);
  f.membrane = call.step("membrane", membrane);
  f.batch_statistics = batch_statistics;
  f.mean = call.must("mean", call.plain("mean", mean, grid), mean);
  f.var = call.must("var", call.plain("var", var, grid), var);
  return f;
}

void lif_forward(const Tensor& current, const Tensor& membrane, const Tensor& leak, const Tensor& threshold, const Options& options,
                 int64_t every, bool packed, const Tensor& spikes, const Tensor& membrane_out, const Tensor& checkpoints) {
  const Call call("lif", current);
  auto f = lif_of<LifForward>(call, membrane, leak, threshold, options, every, checkpoints);
  f.packed = packed;
  f.spikes = call.spikes(spikes, packed);
  f.membrane_out = call.must("membrane_out", call.step("membrane_out", membrane_out), membrane_out);
  if (f.sequence.neurons == 0) return;
  PYACCEL_ON(current, lif_forward, f)
  PYACCEL_RUN(lif_forward, f)
}

void lif_backward(const Tensor& current, const Tensor& membrane, const Tensor& leak, const Tensor& threshold, const Options& options,
                  int64_t every, const Tensor& checkpoints, const Tensor& grad_spikes, const Tensor& grad_membrane,
                  const Tensor& grad_current, const Tensor& grad_membrane_in, const Tensor& grad_leak, const Tensor& grad_threshold) {
  const Call call("lif_backward", current);
  auto f = lif_of<LifBackward>(call, membrane, leak, threshold, options, every, checkpoints);
  f.grad_spikes = call.sequence("grad_spikes", grad_spikes);
  f.grad_membrane = call.step("grad_membrane", grad_membrane);
  f.grad_current = call.must("grad_current", call.sequence("grad_current", grad_current), grad_current);
  f.grad_membrane_in = call.step("grad_membrane_in", grad_membrane_in);
  f.grad_leak = call.step("grad_leak", grad_leak);
  f.grad_threshold = call.step("grad_threshold", grad_threshold);
  if (f.sequence.neurons == 0) return;
  PYACCEL_ON(current, lif_backward, f)
  PYACCEL_RUN(lif_backward, f)
}

int64_t bntt_scratch_bytes(const Tensor& current, bool backward) {
#ifdef PYACCEL_CUDA
  if (current.on_cuda()) return cuda::bntt_scratch_bytes(bntt_shape(Call("bntt", current)), backward);
#endif
  (void)backward;
  (void)current;
  return 0;
}

void bntt_statistics(const Tensor& current, const Tensor& mean, const Tensor& var, const Tensor& scratch) {
  const Call call("bntt_statistics", current);
  BnttStatistics f{bntt_shape(call)};
  const auto grid = {f.shape.steps, f.shape.channels};
  f.current = current.data;
  f.mean = call.must("mean", call.plain("mean", mean, grid), mean);
  f.var = call.must("var", call.plain("var", var, grid), var);
  (void)scratch;
  if (current.size() == 0) return;
  PYACCEL_ON(current, bntt_statistics, f, scratch.data)
  PYACCEL_RUN(bntt_statistics, f)
}

void bntt_forward(const Tensor& current, const Tensor& weight, const Tensor& membrane, const Tensor& leak, const Tensor& threshold,
                  const Options& options, double eps, bool batch_statistics, bool packed, const Tensor& mean, const Tensor& var,
                  const Tensor& spikes, const Tensor& membrane_out, const Tensor& scratch) {
  const Call call("bntt_lif", current);
  auto f = bntt_of<BnttForward>(call, weight, membrane, leak, threshold, options, eps, batch_statistics, mean, var);
  f.packed = packed;
  if (packed && !packs_in_place(f.shape)) refuse(call.op, "current", "of whole bytes a channel for packed spikes", current);
  f.spikes = call.spikes(spikes, packed);
  f.membrane_out = call.must("membrane_out", call.step("membrane_out", membrane_out), membrane_out);
  (void)scratch;
  if (current.size() == 0) return;
  PYACCEL_ON(current, bntt_forward, f, scratch.data)
  PYACCEL_RUN(bntt_forward, f)
}

void bntt_backward(const Tensor& current, const Tensor& weight, const Tensor& membrane, const Tensor& leak, const Tensor& threshold,
                   const Options& options, double eps, bool batch_statistics, const Tensor& mean, const Tensor& var,
                   const Tensor& grad_spikes, const Tensor& grad_membrane, int phase, const Tensor& sums, double count,
                   const Tensor& grad_current, const Tensor& grad_weight, const Tensor& grad_membrane_in, const Tensor& grad_leak,
                   const Tensor& grad_threshold, const Tensor& scratch) {
  const Call call("bntt_lif_backward", current);
  auto f = bntt_of<BnttBackward>(call, weight, membrane, leak, threshold, options, eps, batch_statistics, mean, var);
  f.grad_spikes = call.sequence("grad_spikes", grad_spikes);
  f.grad_membrane = call.step("grad_membrane", grad_membrane);
  f.phase = static_cast<BnttPhase>(phase);
  f.sums = call.plain("sums", sums, {2, f.shape.steps, f.shape.channels});
  if (f.phase != BnttPhase::whole) call.must("sums", f.sums, sums);
  f.count = count;
  f.grad_current = call.sequence("grad_current", grad_current);
  if (f.phase != BnttPhase::sums_only) call.must("grad_current", f.grad_current, grad_current);
  f.grad_weight = call.plain("grad_weight", grad_weight, {f.shape.steps, f.shape.channels});
  f.grad_membrane_in = call.step("grad_membrane_in", grad_membrane_in);
  f.grad_leak = call.plain("grad_leak", grad_leak, {f.shape.channels});
  f.grad_threshold = call.plain("grad_threshold", grad_threshold, {f.shape.channels});
  (void)scratch;
  if (current.size() == 0) return;
  PYACCEL_ON(current, bntt_backward, f, scratch.data)
  PYACCEL_RUN(bntt_backward, f)
}

bool bntt_packs_in_place(const Tensor& current) { return packs_in_place(bntt_shape(Call("bntt_lif", current))); }

// [N] int32 in the layout of one step.
int32_t* counts(const Call& call, const char* name, const Tensor& t) {
  if (!t) return nullptr;
  if (!same_layout(required(call.op, name, t, Dtype::i32, call.current), 0, call.current, 1))
    refuse(call.op, name, "of the shape and strides of one step of current", t);
  return static_cast<int32_t*>(t.data);
}

uint8_t* bits_of(const Call& call, const Tensor& t, const Sequence& s) {
  if (!t) return nullptr;
  return static_cast<uint8_t*>(contiguous(call.op, "bits", required(call.op, "bits", t, Dtype::u8, call.current), {s.steps, (s.neurons + 7) / 8}).data);
}

// A number of an STDB neuron: given as it is, or as a 0-d float64 tensor. What lies on the CPU is read and checked here; a
// GPU is not waited for.
Scalar scalar_of(const Call& call, const char* name, const Tensor& t, double value, bool positive) {
  if (!t) return {value};
  const auto* data = static_cast<const double*>(contiguous(call.op, name, required(call.op, name, t, Dtype::f64, call.current), {}).data);
  if (t.on_cuda()) return {value, data};
  if (!std::isfinite(*data) || (positive && *data <= 0))
    throw py::value_error(std::string(call.op) + ": " + name + " must be a finite number" + (positive ? " above 0" : "") + ", got " + std::string(py::repr(py::float_(*data))));
  return {*data};
}

// [leak, threshold, alpha, beta, form]
using StdbOptions = std::array<double, 5>;

void stdb_forward(const Tensor& current, const Tensor& membrane, const Tensor& since, const Tensor& leak, const Tensor& threshold,
                  const StdbOptions& options, const Tensor& spikes, const Tensor& membrane_out, const Tensor& since_out, const Tensor& bits) {
  const Call call("stdb_lif", current);
  StdbForward f;
  f.sequence = sequence_of(call, {}, {});
  f.leak = scalar_of(call, "leak", leak, options[0], false);
  f.threshold = scalar_of(call, "threshold", threshold, options[1], true);
  f.current = current.data;
  f.membrane = call.step("membrane", membrane);
  f.since = counts(call, "since", since);
  f.spikes = call.spikes(spikes, false);
  f.membrane_out = call.must("membrane_out", call.step("membrane_out", membrane_out), membrane_out);
  f.since_out = static_cast<int32_t*>(call.must("since_out", counts(call, "since_out", since_out), since_out));
  f.bits = bits_of(call, bits, f.sequence);
  if (f.sequence.neurons == 0) return;
  PYACCEL_ON(current, stdb_forward, f)
  PYACCEL_RUN(stdb_forward, f)
}

// `like`: the gradient of the current, whose layout the others follow.
void stdb_backward(const Tensor& grad_current, const Tensor& since, const Tensor& bits, const Tensor& leak, const Tensor& threshold,
                   const StdbOptions& options, const Tensor& grad_spikes, const Tensor& grad_membrane, const Tensor& grad_membrane_in) {
  const Call call("stdb_lif_backward", grad_current);
  StdbBackward f;
  f.sequence = sequence_of(call, {}, {});
  f.leak = scalar_of(call, "leak", leak, options[0], false);
  f.threshold = scalar_of(call, "threshold", threshold, options[1], true);
  f.alpha = options[2];
  f.beta = options[3];
  f.form = static_cast<StdbForm>(options[4]);
  f.since = counts(call, "since", since);
  f.bits = static_cast<const uint8_t*>(call.must("bits", bits_of(call, bits, f.sequence), bits));
  f.grad_spikes = call.sequence("grad_spikes", grad_spikes);
  f.grad_membrane = call.step("grad_membrane", grad_membrane);
  f.grad_current = grad_current.data;
  f.grad_membrane_in = call.step("grad_membrane_in", grad_membrane_in);
  if (f.sequence.neurons == 0) return;
  PYACCEL_ON(grad_current, stdb_backward, f)
  PYACCEL_RUN(stdb_backward, f)
}

// Dense spikes [rows, ...] in memory order <-> planes [planes, rows, ceil(length / 8)].
Planes planes_of(const char* op, const Tensor& spikes, const Tensor& packed, int planes) {
  if (!spikes || spikes.ndim < 1 || !is_floating(spikes.dtype)) refuse(op, "spikes", "a floating tensor [rows, ...]", spikes);
  const int64_t rows = spikes.shape[0], length = rows > 0 ? spikes.size() / rows : 0;
  if (!rows_outermost(spikes)) refuse(op, "spikes", "dense with rows outermost", spikes);
  if (planes < 1 || planes > 4) throw py::value_error(std::string(op) + ": planes must be 1..4, got " + std::to_string(planes));
  Planes f{spikes.dtype, planes, rows, length};
  contiguous(op, "packed", required(op, "packed", packed, Dtype::u8, spikes), {planes, rows, (length + 7) / 8});
  return f;
}

bool pack(const Tensor& spikes, const Tensor& packed, int planes) {
  Planes f = planes_of("pack_spikes", spikes, packed, planes);
  f.from = spikes.data;
  f.to = packed.data;
  if (spikes.size() == 0) return true;
#ifdef PYACCEL_CUDA
  if (spikes.on_cuda()) {  // whether every value had a code is not read back: that would wait for the GPU
    void* stream = current_stream(spikes);
    py::gil_scoped_release release;
    cuda::pack(f, spikes.device.id, stream);
    return true;
  }
#endif
  py::gil_scoped_release release;
  return PYACCEL_CALL(pack(f));
}

void unpack(const Tensor& packed, const Tensor& spikes, int planes) {
  Planes f = planes_of("unpack_spikes", spikes, packed, planes);
  f.from = packed.data;
  f.to = spikes.data;
  if (spikes.size() == 0) return;
  PYACCEL_ON(spikes, unpack, f)
  PYACCEL_RUN(unpack, f)
}

void encode(const Tensor& image, const Tensor& sample_ids, const Tensor& key, double gain, const Tensor& spikes) {
  const char* op = "poisson_encode";
  if (!image || image.ndim < 1 || !is_floating(image.dtype)) refuse(op, "image", "a floating tensor [B, ...]", image);
  if (!is_dense(image, 1)) refuse(op, "image", "dense", image);
  required(op, "spikes", spikes, image.dtype, image);
  if (!same_layout(spikes, 1, image, 0) || spikes.ndim != image.ndim + 1) refuse(op, "spikes", "[T, ...] over image's layout", spikes);
  Encode f;
  f.dtype = image.dtype;
  f.steps = spikes.shape[0];
  f.samples = image.shape[0];
  f.pixels = f.samples > 0 ? image.size() / f.samples : 0;
  f.channels_last = image.ndim == 4 && image.shape[1] > 1 && image.shape[2] * image.shape[3] > 1 && image.strides[1] == 1;
  if (f.channels_last) {
    f.channels = image.shape[1];
    f.inner = image.shape[2] * image.shape[3];
  }
  f.gain = gain;
  f.key = static_cast<const int64_t*>(contiguous(op, "key", required(op, "key", key, Dtype::i64, image), {3}).data);
  if (sample_ids) f.sample_ids = static_cast<const int64_t*>(contiguous(op, "sample_ids", required(op, "sample_ids", sample_ids, Dtype::i64, image), {f.samples}).data);
  f.image = image.data;
  f.spikes = spikes.data;
  if (spikes.size() == 0) return;
  PYACCEL_ON(image, encode, f)
  PYACCEL_RUN(encode, f)
}

}  // namespace

void bind(py::module_& m) {
  const auto opt = [](const char* name) { return py::arg(name).none(true); };
  m.def("lif_forward", &lif_forward, py::arg("current"), opt("membrane"), opt("leak"), opt("threshold"), py::arg("options"),
        py::arg("checkpoint_every"), py::arg("packed"), py::arg("spikes"), py::arg("membrane_out"), opt("checkpoints"));
  m.def("lif_backward", &lif_backward, py::arg("current"), opt("membrane"), opt("leak"), opt("threshold"), py::arg("options"),
        py::arg("checkpoint_every"), opt("checkpoints"), opt("grad_spikes"), opt("grad_membrane"), py::arg("grad_current"),
        opt("grad_membrane_in"), opt("grad_leak"), opt("grad_threshold"));
  m.def("bntt_scratch_bytes", &bntt_scratch_bytes, py::arg("current"), py::arg("backward"));
  m.def("bntt_statistics", &bntt_statistics, py::arg("current"), py::arg("mean"), py::arg("var"), opt("scratch"));
  m.def("bntt_forward", &bntt_forward, py::arg("current"), py::arg("weight"), opt("membrane"), opt("leak"), opt("threshold"),
        py::arg("options"), py::arg("eps"), py::arg("batch_statistics"), py::arg("packed"), py::arg("mean"), py::arg("var"), py::arg("spikes"),
        py::arg("membrane_out"), opt("scratch"));
  m.def("bntt_backward", &bntt_backward, py::arg("current"), py::arg("weight"), opt("membrane"), opt("leak"), opt("threshold"),
        py::arg("options"), py::arg("eps"), py::arg("batch_statistics"), py::arg("mean"), py::arg("var"), opt("grad_spikes"),
        opt("grad_membrane"), py::arg("phase"), opt("sums"), py::arg("count"), opt("grad_current"), opt("grad_weight"),
        opt("grad_membrane_in"), opt("grad_leak"), opt("grad_threshold"), opt("scratch"));
  m.def("bntt_packs_in_place", &bntt_packs_in_place, py::arg("current"));
  m.def("stdb_forward", &stdb_forward, py::arg("current"), opt("membrane"), opt("since"), opt("leak"), opt("threshold"),
        py::arg("options"), py::arg("spikes"), py::arg("membrane_out"), py::arg("since_out"), opt("bits"));
  m.def("stdb_backward", &stdb_backward, py::arg("grad_current"), opt("since"), py::arg("bits"), opt("leak"), opt("threshold"),
        py::arg("options"), opt("grad_spikes"), opt("grad_membrane"), opt("grad_membrane_in"));
  m.def("pack", &pack, py::arg("spikes"), py::arg("packed"), py::arg("planes"));
  m.def("unpack", &unpack, py::arg("packed"), py::arg("spikes"), py::arg("planes"));
  m.def("encode", &encode, py::arg("image"), opt("sample_ids"), py::arg("key"), py::arg("gain"), py::arg("spikes"));
}

}  // namespace pyaccel::neuron
