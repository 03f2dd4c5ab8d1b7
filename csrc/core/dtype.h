// Element types of the tensors that cross into a kernel.
#pragma once
#include <cstdint>

namespace pyaccel {

enum class Dtype : int32_t { f32, f64, f16, bf16, i8, u8, i16, i32, i64, boolean };

constexpr const char* name(Dtype type) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16", "int8",
                                   "uint8",   "int16",   "int32",   "int64",    "bool"};
  return names[static_cast<int>(type)];
}

constexpr int64_t size_of(Dtype type) {
  constexpr int64_t bytes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1};
  return bytes[static_cast<int>(type)];
}

constexpr bool is_floating(Dtype type) { return type <= Dtype::bf16; }

// Sums and neuron state: float64 for float64, float32 for everything narrower.
constexpr Dtype state_of(Dtype type) { return type == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

}  // namespace pyaccel
