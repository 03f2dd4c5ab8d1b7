// Poisson encoder on the CPU (contract: neuron.h). Philox draws four pixels of one sample and step at a time; eight or
// sixteen such blocks run side by side in SIMD lanes. Floor: 4 bytes written an element (2 in bfloat16); at 10 rounds of
// two 32x32-bit products a block it is bound by the multiplications, not by memory.
#include <algorithm>

#include "../core/parallel.h"
#include "../core/philox.h"
#include "cells_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::neuron::PYACCEL_ISA {
namespace {

constexpr int kBlocks = Simd<float>::lanes;  // Philox blocks side by side
typedef uint64_t Wide __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));

// High and low words of a 32x32-bit product in every lane: even and odd lanes go through the 64-bit multiplier in turn.
PYACCEL_INLINE void multiply(WordVec a, uint32_t constant, WordVec& high, WordVec& low) {
  const Wide lanes = __builtin_bit_cast(Wide, a);
  const Wide even = (lanes & 0xffffffffu) * uint64_t{constant};
  const Wide odd = (lanes >> 32) * uint64_t{constant};
  low = __builtin_bit_cast(WordVec, (even & 0xffffffffu) | (odd << 32));
  high = __builtin_bit_cast(WordVec, (even >> 32) | (odd & ~uint64_t{0xffffffffu}));
}

struct Draws {
  WordVec w[4];
};

// philox::draw for indices first, first + 1, ... (one a lane).
PYACCEL_INLINE Draws draw_lanes(uint64_t key, uint32_t first, uint32_t index_high, uint32_t stream, uint32_t domain) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  WordVec c0, c1 = WordVec{} + index_high, c2 = WordVec{} + stream, c3 = WordVec{} + domain;
  for (int i = 0; i < kBlocks; ++i) c0[i] = first + static_cast<uint32_t>(i);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    WordVec high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    const WordVec n0 = high1 ^ c1 ^ k0, n2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// floor(min(gain*|x|, 1) * 2^32), 0 for NaN.
template <class S>
PYACCEL_INLINE uint64_t threshold_of(S x, S gain) {
  const S p = std::abs(x) * gain;
  return p < S(1) ? static_cast<uint64_t>(p * S(4294967296.0)) : p >= S(1) ? uint64_t{1} << 32 : 0;
}

template <class E>
void run(Encode f) {
  using S = typename StateOf<E>::type;
  read_key(f);
  const S gain = static_cast<S>(f.gain);
  const int64_t chunk = 4 * kBlocks, chunks = (f.pixels + chunk - 1) / chunk;
  const int64_t bytes = f.steps * f.samples * f.pixels * static_cast<int64_t>(sizeof(E));
  // A piece is one chunk of pixels of one sample: image, thresholds and signs are read once for all steps.
  parallel_shares(f.samples * chunks, threads_for(4 * bytes, f.samples * chunks), [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t sample = piece / chunks, first = piece % chunks * chunk, count = std::min(chunk, f.pixels - first);
      const E* image = static_cast<const E*>(f.image) + sample * f.pixels;
      const uint64_t id = static_cast<uint64_t>(f.sample_ids != nullptr ? f.sample_ids[sample] : sample);
      int64_t place[4 * kBlocks];
      uint64_t limit[4 * kBlocks];
      S sign[4 * kBlocks];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t p = first + i;
        place[i] = f.channels_last ? p / f.inner + p % f.inner * f.channels : p;
        const S x = load(image + place[i]);
        limit[i] = threshold_of(x, gain);
        sign[i] = x < S(0) ? S(-1) : S(1);
      }
      for (int64_t t = 0; t < f.steps; ++t) {
        const uint32_t step = f.first_step + static_cast<uint32_t>(t);
        const Draws d = draw_lanes(f.seed, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(id), f.stream,
                                   philox::kEncoder + (step << 8));
        alignas(64) uint32_t words[4 * kBlocks];
        for (int lane = 0; lane < kBlocks; ++lane)
          for (int w = 0; w < 4; ++w) words[4 * lane + w] = d.w[w][lane];
        E* out = static_cast<E*>(f.spikes) + (t * f.samples + sample) * f.pixels;
        for (int64_t i = 0; i < count; ++i) store(out + place[i], words[i] < limit[i] ? sign[i] : S(0));
      }
    }
  });
}

}  // namespace

void encode(const Encode& f) {
  with_element(f.dtype, [&](auto e) { run<decltype(e)>(f); });
}

}  // namespace pyaccel::neuron::PYACCEL_ISA
