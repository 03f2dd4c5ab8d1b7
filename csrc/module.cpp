// The compiled module pyaccel._C: build facts, instruction sets, and one call for each kernel family.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/allocator.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace pyaccel::neuron {
void bind(pybind11::module_& m);
}
namespace pyaccel::sram {
void bind(pybind11::module_& m);
}
namespace pyaccel::crossbar {
void bind(pybind11::module_& m);
}
namespace pyaccel::qmac {
void bind(pybind11::module_& m);
}

namespace {

namespace py = pybind11;
using pyaccel::Isa;

py::dict build_info() {
  py::dict info;
  info["version"] = PYACCEL_VERSION;
  info["compiler"] = __VERSION__;
#ifdef PYACCEL_CUDA
  info["cuda"] = PYACCEL_CUDA;  // "13.0, 80-real 90-real 90-virtual"
#else
  info["cuda"] = py::none();
#endif
  info["best_isa"] = pyaccel::name(pyaccel::best_isa());
  info["isa"] = pyaccel::name(pyaccel::isa());
  info["threads"] = omp_get_max_threads();
  return info;
}

void force_isa(const std::string& level) {
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (level == pyaccel::name(isa)) return pyaccel::force_isa(isa);
  throw py::value_error("isa must be baseline, avx2 or avx512, got \"" + level + "\"");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyaccel. Private: use pyaccel.ops.";
  pyaccel::isa();  // a wrong PYACCEL_ISA is reported at import
  m.def("build_info", &build_info);
  m.def("force_isa", &force_isa, py::arg("level"));
  m.def("describe", [](const pyaccel::Tensor& t) { return t.describe(); }, py::arg("tensor").none(true),
        "What reaches a kernel: dtype, shape, strides and device as DLPack gives them.");
  m.def("recycle_memory", &pyaccel::recycle_memory);
  m.def("release_memory", &pyaccel::release_memory);
  auto neuron = m.def_submodule("neuron");
  pyaccel::neuron::bind(neuron);
  auto sram = m.def_submodule("sram");
  pyaccel::sram::bind(sram);
  auto crossbar = m.def_submodule("crossbar");
  pyaccel::crossbar::bind(crossbar);
  auto qmac = m.def_submodule("qmac");
  pyaccel::qmac::bind(qmac);
}
