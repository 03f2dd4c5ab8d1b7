// Which element a CUDA thread works on: pure functions, used by the kernels and proven on the CPU by
// csrc/tests/index_test.cpp. Offsets of a step (t * row) are 64-bit; inside a row everything is 32-bit, so a row has
// fewer than 2^31 elements (check_row).
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../core/host_device.h"
#include "neuron_cuda.h"

namespace pyaccel::neuron::index {

constexpr int64_t kMaxRow = INT32_MAX;  // room for the idle threads of the last block, and for FastDivide

inline void check_row(const char* what, int64_t row) {
  if (row > kMaxRow)
    throw std::invalid_argument(std::string(what) + ": a CUDA kernel takes at most 2^31 - 1 elements a step, got " +
                                std::to_string(row) + "; split the batch");
}

PYACCEL_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Where step t starts, in tensors of `row` elements a step. 64-bit: T rows pass 2^31 elements long before memory ends.
PYACCEL_HD int64_t at_step(int64_t t, int64_t row) {
  return t * row;
}

// n / divisor for n < 2^31 by a multiplication and a shift: division by a run-time number is a subroutine on a GPU.
struct FastDivide {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  PYACCEL_HD uint32_t quotient(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32);
    return (high + n) >> shift;
  }
  PYACCEL_HD uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

// 1 <= divisor < 2^31.
inline FastDivide fast_divide(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  const uint64_t multiplier = (rest << 32) / static_cast<uint64_t>(divisor) + 1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

// ---------------------------------------------------------------------------------------- flat rows (LIF, BNTT scan)
// A thread owns `lanes` neighbouring neurons of every step. Lanes above 1 need a row that they divide.
PYACCEL_HD uint32_t first_neuron(uint32_t block, uint32_t threads, uint32_t thread, uint32_t lanes) {
  return (block * threads + thread) * lanes;
}
PYACCEL_HD int64_t row_blocks(int64_t row, int64_t threads, int64_t lanes) {
  return ceil_div(row, threads * lanes);
}

// Packed spikes: neuron n of a step is bit n % 8 of byte n / 8; steps start at whole bytes.
PYACCEL_HD int64_t packed_row(int64_t row) {
  return ceil_div(row, 8);
}

// Channel of a neuron: (n / inner) % channels.
struct ChannelOf {
  FastDivide inner, channels;
  PYACCEL_HD uint32_t operator()(uint32_t neuron) const { return channels.remainder(inner.quotient(neuron)); }
};
inline ChannelOf channel_of(int64_t channels, int64_t inner) {
  return {fast_divide(inner), fast_divide(channels)};
}

// How the lanes of a thread lie to the channels.
enum class Lanes : int32_t {
  one_channel,      // all in one channel (also: a single lane)
  across_channels,  // lane i in channel c + i
  any,              // each lane where it falls
};

// Segments of time: backward keeps u of one segment on chip. Segment k starts at step k * every.
PYACCEL_HD int64_t segments(int64_t steps, int64_t every) {
  return ceil_div(steps, every);
}

// ------------------------------------------------------------------------------ blocks over channels (BNTT reductions)
// Element ((t*outer + o)*channels + c)*inner + i; a position is (o, i) flattened: position = o*inner + i.
// A block has `columns` threads over channels and `rows` over positions; thread = row * columns + column, so that
// neighbouring threads are neighbours in memory. `columns` is 1 unless inner is 1, and divides a warp.
// One lane per thread, or `lanes` positions of one channel (they divide inner), or `lanes` channels (they divide
// channels).
struct ChannelGrid {
  FastDivide by_inner;
  uint32_t channels = 0, positions = 0;
  uint32_t columns = 1, column_bits = 0, rows = 1;  // columns = 1 << column_bits
  uint32_t position_lanes = 1, channel_lanes = 1;
  uint32_t rounds = 1;  // a thread visits this many places, `rows` apart
  uint32_t column_blocks = 1, chunks = 1;

  PYACCEL_HD uint32_t channel(uint32_t column_block, uint32_t thread) const {
    return (column_block * columns + (thread & (columns - 1))) * channel_lanes;
  }
  PYACCEL_HD uint32_t position(uint32_t chunk, uint32_t thread, uint32_t round) const {
    return ((chunk * rounds + round) * rows + (thread >> column_bits)) * position_lanes;
  }
  PYACCEL_HD bool inside(uint32_t channel, uint32_t position) const {
    return channel < channels && position < positions;
  }
  // Offset inside a step.
  PYACCEL_HD uint32_t offset(uint32_t channel, uint32_t position) const {
    const uint32_t o = by_inner.quotient(position);
    return (o * channels + channel) * by_inner.divisor + (position - o * by_inner.divisor);
  }
  // Blocks of one step (statistics) or of all steps (backward), column blocks fastest: neighbours in memory.
  PYACCEL_HD int64_t blocks() const { return int64_t{column_blocks} * chunks; }
};

inline Lanes lanes_of(const BnttShape& shape, int64_t lanes) {
  if (lanes == 1 || (shape.inner > 1 && shape.inner % lanes == 0)) return Lanes::one_channel;
  if (shape.inner == 1 && shape.channels % lanes == 0) return Lanes::across_channels;
  return Lanes::any;
}

// `lanes` per thread as lanes_of allows (never `any`); all sizes at least 1.
inline ChannelGrid channel_grid(const BnttShape& shape, int64_t threads, int64_t lanes, int64_t rounds) {
  const bool across = lanes_of(shape, lanes) == Lanes::across_channels;
  ChannelGrid g;
  g.by_inner = fast_divide(shape.inner);
  g.channels = static_cast<uint32_t>(shape.channels);
  g.positions = static_cast<uint32_t>(shape.outer * shape.inner);
  g.position_lanes = across ? 1 : static_cast<uint32_t>(lanes);
  g.channel_lanes = across ? static_cast<uint32_t>(lanes) : 1;
  if (shape.inner == 1)
    while (g.column_bits < 5 && (g.channel_lanes << g.column_bits) < g.channels) ++g.column_bits;
  g.columns = 1u << g.column_bits;
  g.rows = static_cast<uint32_t>(threads) / g.columns;
  g.rounds = static_cast<uint32_t>(rounds);
  g.column_blocks = static_cast<uint32_t>(ceil_div(g.channels, int64_t{g.columns} * g.channel_lanes));
  g.chunks = static_cast<uint32_t>(ceil_div(g.positions, int64_t{g.rows} * g.position_lanes * g.rounds));
  return g;
}

// Partial sums, one slot a chunk: [2, steps, chunks, channels].
PYACCEL_HD int64_t slot(int64_t which, int64_t step, int64_t chunk, int64_t channel, int64_t steps, int64_t chunks,
                        int64_t channels) {
  return ((which * steps + step) * chunks + chunk) * channels + channel;
}

// Coefficients of a (step, channel), what a BNTT kernel reads instead of statistics: mean, scale = weight/sqrt(var +
// eps), and for backward shift = S1/n, tilt = S2/(n*(var + eps)). Side by side where a thread stays in one channel,
// field by field where neighbouring lanes are neighbouring channels: one access each.
constexpr int kFields = 4;
PYACCEL_HD int64_t coefficient(int64_t field, int64_t step, int64_t channel, int64_t steps, int64_t channels,
                               bool across) {
  return across ? (field * steps + step) * channels + channel : (step * channels + channel) * kFields + field;
}

// ---------------------------------------------------------------------------------------------- sizes of BNTT launches
// Shared memory of one row of u in a backward block, whatever the type and the lanes: sets the block's threads.
constexpr int kRowBytes = 2048;
constexpr int kStatisticsThreads = 256;
constexpr int kChunkBytes = 32 * 1024;  // of x, a block of the statistics kernel

// Neighbouring elements a thread: 4 where they lie in one channel or are channels, and addresses allow; else 1.
inline int64_t bntt_lanes(const BnttShape& shape, bool aligned) {
  return shape.dtype != Dtype::f64 && aligned && lanes_of(shape, 4) != Lanes::any ? 4 : 1;
}

inline ChannelGrid statistics_grid(const BnttShape& shape, int64_t lanes) {
  return channel_grid(shape, kStatisticsThreads, lanes,
                      kChunkBytes / (kStatisticsThreads * lanes * size_of(shape.dtype)));
}
inline ChannelGrid backward_grid(const BnttShape& shape, int64_t lanes) {
  return channel_grid(shape, kRowBytes / (lanes * size_of(state_of(shape.dtype))), lanes, 1);
}

// Steps a segment: as even as segments of at most kLongestSegment can be.
inline int64_t bntt_segment(int64_t steps) {
  return steps == 0 ? 0 : ceil_div(steps, segments(steps, cuda::kLongestSegment));
}

inline bool is_empty(const BnttShape& s) {
  return s.outer * s.channels * s.inner == 0;
}

// Where things lie in the scratch, in elements of the state type, each at 16 bytes: coefficients [kFields, T, C] at 0,
// slots [2, T, chunks, C], and for backward the states between segments [segments - 1, row].
struct BnttScratch {
  int64_t slots = 0, checkpoints = 0, total = 0;
};
inline BnttScratch bntt_scratch(const BnttShape& shape, bool backward) {
  const auto rounded = [](int64_t elements) { return ceil_div(elements, 4) * 4; };
  BnttScratch s;
  s.slots = rounded(kFields * shape.steps * shape.channels);
  s.checkpoints = s.total = s.slots;
  if (is_empty(shape)) return s;
  const int64_t lanes = bntt_lanes(shape, true);  // a misaligned tensor, one lane, needs no more chunks
  const int64_t chunks = backward ? backward_grid(shape, lanes).chunks : statistics_grid(shape, lanes).chunks;
  s.checkpoints = s.total = s.slots + rounded(2 * std::max<int64_t>(shape.steps, 1) * chunks * shape.channels);
  if (backward && shape.steps > cuda::kLongestSegment)
    s.total += (segments(shape.steps, bntt_segment(shape.steps)) - 1) * shape.outer * shape.channels * shape.inner;
  return s;
}

// ------------------------------------------------------------------------------------------------------- encoder
// One draw serves pixels 4*quad .. 4*quad + 3 of a sample, counted in logical (C, H, W) order.
constexpr uint32_t kQuad = 4;

// Where a pixel lies within its sample.
struct PixelOf {
  FastDivide inner;
  uint32_t channels = 1;
  bool channels_last = false;
  PYACCEL_HD uint32_t operator()(uint32_t pixel) const {
    if (!channels_last) return pixel;
    const uint32_t channel = inner.quotient(pixel);
    return channel + (pixel - channel * inner.divisor) * channels;
  }
};

}  // namespace pyaccel::neuron::index
