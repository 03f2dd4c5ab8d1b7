// Bit failures in memory, in place or copied (contract: sram.h). Floor: dense, the generator (dense_cpu.cpp); sparse,
// two numbers a block (sparse_cpu.cpp) and, out of place, the copy.
#include <algorithm>
#include <cstring>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "failures_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::sram::PYACCEL_ISA {
namespace {

constexpr int64_t kChunk = 8 * 1024;  // bytes; with its failures, values and the generator's tables within the L1

// `bits` read from bit offset `shift` (0..63), one word.
PYACCEL_INLINE uint64_t shifted(const uint64_t* bits, unsigned shift) {
  return shift == 0 ? bits[0] : bits[0] >> shift | bits[1] << (64 - shift);
}

// `shift`: where in the bit strings the first bit of memory stands.
void apply(const uint8_t* in, uint8_t* out, int64_t bytes, const uint64_t* failed, const uint64_t* values, unsigned shift) {
  int64_t at = 0;
  if (shift == 0 && values == nullptr)
    for (; at + PYACCEL_VECTOR_BYTES <= bytes; at += PYACCEL_VECTOR_BYTES)
      store_bits<false>(out + at, load_vec(in + at) ^ load_vec(reinterpret_cast<const uint8_t*>(failed) + at));
  for (; at + 8 <= bytes; at += 8) {
    uint64_t word, change = shifted(failed + at / 8, shift);
    std::memcpy(&word, in + at, 8);
    if (values != nullptr) change &= word ^ shifted(values + at / 8, shift);
    word ^= change;
    std::memcpy(out + at, &word, 8);
  }
  if (at < bytes) {
    uint64_t word = 0, change = shifted(failed + at / 8, shift);
    std::memcpy(&word, in + at, static_cast<size_t>(bytes - at));
    if (values != nullptr) change &= word ^ shifted(values + at / 8, shift);
    word ^= change;
    std::memcpy(out + at, &word, static_cast<size_t>(bytes - at));
  }
}

void dense(const Flip& f) {
  const uint64_t start = f.draws.first_word * static_cast<uint64_t>(f.draws.plan->word_bits);
  const int64_t chunks = (f.bytes + kChunk - 1) / kChunk;
  parallel_shares(chunks, threads_for(16 * f.bytes, chunks), [&](int64_t begin, int64_t end, int) {
    alignas(64) uint64_t failed[kChunk / 8 + 1 + kDenseSlack], values[kChunk / 8 + 1 + kDenseSlack];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t at = c * kChunk, bytes = std::min(kChunk, f.bytes - at);
      const uint64_t bit = start + static_cast<uint64_t>(at) * 8;
      const unsigned shift = static_cast<unsigned>(bit % 64);
      const int64_t words = (bytes * 8 + shift + 63) / 64;
      dense_failures(f.draws, bit - shift, words, failed);
      if (f.stuck) stuck_values(f.draws, bit - shift, words, values);
      apply(f.in + at, f.out + at, bytes, failed, f.stuck ? values : nullptr, shift);
    }
  });
}

void sparse(const Flip& f) {
  const int bits = f.draws.plan->word_bits;
  const uint64_t first = f.draws.first_word, words = static_cast<uint64_t>(f.bytes * 8 / bits);
  // Chunks begin at multiples of their size, counted from word 0: a block never lies in two of them.
  const uint64_t chunk = static_cast<uint64_t>(kSparseChunk) * (bits < 8 ? 2 : 1);
  const uint64_t begin_chunk = first / chunk, end_chunk = (first + words + chunk - 1) / chunk;
  const int64_t chunks = static_cast<int64_t>(end_chunk - begin_chunk);
  // Words that start inside a byte would let two threads write the same one.
  const bool whole = first * static_cast<uint64_t>(bits) % 8 == 0;
  parallel_shares(chunks, whole ? threads_for(f.bytes, chunks) : 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      const uint64_t low = std::max(first, (begin_chunk + static_cast<uint64_t>(c)) * chunk);
      const uint64_t high = std::min(first + words, (begin_chunk + static_cast<uint64_t>(c) + 1) * chunk);
      const uint64_t offset = (low - first) * static_cast<uint64_t>(bits);
      if (f.in != f.out && whole)
        std::memcpy(f.out + offset / 8, f.in + offset / 8, static_cast<size_t>((high - low) * static_cast<uint64_t>(bits) / 8));
      if (f.in != f.out && !whole && c == begin) std::memcpy(f.out, f.in, static_cast<size_t>(f.bytes));
      sparse_failures(f.draws, low, static_cast<int64_t>(high - low), f.stuck, f.out + offset / 8, static_cast<int>(offset % 8));
    }
  });
}

}  // namespace

void flip(const Flip& f) { f.draws.plan->sparse ? sparse(f) : dense(f); }

}  // namespace pyaccel::sram::PYACCEL_ISA
