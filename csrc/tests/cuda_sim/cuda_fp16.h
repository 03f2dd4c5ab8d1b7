// float16 of the simulator: see cuda_runtime.h.
#pragma once
#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) {
  return static_cast<float>(std::bit_cast<_Float16>(h.bits));
}
inline __half __float2half_rn(float v) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))};
}
inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}
