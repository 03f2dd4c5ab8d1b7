// Proves the index arithmetic of the CUDA kernels (neuron/index.h) on the CPU: every element visited exactly once, in
// range, aligned, also beyond 2^31 elements and at the limits of a grid. The loops below go over blocks and threads as
// a device would. The checks are checked too: deliberately wrong bounds must be caught. g++ -std=c++20 -O2 -Wall
// -Wextra -Wconversion -Werror csrc/tests/index_test.cpp && ./a.out
#include "../neuron/index.h"

#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace {

using namespace pyaccel;
using namespace pyaccel::neuron;
namespace ix = pyaccel::neuron::index;

int failures = 0;
int64_t visits = 0;

void expect(bool ok, const char* what, int line) {
  if (!ok && ++failures <= 20) std::fprintf(stderr, "line %d: failed: %s\n", line, what);
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

// Who was visited how often.
class Cover {
 public:
  explicit Cover(int64_t size) : count_(static_cast<size_t>(size)) {}
  void visit(int64_t first, int64_t lanes = 1) {
    ++visits;
    if (first % lanes != 0) misaligned_ = true;
    for (int64_t i = first; i < first + lanes; ++i) {
      if (i < 0 || i >= static_cast<int64_t>(count_.size())) outside_ = true;
      else ++count_[static_cast<size_t>(i)];
    }
  }
  bool exact() const {
    if (outside_ || misaligned_) return false;
    for (const uint8_t c : count_)
      if (c != 1) return false;
    return true;
  }

 private:
  std::vector<uint8_t> count_;
  bool outside_ = false, misaligned_ = false;
};

void divisions() {
  std::mt19937_64 random(1);
  const auto divide = [](const ix::FastDivide& d, int64_t n) {
    const uint32_t numerator = static_cast<uint32_t>(n);
    return d.quotient(numerator) == numerator / d.divisor && d.remainder(numerator) == numerator % d.divisor;
  };
  const auto check = [&](int64_t divisor) {
    const ix::FastDivide d = ix::fast_divide(divisor);
    bool ok = true;
    for (const int64_t base : {int64_t{0}, divisor, 2 * divisor, ix::kMaxRow / divisor * divisor, ix::kMaxRow})
      for (int64_t n = base - 2; n <= base + 2; ++n)
        if (n >= 0 && n <= ix::kMaxRow) ok &= divide(d, n);
    for (int i = 0; i < 200; ++i) ok &= divide(d, static_cast<int64_t>(random() % (uint64_t{ix::kMaxRow} + 1)));
    EXPECT(ok);
  };
  for (int64_t divisor = 1; divisor <= 4096; ++divisor) check(divisor);
  for (int shift = 12; shift < 31; ++shift)
    for (int64_t near = -2; near <= 2; ++near) check((int64_t{1} << shift) + near);
  check(ix::kMaxRow);
  check(ix::kMaxRow - 1);
}

// ---------------------------------------------------------------------------------------------- flat rows
// The launch of a flat row; `slack` widens the bound for the negative control.
bool covers_row(int64_t row, uint32_t threads, uint32_t lanes, int64_t slack = 0) {
  Cover cover(row);
  const int64_t blocks = ix::row_blocks(row, threads, lanes);
  for (uint32_t block = 0; block < blocks; ++block)
    for (uint32_t thread = 0; thread < threads; ++thread) {
      const uint32_t n = ix::first_neuron(block, threads, thread, lanes);
      if (n < row + slack) cover.visit(n, lanes);
    }
  return cover.exact();
}

void rows() {
  for (const uint32_t threads : {32u, 128u, 256u, 512u})
    for (const uint32_t lanes : {1u, 2u, 4u, 8u})
      for (int64_t row = lanes; row < 700; row += lanes) EXPECT(covers_row(row, threads, lanes));
  EXPECT(covers_row(1 << 20, 256, 4));
  EXPECT(!covers_row(1000, 256, 4, 4));  // control: one thread too many
  EXPECT(!covers_row(1002, 256, 4));     // control: lanes that do not divide the row

  // The largest row: idle threads of the last block neither wrap around nor count.
  for (const uint32_t lanes : {1u, 4u, 8u}) {
    const int64_t row = ix::kMaxRow / lanes * lanes, blocks = ix::row_blocks(row, 256, lanes);
    EXPECT(blocks <= std::numeric_limits<int32_t>::max());
    const uint32_t last = static_cast<uint32_t>(blocks - 1);
    int64_t end = 0;
    for (uint32_t thread = 0; thread < 256; ++thread) {
      const uint32_t n = ix::first_neuron(last, 256, thread, lanes);
      EXPECT(n == (int64_t{last} * 256 + thread) * lanes);
      if (n < row) end = int64_t{n} + lanes;
    }
    EXPECT(end == row);
  }

  // Channels of neurons, and of all lanes of a thread at once where one_channel is claimed.
  for (int64_t channels = 1; channels < 9; ++channels)
    for (int64_t inner = 1; inner < 20; ++inner) {
      const ix::ChannelOf of = ix::channel_of(channels, inner);
      bool same = true;
      for (int64_t n = 0; n < 3 * channels * inner; ++n) same &= of(static_cast<uint32_t>(n)) == n / inner % channels;
      EXPECT(same);
    }

  // Packed rows: distinct bytes a step, whole rows.
  for (int64_t row = 1; row < 70; ++row) {
    Cover cover(3 * ix::packed_row(row) * 8);
    for (int64_t t = 0; t < 3; ++t)
      for (int64_t n = 0; n < ix::packed_row(row) * 8; ++n) cover.visit((t * ix::packed_row(row) + n / 8) * 8 + n % 8);
    EXPECT(cover.exact() && ix::packed_row(row) * 8 >= row && ix::packed_row(row) * 8 < row + 8);
  }
}

// ------------------------------------------------------------------------------------ blocks over channels
struct Mistake {
  int64_t chunks = 0;          // added to the number of chunks
  bool ignore_bounds = false;  // idle threads visit too
  int64_t inner = 0;           // added to the divisor of positions
};

// One step, as the statistics and the backward kernels go over it. `channel_ok` is false where a lane is in a wrong
// channel.
bool covers_channels(const BnttShape& shape, ix::ChannelGrid grid, int64_t lanes, const Mistake& mistake = {}) {
  const int64_t row = shape.outer * shape.channels * shape.inner;
  Cover cover(row);
  grid.by_inner = ix::fast_divide(shape.inner + mistake.inner);
  bool channel_ok = true;
  const uint32_t chunks = static_cast<uint32_t>(grid.chunks + mistake.chunks), threads = grid.rows * grid.columns;
  for (uint32_t block = 0; block < grid.column_blocks * chunks; ++block) {
    const uint32_t column_block = block % grid.column_blocks, chunk = block / grid.column_blocks;
    for (uint32_t thread = 0; thread < threads; ++thread) {
      const uint32_t channel = grid.channel(column_block, thread);
      channel_ok &= channel == grid.channel(column_block, thread % 32);  // sums are folded over a warp
      for (uint32_t round = 0; round < grid.rounds; ++round) {
        const uint32_t position = grid.position(chunk, thread, round);
        if (!mistake.ignore_bounds && !grid.inside(channel, position)) continue;
        const int64_t first = grid.offset(channel, position);
        cover.visit(first, lanes);
        for (int64_t i = 0; i < lanes; ++i) {
          const int64_t is = (first + i) / shape.inner % shape.channels;
          channel_ok &= is == channel + (grid.channel_lanes > 1 ? i : 0);
        }
      }
    }
  }
  return channel_ok && cover.exact();
}

void channels() {
  for (const int64_t outer : {1, 2, 5, 9, 33})
    for (const int64_t count : {1, 2, 3, 4, 7, 8, 12, 31, 64, 65, 132})
      for (const int64_t inner : {1, 2, 3, 4, 8, 12, 16, 49, 64})
        for (const int64_t lanes : {1, 4}) {
          const BnttShape shape{Dtype::f32, 1, outer, count, inner};
          if (ix::lanes_of(shape, lanes) == ix::Lanes::any) continue;
          EXPECT(covers_channels(shape, ix::channel_grid(shape, 128, lanes, 1), lanes));
          EXPECT(covers_channels(shape, ix::channel_grid(shape, 256, lanes, 3), lanes));
          EXPECT(covers_channels(shape, ix::backward_grid(shape, lanes), lanes));
          EXPECT(covers_channels(shape, ix::statistics_grid(shape, lanes), lanes));
        }
  EXPECT(covers_channels({Dtype::bf16, 1, 64, 64, 256}, ix::statistics_grid({Dtype::bf16, 1, 64, 64, 256}, 4), 4));

  // Controls: each of these mistakes must be seen.
  const BnttShape maps{Dtype::f32, 1, 33, 8, 64}, flat{Dtype::f32, 1, 700, 12, 1}, odd{Dtype::f32, 1, 9, 3, 6};
  EXPECT(!covers_channels(maps, ix::backward_grid(maps, 4), 4, {.chunks = -1}));
  EXPECT(!covers_channels(maps, ix::backward_grid(maps, 4), 4, {.ignore_bounds = true}));
  EXPECT(!covers_channels(maps, ix::backward_grid(maps, 4), 4, {.inner = 1}));
  EXPECT(!covers_channels(flat, ix::statistics_grid(flat, 4), 4, {.chunks = -1}));
  EXPECT(!covers_channels(flat, ix::statistics_grid(flat, 4), 4, {.ignore_bounds = true}));
  EXPECT(ix::lanes_of(odd, 4) == ix::Lanes::any);
  EXPECT(!covers_channels(odd, ix::channel_grid(odd, 128, 4, 1), 4));  // 4 lanes do not divide 6
}

// Rows of nearly 2^31 elements cannot be counted one by one: the last positions of the last channel, in 64 bits.
void large_channels() {
  const BnttShape shapes[] = {
      {Dtype::bf16, 1, 2600, 64, 12900}, {Dtype::bf16, 1, 33554431, 64, 1}, {Dtype::f32, 1, 1, 1, ix::kMaxRow - 3}};
  for (const BnttShape& shape : shapes)
    for (const int64_t lanes : {int64_t{1}, ix::bntt_lanes(shape, true)}) {
      const int64_t row = shape.outer * shape.channels * shape.inner, positions = shape.outer * shape.inner;
      ix::check_row("test", row);
      for (const ix::ChannelGrid& g : {ix::statistics_grid(shape, lanes), ix::backward_grid(shape, lanes)}) {
        EXPECT(g.blocks() <= std::numeric_limits<int32_t>::max());
        int64_t seen = 0, largest = 0;
        for (uint32_t thread = 0; thread < g.rows * g.columns; ++thread)
          for (uint32_t round = 0; round < g.rounds; ++round) {
            const uint32_t channel = g.channel(g.column_blocks - 1, thread),
                           position = g.position(g.chunks - 1, thread, round);
            const int64_t exact = ((int64_t{g.chunks} - 1) * g.rounds + round) * g.rows * g.position_lanes +
                                  int64_t{thread / g.columns} * g.position_lanes;
            EXPECT(position == exact);
            if (!g.inside(channel, position)) continue;
            const int64_t o = position / shape.inner, i = position % shape.inner;
            const int64_t offset = (o * shape.channels + channel) * shape.inner + i;
            EXPECT(g.offset(channel, position) == offset);
            ++seen;
            largest = std::max(largest, offset + lanes);
          }
        EXPECT(seen > 0 && largest == row && positions > 0);
      }
    }
  bool refused = false;
  try {
    ix::check_row("test", int64_t{1} << 31);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  EXPECT(refused);
}

// ----------------------------------------------------------------------------------------- tables and scratch
void tables() {
  for (const int64_t steps : {1, 3, 5})
    for (const int64_t chunks : {1, 4})
      for (const int64_t count : {1, 7}) {
        Cover slots(2 * steps * chunks * count), across(ix::kFields * steps * count),
            within(ix::kFields * steps * count);
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t c = 0; c < count; ++c) {
            for (int64_t k = 0; k < chunks; ++k)
              for (int64_t which : {0, 1}) slots.visit(ix::slot(which, t, k, c, steps, chunks, count));
            for (int64_t field = 0; field < ix::kFields; ++field) {
              across.visit(ix::coefficient(field, t, c, steps, count, true));
              within.visit(ix::coefficient(field, t, c, steps, count, false));
            }
          }
        EXPECT(slots.exact() && across.exact() && within.exact());
      }
  // Beyond 2^31 elements nothing wraps.
  EXPECT(ix::slot(1, 999, 4999, 1999, 1000, 5000, 2000) == int64_t{2} * 1000 * 5000 * 2000 - 1);
  EXPECT(ix::coefficient(3, 99999, 9999, 100000, 10000, true) == int64_t{4} * 100000 * 10000 - 1);

  // Scratch: room for what one lane or four lanes need, sections in order and at 16 bytes; segments cover the steps.
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16})
    for (const int64_t steps : {0, 1, 25, 32, 33, 64, 65, 100, 1000})
      for (const int64_t outer : {1, 3, 64, 1000})
        for (const int64_t count : {1, 3, 4, 10, 64, 100, 512})
          for (const int64_t inner : {1, 4, 49, 64, 1024}) {
            const BnttShape s{dtype, steps, outer, count, inner};
            const int64_t segment = ix::bntt_segment(s.steps), parts = steps == 0 ? 0 : ix::segments(steps, segment);
            EXPECT(steps == 0 || (segment >= 1 && segment <= cuda::kLongestSegment && (parts - 1) * segment < steps));
            for (const bool backward : {false, true}) {
              const ix::BnttScratch layout = ix::bntt_scratch(s, backward);
              EXPECT(layout.slots % 4 == 0 && layout.checkpoints % 4 == 0 &&
                     layout.slots >= ix::kFields * steps * count);
              EXPECT(layout.total - layout.checkpoints >=
                     (backward && parts > 1 ? (parts - 1) * outer * count * inner : 0));
              for (const bool aligned : {false, true}) {
                const int64_t lanes = ix::bntt_lanes(s, aligned);
                const ix::ChannelGrid grid = backward ? ix::backward_grid(s, lanes) : ix::statistics_grid(s, lanes);
                const int64_t needed = 2 * std::max<int64_t>(steps, 1) * grid.chunks * count;
                EXPECT(layout.checkpoints - layout.slots >= needed);
                EXPECT(grid.columns * grid.rows <= 1024 && 32 % grid.columns == 0);
              }
            }
          }
  EXPECT((cuda::kLongestSegment + 1) * ix::kRowBytes <= 163 * 1024);
}

// ------------------------------------------------------------------------------------------------- encoder
bool covers_pixels(int64_t samples, int64_t count, int64_t inner, bool last, int64_t quads_missing = 0) {
  const int64_t pixels = count * inner, quads = ix::ceil_div(pixels, ix::kQuad) - quads_missing;
  const ix::PixelOf place{ix::fast_divide(last ? inner : 1), static_cast<uint32_t>(count), last};
  const ix::FastDivide by = ix::fast_divide(std::max<int64_t>(quads, 1));
  Cover cover(samples * pixels);
  bool ok = true;
  for (uint32_t number = 0; number < samples * quads; ++number)
    for (uint32_t i = 0; i < ix::kQuad; ++i) {
      const uint32_t pixel = by.remainder(number) * ix::kQuad + i;
      if (pixel >= pixels) continue;
      cover.visit(by.quotient(number) * pixels + place(pixel));
      ok &= place(pixel) == (last ? pixel / inner + pixel % inner * count : pixel);
    }
  return ok && cover.exact();
}

void encoder() {
  for (const int64_t samples : {1, 3})
    for (int64_t count = 1; count < 6; ++count)
      for (int64_t inner = 1; inner < 40; ++inner)
        for (const bool last : {false, true}) EXPECT(covers_pixels(samples, count, inner, last));
  EXPECT(!covers_pixels(2, 3, 16, true, 1));  // control: a block too few
  // Colour images: 12 elements of 4 positions are neighbours.
  const ix::PixelOf place{ix::fast_divide(64), 3, true};
  bool ok = true;
  for (uint32_t quad = 0; quad < 16; ++quad)
    for (uint32_t element = 0; element < 12; ++element)
      ok &= place(element % 3 * 64 + quad * 4 + element / 3) == quad * 12 + element;
  EXPECT(ok);
}

// Steps lie further apart than 32 bits reach, in every type the kernels pass.
void steps_beyond_32_bits() {
  for (const int t : {127, 128, 255, 256, 65535})
    for (const uint32_t row : {16777216u, 4000000u, static_cast<uint32_t>(ix::kMaxRow)})
      EXPECT(ix::at_step(t, row) == static_cast<int64_t>(static_cast<__int128>(t) * row));
}

}  // namespace

int main() {
  divisions();
  rows();
  channels();
  large_channels();
  tables();
  encoder();
  steps_beyond_32_bits();
  std::printf("index_test: %lld visits, %d failures\n", static_cast<long long>(visits), failures);
  return failures == 0 ? 0 : 1;
}
