// Bit failures on CUDA (contract: sram.h): the same bits as on the CPU.
//
// Dense: a thread draws the failures of 128 bits (eight Philox calls) and compares bytes four at a time; a block gathers
// them in shared memory, with the ties of its 16,384 bits in a queue, so that the second stream is drawn by full warps;
// then the masks meet the memory. Resolving ties at once would diverge in nearly every warp.
// Sparse in place: a thread owns one block of words of one plane and XORs its failures into memory; every bit is hit at
// most once and XOR commutes, so atomics are deterministic. Fused, the failures of a tile meet in shared memory.
// Floor: dense, the generator (integer multiplications), not memory; sparse, two numbers a block; fused, one tensor read
// and one written. Not yet run on a device: the simulator of csrc/tests runs these sources on the CPU.
#include "../core/cuda_launch.h"
#include "../core/cuda_vector.h"
#include "../core/philox.h"
#include "bits.h"
#include "noise_math.h"
#include "sram_cuda.h"

namespace pyaccel::sram::cuda {

using namespace ::pyaccel::cuda;

namespace {

constexpr int kThreads = 128;
constexpr int kTileWords = kThreads * 4;        // 32-bit words of failures a tile
constexpr int64_t kTileBits = kTileWords * 32;  // 16,384
constexpr unsigned kQueue = 1024;               // ties kept; the few beyond are resolved where they are found

struct Key {
  uint64_t seed;
  uint32_t stream;
};

// ---- dense

struct Pattern {
  uint32_t high[8];             // high bytes of the thresholds of bits 4j .. 4j+3, j modulo 8
  uint32_t always, may_tie;     // of 32 bits
  uint32_t low[kMaxWordBits];   // 24 low bits
  int word_bits;

  explicit Pattern(const Plan& plan) : high{}, always(0), may_tie(0), low{}, word_bits(plan.word_bits) {
    for (int i = 0; i < 32; ++i) {
      const uint64_t t = plan.planes[i % plan.word_bits].threshold;
      high[i / 4] |= static_cast<uint32_t>((t >> 24) & 255) << (8 * (i % 4));
      always |= static_cast<uint32_t>(t >> 32) << i;
      may_tie |= static_cast<uint32_t>((t & 0xffffffu) != 0) << i;
    }
    for (int b = 0; b < plan.word_bits; ++b) low[b] = static_cast<uint32_t>(plan.planes[b].threshold & 0xffffffu);
  }
};

PYACCEL_DEVICE bool tie_fails(const Key& key, const Pattern& pattern, uint64_t bit) {
  const philox::Words w = philox::draw(key.seed, bit >> 2, key.stream, philox::kDenseFlipLow);
  const uint32_t i = static_cast<uint32_t>(bit) & 3;
  const uint32_t drawn = i < 2 ? (i == 0 ? w.w[0] : w.w[1]) : (i == 2 ? w.w[2] : w.w[3]);
  return (drawn >> 8) < pattern.low[static_cast<uint32_t>(bit) & static_cast<uint32_t>(pattern.word_bits - 1)];
}

// Failures (and, for stuck cells, values) of one tile.
struct Tile {
  uint32_t failed[kTileWords];
  unsigned ties;
  uint16_t queue[kQueue];
};

// Fills `tile` with the failures of bits first .. first + kTileBits; `first` is a multiple of 32. All threads of the
// block take part; the tile may be read on return.
PYACCEL_DEVICE void dense_tile(const Key& key, const Pattern& pattern, uint64_t first, Tile* tile) {
  if (threadIdx.x == 0) tile->ties = 0;
  __syncthreads();
  uint32_t same[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    uint32_t failed = 0;
    same[word] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t group = (first >> 4) + threadIdx.x * 8 + static_cast<uint64_t>(word * 2 + half);
      const philox::Words drawn = philox::draw(key.seed, group, key.stream, philox::kDenseFlipHigh);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t limit = pattern.high[half * 4 + j];
        failed |= bits::gather(bits::less(drawn.w[j], limit)) << (half * 16 + j * 4);
        same[word] |= bits::gather(bits::equal(drawn.w[j], limit)) << (half * 16 + j * 4);
      }
    }
    same[word] &= pattern.may_tie;
    tile->failed[threadIdx.x * 4 + static_cast<unsigned>(word)] = failed | pattern.always;
  }
  __syncthreads();
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    for (uint32_t left = same[word]; left != 0; left &= left - 1) {
      const uint32_t at = (threadIdx.x * 4 + static_cast<unsigned>(word)) * 32 + static_cast<uint32_t>(__ffs(static_cast<int>(left)) - 1);
      const unsigned place = atomicAdd(&tile->ties, 1u);
      if (place < kQueue) {
        tile->queue[place] = static_cast<uint16_t>(at);
      } else if (tie_fails(key, pattern, first + at)) {
        atomicOr(&tile->failed[at >> 5], 1u << (at & 31));
      }
    }
  }
  __syncthreads();
  const unsigned count = tile->ties < kQueue ? tile->ties : kQueue;
  for (unsigned n = threadIdx.x; n < count; n += kThreads) {
    const uint32_t at = tile->queue[n];
    if (tie_fails(key, pattern, first + at)) atomicOr(&tile->failed[at >> 5], 1u << (at & 31));
  }
  __syncthreads();
}

// The lowest bits of the stream bytes of 32 bits.
PYACCEL_DEVICE uint32_t stuck_word(const Key& key, uint64_t first) {
  uint32_t values = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const philox::Words drawn = philox::draw(key.seed, (first >> 4) + static_cast<uint64_t>(half), key.stream, philox::kStuckValue);
#pragma unroll
    for (int j = 0; j < 4; ++j) values |= bits::gather(drawn.w[j] << 7 & 0x80808080u) << (half * 16 + j * 4);
  }
  return values;
}

// 32 bits from bit `at` of a string of words.
PYACCEL_DEVICE uint32_t bits_from(const uint32_t* words, int64_t at) {
  const int64_t word = at >> 5;
  const int shift = static_cast<int>(at & 31);
  return shift == 0 ? words[word] : words[word] >> shift | words[word + 1] << (32 - shift);
}

// `first`: bit of the stream at the first byte of memory, rounded down to 32; `shift`: what was rounded off. A block
// covers `bytes_per_block` bytes, a little less than a tile where shift is not 0.
template <bool stuck>
__global__ void __launch_bounds__(kThreads)
    dense_kernel(const Key key, const __grid_constant__ Pattern pattern, uint64_t first, int shift, int64_t bytes, int bytes_per_block,
                 const uint8_t* in, uint8_t* out, bool wide) {
  __shared__ Tile tile;
  __shared__ uint32_t values[stuck ? kTileWords : 1];
  const int64_t start = int64_t{blockIdx.x} * bytes_per_block;
  const uint64_t bit = first + static_cast<uint64_t>(start) * 8;
  if constexpr (stuck) {
#pragma unroll
    for (unsigned word = 0; word < 4; ++word) values[threadIdx.x * 4 + word] = stuck_word(key, bit + (threadIdx.x * 4 + word) * 32);
  }
  dense_tile(key, pattern, bit, &tile);
  const int64_t mine = start + threadIdx.x * 16;
  if (wide && mine + 16 <= bytes) {
    uint4 memory = *reinterpret_cast<const uint4*>(in + mine);
    const uint32_t* failed = tile.failed + threadIdx.x * 4;
    uint32_t change[4] = {failed[0], failed[1], failed[2], failed[3]};
    if constexpr (stuck) {
      const uint32_t* value = values + threadIdx.x * 4;
      change[0] &= memory.x ^ value[0];
      change[1] &= memory.y ^ value[1];
      change[2] &= memory.z ^ value[2];
      change[3] &= memory.w ^ value[3];
    }
    memory.x ^= change[0];
    memory.y ^= change[1];
    memory.z ^= change[2];
    memory.w ^= change[3];
    *reinterpret_cast<uint4*>(out + mine) = memory;
    return;
  }
  for (int i = 0; i < 16; ++i) {
    const int offset = static_cast<int>(threadIdx.x) * 16 + i;
    if (offset >= bytes_per_block || start + offset >= bytes) break;
    const int64_t at = int64_t{offset} * 8 + shift;
    uint32_t change = bits_from(tile.failed, at) & 255u;
    const uint8_t byte = in[start + offset];
    if constexpr (stuck) change &= byte ^ bits_from(values, at);
    out[start + offset] = static_cast<uint8_t>(byte ^ change);
  }
}

// ---- sparse

struct SparsePlane {
  uint32_t number;
  int block_log2;
  int last;             // of the table
  uint32_t counts[65];
};

SparsePlane sparse_plane(const Plan& plan, int number) {
  const Plane& from = plan.planes[number];
  SparsePlane plane{static_cast<uint32_t>(number), from.block_log2, static_cast<int>(from.counts.size()) - 1, {}};
  for (size_t i = 0; i < from.counts.size(); ++i) plane.counts[i] = from.counts[i];
  return plane;
}

// hit(word) for each failing word of block k.
template <class Hit>
PYACCEL_DEVICE void block_failures(const Key& key, const SparsePlane& plane, uint64_t k, const Hit& hit) {
  const uint32_t domain = philox::kSparseFlip | plane.number << 16, size = 1u << plane.block_log2;
  philox::Words words = philox::draw(key.seed, k, key.stream, domain);
  int count = 0;
  while (count < plane.last && words.w[0] >= plane.counts[count]) ++count;
  const uint64_t base = k << plane.block_log2;
  uint32_t chosen[65];
  for (uint32_t s = 0; s < static_cast<uint32_t>(count); ++s) {
    const uint32_t lane = (s + 1) & 3;
    if (lane == 0) words = philox::draw(key.seed, k, key.stream, domain | (s + 1) >> 2);
    const uint32_t drawn = lane < 2 ? (lane == 0 ? words.w[0] : words.w[1]) : (lane == 2 ? words.w[2] : words.w[3]);
    const uint32_t j = size - static_cast<uint32_t>(count) + s;
    uint32_t r = static_cast<uint32_t>((uint64_t{drawn} * (j + 1)) >> 32);
    for (uint32_t other = 0; other < s; ++other)
      if (chosen[other] == r) {
        r = j;
        break;
      }
    chosen[s] = r;
    hit(base + r);
  }
}

// Changes bit `bit` of memory by an atomic on the aligned 32-bit word around it. That word may reach beyond the
// tensor, never beyond its allocation; the bytes outside keep their value.
template <class Change>
PYACCEL_DEVICE void change_bit(uint8_t* memory, uint64_t bit, const Change& change) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bit >> 3), word = address & ~uintptr_t{3};
  change(reinterpret_cast<uint32_t*>(word), 1u << ((address - word) * 8 + (bit & 7)));
}

template <bool stuck>
__global__ void __launch_bounds__(256)
    sparse_kernel(const Key key, const __grid_constant__ SparsePlane plane, uint64_t first_block, uint32_t blocks, uint64_t first, uint64_t words,
                  int word_bits, uint8_t* memory) {
  const uint32_t number = blockIdx.x * 256 + threadIdx.x;
  if (number >= blocks) return;
  block_failures(key, plane, first_block + number, [&](uint64_t word) {
    if (word - first >= words) return;  // also where it lies before `first`
    const uint64_t bit = (word - first) * static_cast<uint64_t>(word_bits) + plane.number;
    bool set = false;
    if constexpr (stuck) {
      const uint64_t i = word * static_cast<uint64_t>(word_bits) + plane.number;
      const philox::Words value = philox::draw(key.seed, i >> 4, key.stream, philox::kStuckValue);
      const uint32_t which = static_cast<uint32_t>(i >> 2) & 3;
      const uint32_t four = which < 2 ? (which == 0 ? value.w[0] : value.w[1]) : (which == 2 ? value.w[2] : value.w[3]);
      set = (four >> (8 * (i & 3)) & 1) != 0;
    }
    change_bit(memory, bit, [&](uint32_t* at, uint32_t mask) {
      if constexpr (stuck) {
        if (set) atomicOr(at, mask);
        else atomicAnd(at, ~mask);
      } else {
        atomicXor(at, mask);
      }
    });
  });
}

// ---- fused

template <class S>
struct Quantiser {
  const S* scale_data;
  S scale, low, high;
  int word_bits;
  bool is_signed;
};

template <class T>
PYACCEL_DEVICE T noisy(T x, uint32_t failed, const Quantiser<State<T>>& q, State<T> scale) {
  using S = State<T>;
  const int code = code_of<S>(to_state(x) / scale, q.low, q.high);
  return from_state<T>(static_cast<S>(failed_code(code, failed, q.word_bits, q.is_signed)) * scale);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    noise_dense_kernel(const Key key, const __grid_constant__ Pattern pattern, const Quantiser<State<T>> q, uint64_t first, int shift, int64_t elements,
                       int per_block, const T* x, T* y) {
  __shared__ Tile tile;
  const int64_t start = int64_t{blockIdx.x} * per_block;
  dense_tile(key, pattern, first + static_cast<uint64_t>(start) * static_cast<uint64_t>(q.word_bits), &tile);
  const State<T> scale = q.scale_data != nullptr ? *q.scale_data : q.scale;
  const uint32_t all = (1u << q.word_bits) - 1;
  const int64_t count = elements - start < per_block ? elements - start : per_block;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t bit = i * q.word_bits + shift;  // a word never straddles: widths divide 32
    y[start + i] = noisy(x[start + i], tile.failed[bit >> 5] >> (bit & 31) & all, q, scale);
  }
}

constexpr int kSparseTile = 8192;  // words; no block straddles two tiles
struct SparsePlanes {
  SparsePlane planes[16];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    noise_sparse_kernel(const Key key, const __grid_constant__ SparsePlanes planes, const Quantiser<State<T>> q, uint64_t first_tile, uint64_t first,
                        int64_t elements, const T* x, T* y) {
  __shared__ uint32_t failed[kSparseTile / 2];  // 16 bits a word at most
  const uint64_t tile = (first_tile + blockIdx.x) * kSparseTile;
  for (int i = static_cast<int>(threadIdx.x); i < kSparseTile * q.word_bits / 32; i += kThreads) failed[i] = 0;
  __syncthreads();
  for (int b = 0; b < q.word_bits; ++b) {
    const SparsePlane& plane = planes.planes[b];
    if (plane.last < 0) continue;
    const uint32_t blocks = static_cast<uint32_t>(kSparseTile) >> plane.block_log2;
    for (uint32_t n = threadIdx.x; n < blocks; n += kThreads) {
      block_failures(key, plane, (tile >> plane.block_log2) + n, [&](uint64_t word) {
        const uint32_t bit = static_cast<uint32_t>(word - tile) * static_cast<uint32_t>(q.word_bits) + plane.number;
        atomicXor(&failed[bit >> 5], 1u << (bit & 31));
      });
    }
  }
  __syncthreads();
  const State<T> scale = q.scale_data != nullptr ? *q.scale_data : q.scale;
  const uint32_t all = (1u << q.word_bits) - 1;
  for (uint32_t i = threadIdx.x; i < kSparseTile; i += kThreads) {
    const uint64_t at = tile + i - first;
    if (at >= static_cast<uint64_t>(elements)) continue;  // also where it lies before `first`
    const uint32_t bit = i * static_cast<uint32_t>(q.word_bits);
    y[at] = noisy(x[at], failed[bit >> 5] >> (bit & 31) & all, q, scale);
  }
}

template <class T>
__global__ void __launch_bounds__(256)
    noise_backward_kernel(const Quantiser<State<T>> q, int64_t elements, const T* x, const T* grad, T* grad_x) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= elements) return;
  const State<T> scale = q.scale_data != nullptr ? *q.scale_data : q.scale;
  grad_x[i] = passes<State<T>>(to_state(x[i]) / scale, q.low, q.high) ? grad[i] : T{};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64: return f(double{});
    case Dtype::f16: return f(__half{});
    case Dtype::bf16: return f(__nv_bfloat16{});
    default: return f(float{});
  }
}

bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

void flip(const Flip& f, int device, void* stream) {
  const Plan& plan = *f.draws.plan;
  const Key key{f.draws.seed, f.draws.stream};
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  if (!plan.sparse) {
    const uint64_t bit = f.draws.first_word * static_cast<uint64_t>(plan.word_bits);
    const int shift = static_cast<int>(bit % 32), per_block = static_cast<int>(kTileBits / 8) - (shift != 0 ? 16 : 0);
    const bool wide = shift == 0 && on_16_bytes(f.in) && on_16_bytes(f.out);
    const Grid grid{ceil_div(f.bytes, per_block), kThreads};
    const auto run = [&](auto kernel) {
      launch("flip_bits", kernel, grid, queue, key, Pattern(plan), bit - static_cast<uint64_t>(shift), shift, f.bytes, per_block, f.in, f.out, wide);
    };
    return f.stuck ? run(dense_kernel<true>) : run(dense_kernel<false>);
  }
  if (f.in != f.out)
    check(cudaMemcpyAsync(f.out, f.in, static_cast<size_t>(f.bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)), "flip_bits");
  const uint64_t first = f.draws.first_word, words = static_cast<uint64_t>(f.bytes * 8 / plan.word_bits);
  for (int b = 0; b < plan.word_bits; ++b) {
    if (plan.planes[b].threshold == 0) continue;
    const SparsePlane plane = sparse_plane(plan, b);
    const uint64_t begin = first >> plane.block_log2, end = ((first + words - 1) >> plane.block_log2) + 1;
    if (end - begin > 0xffffff00u) throw std::invalid_argument("flip_bits: more than 2^32 blocks; flip the memory in pieces (first_element)");
    const Grid grid{ceil_div(static_cast<int64_t>(end - begin), 256), 256};
    const auto run = [&](auto kernel) {
      launch("flip_bits", kernel, grid, queue, key, plane, begin, static_cast<uint32_t>(end - begin), first, words, plan.word_bits, f.out);
    };
    f.stuck ? run(sparse_kernel<true>) : run(sparse_kernel<false>);
  }
}

void noise(const Noise& f, int device, void* stream) {
  const Plan& plan = *f.draws.plan;
  const Key key{f.draws.seed, f.draws.stream};
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  with_type(f.dtype, [&]<class T>(T) {
    using S = State<T>;
    const Quantiser<S> q{static_cast<const S*>(f.scale_data), static_cast<S>(f.scale), static_cast<S>(f.low()), static_cast<S>(f.high()),
                         plan.word_bits, f.is_signed};
    const T* x = static_cast<const T*>(f.x);
    T* y = static_cast<T*>(f.y);
    const uint64_t first = f.draws.first_word;
    if (plan.sparse) {
      SparsePlanes planes{};
      for (int b = 0; b < plan.word_bits; ++b) planes.planes[b] = sparse_plane(plan, b);
      const uint64_t begin = first / kSparseTile, end = (first + static_cast<uint64_t>(f.elements) - 1) / kSparseTile + 1;
      launch("sram_noise", noise_sparse_kernel<T>, Grid{static_cast<int64_t>(end - begin), kThreads}, queue, key, planes, q, begin, first, f.elements, x, y);
    } else {
      const uint64_t bit = first * static_cast<uint64_t>(plan.word_bits);
      const int shift = static_cast<int>(bit % 32), per_block = (static_cast<int>(kTileBits) - (shift != 0 ? 32 : 0)) / plan.word_bits;
      launch("sram_noise", noise_dense_kernel<T>, Grid{ceil_div(f.elements, per_block), kThreads}, queue, key, Pattern(plan), q,
             bit - static_cast<uint64_t>(shift), shift, f.elements, per_block, x, y);
    }
  });
}

void noise_backward(const NoiseBackward& f, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  with_type(f.dtype, [&]<class T>(T) {
    using S = State<T>;
    const Quantiser<S> q{static_cast<const S*>(f.scale_data), static_cast<S>(f.scale), static_cast<S>(f.low), static_cast<S>(f.high), 0, false};
    launch("sram_noise_backward", noise_backward_kernel<T>, Grid{ceil_div(f.elements, 256), 256}, queue, q, f.elements, static_cast<const T*>(f.x),
           static_cast<const T*>(f.grad), static_cast<T*>(f.grad_x));
  });
}

}  // namespace pyaccel::sram::cuda
