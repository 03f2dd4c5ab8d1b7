// Quantise, fail, dequantise: the arithmetic of one element, the same on both sides.
#pragma once
#include <cmath>

#include "../core/host_device.h"

namespace pyaccel::sram {

// clamp(round(t), low, high), half to even; NaN has code 0. Clamping first changes nothing: the bounds are integers.
template <class S>
PYACCEL_HD int code_of(S t, S low, S high) {
  t = t == t ? t : S(0);
  t = t > low ? t : low;
  t = t < high ? t : high;
#if defined(__CUDA_ARCH__)
  return static_cast<int>(rint(t));
#else
  return static_cast<int>(std::nearbyint(t));
#endif
}

// What a code reads as after `failed` bits flip. The word holds W bits; its top bit counts -2^(W-1) where signed.
PYACCEL_HD int failed_code(int code, unsigned failed, int word_bits, bool is_signed) {
  const unsigned up = static_cast<unsigned>(32 - word_bits);
  const unsigned word = (static_cast<unsigned>(code) ^ failed) << up;
  return is_signed ? static_cast<int>(word) >> up : static_cast<int>(word >> up);
}

// Straight through: the gradient passes where the quantiser did not clip.
template <class S>
PYACCEL_HD bool passes(S t, S low, S high) {
  const int code = code_of(t, low - S(1), high + S(1));
  return code >= static_cast<int>(low) && code <= static_cast<int>(high);
}

}  // namespace pyaccel::sram
