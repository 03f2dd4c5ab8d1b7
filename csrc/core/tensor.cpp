#include "tensor.h"

#include <vector>

namespace pyaccel {
namespace {

namespace py = pybind11;

// The table of the tensor's type. torch.Tensor and torch.nn.Parameter are all that is seen in practice,
// so the last type is remembered; the GIL guards it.
const dlpack::ExchangeApi* exchange_of(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const dlpack::ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    throw py::type_error(std::string("expected a torch.Tensor (torch >= 2.11), got ") + type->tp_name);
  }
  const auto owner = py::reinterpret_steal<py::object>(capsule);
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(owner.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->version.major != dlpack::kMajor) header = header->previous;
  if (header == nullptr)
    throw py::type_error(std::string(type->tp_name) + " offers no DLPack exchange table of major version " +
                         std::to_string(dlpack::kMajor) + ": this build of pyaccel is too old for this torch");
  auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api->view_of_object == nullptr)
    throw py::type_error(std::string(type->tp_name) + " gives no borrowed DLPack views");
  Py_INCREF(reinterpret_cast<PyObject*>(type));  // a remembered type must not be freed and reborn as another
  last_type = type;
  last_api = api;
  return api;
}

const dlpack::ExchangeApi* last_exchange = nullptr;

Dtype dtype_of(const dlpack::DataType& type) {
  const auto key = [](uint8_t code, uint8_t bits) { return code * 256 + bits; };
  if (type.lanes == 1) {
    switch (key(type.code, type.bits)) {
      case key(dlpack::kFloat, 32): return Dtype::f32;
      case key(dlpack::kFloat, 64): return Dtype::f64;
      case key(dlpack::kFloat, 16): return Dtype::f16;
      case key(dlpack::kBfloat, 16): return Dtype::bf16;
      case key(dlpack::kInt, 8): return Dtype::i8;
      case key(dlpack::kUInt, 8): return Dtype::u8;
      case key(dlpack::kInt, 16): return Dtype::i16;
      case key(dlpack::kInt, 32): return Dtype::i32;
      case key(dlpack::kInt, 64): return Dtype::i64;
      case key(dlpack::kBool, 8): return Dtype::boolean;
    }
  }
  throw py::type_error("expected a tensor of float32, float64, float16, bfloat16, bool or an 8 to 64-bit integer, got "
                       "DLPack type code " + std::to_string(type.code) + " of " + std::to_string(type.bits) + " bits");
}

}  // namespace

namespace detail {

Tensor view(PyObject* object) {
  const dlpack::ExchangeApi* api = exchange_of(Py_TYPE(object));
  dlpack::Tensor raw;
  if (api->view_of_object(object, &raw) != 0) throw py::error_already_set();
  last_exchange = api;
  Tensor tensor;
  tensor.data = static_cast<char*>(raw.data) + raw.byte_offset;
  tensor.shape = raw.shape;
  tensor.strides = raw.strides;
  tensor.ndim = raw.ndim;
  tensor.dtype = dtype_of(raw.dtype);
  tensor.device = raw.device;
  return tensor;
}

}  // namespace detail

int64_t Tensor::size() const {
  int64_t product = 1;
  for (int d = 0; d < ndim; ++d) product *= shape[d];
  return product;
}

std::string Tensor::describe() const {
  if (ndim < 0) return "None";
  std::string text = std::string(name(dtype)) + " [";
  for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  text += "] strides [";
  for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(strides[d]);
  text += device.type == dlpack::kCUDA ? "] on cuda:" + std::to_string(device.id) : "] on cpu";
  return text;
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  if (last_exchange == nullptr || last_exchange->current_stream(tensor.device.type, tensor.device.id, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

void refuse(const char* op, const char* name, const std::string& wanted, const Tensor& got) {
  throw py::value_error(std::string(op) + ": " + name + " must be " + wanted + ", got " + got.describe());
}

const Tensor& required(const char* op, const char* name, const Tensor& tensor, Dtype dtype, const Tensor& like) {
  if (!tensor) refuse(op, name, "given", tensor);
  if (tensor.dtype != dtype) refuse(op, name, pyaccel::name(dtype), tensor);
  if (tensor.device.type != like.device.type || tensor.device.id != like.device.id)
    refuse(op, name, "on the device of the other tensors", tensor);
  return tensor;
}

const Tensor& contiguous(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool good = tensor.ndim == static_cast<int>(shape.size());
  int d = 0;
  for (int64_t extent : shape) good = good && tensor.shape[d++] == extent;
  int64_t stride = 1;
  for (d = tensor.ndim - 1; good && d >= 0; stride *= tensor.shape[d--])
    good = tensor.shape[d] <= 1 || tensor.strides[d] == stride || tensor.size() == 0;
  if (good) return tensor;
  std::string wanted = "contiguous [";
  for (auto it = shape.begin(); it != shape.end(); ++it) wanted += (it == shape.begin() ? "" : ", ") + std::to_string(*it);
  refuse(op, name, wanted + "]", tensor);
}

bool same_layout(const Tensor& a, int a_from, const Tensor& b, int b_from) {
  if (a.ndim - a_from != b.ndim - b_from) return false;
  for (int d = 0; d < a.ndim - a_from; ++d) {
    if (a.shape[a_from + d] != b.shape[b_from + d]) return false;
    if (a.shape[a_from + d] > 1 && a.strides[a_from + d] != b.strides[b_from + d]) return false;
  }
  return true;
}

bool is_dense(const Tensor& tensor, int from) {
  // Peel the dimension with the smallest stride until none is left: each must start where the last ended.
  std::vector<bool> used(static_cast<size_t>(tensor.ndim), false);
  int64_t expected = 1;
  for (int step = from; step < tensor.ndim; ++step) {
    int found = -1;
    for (int d = from; d < tensor.ndim && found < 0; ++d)
      if (!used[static_cast<size_t>(d)] && (tensor.shape[d] <= 1 || tensor.strides[d] == expected)) found = d;
    if (found < 0) return false;
    used[static_cast<size_t>(found)] = true;
    expected *= tensor.shape[found] > 1 ? tensor.shape[found] : 1;
  }
  return true;
}

}  // namespace pyaccel
