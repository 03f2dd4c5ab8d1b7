// Quantised convolution on the CPU (contract: qmac.h).
//
// Pixels of all images in the lanes, output channels in the rows, K = (channel, kernel row, kernel column). Activations
// are copied once with their padding, so that a patch has no borders; each block of pixels then builds its panels from
// four (two, six, ...) shifted rows at a time, eight pixels a step, never materialising the unfolded matrix. Q is a box
// sum over one plane a group, not a product. Floor: the multiplier's rate; building panels costs about one operation a
// byte against `outputs` products.
#include <vector>

#include "block_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::qmac::PYACCEL_ISA {
namespace {

struct Geometry {
  int64_t height, width, plane;  // padded image
  int64_t kernel[2], stride[2], dilation[2];
  int64_t out_height, out_width, pixels;  // pixels: of one output image
  int64_t group_channels, length;
};

Geometry geometry_of(const Conv& f) {
  Geometry g{};
  g.group_channels = f.channels / f.groups;
  g.length = g.group_channels * f.kernel[0] * f.kernel[1];
  g.pixels = f.out_height * f.out_width;
  const bool flat = f.kernel[0] * f.kernel[1] == 1 && f.stride[0] * f.stride[1] == 1 && f.padding[0] + f.padding[1] == 0;
  for (int d = 0; d < 2; ++d) g.kernel[d] = f.kernel[d], g.stride[d] = f.stride[d], g.dilation[d] = f.dilation[d];
  g.height = flat ? 1 : f.height + 2 * f.padding[0];
  g.width = flat ? f.height * f.width : f.width + 2 * f.padding[1];
  g.out_height = flat ? 1 : f.out_height;
  g.out_width = flat ? g.pixels : f.out_width;
  g.plane = g.height * g.width;
  return g;
}

// Limb `limb` of every image with its padding: [batch, channels, height, width] bytes. Returns the OR of all codes.
uint64_t copy_planes(const Conv& f, const Geometry& g, int limb, uint8_t* planes) {
  const int64_t rows = g.height - 2 * f.padding[0], width = g.width - 2 * f.padding[1];
  uint64_t seen = 0;
  const int64_t images = f.batch * f.channels;
#pragma omp parallel for reduction(| : seen) num_threads(threads_for(images * g.plane, images)) schedule(static)
  for (int64_t image = 0; image < images; ++image) {
    uint8_t* to = planes + image * g.plane;
    if (f.padding[0] + f.padding[1] > 0) memset(to, 0, static_cast<size_t>(g.plane));
    for (int64_t y = 0; y < rows; ++y) {
      uint8_t* line = to + (y + f.padding[0]) * g.width + f.padding[1];
      const int64_t from = (image * rows + y) * width;
      if (f.activation_bits == 16) {
        const int32_t* codes = static_cast<const int32_t*>(f.activations) + from;
        for (int64_t x = 0; x < width; ++x) {
          seen |= static_cast<uint32_t>(codes[x]);
          line[x] = static_cast<uint8_t>(codes[x] >> (8 * limb));
        }
      } else {
        const uint8_t* codes = static_cast<const uint8_t*>(f.activations) + from;
        int64_t x = 0;
        for (; x + 8 <= width; x += 8) {
          const uint64_t eight = load_any<uint64_t>(codes + x);
          seen |= eight | eight >> 32;
          store_any(line + x, eight);
        }
        for (; x < width; ++x) {
          seen |= codes[x];
          line[x] = codes[x];
        }
      }
    }
  }
  return f.activation_bits == 16 ? seen : (seen | seen >> 8 | seen >> 16 | seen >> 24) & 0xff;
}

// Eight pixels, `stride` bytes apart.
PYACCEL_INLINE uint64_t eight_pixels(const uint8_t* p, int64_t stride) {
  uint64_t x = 0;
  if (stride == 1) {
    memcpy(&x, p, 8);
  } else if (stride == 2) {
    constexpr uint64_t even = 0x00ff00ff00ff00ffull;
    uint64_t two[2];
    memcpy(two, p, 16);
    for (uint64_t& half : two) {
      half &= even;
      half = (half | half >> 8) & 0x0000ffff0000ffffull;
      half = (half | half >> 16) & 0xffffffffull;
    }
    x = two[0] | two[1] << 32;
  } else {
    for (int i = 0; i < 8; ++i) x |= static_cast<uint64_t>(p[i * stride]) << (8 * i);
  }
  return x;
}

struct Segment {
  int64_t column, count, source;  // columns of the block; where their first pixel's patch starts in `planes`
};

// Eight pixels of one step: where their codes start in the planes, where they go in a panel (or in `line`).
struct Chunk {
  int64_t source, to;
};

// One step of every chunk, `codes` codes at the given offsets; a full step of unit stride is the case that counts.
template <Layout layout, int codes, int bits>
PYACCEL_INLINE void fill_step(const std::vector<Chunk>& chunks, const uint8_t* planes, const int64_t* offset, uint8_t* to) {
  for (const Chunk& chunk : chunks) {
    const uint8_t* source = planes + chunk.source;
    if constexpr (layout == Layout::quads) {
      const Sixteen low = alternate_bytes(load_eight(source + offset[0]), load_eight(source + offset[1]));
      const Sixteen high = alternate_bytes(load_eight(source + offset[2]), load_eight(source + offset[3]));
      store_alternate_halves(to + chunk.to, low, high);
    } else if constexpr (layout == Layout::pairs) {
      store_any(to + chunk.to, widen_eight(source + offset[0]) | widen_eight(source + offset[1]) << 16);
    } else {
      uint64_t digit = 0;
#pragma GCC unroll 8
      for (int j = 0; j < codes; ++j) digit |= load_any<uint64_t>(source + offset[j]) << (j * bits);
      store_any(to + chunk.to, digit);
    }
  }
}

// Any stride, any number of codes: the last step, strided convolutions, and words of 32 codes.
void fill_any(const Product& p, int bits, const std::vector<Chunk>& chunks, const uint8_t* planes, const int64_t* offset, int count,
              int64_t stride, uint8_t* to) {
  const int shift = p.layout == Layout::pairs ? 16 : p.layout == Layout::quads ? 8 : bits;
  for (const Chunk& chunk : chunks) {
    const uint8_t* source = planes + chunk.source;
    if (p.layout == Layout::digits) {
      uint64_t digit = 0;
      for (int j = 0; j < count; ++j) digit |= eight_pixels(source + offset[j], stride) << (j * shift);
      store_any(to + chunk.to, digit);
    } else {
      EightWords word{};
      for (int j = 0; j < count; ++j) {
        const uint64_t pixels = eight_pixels(source + offset[j], stride);
        word |= widen_eight(reinterpret_cast<const uint8_t*>(&pixels)) << (j * shift);
      }
      store_any(to + chunk.to, word);
    }
  }
}

// Panels of a block: for each step, its codes of every column, in the product's layout. Lanes beyond the last column hold
// whatever was there: nothing is stored from them. Chunks of eight columns go straight to their place where they start
// at a multiple of eight; else, and for digits, through a line that is then cut up (a chunk may spill over its segment:
// the next one, or nobody, owns those columns).
void patch_panels(const Product& p, const Geometry& g, int bits, const uint8_t* planes, const std::vector<int64_t>& offsets,
                  const std::vector<Segment>& segments, int64_t columns, int64_t first_step, int64_t steps, uint8_t* panels,
                  std::vector<Chunk>& chunks) {
  const int64_t tiles = ceil_div(columns, p.lanes), panel_bytes = steps * p.step_bytes, lane_bytes = p.step_bytes / p.lanes;
  const bool unit = g.stride[1] == 1;
  bool direct = p.layout != Layout::digits;
  for (const Segment& segment : segments) direct = direct && segment.column % 8 == 0;
  chunks.clear();
  for (const Segment& segment : segments)
    for (int64_t i = 0; i < segment.count; i += 8) {
      const int64_t column = segment.column + i;
      const int64_t to = direct ? column / p.lanes * panel_bytes + column % p.lanes * lane_bytes : column * lane_bytes;
      chunks.push_back({segment.source + i * g.stride[1], to});
    }
  alignas(64) uint8_t line[4 * (kTilesPerBlock * kMaxLanes + 16)];
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t first = (first_step + s) * p.codes;
    const int count = static_cast<int>(std::clamp<int64_t>(g.length - first, 0, p.codes));
    const int64_t* offset = offsets.data() + first;
    uint8_t* to = direct ? panels + s * p.step_bytes : line;
    if (!unit || count < p.codes || p.layout == Layout::words) fill_any(p, bits, chunks, planes, offset, count, g.stride[1], to);
    else if (p.layout == Layout::quads) fill_step<Layout::quads, 4, 8>(chunks, planes, offset, to);
    else if (p.layout == Layout::pairs) fill_step<Layout::pairs, 2, 8>(chunks, planes, offset, to);
    else if (bits == 1 && p.codes == 4) fill_step<Layout::digits, 4, 1>(chunks, planes, offset, to);
    else if (bits == 2 && p.codes == 2) fill_step<Layout::digits, 2, 2>(chunks, planes, offset, to);
    else if (bits == 1) fill_step<Layout::digits, 6, 1>(chunks, planes, offset, to);
    else fill_step<Layout::digits, 3, 2>(chunks, planes, offset, to);
    if (direct) continue;
    for (int64_t t = 0; t < tiles; ++t) {
      uint8_t* panel = panels + t * panel_bytes + s * p.step_bytes;
      for (int64_t at = 0; at < p.step_bytes; at += kBytes) {
        const uint8_t* from = line + t * p.step_bytes + at;
        if (p.layout == Layout::digits) interleave_halves(from, panel + at);
        else store_any(panel + at, load_any<Bytes>(from));
      }
    }
  }
}

// Q [batch, groups, pixels]: the channels of a group summed into one plane, then a box sum over the kernel.
template <class T>
void patch_sums(const Conv& f, const Geometry& g, const uint8_t* planes, int64_t limb_bytes) {
  const int limbs = limbs_of(f.activation_bits);
  parallel_shares(f.batch * f.groups, threads_for(f.batch * f.channels * g.plane, f.batch * f.groups), [&](int64_t begin, int64_t end, int) {
    std::vector<T> plane(static_cast<size_t>(g.plane));
    for (int64_t piece = begin; piece < end; ++piece) {
      memset(plane.data(), 0, plane.size() * sizeof(T));
      for (int limb = 0; limb < limbs; ++limb)
        for (int64_t c = 0; c < g.group_channels; ++c) {
          const uint8_t* from = planes + limb * limb_bytes + (piece * g.group_channels + c) * g.plane;
          int64_t i = 0;
          if constexpr (sizeof(T) == 4)
            for (; i + 8 <= g.plane; i += 8)
              store_any(plane.data() + i, load_any<EightWords>(plane.data() + i) + widen_eight(from + i));
          for (; i < g.plane; ++i) plane[static_cast<size_t>(i)] += static_cast<T>(from[i]) << (8 * limb);
        }
      T* q = static_cast<T*>(f.q) + piece * g.pixels;
      for (int64_t y = 0; y < g.out_height; ++y) {
        int64_t x = 0;
        if constexpr (sizeof(T) == 4)
          for (; g.stride[1] == 1 && x + 8 <= g.out_width; x += 8) {
            EightWords sum{};
            for (int64_t r = 0; r < g.kernel[0]; ++r)
              for (int64_t s = 0; s < g.kernel[1]; ++s)
                sum += load_any<EightWords>(plane.data() + (y * g.stride[0] + r * g.dilation[0]) * g.width + x + s * g.dilation[1]);
            store_any(q + y * g.out_width + x, sum);
          }
        for (; x < g.out_width; ++x) {
          T sum = 0;
          for (int64_t r = 0; r < g.kernel[0]; ++r)
            for (int64_t s = 0; s < g.kernel[1]; ++s)
              sum += plane[static_cast<size_t>((y * g.stride[0] + r * g.dilation[0]) * g.width + x * g.stride[1] + s * g.dilation[1])];
          q[y * g.out_width + x] = sum;
        }
      }
    }
  });
}

template <class T>
void start_from_q(const Conv& f, const Geometry& g, int64_t group, int64_t first_row, int64_t last_row, const Target& t, int64_t first_pixel) {
  const int64_t factor = shift_factor(f.weight_bits);
  for (int64_t k = 0; k < t.run_count; ++k) {
    const int64_t pixel = first_pixel + t.runs[k].first, image = pixel / g.pixels;
    const T* q = static_cast<const T*>(f.q) + (image * f.groups + group) * g.pixels + pixel % g.pixels;
    for (int64_t row = first_row; row < last_row; ++row) {
      T* p = static_cast<T*>(t.p) + row * t.row_stride + t.runs[k].offset;
      for (int64_t i = 0; i < t.runs[k].count; ++i) p[i] = static_cast<T>(factor) * q[i];
    }
  }
}

// Output pixels `first` .. of all images: where their patches start, and where their results go.
void describe_block(const Conv& f, const Geometry& g, int64_t group, int64_t first, int64_t columns, std::vector<Segment>& segments,
                    std::vector<Run>& runs) {
  segments.clear();
  runs.clear();
  for (int64_t column = 0; column < columns;) {
    const int64_t pixel = first + column, image = pixel / g.pixels, inside = pixel % g.pixels;
    const int64_t y = inside / g.out_width, x = inside % g.out_width;
    const int64_t count = std::min(g.out_width - x, columns - column);
    segments.push_back({column, count,
                        (image * f.channels + group * g.group_channels) * g.plane + y * g.stride[0] * g.width + x * g.stride[1]});
    if (inside == 0 || column == 0) runs.push_back({column, 0, (image * f.outputs + group * (f.outputs / f.groups)) * g.pixels + inside});
    runs.back().count += count;
    column += count;
  }
}

}  // namespace

void convolution(Conv& f) {
  const Geometry g = geometry_of(f);
  const int64_t pixels = f.batch * g.pixels;
  const int activation_limbs = limbs_of(f.activation_bits), weight_limbs = limbs_of(f.weight_bits);
  const int64_t limb_bytes = f.batch * f.channels * g.plane;
  auto* planes = static_cast<uint8_t*>(scratch(1, static_cast<size_t>(activation_limbs * limb_bytes + 64 + 8 * g.stride[1])));
  for (int limb = 0; limb < activation_limbs; ++limb) {
    const uint64_t seen = copy_planes(f, g, limb, planes + limb * limb_bytes);
    f.in_range = seen >> f.activation_bits == 0;
    if (!f.in_range) return;
  }
  if (pixels == 0) return;
  if (f.sum_bytes == 4) patch_sums<uint32_t>(f, g, planes, limb_bytes);
  else patch_sums<uint64_t>(f, g, planes, limb_bytes);
  if (f.outputs == 0) return;

  const Product p = choose_product(limb_bits(f.weight_bits), limb_bits(f.activation_bits), false);
  const int64_t stride = row_stride(p, g.length), steps_all = ceil_div(g.length, p.codes), steps_block = block_steps(p);
  const int64_t words = words_of(g.length, f.weight_bits), group_outputs = f.outputs / f.groups;
  auto* rows = static_cast<uint8_t*>(scratch(0, static_cast<size_t>(weight_limbs * f.outputs * stride + 64)));
  parallel_shares(f.outputs, threads_for(f.outputs * g.length, f.outputs), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int limb = 0; limb < weight_limbs; ++limb)
        layout_row(p, p.rows_signed, f.weight_bits, f.weights + r * words, g.length, limb, 0, steps_all, rows + (limb * f.outputs + r) * stride);
  });
  std::vector<int64_t> offsets(static_cast<size_t>(g.length));
  for (int64_t k = 0; k < g.length; ++k) {
    const int64_t s = k % g.kernel[1], r = k / g.kernel[1] % g.kernel[0], c = k / (g.kernel[0] * g.kernel[1]);
    offsets[static_cast<size_t>(k)] = c * g.plane + r * g.dilation[0] * g.width + s * g.dilation[1];
  }

  const int64_t tiles = ceil_div(pixels, p.lanes), work = pixels * group_outputs * g.length;
  const int64_t threads = threads_for(work * f.groups / 16, tiles * f.outputs);
  const int64_t per_block = std::clamp<int64_t>(tiles * f.groups / (2 * threads), 1, kTilesPerBlock), blocks = ceil_div(tiles, per_block);
  const int64_t parts = blocks * f.groups >= threads ? 1 : std::min(ceil_div(threads, blocks * f.groups), ceil_div(group_outputs, p.max_rows));
  const int64_t pieces = f.groups * blocks * parts;
  parallel_shares(pieces, static_cast<int>(std::min(threads, pieces)), [&](int64_t begin, int64_t end, int) {
    auto* panels = static_cast<uint8_t*>(scratch(2, static_cast<size_t>(per_block * steps_block * p.step_bytes)));
    std::vector<Segment> segments;
    std::vector<Run> runs;
    std::vector<Chunk> chunks;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t group = piece / (blocks * parts), block = piece / parts % blocks, part = piece % parts;
      const int64_t first_pixel = block * per_block * p.lanes, columns = std::min(per_block * p.lanes, pixels - first_pixel);
      const int64_t first_row = group_outputs * part / parts, last_row = group_outputs * (part + 1) / parts;
      describe_block(f, g, group, first_pixel, columns, segments, runs);
      const Target target{f.p, f.sum_bytes, g.pixels, runs.data(), static_cast<int64_t>(runs.size())};
      bool accumulate = p.rows_signed;
      if (accumulate && f.sum_bytes == 4) start_from_q<int32_t>(f, g, group, first_row, last_row, target, first_pixel);
      if (accumulate && f.sum_bytes == 8) start_from_q<int64_t>(f, g, group, first_row, last_row, target, first_pixel);
      for (int64_t first = 0; first < steps_all; first += steps_block) {
        const int64_t steps = std::min(steps_block, steps_all - first);
        for (int a = 0; a < activation_limbs; ++a) {
          patch_panels(p, g, limb_bits(f.activation_bits), planes + a * limb_bytes, offsets, segments, columns, first, steps, panels,
                       chunks);
          for (int w = 0; w < weight_limbs; ++w) {
            const uint8_t* r = rows + (w * f.outputs + group * group_outputs) * stride + first * row_step_bytes(p);
            multiply_block(p, r, stride, first_row, last_row, panels, ceil_div(columns, p.lanes), steps, target, 8 * (w + a), accumulate);
            accumulate = true;
          }
        }
      }
    }
  });
}

}  // namespace pyaccel::qmac::PYACCEL_ISA
