// Poisson encoder on CUDA (contract: neuron.h).
//
// A thread owns the four pixels of one Philox block of one sample, keeps thresholds and signs in registers and walks
// through time. Floor: one write, 4 bytes an element (float32) or 2; about 14 instructions an element against 14 of
// budget in 16-bit types, so the draws and the stores weigh the same.
// Versions: wide stores where samples are whole, aligned blocks; a thread of 4 positions x 3 channels for channels-last
// colour images (12 neighbouring elements, three draws a step); single elements for the rest.
#include "../core/cuda_launch.h"
#include "../core/cuda_vector.h"
#include "../core/philox.h"
#include "index.h"
#include "neuron_cuda.h"
#include "sweep_cuda.h"

namespace pyaccel::neuron::cuda {
namespace {

using index::kQuad;
constexpr int kEncodeThreads = 256;

// Which block of which sample a thread draws for: blocks of a sample are neighbours.
struct Blocks {
  index::FastDivide per_sample;
  uint32_t total = 0;
};

// A pixel through time: it spikes where the draw is below `bound`, and then is `spike`.
template <class T>
struct Pixel {
  uint64_t bound = 0;
  T spike = {};

  // min(gain*|x|, 1) * 2^32 is exact in the state type; NaN compares false and never spikes.
  PYACCEL_DEVICE static Pixel of(T x, double gain) {
    using S = State<T>;
    const S v = to_state(x), p = static_cast<S>(gain) * (v < 0 ? -v : v);
    constexpr S one = S(4294967296.0);
    Pixel pixel;
    pixel.bound = p >= S(1) ? uint64_t{1} << 32 : p > S(0) ? static_cast<uint64_t>(p * one) : 0;
    pixel.spike = from_state<T>(v < 0 ? S(-1) : S(1));
    return pixel;
  }
  PYACCEL_DEVICE T at(uint32_t draw) const { return draw < bound ? spike : T{}; }
};

PYACCEL_DEVICE uint64_t draw_index(const Encode& e, uint32_t sample, uint32_t quad) {
  const int64_t id = e.sample_ids != nullptr ? e.sample_ids[sample] : int64_t{sample};
  return static_cast<uint64_t>(id) << 32 | quad;
}
PYACCEL_DEVICE uint32_t domain_at(const Encode& e, int t) {
  return philox::kEncoder + ((e.first_step + static_cast<uint32_t>(t)) << 8);
}

// `wide`: pixels are neighbours in memory and blocks are whole and aligned.
template <class T, bool wide>
__global__ void __launch_bounds__(kEncodeThreads)
    encode_kernel(const Encode e, const Blocks blocks, const index::PixelOf place) {
  const uint32_t number = blockIdx.x * kEncodeThreads + threadIdx.x;
  if (number >= blocks.total) return;
  const uint32_t sample = blocks.per_sample.quotient(number), quad = blocks.per_sample.remainder(number);
  const uint32_t pixels = static_cast<uint32_t>(e.pixels), first = quad * kQuad;
  const int64_t start = static_cast<int64_t>(sample) * e.pixels, row = e.samples * e.pixels;
  const T* image = static_cast<const T*>(e.image) + start;
  T* spikes = static_cast<T*>(e.spikes) + start;
  Pixel<T> pixel[kQuad];
  uint32_t at[kQuad];
  if constexpr (wide) {
    const Pack<T, 4> pack = load<Access::constant, 4>(image + first);
    for (uint32_t i = 0; i < kQuad; ++i) pixel[i] = Pixel<T>::of(pack.lane[i], e.gain);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kQuad; ++i) {
      at[i] = first + i < pixels ? place(first + i) : 0;
      pixel[i] = Pixel<T>::of(image[at[i]], e.gain);
    }
  }
  const uint64_t index = draw_index(e, sample, quad);
#pragma unroll 2
  for (int t = 0; t < static_cast<int>(e.steps); ++t) {
    const philox::Words words = philox::draw(e.seed, index, e.stream, domain_at(e, t));
    if constexpr (wide) {
      Pack<T, 4> pack;
#pragma unroll
      for (uint32_t i = 0; i < kQuad; ++i) pack.lane[i] = pixel[i].at(words.w[i]);
      store(spikes + first, pack);
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kQuad; ++i)
        if (first + i < pixels) spikes[at[i]] = pixel[i].at(words.w[i]);
    }
    spikes += row;
  }
}

// Channels-last, 3 channels, whole blocks of positions: 12 neighbouring elements a thread.
template <class T>
__global__ void __launch_bounds__(kEncodeThreads) encode_colour_kernel(const Encode e, const Blocks blocks) {
  constexpr uint32_t channels = 3;
  const uint32_t number = blockIdx.x * kEncodeThreads + threadIdx.x;
  if (number >= blocks.total) return;
  const uint32_t sample = blocks.per_sample.quotient(number), quad = blocks.per_sample.remainder(number);
  const uint32_t quads = static_cast<uint32_t>(e.inner) / kQuad;  // of one channel
  const int64_t start = static_cast<int64_t>(sample) * e.pixels + int64_t{quad} * kQuad * channels;
  const int64_t row = e.samples * e.pixels;
  const T* image = static_cast<const T*>(e.image) + start;
  T* spikes = static_cast<T*>(e.spikes) + start;
  Pixel<T> pixel[kQuad * channels];  // in memory order
#pragma unroll
  for (uint32_t j = 0; j < channels; ++j) {
    const Pack<T, 4> pack = load<Access::constant, 4>(image + j * 4);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) pixel[j * 4 + i] = Pixel<T>::of(pack.lane[i], e.gain);
  }
  const uint64_t index = draw_index(e, sample, 0);
#pragma unroll 1
  for (int t = 0; t < static_cast<int>(e.steps); ++t) {
    philox::Words words[channels];
#pragma unroll
    for (uint32_t c = 0; c < channels; ++c)
      words[c] = philox::draw(e.seed, index | (c * quads + quad), e.stream, domain_at(e, t));
#pragma unroll
    for (uint32_t j = 0; j < channels; ++j) {
      Pack<T, 4> pack;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t element = j * 4 + i;  // position element / 3, channel element % 3
        pack.lane[i] = pixel[element].at(words[element % channels].w[element / channels]);
      }
      store(spikes + j * 4, pack);
    }
    spikes += row;
  }
}

}  // namespace

void encode(const Encode& e, int device, void* stream) {
  if (e.samples == 0 || e.pixels == 0 || e.steps == 0) return;
  index::check_row("encode", e.pixels);
  const bool last = e.channels_last && e.channels > 1 && e.inner > 1;  // else the two orders are one
  const int64_t per_sample = index::ceil_div(e.pixels, kQuad);
  const bool aligned = all_aligned(e.image, e.spikes);
  const bool wide = !last && aligned && e.pixels % kQuad == 0;
  const bool colour = last && aligned && e.channels == 3 && e.inner % kQuad == 0;
  const int64_t each = colour ? e.inner / kQuad : per_sample;
  index::check_row("encode", e.samples * each);
  const Blocks blocks{index::fast_divide(each), static_cast<uint32_t>(e.samples * each)};
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const Grid grid{index::ceil_div(blocks.total, kEncodeThreads), kEncodeThreads};
  const index::PixelOf place{index::fast_divide(last ? e.inner : 1), static_cast<uint32_t>(e.channels), last};
  with_type(e.dtype, [&]<class T>(T) {
    if (colour) launch("encode", encode_colour_kernel<T>, grid, queue, e, blocks);
    else if (wide) launch("encode", encode_kernel<T, true>, grid, queue, e, blocks, place);
    else launch("encode", encode_kernel<T, false>, grid, queue, e, blocks, place);
  });
}

}  // namespace pyaccel::neuron::cuda
