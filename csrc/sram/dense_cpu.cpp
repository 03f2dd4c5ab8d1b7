// Dense failures on the CPU (contract: sram.h): bit i fails where U(i) < T, U = 8 high bits from one Philox stream and
// 24 low bits from another, which is drawn only where the high bits tie (1 in 256).
//
// Byte i of the first stream belongs to flat bit i, so one comparison of a vector of stream bytes against the high bytes
// of the thresholds gives a mask that is the packed failure word: nothing to pack, and every word width is the same
// kernel with another threshold pattern. Floor: the generator, one byte of Philox a bit of memory (`raw_philox`).
//   versions    one vector at a time, ties found by a loop over set bits; then kGroups vectors side by side; ties pushed
//               without branches. See docs/sram.md for what each bought.
#include <algorithm>
#include <cstring>

#include "../core/parallel.h"
#include "failures_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::sram::PYACCEL_ISA {
namespace {

constexpr int V = PYACCEL_VECTOR_BYTES;
#if PYACCEL_VECTOR_BYTES == 64
constexpr int kGroups = 4;    // vectors side by side
constexpr uint8_t kBias = 0;  // what makes bytes comparable: AVX2 and SSE compare signed bytes only
#elif defined(__x86_64__)
constexpr int kGroups = PYACCEL_VECTOR_BYTES == 32 ? 3 : 2;
constexpr uint8_t kBias = 0x80;
#else
constexpr int kGroups = 2;
constexpr uint8_t kBias = 0;
#endif
constexpr int kUnits = kGroups * 2 * V / 64;  // 64-bit words of failures a turn
static_assert(kUnits >= 1 && kUnits <= kDenseSlack);

typedef uint8_t ByteVec __attribute__((vector_size(V)));
typedef uint32_t Places __attribute__((vector_size(V / 2)));

// One bit a byte: a < b, and a == b.
PYACCEL_INLINE void compare(ByteVec a, ByteVec b, uint64_t& less, uint64_t& equal) {
#if PYACCEL_VECTOR_BYTES == 64
  const __m512i x = __builtin_bit_cast(__m512i, a), y = __builtin_bit_cast(__m512i, b);
  less = _mm512_cmplt_epu8_mask(x, y);
  equal = _mm512_cmpeq_epu8_mask(x, y);
#elif PYACCEL_VECTOR_BYTES == 32
  const __m256i x = __builtin_bit_cast(__m256i, a), y = __builtin_bit_cast(__m256i, b);
  less = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(y, x)));
  equal = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, y)));
#elif defined(__x86_64__)
  const __m128i x = __builtin_bit_cast(__m128i, a), y = __builtin_bit_cast(__m128i, b);
  less = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmplt_epi8(x, y)));
  equal = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, y)));
#else
  less = equal = 0;
  for (int i = 0; i < V; ++i) {
    less |= static_cast<uint64_t>(a[i] < b[i]) << i;
    equal |= static_cast<uint64_t>(a[i] == b[i]) << i;
  }
#endif
}

// The lowest bit of every byte.
PYACCEL_INLINE uint64_t low_bits(ByteVec a) {
#if PYACCEL_VECTOR_BYTES == 64
  return _mm512_test_epi8_mask(__builtin_bit_cast(__m512i, a), _mm512_set1_epi8(1));
#elif PYACCEL_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi64(__builtin_bit_cast(__m256i, a), 7)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_slli_epi64(__builtin_bit_cast(__m128i, a), 7)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < V; ++i) bits |= static_cast<uint64_t>(a[i] & 1) << i;
  return bits;
#endif
}

// Counters lie in the lanes so that interleaving the two output registers puts the stream in order.
PYACCEL_INLINE Wide lane_offsets() {
  Wide offset{};
  for (int m = 0; m < kWideLanes / 2; ++m) {
    offset[2 * m] = static_cast<uint64_t>(m);
    offset[2 * m + 1] = static_cast<uint64_t>(m + kWideLanes / 2);
  }
  return offset;
}
PYACCEL_INLINE void interleave(Wide a, Wide b, ByteVec& first, ByteVec& second) {
#if PYACCEL_VECTOR_BYTES == 64
  const __m512i x = __builtin_bit_cast(__m512i, a), y = __builtin_bit_cast(__m512i, b);
  first = __builtin_bit_cast(ByteVec, _mm512_maskz_unpacklo_epi64(0xff, x, y));
  second = __builtin_bit_cast(ByteVec, _mm512_maskz_unpackhi_epi64(0xff, x, y));
#elif PYACCEL_VECTOR_BYTES == 32
  const __m256i x = __builtin_bit_cast(__m256i, a), y = __builtin_bit_cast(__m256i, b);
  first = __builtin_bit_cast(ByteVec, _mm256_unpacklo_epi64(x, y));
  second = __builtin_bit_cast(ByteVec, _mm256_unpackhi_epi64(x, y));
#else
  first = __builtin_bit_cast(ByteVec, Wide{a[0], b[0]});
  second = __builtin_bit_cast(ByteVec, Wide{a[1], b[1]});
#endif
}

// body(unit, first, second, group) with the stream bytes of the bits of each group: 2*V bytes, in order.
// Runs are split where the upper half of the counter changes; ended(unit) after each. What `body` saw from that unit on
// was not of the stream.
template <class Body, class Ended>
PYACCEL_INLINE void for_stream(const Draws& d, uint32_t domain, uint64_t first_bit, int64_t words, const Body& body, const Ended& ended) {
  const PhiloxKeys keys(d.seed);
  constexpr int64_t kRun = int64_t{1} << 30;  // 64-bit words of bits that 2^32 counters cover
  for (int64_t done = 0; done < words;) {
    const uint64_t counter = first_bit / 16 + static_cast<uint64_t>(done) * 4;
    const int64_t left = kRun - static_cast<int64_t>((counter & 0xffffffffu) / 4), end = std::min(words, done + left);
    const PhiloxRun run(keys, static_cast<uint32_t>(counter >> 32), d.stream, domain);
    Wide products[kGroups];
    for (int g = 0; g < kGroups; ++g)
      products[g] = multiply_low(lane_offsets() + (counter & 0xffffffffu) + static_cast<uint64_t>(g * kWideLanes), Wide{} + kPhilox0);
    for (; done < end; done += kUnits) {
      PhiloxEnd drawn[kGroups];
      run.draw(products, drawn);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        Wide c01, c23;
        drawn[g].pairs(kBias, c01, c23);
        ByteVec first, second;
        interleave(c01, c23, first, second);
        body(done, first, second, g);
        products[g] += kPhilox0 * static_cast<uint64_t>(kGroups * kWideLanes);
      }
    }
    done = end;
    ended(end);
  }
}

// Masks of 2*V bits a group, as 64-bit words at out[unit ...].
PYACCEL_INLINE void put(uint64_t* out, int group, uint64_t first, uint64_t second) {
  if constexpr (V == 64) {
    out[2 * group] = first;
    out[2 * group + 1] = second;
  } else {
    const uint64_t both = first | second << (V % 64);
    if constexpr (V == 32) out[group] = both;
    else std::memcpy(reinterpret_cast<char*>(out) + 4 * group, &both, 4);  // little-endian
  }
}

// The thresholds as the kernel wants them, for bits in the order of memory.
struct Pattern {
  ByteVec high[2];              // their high bytes, for the first and second vector of a group
  uint64_t always = 0;          // bits that fail with certainty
  uint64_t may_tie = 0;         // bits whose threshold has low bits
  uint32_t low[kMaxWordBits];   // 24 low bits

  explicit Pattern(const Plan& plan) {
    for (int i = 0; i < 2 * V; ++i) high[i / V][i % V] = static_cast<uint8_t>((plan.planes[i & (plan.word_bits - 1)].threshold >> 24) ^ kBias);
    for (int i = 0; i < 64; ++i) {
      const uint64_t t = plan.planes[i & (plan.word_bits - 1)].threshold;
      always |= static_cast<uint64_t>(t >> 32) << i;
      may_tie |= static_cast<uint64_t>((t & 0xffffffu) != 0) << i;
    }
    for (int b = 0; b < plan.word_bits; ++b) low[b] = static_cast<uint32_t>(plan.planes[b].threshold & 0xffffffu);
  }
};

// Positions whose high bits tie: their low bits decide.
class Ties {
 public:
  static constexpr int kCapacity = 4096;

  Ties(const Draws& d, const Pattern& pattern, uint64_t first_bit, uint64_t* out)
      : keys_(d.seed), pattern_(pattern), stream_(d.stream), first_(first_bit), bit_mask_(static_cast<uint32_t>(d.plan->word_bits - 1)), out_(out) {}

  // Adds to the `count` ties collected. The first of a word is pushed without a branch: 2 in 100 words hold more.
  // (The count is the caller's, in a register: as a member it would go through memory at every push.)
  PYACCEL_INLINE int push(int count, uint32_t base, uint64_t ties) {
    at_[count] = base + static_cast<uint32_t>(__builtin_ctzll(ties | uint64_t{1} << 63));
    count += ties != 0;
    ties &= ties - 1;
    while (__builtin_expect(ties != 0, 0)) {
      at_[count++] = base + static_cast<uint32_t>(__builtin_ctzll(ties));
      ties &= ties - 1;
    }
    return count;
  }

  // Positions were pushed in order.
  int keep_below(int count, uint32_t end) const {
    while (count > 0 && at_[count - 1] >= end) --count;
    return count;
  }

  void resolve(int count) {
    constexpr int kBatch = 2 * kWideLanes;
    for (int i = count; i < count + kBatch; ++i) at_[i] = 0;  // idle lanes draw something harmless
    for (int from = 0; from < count; from += kBatch) {
      Wide pairs[4];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Places places;
        std::memcpy(&places, at_ + from + half * kWideLanes, sizeof places);
        const Wide counter = (__builtin_convertvector(places, Wide) + first_) >> 2;
        philox_lanes(keys_, counter, stream_, 1).pairs(0, pairs[2 * half], pairs[2 * half + 1]);
      }
      alignas(64) uint32_t words[4][2 * kWideLanes];  // [half * 2 + pair][lane * 2 + member]
      std::memcpy(words, pairs, sizeof words);
      const int n = std::min(kBatch, count - from);
      for (int l = 0; l < n; ++l) {
        const uint32_t bit = at_[from + l], i = bit & 3;
        const uint32_t drawn = words[l / kWideLanes * 2 + static_cast<int>(i >> 1)][l % kWideLanes * 2 + static_cast<int>(i & 1)] >> 8;
        out_[bit >> 6] |= static_cast<uint64_t>(drawn < pattern_.low[bit & bit_mask_]) << (bit & 63);
      }
    }
  }

 private:
  PhiloxKeys keys_;
  const Pattern& pattern_;
  uint32_t stream_;
  uint64_t first_;
  uint32_t bit_mask_;
  uint64_t* out_;
  uint32_t at_[kCapacity + 2 * kWideLanes];
};

}  // namespace

void dense_failures(const Draws& d, uint64_t first_bit, int64_t words, uint64_t* out) {
  const Pattern pattern(*d.plan);
  Ties ties(d, pattern, first_bit, out);
  const uint64_t always = pattern.always, may_tie = pattern.may_tie;
  int tied = 0;
  alignas(64) uint64_t equal[kUnits];
  for_stream(d, 0, first_bit, words, [&](int64_t unit, ByteVec first, ByteVec second, int g) PYACCEL_LAMBDA_INLINE {
    uint64_t less[2], same[2];
    compare(first, pattern.high[0], less[0], same[0]);
    compare(second, pattern.high[1], less[1], same[1]);
    put(out + unit, g, less[0], less[1]);
    put(equal, g, same[0], same[1]);
    if (g + 1 < kGroups) return;
    if (__builtin_expect(tied > Ties::kCapacity - 64 * kUnits, 0)) {
      ties.resolve(tied);
      tied = 0;
    }
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      out[unit + u] |= always;
      tied = ties.push(tied, static_cast<uint32_t>(unit + u) * 64, equal[u] & may_tie);
    }
  }, [&](int64_t end) PYACCEL_LAMBDA_INLINE { tied = ties.keep_below(tied, static_cast<uint32_t>(end) * 64); });
  ties.resolve(tied);
}

void stuck_values(const Draws& d, uint64_t first_bit, int64_t words, uint64_t* out) {
  for_stream(d, 2, first_bit, words, [&](int64_t unit, ByteVec first, ByteVec second, int g) PYACCEL_LAMBDA_INLINE {
    const uint64_t flip = kBias & 1 ? ~uint64_t{0} : 0;  // the bias leaves the lowest bit alone
    put(out + unit, g, low_bits(first) ^ flip, low_bits(second) ^ flip);
  }, [](int64_t) PYACCEL_LAMBDA_INLINE {});
}

void raw_philox(const RawPhilox& f) {
  if (f.out != nullptr) {
    const PhiloxKeys keys(f.seed);
    for (int64_t done = 0; done < f.blocks; done += kWideLanes) {
      Wide counter = Wide{} + f.first + static_cast<uint64_t>(done);
      for (int l = 0; l < kWideLanes; ++l) counter[l] += static_cast<uint64_t>(l);
      Wide words[4];
      philox_lanes(keys, counter, f.stream, f.domain).words(words);
      for (int l = 0; l < kWideLanes && done + l < f.blocks; ++l)
        for (int w = 0; w < 4; ++w) f.out[(done + l) * 4 + w] = static_cast<uint32_t>(words[w][l]);
    }
    return;
  }
  const int64_t turns = f.blocks / (kGroups * kWideLanes);
  const int threads = threads_for(f.blocks * 16, turns);
  uint64_t folded[2] = {0, 0};
  parallel_shares(turns, threads, [&](int64_t begin, int64_t end, int) {
    const PhiloxKeys keys(f.seed);
    const uint64_t counter = f.first + static_cast<uint64_t>(begin * kGroups * kWideLanes);
    const PhiloxRun run(keys, static_cast<uint32_t>(counter >> 32), f.stream, f.domain);
    Wide products[kGroups], sum0{}, sum1{};
    for (int g = 0; g < kGroups; ++g)
      products[g] = multiply_low(lane_offsets() + (counter & 0xffffffffu) + static_cast<uint64_t>(g * kWideLanes), Wide{} + kPhilox0);
    for (int64_t turn = begin; turn < end; ++turn) {
      PhiloxEnd drawn[kGroups];
      run.draw(products, drawn);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        Wide c01, c23;
        drawn[g].pairs(0, c01, c23);
        sum0 ^= c01;
        sum1 ^= c23;
        products[g] += kPhilox0 * static_cast<uint64_t>(kGroups * kWideLanes);
      }
    }
    uint64_t a = 0, b = 0;
    for (int l = 0; l < kWideLanes; ++l) a ^= sum0[l], b ^= sum1[l];
    __atomic_fetch_xor(&folded[0], a, __ATOMIC_RELAXED);
    __atomic_fetch_xor(&folded[1], b, __ATOMIC_RELAXED);
  });
  std::memcpy(f.folded, folded, sizeof folded);
}

}  // namespace pyaccel::sram::PYACCEL_ISA
