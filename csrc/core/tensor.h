// A borrowed view of a Python tensor, read through the DLPack exchange API: pointer, shape, strides, dtype, device.
// Nothing of torch is linked; a tensor that requires grad is accepted; no stream is synchronised.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "dlpack.h"
#include "dtype.h"

namespace pyaccel {

struct Tensor {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int ndim = -1;                     // -1: None was passed
  Dtype dtype = Dtype::f32;
  dlpack::Device device{};

  explicit operator bool() const { return ndim >= 0; }
  bool on_cuda() const { return device.type == dlpack::kCUDA; }
  int64_t size() const;
  std::string describe() const;  // "float32 [4, 8] on cpu", for messages
};

// The stream on which the producer of `tensor` works now (CUDA only).
void* current_stream(const Tensor& tensor);

// "op: name must be `wanted`, got <what came>"
[[noreturn]] void refuse(const char* op, const char* name, const std::string& wanted, const Tensor& got);

// Checks of the bindings: the Python wrappers explain, these make sure that no bare address is ever trusted.
const Tensor& required(const char* op, const char* name, const Tensor& tensor, Dtype dtype, const Tensor& like);
const Tensor& contiguous(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape);
bool same_layout(const Tensor& a, int a_from, const Tensor& b, int b_from);
// Every element of dimensions `from`.. lies in one gap-free block (any order of the dimensions).
bool is_dense(const Tensor& tensor, int from);

namespace detail {
Tensor view(PyObject* object);  // throws pybind11::error_already_set, or type_error for what is no tensor
}

}  // namespace pyaccel

namespace pybind11::detail {

template <>
struct type_caster<pyaccel::Tensor> {
  PYBIND11_TYPE_CASTER(pyaccel::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none()) value = pyaccel::detail::view(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
