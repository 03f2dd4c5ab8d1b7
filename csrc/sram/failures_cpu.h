// Which bits fail, as bit strings and as positions: what the kernels of one instruction set share.
#pragma once
#include "../core/philox_lanes.h"
#include "sram.h"

namespace pyaccel::sram::PYACCEL_ISA {
using namespace ::pyaccel::PYACCEL_ISA;

// dense_failures may write this many 64-bit words beyond what was asked for.
constexpr int kDenseSlack = 16;

// Failing bits first_bit .. first_bit + 64*words, as a bit string. first_bit is a multiple of 64.
void dense_failures(const Draws&, uint64_t first_bit, int64_t words, uint64_t* out);

// Values of stuck cells for the same bits.
void stuck_values(const Draws&, uint64_t first_bit, int64_t words, uint64_t* out);

// Receives failing words of one plane, as offsets from `base`.
struct Positions {
  static constexpr int kCapacity = 4096, kRoom = 2048;  // one turn adds at most kRoom
  uint32_t at[kCapacity];
  int count = 0;
};

// Sparse failures of words first .. first+count, whose bits begin at bit `offset` (0..7) of `memory`.
// Flips them there; with `stuck` they read their fixed values.
void sparse_failures(const Draws&, uint64_t first, int64_t count, bool stuck, uint8_t* memory, int offset);

// Words of one chunk of sparse work: at least 16 blocks of the largest size, so that no lanes idle; a multiple of it.
constexpr int64_t kSparseChunk = 256 * 1024;

}  // namespace pyaccel::sram::PYACCEL_ISA
