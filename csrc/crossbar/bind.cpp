// Python names of the crossbar family: checks, device dispatch. Outputs are allocated by the caller.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "../core/tensor.h"
#include "kernels_cpu.h"
#ifdef PYACCEL_CUDA
#include "crossbar_cuda.h"
#endif

namespace py = pybind11;

namespace pyaccel::crossbar {
namespace {

using Ohm = std::tuple<double, double, double, double>;  // driver, wire_row, wire_col, sense

Resistances resistances_of(const Ohm& o) { return {std::get<0>(o), std::get<1>(o), std::get<2>(o), std::get<3>(o)}; }

Tiles tiles_of(const char* op, const Tensor& g) {
  if (!g || g.ndim != 3 || (g.dtype != Dtype::f32 && g.dtype != Dtype::f64))
    refuse(op, "conductance", "a float32 or float64 tensor [tiles, M, N]", g);
  contiguous(op, "conductance", g, {g.shape[0], g.shape[1], g.shape[2]});
  return {g.dtype, g.shape[0], g.shape[1], g.shape[2]};
}

void* same(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  return contiguous(op, name, required(op, name, t, like.dtype, like), {like.shape[0], like.shape[1], like.shape[2]}).data;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

void report(const char* op, const Fault& fault) {
  if (fault.kind == Fault::conductance)
    throw py::value_error(std::string(op) + ": conductance must be finite and at least 0 siemens, got " + number(fault.value) +
                          " in tile " + std::to_string(fault.tile) + ", row " + std::to_string(fault.row) + ", column " +
                          std::to_string(fault.column));
  if (fault.kind == Fault::load)
    throw py::value_error(std::string(op) + ": tile " + std::to_string(fault.tile) +
                          " is too ill-conditioned to solve: a resistance times the conductance of a column is " +
                          number(fault.value) + ", the limit is " + number(kLargestLoad) +
                          "; conductance must be in siemens and resistances in ohm");
}

#ifdef PYACCEL_CUDA
#define PYACCEL_ON(tensor, ...)                  \
  if ((tensor).on_cuda()) {                      \
    void* queue = current_stream(tensor);        \
    const int device = (tensor).device.id;       \
    py::gil_scoped_release release;              \
    cuda::__VA_ARGS__;                           \
    return;                                      \
  }
#else
#define PYACCEL_ON(tensor, ...) \
  if ((tensor).on_cuda()) throw std::runtime_error("this build of pyaccel has no CUDA kernels (see python -m pyaccel doctor)");
#endif

// What the CUDA launches want besides their tensors; the CPU has scratch of its own.
int64_t scratch_bytes(const Tensor& conductance, const Ohm& ohm, bool gradient) {
  const Tiles tiles = tiles_of("crossbar_matrix", conductance);
#ifdef PYACCEL_CUDA
  if (conductance.on_cuda() && conductance.size() > 0) return cuda::scratch_bytes(tiles, resistances_of(ohm), gradient);
#endif
  (void)tiles, (void)ohm, (void)gradient;
  return 0;
}

#ifdef PYACCEL_CUDA
int64_t scratch_of(const char* op, const Tensor& scratch, const Tensor& like) {
  required(op, "scratch", scratch, Dtype::u8, like);
  if (scratch.ndim != 1) refuse(op, "scratch", "[bytes]", scratch);
  return scratch.shape[0];
}
#endif

void matrix(const Tensor& conductance, const Ohm& ohm, const Tensor& effective, const Tensor& scratch) {
  const char* op = "crossbar_matrix";
  Matrix f{tiles_of(op, conductance), resistances_of(ohm)};
  f.conductance = conductance.data;
  f.effective = same(op, "effective", effective, conductance);
  if (conductance.size() == 0) return;
  (void)scratch;
  PYACCEL_ON(conductance, matrix(f, scratch.data, scratch_of(op, scratch, conductance), device, queue))
  Fault fault;
  {
    py::gil_scoped_release release;
    fault = PYACCEL_CALL(matrix(f));
  }
  report(op, fault);
}

void matrix_gradient(const Tensor& conductance, const Ohm& ohm, const Tensor& grad_effective, const Tensor& grad_conductance,
                     int64_t history_bytes, const Tensor& scratch) {
  const char* op = "crossbar_matrix_backward";
  MatrixGradient f{tiles_of(op, conductance), resistances_of(ohm)};
  f.conductance = conductance.data;
  f.grad_effective = same(op, "grad_effective", grad_effective, conductance);
  f.grad_conductance = same(op, "grad_conductance", grad_conductance, conductance);
  f.history_bytes = history_bytes;
  if (conductance.size() == 0) return;
  (void)scratch;
  PYACCEL_ON(conductance, matrix_gradient(f, scratch.data, scratch_of(op, scratch, conductance), device, queue))
  Fault fault;
  {
    py::gil_scoped_release release;
    fault = PYACCEL_CALL(matrix_gradient(f));
  }
  report(op, fault);
}

const void* weights(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t inputs, int64_t outputs) {
  return t ? contiguous(op, name, required(op, name, t, x.dtype, x), {inputs, outputs}).data : nullptr;
}

// `values`: [2] or [2, outputs], steps then their inverses.
Converter converter_of(const char* op, const char* name, const Tensor& values, int32_t top, const Tensor& x, int64_t outputs) {
  Converter c{top};
  if (top == 0) return c;
  required(op, name, values, x.dtype, x);
  c.per_column = values.ndim == 2;
  c.step = c.per_column ? contiguous(op, name, values, {2, outputs}).data : contiguous(op, name, values, {2}).data;
  c.inverse = static_cast<const char*>(c.step) + (c.per_column ? outputs : 1) * size_of(x.dtype);
  return c;
}

const Tensor& plain(const char* op, const char* name, const Tensor& t) {
  if (!t || t.ndim != 2 || (t.dtype != Dtype::f32 && t.dtype != Dtype::f64)) refuse(op, name, "float32 or float64 [batch, inputs]", t);
  return contiguous(op, name, t, {t.shape[0], t.shape[1]});
}

void matmul(const Tensor& x, const Tensor& positive, const Tensor& negative, int64_t tile, bool apart, int adc_top,
            const Tensor& adc, double read_noise, int64_t seed, int64_t stream, const Tensor& y) {
  const char* op = "crossbar_matmul";
  plain(op, "x", x);
  if (!positive || positive.ndim != 2) refuse(op, "positive", "[inputs, outputs]", positive);
  if (tile < 1) throw py::value_error("crossbar_matmul: tile must be at least 1");
  Matmul f;
  f.dtype = x.dtype;
  f.batch = x.shape[0];
  f.inputs = x.shape[1];
  f.outputs = positive.shape[1];
  f.tile = tile;
  f.x = x.data;
  f.positive = weights(op, "positive", positive, x, f.inputs, f.outputs);
  f.negative = weights(op, "negative", negative, x, f.inputs, f.outputs);
  f.apart = apart && f.negative != nullptr;
  f.adc = converter_of(op, "adc", adc, adc_top, x, f.outputs);
  f.read_noise = read_noise;
  f.seed = static_cast<uint64_t>(seed);
  f.stream = static_cast<uint32_t>(stream);
  f.y = contiguous(op, "y", required(op, "y", y, x.dtype, x), {f.batch, f.outputs}).data;
  if (y.size() == 0) return;
  PYACCEL_ON(x, matmul(f, device, queue))
  py::gil_scoped_release release;
  PYACCEL_CALL(matmul(f));
}

void quantize(const Tensor& x, int top, const Tensor& converter, const Tensor& out) {
  const char* op = "crossbar_matmul";
  plain(op, "x", x);
  Quantize f{x.dtype, x.size(), x.data, converter_of(op, "dac", converter, top, x, 1), nullptr};
  f.out = contiguous(op, "out", required(op, "out", out, x.dtype, x), {x.shape[0], x.shape[1]}).data;
  if (f.count == 0) return;
  PYACCEL_ON(x, quantize(f, device, queue))
  py::gil_scoped_release release;
  PYACCEL_CALL(quantize(f));
}

void normal(int64_t seed, int64_t stream, int64_t domain, int64_t first, const Tensor& out) {
  const char* op = "philox_normal";
  if (!out || out.ndim != 1 || out.dtype != Dtype::f32 || out.on_cuda()) refuse(op, "out", "float32 [count] on the CPU", out);
  contiguous(op, "out", out, {out.shape[0]});
  if (first < 0) throw py::value_error("philox_normal: first must be at least 0");
  Normal f{static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), static_cast<uint32_t>(domain), first, out.shape[0],
           static_cast<float*>(out.data)};
  if (f.count == 0) return;
  py::gil_scoped_release release;
  PYACCEL_CALL(normal(f));
}

}  // namespace

void bind(py::module_& m) {
  m.def("matrix", &matrix, py::arg("conductance"), py::arg("ohm"), py::arg("effective"), py::arg("scratch").none(true));
  m.def("matrix_gradient", &matrix_gradient, py::arg("conductance"), py::arg("ohm"), py::arg("grad_effective"),
        py::arg("grad_conductance"), py::arg("history_bytes"), py::arg("scratch").none(true));
  m.def("scratch_bytes", &scratch_bytes, py::arg("conductance"), py::arg("ohm"), py::arg("gradient"));
  m.def("matmul", &matmul, py::arg("x"), py::arg("positive"), py::arg("negative").none(true), py::arg("tile"), py::arg("apart"),
        py::arg("adc_top"), py::arg("adc").none(true), py::arg("read_noise"), py::arg("seed"), py::arg("stream"), py::arg("y"));
  m.def("quantize", &quantize, py::arg("x"), py::arg("top"), py::arg("converter"), py::arg("out"));
  m.def("normal", &normal, py::arg("seed"), py::arg("stream"), py::arg("domain"), py::arg("first"), py::arg("out"));
}

}  // namespace pyaccel::crossbar
