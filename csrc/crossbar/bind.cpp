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

void matrix(const Tensor& conductance, const Ohm& ohm, const Tensor& effective) {
  const char* op = "crossbar_matrix";
  Matrix f{tiles_of(op, conductance), resistances_of(ohm)};
  f.conductance = conductance.data;
  f.effective = same(op, "effective", effective, conductance);
  if (conductance.size() == 0) return;
  PYACCEL_ON(conductance, matrix(f, device, queue))
  Fault fault;
  {
    py::gil_scoped_release release;
    fault = PYACCEL_CALL(matrix(f));
  }
  report(op, fault);
}

void matrix_gradient(const Tensor& conductance, const Ohm& ohm, const Tensor& grad_effective, const Tensor& grad_conductance,
                     int64_t history_bytes) {
  const char* op = "crossbar_matrix_backward";
  MatrixGradient f{tiles_of(op, conductance), resistances_of(ohm)};
  f.conductance = conductance.data;
  f.grad_effective = same(op, "grad_effective", grad_effective, conductance);
  f.grad_conductance = same(op, "grad_conductance", grad_conductance, conductance);
  f.history_bytes = history_bytes;
  if (conductance.size() == 0) return;
  PYACCEL_ON(conductance, matrix_gradient(f, device, queue))
  Fault fault;
  {
    py::gil_scoped_release release;
    fault = PYACCEL_CALL(matrix_gradient(f));
  }
  report(op, fault);
}

}  // namespace

void bind(py::module_& m) {
  m.def("matrix", &matrix, py::arg("conductance"), py::arg("ohm"), py::arg("effective"));
  m.def("matrix_gradient", &matrix_gradient, py::arg("conductance"), py::arg("ohm"), py::arg("grad_effective"),
        py::arg("grad_conductance"), py::arg("history_bytes"));
}

}  // namespace pyaccel::crossbar
