// Spikes to bit planes and back on CUDA: eight elements, one byte of every plane, a thread (contract: neuron.h,
// Planes).
//
// Floor in bytes an element: 4.1 (float32), 2.1 (16-bit) either way, and an eighth for each further plane. The wide
// side moves 16 bytes an access where rows are whole bytes and addresses allow; then all rows are one. A warp touches
// one full sector of a plane: no shuffle. The number of planes is a run-time loop of at most four.
#include "../core/cuda_launch.h"
#include "../core/cuda_vector.h"
#include "index.h"
#include "neuron_cuda.h"
#include "sweep_cuda.h"

namespace pyaccel::neuron::cuda {
namespace {

constexpr int kPackThreads = 256;

// A launch covers `bytes` bytes a row of each plane; blocks of a row are neighbours.
struct Bytes {
  index::FastDivide blocks_per_row;
  int64_t length = 0, bytes = 0, plane = 0;  // elements and bytes of a row, bytes of a plane
  int planes = 1;
};

// Integer codes of `planes` bits: two's complement where planes is even, quarters from 3 planes on.
struct Codes {
  int low, high;
  float scale, unit;

  PYACCEL_DEVICE explicit Codes(int planes)
      : low(planes % 2 == 0 ? -(1 << (planes - 1)) : 0),
        high(planes % 2 == 0 ? (1 << (planes - 1)) - 1 : (1 << planes) - 1),
        scale(planes >= 3 ? 4.0f : 1.0f),
        unit(planes >= 3 ? 0.25f : 1.0f) {}
  template <class S>
  PYACCEL_DEVICE unsigned of(S v) const {
    const S scaled = v * static_cast<S>(scale);
    const bool known = scaled >= static_cast<S>(low) && scaled <= static_cast<S>(high);
    return known ? static_cast<unsigned>(static_cast<int>(scaled)) : 0u;
  }
  template <class S>
  PYACCEL_DEVICE S value(unsigned code) const {
    const int signed_code = static_cast<int>(code) > high ? static_cast<int>(code) + 2 * low : static_cast<int>(code);
    return static_cast<S>(signed_code) * static_cast<S>(unit);
  }
};

struct Byte {
  int64_t row, byte;
};
PYACCEL_DEVICE Byte byte_of(const Bytes& b) {
  const uint32_t row = b.blocks_per_row.quotient(blockIdx.x), block = b.blocks_per_row.remainder(blockIdx.x);
  return {row, int64_t{block} * kPackThreads + threadIdx.x};
}

template <class T, bool wide>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const T* __restrict__ from, uint8_t* __restrict__ to, const Bytes b) {
  const Byte at = byte_of(b);
  if (at.byte >= b.bytes) return;
  const T* elements = from + at.row * b.length + at.byte * 8;
  const Codes codes(b.planes);
  unsigned code[8];
  if constexpr (wide) {
    const Pack<T, 8> pack = load<Access::streaming, 8>(elements);
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = codes.of(to_state(pack.lane[i]));
  } else {
    const int64_t left = b.length - at.byte * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = i < left ? codes.of(to_state(elements[i])) : 0u;
  }
  to += at.row * b.bytes + at.byte;
#pragma unroll 1
  for (int k = 0; k < b.planes; ++k) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= (code[i] >> k & 1u) << i;
    to[k * b.plane] = static_cast<uint8_t>(bits);
  }
}

template <class T, bool wide>
__global__ void __launch_bounds__(kPackThreads)
    unpack_kernel(const uint8_t* __restrict__ from, T* __restrict__ to, const Bytes b) {
  const Byte at = byte_of(b);
  if (at.byte >= b.bytes) return;
  from += at.row * b.bytes + at.byte;
  unsigned code[8] = {};
#pragma unroll 1
  for (int k = 0; k < b.planes; ++k) {
    const unsigned bits = from[k * b.plane];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] |= (bits >> i & 1u) << k;
  }
  const Codes codes(b.planes);
  T* elements = to + at.row * b.length + at.byte * 8;
  if constexpr (wide) {
    Pack<T, 8> pack;
#pragma unroll
    for (int i = 0; i < 8; ++i) pack.lane[i] = from_state<T>(codes.value<State<T>>(code[i]));
    store<Access::coherent>(elements, pack);  // its consumer comes next
  } else {
    const int64_t left = b.length - at.byte * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) elements[i] = from_state<T>(codes.value<State<T>>(code[i]));
  }
}

// Calls run(wide, sizes, grid, queue).
template <class F>
void over_bytes(const char* what, const Planes& f, const void* elements, int device, void* stream, const F& run) {
  if (f.rows == 0 || f.length == 0) return;
  const bool wide = f.length % 8 == 0 && all_aligned(elements);
  const int64_t rows = wide ? 1 : f.rows, length = wide ? f.rows * f.length : f.length;
  const int64_t bytes = index::packed_row(length), blocks = index::ceil_div(bytes, kPackThreads);
  if (blocks > index::kMaxRow)
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(length) +
                                " elements are more than one launch takes; split the batch");
  const DeviceGuard guard(device);
  run(wide, Bytes{index::fast_divide(blocks), length, bytes, rows * bytes, f.planes}, Grid{rows * blocks, kPackThreads},
      Queue{device, stream});
}

}  // namespace

void pack(const Planes& f, int device, void* stream) {
  over_bytes("pack", f, f.from, device, stream,
             [&](bool wide, const Bytes& bytes, const Grid& grid, const Queue& queue) {
               with_type(f.dtype, [&]<class T>(T) {
                 launch("pack", wide ? pack_kernel<T, true> : pack_kernel<T, false>, grid, queue,
                        static_cast<const T*>(f.from), static_cast<uint8_t*>(f.to), bytes);
               });
             });
}

void unpack(const Planes& f, int device, void* stream) {
  over_bytes("unpack", f, f.to, device, stream,
             [&](bool wide, const Bytes& bytes, const Grid& grid, const Queue& queue) {
               with_type(f.dtype, [&]<class T>(T) {
                 launch("unpack", wide ? unpack_kernel<T, true> : unpack_kernel<T, false>, grid, queue,
                        static_cast<const uint8_t*>(f.from), static_cast<T*>(f.to), bytes);
               });
             });
}

}  // namespace pyaccel::neuron::cuda
