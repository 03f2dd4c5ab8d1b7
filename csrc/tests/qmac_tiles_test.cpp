// The phases of the CUDA products (csrc/qmac/index.h) on the CPU: every thread of every block in loops, barriers between
// the loops, tensor-core products written out from the fragments of all 32 lanes. Against plain 64-bit sums, over widths,
// limbs, stretches, edges and geometries; then negative controls.
// g++ -std=c++20 -Wall -Wextra -Wconversion -Werror csrc/tests/qmac_tiles_test.cpp
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../qmac/index.h"

namespace {

using namespace pyaccel::qmac;
using namespace pyaccel::qmac::index;

int failures = 0;
void expect(bool good, const std::string& what) {
  if (good) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}
std::mt19937_64 random_bits(11);
int below(int n) { return static_cast<int>(random_bits() % static_cast<uint64_t>(n)); }

// One warp's m16n8k32 from the registers of its lanes, as the instruction is specified.
void multiply(uint32_t (&sum)[32][4], const FragmentA (&a)[32], const FragmentB (&b)[32]) {
  uint8_t rows[16][32], columns[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, k = lane % 4 * 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&rows[group + (i % 2) * 8][k + (i / 2) * 16], &a[lane].word[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&columns[group][k + i * 16], &b[lane].word[i], 4);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) sum[lane][i] += uint32_t{rows[row][k]} * columns[column][k];
    }
}

int pitch_error = 0;  // of the negative control: fragments of the wrong word

void run_block(const Tile& t, const Place& place, int row_block, int64_t column_block, int shift, bool accumulate, std::vector<int64_t>& p,
               std::vector<int>& written) {
  alignas(16) uint8_t shared[kTileBytes];
  std::memset(shared, 0xa5, sizeof shared);
  constexpr int kWarps = kThreads / 32;
  static uint32_t sum[kWarps][kTilesDown][kTilesAcross][32][4];
  std::memset(sum, 0, sizeof sum);
  for (int step = t.first; step < t.last; step += kStep) {
    for (int thread = kThreads - 1; thread >= 0; --thread) {
      load_weights(t, row_block, step, thread, shared);
      load_activations(t, column_block, step, thread, shared);
    }
    for (int warp = 0; warp < kWarps; ++warp)
      for (int slice = 0; slice < kStep / 32; ++slice)
        for (int i = 0; i < kTilesDown; ++i)
          for (int j = 0; j < kTilesAcross; ++j) {
            FragmentA a[32];
            FragmentB b[32];
            for (int lane = 0; lane < 32; ++lane) {
              a[lane] = fragment_a(shared, warp_row(warp) + 16 * i, slice, (lane + pitch_error) % 32);
              b[lane] = fragment_b(shared, warp_column(warp) + 8 * j, slice, lane);
            }
            multiply(sum[warp][i][j], a, b);
          }
  }
  for (int warp = 0; warp < kWarps; ++warp)
    for (int i = 0; i < kTilesDown; ++i)
      for (int j = 0; j < kTilesAcross; ++j)
        for (int lane = 0; lane < 32; ++lane)
          for (int n = 0; n < 4; ++n) {
            const int output = row_block * kRows + warp_row(warp) + 16 * i + sum_row(lane, n);
            const int64_t column = column_block * kColumns + warp_column(warp) + 8 * j + sum_column(lane, n);
            const int64_t at = place_of(place, output, column);
            if (at < 0) continue;
            const size_t to = static_cast<size_t>(at);
            p.at(to) = (accumulate ? p[to] : 0) + (int64_t{sum[warp][i][j][lane][n]} << shift);
            ++written.at(to);
          }
}

// What multiply_all (product_cuda.cu) launches. Returns how often each element was written.
void run_all(Tile t, const Place& place, int64_t length, int64_t stretch, std::vector<int64_t>& p, std::vector<int>& launches_wrote,
             int& launches) {
  const int row_blocks = (t.outputs + kRows - 1) / kRows;
  const int64_t column_blocks = (t.columns + kColumns - 1) / kColumns;
  bool accumulate = false;
  for (int64_t first = 0; first < length; first += stretch)
    for (t.weight_limb = 0; t.weight_limb < (t.weight_bits == 16 ? 2 : 1); ++t.weight_limb)
      for (t.activation_limb = 0; t.activation_limb < (t.activation_bits == 16 ? 2 : 1); ++t.activation_limb) {
        t.first = static_cast<int>(first);
        t.last = static_cast<int>(std::min(first + stretch, length));
        for (int64_t block = 0; block < row_blocks * column_blocks; ++block)
          run_block(t, place, static_cast<int>(block % row_blocks), block / row_blocks, 8 * (t.weight_limb + t.activation_limb), accumulate, p,
                    launches_wrote);
        accumulate = true;
        ++launches;
      }
}

std::vector<uint32_t> pack(const std::vector<uint32_t>& codes, int64_t rows, int64_t length, int bits, bool garbage) {
  const int64_t words = words_of(length, bits);
  std::vector<uint32_t> out(static_cast<size_t>(rows * words), 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < length; ++j)
      out[static_cast<size_t>(r * words + j * bits / 32)] |= codes[static_cast<size_t>(r * length + j)] << (j * bits % 32);
    const int64_t used = length * bits % 32;
    if (garbage && used) out[static_cast<size_t>(r * words + words - 1)] |= ~uint32_t{0} << used;
  }
  return out;
}
std::vector<uint32_t> random_codes(int64_t count, int bits, bool largest) {
  std::vector<uint32_t> codes(static_cast<size_t>(count));
  for (auto& c : codes) c = largest ? (1u << bits) - 1 : static_cast<uint32_t>(below(1 << bits));
  return codes;
}

int64_t linear_case(int batch, int outputs, int length, int activation_bits, int weight_bits, int64_t stretch) {
  const bool largest = below(4) == 0;
  const auto a = random_codes(int64_t{batch} * length, activation_bits, largest), w = random_codes(int64_t{outputs} * length, weight_bits, largest);
  const auto activations = pack(a, batch, length, activation_bits, true), weights = pack(w, outputs, length, weight_bits, true);
  Tile t;
  t.weight_bits = weight_bits;
  t.activation_bits = activation_bits;
  t.outputs = outputs;
  t.columns = batch;
  t.length = length;
  t.weights = weights.data();
  t.weight_words = words_of(length, weight_bits);
  t.activations = activations.data();
  t.activation_words = words_of(length, activation_bits);
  std::vector<int64_t> p(static_cast<size_t>(batch * outputs), -1);
  std::vector<int> written(p.size(), 0);
  int launches = 0;
  run_all(t, Place{outputs, batch, 0, outputs, 0}, length, stretch, p, written, launches);
  int64_t wrong = 0;
  for (int b = 0; b < batch; ++b)
    for (int o = 0; o < outputs; ++o) {
      int64_t sum = 0;
      for (int k = 0; k < length; ++k)
        sum += int64_t{a[static_cast<size_t>(b * length + k)]} * w[static_cast<size_t>(o * length + k)];
      const size_t at = static_cast<size_t>(b * outputs + o);
      wrong += p[at] != sum || written[at] != launches;
    }
  return wrong;
}

int64_t conv_case(int activation_bits, int weight_bits) {
  const int groups = 1 + below(2), channels = groups * (1 + below(6)), outputs = groups * (1 + below(70));
  const int batch = 1 + below(3), height = 3 + below(7), width = 3 + below(9), kernel[2] = {1 + below(3), 1 + below(3)};
  int stride[2], padding[2], dilation[2], out[2];
  for (int d = 0; d < 2; ++d) {
    stride[d] = 1 + below(3);
    dilation[d] = 1 + below(2);
    padding[d] = below(3);
    const int size = d ? width : height;
    while (size + 2 * padding[d] < dilation[d] * (kernel[d] - 1) + 1) ++padding[d];
    out[d] = (size + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  const int group_channels = channels / groups, length = group_channels * kernel[0] * kernel[1], pixels = out[0] * out[1];
  const auto a = random_codes(int64_t{batch} * channels * height * width, activation_bits, false);
  const auto w = random_codes(int64_t{outputs} * length, weight_bits, false);
  const auto weights = pack(w, outputs, length, weight_bits, true);
  const std::vector<uint8_t> narrow(a.begin(), a.end());
  const std::vector<int32_t> wide(a.begin(), a.end());
  std::vector<int64_t> p(static_cast<size_t>(batch * outputs * pixels), -1);
  std::vector<int> written(p.size(), 0);
  int launches = 0;
  for (int group = 0; group < groups; ++group) {
    Tile t;
    t.weight_bits = weight_bits;
    t.activation_bits = activation_bits;
    t.outputs = outputs / groups;
    t.columns = int64_t{batch} * pixels;
    t.length = length;
    t.weight_words = words_of(length, weight_bits);
    t.weights = weights.data() + group * t.outputs * t.weight_words;
    t.activations = activation_bits == 16 ? static_cast<const void*>(wide.data()) : narrow.data();
    t.channels = group_channels;
    t.all_channels = channels;
    t.first_channel = group * group_channels;
    t.height = height;
    t.width = width;
    t.kernel_height = kernel[0];
    t.kernel_width = kernel[1];
    for (int d = 0; d < 2; ++d) t.stride[d] = stride[d], t.padding[d] = padding[d], t.dilation[d] = dilation[d];
    t.out_height = out[0];
    t.out_width = out[1];
    launches = 0;
    run_all(t, Place{t.outputs, t.columns, group * t.outputs, outputs, pixels}, length, kStretch, p, written, launches);
  }
  int64_t wrong = 0;
  for (int b = 0; b < batch; ++b)
    for (int o = 0; o < outputs; ++o)
      for (int y = 0; y < out[0]; ++y)
        for (int x = 0; x < out[1]; ++x) {
          int64_t sum = 0;
          for (int c = 0; c < group_channels; ++c)
            for (int r = 0; r < kernel[0]; ++r)
              for (int s = 0; s < kernel[1]; ++s) {
                const int iy = y * stride[0] - padding[0] + r * dilation[0], ix = x * stride[1] - padding[1] + s * dilation[1];
                if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
                const int channel = o / (outputs / groups) * group_channels + c;
                sum += int64_t{a[static_cast<size_t>(((b * channels + channel) * height + iy) * width + ix)]} *
                       w[static_cast<size_t>(o * length + (c * kernel[0] + r) * kernel[1] + s)];
              }
          const size_t at = static_cast<size_t>(((b * outputs + o) * out[0] + y) * out[1] + x);
          wrong += p[at] != sum || written[at] != launches;
        }
  return wrong;
}

// The masked sums of stream_cuda.cu for one row of weights.
int64_t stream_case(int length, int activation_bits, int bits) {
  const auto a = random_codes(length, activation_bits, below(3) == 0), w = random_codes(length, bits, below(3) == 0);
  const auto weights = pack(w, 1, length, bits, true);
  const int masks = 8 / bits;
  uint64_t total = 0;
  std::set<int64_t> met;
  for (int m = 0; m < masks; ++m) {
    uint64_t sum = 0;
    for (size_t word = 0; word < weights.size(); ++word)
      for (int byte = 0; byte < 4; ++byte) {
        const int64_t code = masked_code(static_cast<int64_t>(word), byte, bits, m);
        const uint32_t activation = code < length ? a[static_cast<size_t>(code)] : 0;
        if (code < length) met.insert(code);
        sum += uint64_t{(weights[word] & byte_mask(bits, m)) >> (8 * byte) & 0xff} * activation;
      }
    if (sum >= uint64_t{1} << 32) return 1;
    total += sum >> (bits * m);
  }
  uint64_t wanted = 0;
  for (int k = 0; k < length; ++k) wanted += uint64_t{a[static_cast<size_t>(k)]} * w[static_cast<size_t>(k)];
  return total != wanted || met.size() != static_cast<size_t>(length);
}

struct Sizes {
  int batch, outputs, length;
};

}  // namespace

int main() {
  constexpr int widths[] = {1, 2, 4, 8, 16};
  for (const int a : widths)
    for (const int w : widths) {
      const std::string name = std::to_string(a) + "x" + std::to_string(w);
      for (const auto& [batch, outputs, length] : std::vector<Sizes>{{1, 1, 1}, {3, 65, 33}, {70, 5, 64}, {64, 64, 129}, {2, 3, 31}})
        expect(linear_case(batch, outputs, length, a, w, kStretch) == 0, "linear " + name + " K=" + std::to_string(length));
      expect(linear_case(5, 7, 300, a, w, 64) == 0, "linear in stretches " + name);
      for (int i = 0; i < 3; ++i) expect(conv_case(a, w) == 0, "convolution " + name);
      if (a <= 8 && w <= 8)
        for (const int length : {1, 7, 31, 32, 33, 500, 4097}) expect(stream_case(length, a, w) == 0, "stream " + name);
    }
  // Stretch: 65,536 products of the largest codes still fit an unsigned 32-bit sum; 66,052 do not.
  expect(kStretch * 255 * 255 < int64_t{1} << 32 && int64_t{66'052} * 255 * 255 >= int64_t{1} << 32, "the stretch");
  // The words that a warp reads at once lie in 32 banks.
  for (int word = 0; word < 12; ++word) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) banks.insert((lane / 4 * kPitch / 4 + word + lane % 4) % 32);
    expect(banks.size() == 32, "bank conflicts");
  }
  // Negative controls: a checker that cannot fail proves nothing.
  pitch_error = 1;
  expect(linear_case(64, 64, 129, 8, 8, kStretch) > 0, "wrong fragments must show");
  pitch_error = 0;
  {
    const auto good = random_codes(64, 8, false);
    const auto packed = pack(good, 1, 64, 8, false);
    expect(four_codes(packed.data(), 16, 4, 8, 0) != four_codes(packed.data(), 16, 8, 8, 0), "different codes must differ");
    expect(keep_below(0x01010101u, 60, 62) == 0x00000101u && keep_below(0x01010101u, 64, 62) == 0, "the end of a stretch");
  }
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
