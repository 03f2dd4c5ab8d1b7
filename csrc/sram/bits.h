// Comparison of stream bytes with thresholds, four in a 32-bit word; what the CUDA kernels do instead of vector compares.
#pragma once
#include <cstdint>

#include "../core/host_device.h"

namespace pyaccel::sram::bits {

// Bit 7 of every byte: a < b, unsigned. No borrow crosses a byte: each byte of the difference is 1..255.
PYACCEL_HD uint32_t less(uint32_t a, uint32_t b) {
  const uint32_t difference = (a | 0x80808080u) - (b & 0x7f7f7f7fu);
  return ((~a & b) | (~(a ^ b) & ~difference)) & 0x80808080u;
}

// Bit 7 of every byte: a == b, exactly.
PYACCEL_HD uint32_t equal(uint32_t a, uint32_t b) {
  const uint32_t v = a ^ b;
  return ~(((v & 0x7f7f7f7fu) + 0x7f7f7f7fu) | v) & 0x80808080u;
}

// Bits 7, 15, 23, 31 to bits 0..3: the partial products fall on different bits, so nothing carries.
PYACCEL_HD uint32_t gather(uint32_t mask) { return ((mask >> 7) * 0x10204080u) >> 28; }

}  // namespace pyaccel::sram::bits
