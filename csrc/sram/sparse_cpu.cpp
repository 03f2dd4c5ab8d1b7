// Sparse failures on the CPU (contract: sram.h): work proportional to blocks and failures, not to bits.
//
// For one plane, a vector of blocks a turn: their count draws fill 32-bit lanes (even blocks in one Philox register, odd
// ones in another), counts come from comparisons with the cumulative table, and the three words that the count draw
// leaves over give the first three positions, with duplicates repaired without a branch. Blocks with four to seven
// failures wait in a queue, so that registers are full when their turn comes; the few with more go one at a time. Positions are
// collected and applied in batches. A chunk of memory stays in the L2 while all planes pass over it.
#include <algorithm>
#include <cstring>

#include "../core/philox.h"
#include "failures_cpu.h"

namespace pyaccel::sram::PYACCEL_ISA {
namespace {

constexpr int kLanes = PYACCEL_VECTOR_BYTES / 4;  // blocks a turn
typedef int32_t IntVec __attribute__((vector_size(PYACCEL_VECTOR_BYTES)));

// Lane 2l from the low half of even[l], lane 2l+1 from that of odd[l].
PYACCEL_INLINE WordVec merge(Wide even, Wide odd) {
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(WordVec, _mm512_mask_blend_epi32(0xaaaa, __builtin_bit_cast(__m512i, even), __builtin_bit_cast(__m512i, odd << 32)));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(WordVec, _mm256_blend_epi32(__builtin_bit_cast(__m256i, even), __builtin_bit_cast(__m256i, odd << 32), 0xaa));
#else
  return __builtin_bit_cast(WordVec, (even & 0xffffffffu) | (odd << 32));
#endif
}

PYACCEL_INLINE WordVec multiply_high(WordVec a, WordVec b) {
  const Wide x = __builtin_bit_cast(Wide, a), y = __builtin_bit_cast(Wide, b);
  const Wide even = multiply_low(x, y) >> 32, odd = multiply_low(x >> 32, y >> 32);
#if PYACCEL_VECTOR_BYTES == 64
  return __builtin_bit_cast(WordVec, _mm512_mask_blend_epi32(0xaaaa, __builtin_bit_cast(__m512i, even), __builtin_bit_cast(__m512i, odd)));
#elif PYACCEL_VECTOR_BYTES == 32
  return __builtin_bit_cast(WordVec, _mm256_blend_epi32(__builtin_bit_cast(__m256i, even), __builtin_bit_cast(__m256i, odd), 0xaa));
#else
  return __builtin_bit_cast(WordVec, even | (odd & ~uint64_t{0xffffffffu}));
#endif
}

// One bit a lane of a comparison's result.
PYACCEL_INLINE uint32_t lanes_set(IntVec mask) {
#if PYACCEL_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(__builtin_bit_cast(__m512i, mask));
#elif PYACCEL_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(__builtin_bit_cast(__m256, mask)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(__builtin_bit_cast(__m128, mask)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(mask[l] & 1) << l;
  return bits;
#endif
}

#if PYACCEL_VECTOR_BYTES == 32
// For every mask of 8 lanes, the numbers of the lanes set, first.
struct CompressTable {
  alignas(64) uint8_t lanes[256][8];
  constexpr CompressTable() : lanes{} {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][n++] = static_cast<uint8_t>(lane);
  }
};
constexpr CompressTable kCompress;
#endif

// Stores the lanes set in `mask` one after another; may write a whole vector. (A full store of a compressed register:
// compressing into memory is microcoded on some processors.)
struct Compress {
  uint32_t mask;
#if PYACCEL_VECTOR_BYTES == 32
  __m256i order;
  PYACCEL_INLINE explicit Compress(uint32_t mask)
      : mask(mask), order(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[mask])))) {}
#else
  PYACCEL_INLINE explicit Compress(uint32_t mask) : mask(mask) {}
#endif
  PYACCEL_INLINE int count() const { return __builtin_popcount(mask); }
  PYACCEL_INLINE void store(uint32_t* to, WordVec v) const {
#if PYACCEL_VECTOR_BYTES == 64
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), __builtin_bit_cast(__m512i, v)));
#elif PYACCEL_VECTOR_BYTES == 32
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(__builtin_bit_cast(__m256i, v), order));
#else
    for (int l = 0, n = 0; l < kLanes; ++l) {
      to[n] = v[l];
      n += static_cast<int>(mask >> l & 1);
    }
#endif
  }
};

PYACCEL_INLINE Wide low_lanes(const uint32_t* block, int odd) {
  Wide v;
  for (int l = 0; l < kWideLanes; ++l) v[l] = block[2 * l + odd];
  return v;
}

// Failing words of one chunk of memory, in all planes.
class Chunk {
 public:
  Chunk(const Draws& d, uint64_t first, int64_t count, bool stuck, uint8_t* memory, int offset)
      : d_(d), keys_(d.seed), first_(first), count_(count), stuck_(stuck), memory_(memory), offset_(static_cast<uint64_t>(offset)), log2_bits_(__builtin_ctz(static_cast<unsigned>(d.plan->word_bits))) {}

  void plane(int number) {
    const Plane& plane = d_.plan->planes[number];
    plane_ = &plane;
    number_ = static_cast<uint32_t>(number);
    domain_ = philox::kSparseFlip | number_ << 16;
    block_ = 1u << plane.block_log2;
    last_count_ = static_cast<int32_t>(plane.counts.size()) - 1;
    for (int i = 0; i < kCompared; ++i)
      limits_[i] = static_cast<int32_t>((i < last_count_ ? plane.counts[static_cast<size_t>(i)] : 0xffffffffu) ^ 0x80000000u);
    base_block_ = first_ >> plane.block_log2;
    base_ = static_cast<uint32_t>(first_ - (base_block_ << plane.block_log2));
    const uint64_t end_block = (first_ + static_cast<uint64_t>(count_) + block_ - 1) >> plane.block_log2;
    const uint32_t blocks = static_cast<uint32_t>(end_block - base_block_);
    for (uint32_t at = 0; at < blocks; at += 2 * kLanes) turn<2>(at, blocks);
    drain_queue(1);
    apply();
  }

 private:
  static constexpr int kCompared = 8;                  // counts found without a branch
  static constexpr int kQueue = 512;
  static constexpr int kAhead = 16;  // positions that a prefetch runs ahead
  static_assert(Positions::kRoom >= 128 * kLanes);     // the longest table has 65 entries

  // Several vectors of blocks side by side, for the generator's sake.
  template <int vectors>
  PYACCEL_INLINE void turn(uint32_t at, uint32_t blocks) {
    Wide index[2 * vectors];
    PhiloxEnd drawn[2 * vectors];
    Wide lane = Wide{} + (base_block_ + at);
    for (int l = 0; l < kWideLanes; ++l) lane[l] += static_cast<uint64_t>(2 * l);
#pragma GCC unroll 4
    for (int g = 0; g < 2 * vectors; ++g) index[g] = lane + static_cast<uint64_t>(g / 2 * kLanes + g % 2);
    philox_lanes(keys_, index, d_.stream, domain_, drawn);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Wide even[4], odd[4];
      drawn[2 * v].words(even);
      drawn[2 * v + 1].words(odd);
      positions(at + static_cast<uint32_t>(v * kLanes), blocks, even, odd);
    }
    if (queued_ >= kQueue - vectors * kLanes) drain_queue(kLanes);
    if (found_.count > Positions::kCapacity - Positions::kRoom) apply();
  }

  PYACCEL_INLINE void positions(uint32_t at, uint32_t blocks, const Wide (&even)[4], const Wide (&odd)[4]) {
    const IntVec drawn = __builtin_bit_cast(IntVec, merge(even[0], odd[0])) ^ static_cast<int32_t>(0x80000000u);
    IntVec below{}, count;
#pragma GCC unroll 8
    for (int i = 0; i < kCompared; ++i) below += limits_[i] > drawn;
    count = kCompared + below;
    if (__builtin_expect(lanes_set(count >= kCompared) != 0, 0) && last_count_ >= kCompared) {
      for (int i = kCompared; i < last_count_; ++i)
        count -= drawn >= static_cast<int32_t>(plane_->counts[static_cast<size_t>(i)] ^ 0x80000000u);
    }
    count = count > last_count_ ? IntVec{} + last_count_ : count;  // the largest draw passes every entry
    IntVec lane;
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    const IntVec block = lane + static_cast<int32_t>(at);
    count = block < static_cast<int32_t>(blocks) ? count : IntVec{};
    const uint32_t some = lanes_set(count > 0);
    if (some == 0) return;
    const uint32_t many = lanes_set(count > 7);
    if (__builtin_expect(many != 0, 0)) {
      for (int l = 0; l < kLanes; ++l)
        if (many >> l & 1) one_block(at + static_cast<uint32_t>(l), static_cast<uint32_t>(count[l]));
      count = count > 7 ? IntVec{} : count;
    }
    const WordVec start = __builtin_bit_cast(WordVec, block) << plane_->block_log2, from = block_ - __builtin_bit_cast(WordVec, count);
    const WordVec r0 = multiply_high(merge(even[1], odd[1]), from + 1);
    WordVec r1 = multiply_high(merge(even[2], odd[2]), from + 2);
    r1 = r1 == r0 ? from + 1 : r1;
    WordVec r2 = multiply_high(merge(even[3], odd[3]), from + 3);
    r2 = (r2 == r0) | (r2 == r1) ? from + 2 : r2;
    add(r0 + start, count > 0);
    add(r1 + start, count > 1);
    add(r2 + start, count > 2);
    const Compress longer(lanes_set(count > 3));  // stored without asking whether there are any
    longer.store(queue_[0] + queued_, __builtin_bit_cast(WordVec, block));
    longer.store(queue_[1] + queued_, __builtin_bit_cast(WordVec, count));
    longer.store(queue_[2] + queued_, r0);
    longer.store(queue_[3] + queued_, r1);
    longer.store(queue_[4] + queued_, r2);
    queued_ += longer.count();
  }

  // Until fewer than `keep` blocks wait.
  void drain_queue(int keep) {
    while (queued_ > 0 && queued_ >= keep) continue_queue();
  }

  // Positions four to seven of a register full of blocks, from their second draw.
  void continue_queue() {
    const int n = std::min(queued_, kLanes);
    queued_ -= n;
    uint32_t* taken[5];
    for (int i = 0; i < 5; ++i) taken[i] = queue_[i] + queued_;
    for (int l = n; l < kLanes; ++l) taken[0][l] = taken[1][l] = 0;
    Wide even[4], odd[4];
    philox_lanes(keys_, low_lanes(taken[0], 0) + base_block_, d_.stream, domain_ | 1).words(even);
    philox_lanes(keys_, low_lanes(taken[0], 1) + base_block_, d_.stream, domain_ | 1).words(odd);
    const WordVec start = load_vec(taken[0]) << plane_->block_log2, from = block_ - load_vec(taken[1]);
    const IntVec count = __builtin_bit_cast(IntVec, load_vec(taken[1]));
    const WordVec r0 = load_vec(taken[2]), r1 = load_vec(taken[3]), r2 = load_vec(taken[4]);
    WordVec r3 = multiply_high(merge(even[0], odd[0]), from + 4);
    r3 = (r3 == r0) | (r3 == r1) | (r3 == r2) ? from + 3 : r3;
    WordVec r4 = multiply_high(merge(even[1], odd[1]), from + 5);
    r4 = (r4 == r0) | (r4 == r1) | (r4 == r2) | (r4 == r3) ? from + 4 : r4;
    WordVec r5 = multiply_high(merge(even[2], odd[2]), from + 6);
    r5 = (r5 == r0) | (r5 == r1) | (r5 == r2) | (r5 == r3) | (r5 == r4) ? from + 5 : r5;
    WordVec r6 = multiply_high(merge(even[3], odd[3]), from + 7);
    r6 = (r6 == r0) | (r6 == r1) | (r6 == r2) | (r6 == r3) | (r6 == r4) | (r6 == r5) ? from + 6 : r6;
    add(r3 + start, count > 3);
    add(r4 + start, count > 4);
    add(r5 + start, count > 5);
    add(r6 + start, count > 6);
    if (found_.count > Positions::kCapacity - Positions::kRoom) apply();
  }

  // The definition, one position at a time.
  void one_block(uint32_t at, uint32_t count) {
    uint32_t chosen[65];
    philox::Words words{};
    for (uint32_t s = 0; s < count; ++s) {
      const uint32_t number = s + 1;
      if (s == 0 || number % 4 == 0) words = philox::draw(d_.seed, base_block_ + at, d_.stream, domain_ | number / 4);
      const uint32_t j = block_ - count + s;
      const uint32_t r = static_cast<uint32_t>((static_cast<uint64_t>(words.w[number % 4]) * (j + 1)) >> 32);
      const bool repeated = std::find(chosen, chosen + s, r) != chosen + s;
      chosen[s] = repeated ? j : r;
      found_.at[found_.count++] = (at << plane_->block_log2) + chosen[s];
    }
  }

  PYACCEL_INLINE void add(WordVec position, IntVec wanted) {
    const Compress compress(lanes_set(wanted));
    compress.store(found_.at + found_.count, position);
    found_.count += compress.count();
  }

  // Positions count from the start of the first block; those outside the memory are dropped.
  void apply() {
    const int n = found_.count;
    found_.count = 0;
    const uint32_t words = static_cast<uint32_t>(count_);
    if (stuck_) return apply_stuck(n);
    if (log2_bits_ == 3 && base_ == 0 && words % block_ == 0) {  // the common case: bytes, whole blocks
      const uint8_t bit = static_cast<uint8_t>(1u << number_);
      for (int i = n; i < n + kAhead; ++i) found_.at[i] = 0;
      for (int i = 0; i < n; ++i) {
        __builtin_prefetch(memory_ + found_.at[i + kAhead], 1);
        memory_[found_.at[i]] ^= bit;
      }
      return;
    }
    for (int i = 0; i < n; ++i) {
      const uint32_t word = found_.at[i] - base_;
      if (word >= words) continue;
      const uint64_t bit = (static_cast<uint64_t>(word) << log2_bits_) + number_ + offset_;
      memory_[bit >> 3] ^= static_cast<uint8_t>(1u << (bit & 7));
    }
  }

  void apply_stuck(int n) {
    const uint64_t origin = (first_ << log2_bits_) + number_;
    for (int i = n; i < n + kWideLanes; ++i) found_.at[i] = base_;
    for (int from = 0; from < n; from += kWideLanes) {
      Wide group, pairs[2];
      uint64_t offset[kWideLanes];
      for (int l = 0; l < kWideLanes; ++l) {
        offset[l] = static_cast<uint64_t>(found_.at[from + l] - base_) << log2_bits_;
        group[l] = (origin + offset[l]) >> 4;
      }
      philox_lanes(keys_, group, d_.stream, philox::kStuckValue).pairs(0, pairs[0], pairs[1]);
      uint8_t bytes[2][kWideLanes][8];
      std::memcpy(bytes, pairs, sizeof bytes);
      for (int l = 0; l < kWideLanes && from + l < n; ++l) {
        if (found_.at[from + l] - base_ >= static_cast<uint32_t>(count_)) continue;
        const uint64_t i = origin + offset[l], bit = offset[l] + number_ + offset_;
        const unsigned value = bytes[i >> 3 & 1][l][i & 7] & 1u;
        uint8_t& cell = memory_[bit >> 3];
        cell = static_cast<uint8_t>((cell & ~(1u << (bit & 7))) | value << (bit & 7));
      }
    }
  }

  const Draws& d_;
  const PhiloxKeys keys_;
  const uint64_t first_;
  const int64_t count_;
  const bool stuck_;
  uint8_t* const memory_;
  const uint64_t offset_;  // bits
  const int log2_bits_;
  const Plane* plane_ = nullptr;
  uint32_t number_ = 0, domain_ = 0, block_ = 0, base_ = 0;
  int32_t last_count_ = 0, limits_[kCompared];
  uint64_t base_block_ = 0;
  uint32_t queue_[5][kQueue + kLanes];
  int queued_ = 0;
  Positions found_;
};

}  // namespace

void sparse_failures(const Draws& d, uint64_t first, int64_t count, bool stuck, uint8_t* memory, int offset) {
  Chunk chunk(d, first, count, stuck, memory, offset);
  for (int b = 0; b < d.plan->word_bits; ++b)
    if (d.plan->planes[b].threshold != 0) chunk.plane(b);
}

}  // namespace pyaccel::sram::PYACCEL_ISA
