// Quantise, fail and dequantise in one pass (contract: sram.h), and its straight-through gradient. Floor: one tensor
// read and one written; in dense mode the generator. Failures of a chunk of elements are a bit string in the caches,
// so both modes and every width share the element loop.
#include <algorithm>
#include <cstring>

#include "../core/parallel.h"
#include "../core/scratch.h"
#include "failures_cpu.h"
#include "kernels_cpu.h"
#include "noise_math.h"

namespace pyaccel::sram::PYACCEL_ISA {
namespace {

constexpr int kLanes = Simd<float>::lanes;
constexpr int64_t kStreamBytes = 12 << 20;  // results beyond this go past the caches
typedef int32_t IntVec __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));

// One mask a lane. (The compiler's own conversion of narrow vectors takes several steps.)
PYACCEL_INLINE WordVec masks_of(const uint8_t* p) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(WordVec, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(WordVec, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return WordVec{p[0], p[1], p[2], p[3]};
#endif
}
PYACCEL_INLINE WordVec masks_of(const uint16_t* p) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(WordVec, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(WordVec, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return WordVec{p[0], p[1], p[2], p[3]};
#endif
}

template <class S>
struct Quantiser {
  S scale, low, high;
  int word_bits;
  bool is_signed;
};

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even

PYACCEL_INLINE Vec<float> clipped(Vec<float> t, float low, float high) {
  t = t == t ? t : Vec<float>{};
#if PYACCEL_VECTOR_BYTES == 32
  const __m256 above = _mm256_max_ps(__builtin_bit_cast(__m256, t), _mm256_set1_ps(low));
  return __builtin_bit_cast(Vec<float>, _mm256_min_ps(above, _mm256_set1_ps(high)));
#else
  t = t > low ? t : Vec<float>{} + low;
  return t < high ? t : Vec<float>{} + high;
#endif
}

// Elements with one failure mask (M: uint8_t or uint16_t) each. `q` by value: behind a reference it would be read again
// after every store.
template <bool stream, class E, class M>
void elements(const E* x, E* y, int64_t n, const M* failed, const Quantiser<typename StateOf<E>::type> q) {
  using S = typename StateOf<E>::type;
  int64_t i = 0;
  if constexpr (sizeof(S) == 4) {
    const int up = 32 - q.word_bits;
    for (; i + kLanes <= n; i += kLanes) {
      const Vec<float> t = clipped(load_vec(x + i) / q.scale, q.low, q.high);
      const WordVec code = __builtin_bit_cast(WordVec, t + kRound) - __builtin_bit_cast(uint32_t, kRound);
      const WordVec word = (code ^ masks_of(failed + i)) << up;
      const IntVec read = q.is_signed ? __builtin_bit_cast(IntVec, word) >> up : __builtin_bit_cast(IntVec, word >> up);
      store_vec<stream>(y + i, __builtin_convertvector(read, Vec<float>) * q.scale);
    }
  }
  for (; i < n; ++i) {
    const int code = code_of(S(load(x + i)) / q.scale, q.low, q.high);
    store(y + i, static_cast<S>(failed_code(code, failed[i], q.word_bits, q.is_signed)) * q.scale);
  }
}

template <class E>
void chunk(const E* x, E* y, int64_t n, const uint8_t* failed, int shift, bool stream, const Quantiser<typename StateOf<E>::type>& q) {
  const auto run = [&](const auto* masks, int64_t at, int64_t count) {
    if (stream && aligned(y + at)) elements<true>(x + at, y + at, count, masks, q);
    else elements<false>(x + at, y + at, count, masks, q);
  };
  if (q.word_bits == 8) return run(failed + shift / 8, 0, n);
  if (q.word_bits == 16) return run(reinterpret_cast<const uint16_t*>(failed + shift / 8), 0, n);
  constexpr int64_t kBatch = 512;
  uint8_t masks[kBatch];
  const unsigned all = (1u << q.word_bits) - 1;
  for (int64_t at = 0; at < n; at += kBatch) {
    const int64_t count = std::min(kBatch, n - at);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t bit = shift + (at + i) * q.word_bits;
      masks[i] = static_cast<uint8_t>(failed[bit >> 3] >> (bit & 7) & all);
    }
    run(masks, at, count);
  }
}

template <class E>
void run(const Noise& f) {
  using S = typename StateOf<E>::type;
  const Plan& plan = *f.draws.plan;
  const Quantiser<S> q{f.scale_data != nullptr ? *static_cast<const S*>(f.scale_data) : static_cast<S>(f.scale),
                       static_cast<S>(f.low()), static_cast<S>(f.high()), plan.word_bits, f.is_signed};
  const bool stream = f.elements * static_cast<int64_t>(sizeof(E)) > kStreamBytes;
  // Counted from word 0, so that no sparse block lies in two chunks.
  const uint64_t size = plan.sparse ? kSparseChunk / 4 : 8192, first = f.draws.first_word;
  const uint64_t begin_chunk = first / size, end_chunk = (first + static_cast<uint64_t>(f.elements) + size - 1) / size;
  const int64_t chunks = static_cast<int64_t>(end_chunk - begin_chunk);
  const size_t mask_bytes = size * static_cast<size_t>(plan.word_bits) / 8;
  parallel_shares(chunks, threads_for(f.elements * 16, chunks), [&](int64_t begin, int64_t end, int) {
    uint8_t* failed = static_cast<uint8_t*>(scratch(0, mask_bytes + 8 * (kDenseSlack + 1)));
    for (int64_t c = begin; c < end; ++c) {
      const uint64_t low = std::max(first, (begin_chunk + static_cast<uint64_t>(c)) * size);
      const uint64_t high = std::min(first + static_cast<uint64_t>(f.elements), (begin_chunk + static_cast<uint64_t>(c) + 1) * size);
      const int64_t n = static_cast<int64_t>(high - low), at = static_cast<int64_t>(low - first);
      int shift = 0;
      if (plan.sparse) {
        std::memset(failed, 0, static_cast<size_t>(n * plan.word_bits + 7) / 8);
        sparse_failures(f.draws, low, n, false, failed, 0);
      } else {
        const uint64_t bit = low * static_cast<uint64_t>(plan.word_bits);
        shift = static_cast<int>(bit % 64);
        dense_failures(f.draws, bit - static_cast<uint64_t>(shift), (n * plan.word_bits + shift + 63) / 64, reinterpret_cast<uint64_t*>(failed));
      }
      chunk(static_cast<const E*>(f.x) + at, static_cast<E*>(f.y) + at, n, failed, shift, stream, q);
    }
    if (stream) finish_streams();
  });
}

template <class E>
void run(const NoiseBackward& f) {
  using S = typename StateOf<E>::type;
  const S step = f.scale_data != nullptr ? *static_cast<const S*>(f.scale_data) : static_cast<S>(f.scale);
  const int64_t piece = 4096, pieces = (f.elements + piece - 1) / piece;
  const E *x = static_cast<const E*>(f.x), *grad = static_cast<const E*>(f.grad);
  E* to = static_cast<E*>(f.grad_x);
  parallel_shares(pieces, threads_for(f.elements * 3 * static_cast<int64_t>(sizeof(E)), pieces), [&](int64_t begin, int64_t end, int) {
    E* const out = to;
    const S scale = step, low = static_cast<S>(f.low), high = static_cast<S>(f.high);
    int64_t i = begin * piece;
    const int64_t last = std::min(end * piece, f.elements);
    if constexpr (sizeof(S) == 4) {
      for (; i + kLanes <= last; i += kLanes) {
        const Vec<float> t = clipped(load_vec(x + i) / scale, low - 1, high + 1);
        const Vec<float> code = (t + kRound) - kRound, g = load_vec(grad + i);
        store_vec<false>(out + i, (code >= low) & (code <= high) ? g : Vec<float>{});
      }
    }
    for (; i < last; ++i) store(out + i, passes(S(load(x + i)) / scale, low, high) ? S(load(grad + i)) : S(0));
  });
}

template <class F>
void with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64: return f(double{});
    case Dtype::f16: return f(Half{});
    case Dtype::bf16: return f(Bf16{});
    default: return f(float{});
  }
}

}  // namespace

void noise(const Noise& f) {
  with_element(f.dtype, [&](auto e) { run<decltype(e)>(f); });
}

void noise_backward(const NoiseBackward& f) {
  with_element(f.dtype, [&](auto e) { run<decltype(e)>(f); });
}

}  // namespace pyaccel::sram::PYACCEL_ISA
