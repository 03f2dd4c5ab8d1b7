// Python names of the qmac family: checks, device dispatch. Outputs are allocated by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../core/tensor.h"
#include "kernels_cpu.h"
#ifdef PYACCEL_CUDA
#include "qmac_cuda.h"
#endif

namespace py = pybind11;

namespace pyaccel::qmac {
namespace {

using Pair = std::array<int64_t, 2>;

void check_bits(const char* op, const char* name, int bits) {
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8 && bits != 16)
    throw py::value_error(std::string(op) + ": " + name + " must be 1, 2, 4, 8 or 16, got " + std::to_string(bits));
}
Dtype code_dtype(int bits) { return bits == 16 ? Dtype::i32 : Dtype::u8; }

// int32 or int64 sums of the given shape.
void* sums(const char* op, const char* name, const Tensor& t, const Tensor& like, int bytes, std::initializer_list<int64_t> shape) {
  return contiguous(op, name, required(op, name, t, bytes == 4 ? Dtype::i32 : Dtype::i64, like), shape).data;
}
int bytes_of(const char* op, const Tensor& p) {
  if (!p || (p.dtype != Dtype::i32 && p.dtype != Dtype::i64)) refuse(op, "p", "int32 or int64", p);
  return static_cast<int>(size_of(p.dtype));
}
const uint32_t* words(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t rows, int64_t length, int bits) {
  return static_cast<const uint32_t*>(contiguous(op, name, required(op, name, t, Dtype::i32, like), {rows, words_of(length, bits)}).data);
}

#ifdef PYACCEL_CUDA
#define PYACCEL_ON(tensor, function, ...)                    \
  if ((tensor).on_cuda()) {                                  \
    void* stream = current_stream(tensor);                   \
    py::gil_scoped_release release;                          \
    cuda::function(__VA_ARGS__, (tensor).device.id, stream); \
    return true;                                             \
  }
#else
#define PYACCEL_ON(tensor, function, ...) \
  if ((tensor).on_cuda()) throw std::runtime_error("this build of pyaccel has no CUDA kernels (see python -m pyaccel doctor)");
#endif
#define PYACCEL_RUN(function, parameters) \
  {                                       \
    py::gil_scoped_release release;       \
    PYACCEL_CALL(function(parameters));   \
  }

Pack pack_of(const char* op, const Tensor& codes, const Tensor& packed, int bits) {
  check_bits(op, "bits", bits);
  if (!codes || codes.ndim != 2) refuse(op, "codes", "[rows, length]", codes);
  Pack f;
  f.bits = bits;
  f.rows = codes.shape[0];
  f.length = codes.shape[1];
  f.codes = contiguous(op, "codes", required(op, "codes", codes, code_dtype(bits), codes), {f.rows, f.length}).data;
  f.words = const_cast<uint32_t*>(words(op, "words", packed, codes, f.rows, f.length, bits));
  return f;
}

// False: a code was out of range (never on CUDA, where nothing is read back: such codes lose their high bits).
bool pack(const Tensor& codes, int bits, const Tensor& packed) {
  Pack f = pack_of("pack_codes", codes, packed, bits);
  if (f.rows * f.length == 0) return true;
  PYACCEL_ON(codes, pack, f)
  PYACCEL_RUN(pack, f)
  return f.in_range;
}

bool unpack(const Tensor& packed, int bits, const Tensor& codes) {
  const Pack f = pack_of("unpack_codes", codes, packed, bits);
  if (f.rows * f.length == 0) return true;
  PYACCEL_ON(codes, unpack, f)
  PYACCEL_RUN(unpack, f)
  return true;
}

bool linear(const Tensor& activations, const Tensor& weights, int activation_bits, int weight_bits, int64_t length, const Tensor& p,
            const Tensor& q) {
  const char* op = "quantized_linear";
  check_bits(op, "activation_bits", activation_bits);
  check_bits(op, "weight_bits", weight_bits);
  if (!activations || activations.ndim != 2) refuse(op, "activation_words", "[batch, words]", activations);
  if (!weights || weights.ndim != 2) refuse(op, "weight_words", "[outputs, words]", weights);
  if (length < 0) throw py::value_error("quantized_linear: length must not be negative, got " + std::to_string(length));
  Linear f;
  f.activation_bits = activation_bits;
  f.weight_bits = weight_bits;
  f.batch = activations.shape[0];
  f.outputs = weights.shape[0];
  f.length = length;
  f.activations = words(op, "activation_words", activations, activations, f.batch, length, activation_bits);
  f.weights = words(op, "weight_words", weights, activations, f.outputs, length, weight_bits);
  f.sum_bytes = bytes_of(op, p);
  f.p = sums(op, "p", p, activations, f.sum_bytes, {f.batch, f.outputs});
  f.q = sums(op, "q", q, activations, f.sum_bytes, {f.batch});
  if (f.batch == 0) return true;
  PYACCEL_ON(activations, linear, f)
  PYACCEL_RUN(linear, f)
  return true;
}

bool convolution(const Tensor& activations, const Tensor& weights, int activation_bits, int weight_bits, Pair kernel, Pair stride,
                 Pair padding, Pair dilation, int64_t groups, const Tensor& p, const Tensor& q) {
  const char* op = "quantized_conv2d";
  check_bits(op, "activation_bits", activation_bits);
  check_bits(op, "weight_bits", weight_bits);
  if (!activations || activations.ndim != 4) refuse(op, "activation_codes", "[batch, channels, height, width]", activations);
  if (!weights || weights.ndim != 2) refuse(op, "weight_words", "[outputs, words]", weights);
  Conv f;
  f.activation_bits = activation_bits;
  f.weight_bits = weight_bits;
  f.batch = activations.shape[0];
  f.channels = activations.shape[1];
  f.height = activations.shape[2];
  f.width = activations.shape[3];
  f.outputs = weights.shape[0];
  f.groups = groups;
  if (groups < 1 || f.channels % groups || f.outputs % groups)
    throw py::value_error("quantized_conv2d: groups must divide " + std::to_string(f.channels) + " channels and " +
                          std::to_string(f.outputs) + " outputs, got " + std::to_string(groups));
  int64_t out[2];
  for (size_t d = 0; d < 2; ++d) {
    f.kernel[d] = kernel[d], f.stride[d] = stride[d], f.padding[d] = padding[d], f.dilation[d] = dilation[d];
    if (kernel[d] < 1 || stride[d] < 1 || padding[d] < 0 || dilation[d] < 1)
      throw py::value_error("quantized_conv2d: kernel, stride and dilation must be positive, padding must not be negative");
    const int64_t room = (d ? f.width : f.height) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    out[d] = room < 0 ? 0 : room / stride[d] + 1;
  }
  f.out_height = out[0];
  f.out_width = out[1];
  f.activations = contiguous(op, "activation_codes", required(op, "activation_codes", activations, code_dtype(activation_bits), activations),
                             {f.batch, f.channels, f.height, f.width}).data;
  f.weights = words(op, "weight_words", weights, activations, f.outputs, f.channels / groups * kernel[0] * kernel[1], weight_bits);
  f.sum_bytes = bytes_of(op, p);
  f.p = sums(op, "p", p, activations, f.sum_bytes, {f.batch, f.outputs, f.out_height, f.out_width});
  f.q = sums(op, "q", q, activations, f.sum_bytes, {f.batch, groups, f.out_height, f.out_width});
  if (p.size() + q.size() == 0) return true;
  PYACCEL_ON(activations, convolution, f)
  PYACCEL_RUN(convolution, f)
  return f.in_range;
}

bool quantize(const Tensor& x, double scale, double levels, const Tensor& codes) {
  const char* op = "quantize_codes";
  if (!x || x.dtype != Dtype::f32 || !is_dense(x, 0)) refuse(op, "x", "dense float32", x);
  if (!codes || (codes.dtype != Dtype::u8 && codes.dtype != Dtype::i32)) refuse(op, "codes", "uint8 or int32", codes);
  if (!same_layout(required(op, "codes", codes, codes.dtype, x), 0, x, 0)) refuse(op, "codes", "of x's shape and strides", codes);
  Quantize f;
  f.count = x.size();
  f.scale = static_cast<float>(scale);
  f.levels = static_cast<float>(levels);
  f.wide = codes.dtype == Dtype::i32;
  f.x = static_cast<const float*>(x.data);
  f.codes = codes.data;
  if (f.count == 0) return true;
  PYACCEL_ON(x, quantize, f)
  PYACCEL_RUN(quantize, f)
  return true;
}

bool dequantize(const Tensor& p, const Tensor& q, const Tensor& bias, double p_scale, double q_scale, const Tensor& y) {
  const char* op = "dequantize_sums";
  Dequantize f;
  f.sum_bytes = bytes_of(op, p);
  if (p.ndim < 2) refuse(op, "p", "[batch, outputs, ...]", p);
  f.batch = p.shape[0];
  f.outputs = p.shape[1];
  for (int d = 2; d < p.ndim; ++d) f.inner *= p.shape[d];
  if (!is_dense(p, 0) || !same_layout(p, 0, required(op, "y", y, Dtype::f32, p), 0)) refuse(op, "y", "contiguous like p", y);
  if (p.size() > 0 && p.ndim > 0 && p.strides[p.ndim - 1] > 1) refuse(op, "p", "contiguous", p);
  if (!q || q.dtype != p.dtype || !is_dense(q, 0)) refuse(op, "q", "contiguous, of p's dtype", q);
  const int64_t positions = f.batch * f.inner;
  f.groups = positions > 0 ? q.size() / positions : 1;
  if (f.groups * positions != q.size() || f.groups < 1 || f.outputs % f.groups) refuse(op, "q", "[batch, groups, ...]", q);
  if (bias) f.bias = static_cast<const float*>(contiguous(op, "bias", required(op, "bias", bias, Dtype::f32, p), {f.outputs}).data);
  f.p_scale = p_scale;
  f.q_scale = q_scale;
  f.p = p.data;
  f.q = q.data;
  f.y = static_cast<float*>(y.data);
  if (p.size() == 0) return true;
  PYACCEL_ON(p, dequantize, f)
  PYACCEL_RUN(dequantize, f)
  return true;
}

bool to_signed(const Tensor& packed, int64_t length, const Tensor& codes, const Tensor& row_sums) {
  const char* op = "quantized_linear";
  if (!packed || packed.ndim != 2) refuse(op, "words", "[rows, words]", packed);
  Signed f;
  f.rows = packed.shape[0];
  f.length = length;
  f.words = words(op, "words", packed, packed, f.rows, length, 8);
  f.codes = static_cast<int8_t*>(contiguous(op, "codes", required(op, "codes", codes, Dtype::i8, packed), {f.rows, length}).data);
  f.sums = static_cast<int32_t*>(contiguous(op, "sums", required(op, "sums", row_sums, Dtype::i32, packed), {f.rows}).data);
  if (f.rows == 0) return true;
  PYACCEL_ON(packed, to_signed, f)
  PYACCEL_RUN(to_signed, f)
  return true;
}

}  // namespace

void bind(py::module_& m) {
  m.def("pack", &pack, py::arg("codes"), py::arg("bits"), py::arg("words"));
  m.def("unpack", &unpack, py::arg("words"), py::arg("bits"), py::arg("codes"));
  m.def("linear", &linear, py::arg("activation_words"), py::arg("weight_words"), py::arg("activation_bits"), py::arg("weight_bits"),
        py::arg("length"), py::arg("p"), py::arg("q"));
  m.def("convolution", &convolution, py::arg("activation_codes"), py::arg("weight_words"), py::arg("activation_bits"),
        py::arg("weight_bits"), py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("p"), py::arg("q"));
  m.def("quantize", &quantize, py::arg("x"), py::arg("scale"), py::arg("levels"), py::arg("codes"));
  m.def("dequantize", &dequantize, py::arg("p"), py::arg("q"), py::arg("bias").none(true), py::arg("p_scale"), py::arg("q_scale"),
        py::arg("y"));
  m.def("to_signed", &to_signed, py::arg("words"), py::arg("length"), py::arg("codes"), py::arg("sums"));
}

}  // namespace pyaccel::qmac
