// Python names of the sram family: checks, device dispatch. Outputs are allocated by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "../core/dispatch.h"
#include "kernels_cpu.h"
#ifdef PYACCEL_CUDA
#include "sram_cuda.h"
#endif

namespace py = pybind11;

namespace pyaccel::sram {
namespace {

// One entry a bit, LSB first: (threshold, log2 of the block, cumulative counts).
using PlaneOf = std::tuple<uint64_t, int, std::vector<uint32_t>>;

std::unique_ptr<Plan> make_plan(bool sparse, const std::vector<PlaneOf>& planes) {
  auto plan = std::make_unique<Plan>();
  plan->word_bits = static_cast<int>(planes.size());
  plan->sparse = sparse;
  if (planes.empty() || planes.size() > kMaxWordBits || (planes.size() & (planes.size() - 1)) != 0)
    throw py::value_error("plan: one entry for each of 1, 2, 4, 8, 16 or 32 bits, got " + std::to_string(planes.size()));
  for (size_t b = 0; b < planes.size(); ++b) {
    auto& [threshold, block_log2, counts] = planes[b];
    if (threshold > uint64_t{1} << 32) throw py::value_error("plan: a threshold is at most 2^32");
    if (sparse && threshold > 0 && (block_log2 < 6 || block_log2 > 12 || counts.empty() || counts.size() > 65))
      throw py::value_error("plan: a sparse plane needs a block of 64..4096 words and a table of 1..65 entries");
    plan->planes[b] = {threshold, block_log2, counts};
  }
  return plan;
}

Draws draws_of(const Plan& plan, int64_t seed, int64_t stream, int64_t first_word) {
  return {&plan, static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), static_cast<uint64_t>(first_word)};
}

const Tensor& memory(const char* op, const char* name, const Tensor& t) {
  const bool integer = t && (t.dtype == Dtype::i8 || t.dtype == Dtype::u8 || t.dtype == Dtype::i16 || t.dtype == Dtype::i32);
  if (!integer) refuse(op, name, "int8, uint8, int16 or int32", t);
  return t;
}

// Row-major and gap-free: words are numbered in logical order.
const Tensor& row_major(const char* op, const char* name, const Tensor& t) {
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0 && t.size() > 0; stride *= t.shape[d--])
    if (t.shape[d] > 1 && t.strides[d] != stride) refuse(op, name, "contiguous", t);
  return t;
}

void flip_words(const Tensor& in, const Tensor& out, const Plan& plan, int64_t seed, int64_t stream, int64_t first_word, bool stuck) {
  const char* op = "flip_bits";
  row_major(op, "words", memory(op, "words", in));
  row_major(op, "out", required(op, "out", out, in.dtype, in));
  if (!same_layout(in, 0, out, 0)) refuse(op, "out", "of the shape of words", out);
  if (plan.word_bits > 8 * size_of(in.dtype)) refuse(op, "words", "of at least word_bits bits an element", in);
  Flip f{draws_of(plan, seed, stream, first_word)};
  f.stuck = stuck;
  f.bytes = in.size() * size_of(in.dtype);
  f.in = static_cast<const uint8_t*>(in.data);
  f.out = static_cast<uint8_t*>(out.data);
  if (f.bytes == 0) return;
  PYACCEL_ON(in, flip, f)
  PYACCEL_RUN(flip, f)
}

const void* scale_of(const char* op, const Tensor& scale, const Tensor& x) {
  if (!scale) return nullptr;
  if (scale.size() != 1) refuse(op, "scale", "one value", scale);
  return required(op, "scale", scale, state_of(x.dtype), x).data;
}

const Tensor& values(const char* op, const char* name, const Tensor& t) {
  if (!t || !is_floating(t.dtype)) refuse(op, name, "a floating tensor", t);
  return row_major(op, name, t);
}

void noise_forward(const Tensor& x, const Tensor& scale, double scale_value, const Plan& plan, bool is_signed, int64_t seed,
                   int64_t stream, int64_t first_word, const Tensor& y) {
  const char* op = "sram_noise";
  values(op, "x", x);
  if (!same_layout(values(op, "y", required(op, "y", y, x.dtype, x)), 0, x, 0)) refuse(op, "y", "of the shape of x", y);
  if (plan.word_bits > 16 || (is_signed && plan.word_bits < 2))
    throw py::value_error("sram_noise: word_bits must be 1, 2, 4, 8 or 16, and at least 2 where signed");
  Noise f{draws_of(plan, seed, stream, first_word)};
  f.dtype = x.dtype;
  f.is_signed = is_signed;
  f.elements = x.size();
  f.scale_data = scale_of(op, scale, x);
  f.scale = scale_value;
  f.x = x.data;
  f.y = y.data;
  if (f.elements == 0) return;
  PYACCEL_ON(x, noise, f)
  PYACCEL_RUN(noise, f)
}

void noise_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, double scale_value, int low, int high, const Tensor& grad_x) {
  const char* op = "sram_noise_backward";
  values(op, "x", x);
  if (!same_layout(values(op, "grad", required(op, "grad", grad, x.dtype, x)), 0, x, 0)) refuse(op, "grad", "of the shape of x", grad);
  if (!same_layout(values(op, "grad_x", required(op, "grad_x", grad_x, x.dtype, x)), 0, x, 0)) refuse(op, "grad_x", "of the shape of x", grad_x);
  NoiseBackward f{x.dtype, low, high, x.size()};
  f.scale_data = scale_of(op, scale, x);
  f.scale = scale_value;
  f.x = x.data;
  f.grad = grad.data;
  f.grad_x = grad_x.data;
  if (f.elements == 0) return;
  PYACCEL_ON(x, noise_backward, f)
  PYACCEL_RUN(noise_backward, f)
}

// Tests and the benchmark's yardstick, on the CPU: `blocks` Philox blocks into `out` (int32 [blocks, 4]), or only folded.
py::object raw(int64_t seed, int64_t first, int64_t stream, int64_t domain, int64_t blocks, const Tensor& out) {
  RawPhilox f;
  f.seed = static_cast<uint64_t>(seed);
  f.first = static_cast<uint64_t>(first);
  f.stream = static_cast<uint32_t>(stream);
  f.domain = static_cast<uint32_t>(domain);
  f.blocks = blocks;
  uint32_t folded[4] = {};
  f.folded = folded;
  if (out) {
    if (out.dtype != Dtype::i32 || out.on_cuda()) refuse("raw_philox", "out", "int32 on the CPU", out);
    f.out = static_cast<uint32_t*>(contiguous("raw_philox", "out", out, {blocks, 4}).data);
  }
  PYACCEL_RUN(raw_philox, f)
  return py::make_tuple(folded[0], folded[1], folded[2], folded[3]);
}

// The benchmark's clock: 8*n additions, each waiting for the one before, one a cycle.
uint64_t additions(int64_t n) {
  uint64_t x = 0;
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      x += 3;
      asm volatile("" : "+r"(x));
    }
  }
  return x;
}

}  // namespace

void bind(py::module_& m) {
  const auto opt = [](const char* name) { return py::arg(name).none(true); };
  py::class_<Plan>(m, "Plan").def(py::init(&make_plan), py::arg("sparse"), py::arg("planes"));
  m.def("flip", &flip_words, py::arg("words"), py::arg("out"), py::arg("plan"), py::arg("seed"), py::arg("stream"),
        py::arg("first_word"), py::arg("stuck"));
  m.def("noise", &noise_forward, py::arg("x"), opt("scale"), py::arg("scale_value"), py::arg("plan"), py::arg("is_signed"),
        py::arg("seed"), py::arg("stream"), py::arg("first_word"), py::arg("y"));
  m.def("noise_backward", &noise_backward, py::arg("grad"), py::arg("x"), opt("scale"), py::arg("scale_value"), py::arg("low"),
        py::arg("high"), py::arg("grad_x"));
  m.def("raw_philox", &raw, py::arg("seed"), py::arg("first"), py::arg("stream"), py::arg("domain"), py::arg("blocks"), opt("out"));
  m.def("additions", &additions, py::arg("n"));
}

}  // namespace pyaccel::sram
