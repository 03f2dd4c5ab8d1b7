// Philox4x32-10 (Salmon et al., SC 2011), and the table of what each counter domain draws.
//
// key     = (seed low, seed high)
// counter = (index low, index high, stream, domain)
// Counter-based: the draw for an element depends on what is drawn, never on where or when it runs.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace pyaccel::philox {

enum Domain : uint32_t {
  kDenseFlipHigh = 0,   // high bytes of dense flips
  kDenseFlipLow = 1,    // low words of dense flips
  kStuckValue = 2,      // value of a stuck cell
  kEncoder = 3,         // + (step << 8): Poisson encoder
  kDeviceVariation = 4,
  kReadNoise = 5,
  kDropout = 6,         // dropout mask held over time
  kSparseFlip = 0x02000000,  // + (plane << 16): sparse flips of one bit plane
};

struct Words {
  uint32_t w[4];
};

PYACCEL_HD Words draw(uint64_t key, uint64_t index, uint32_t stream, uint32_t domain) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = stream, c3 = domain;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace pyaccel::philox
