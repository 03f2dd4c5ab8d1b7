// Elements in memory and in registers: wide accesses, cache hints, conversions. Device code only.
//
// A streaming access marks its line as the first to evict: for what is read or written once. A plain load keeps the
// line: for what this launch or the next one reads again.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pyaccel::cuda {

#define PYACCEL_DEVICE __device__ __forceinline__

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
PYACCEL_DEVICE T* dynamic_shared() {
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

// Neuron state and sums of a tensor's type.
template <class T>
using State = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V neighbouring elements; a full 16 bytes move as one access.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T lane[V];
};

template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// `p` is aligned to the pack. `streaming`: see above; `constant`: nothing writes there during the launch.
enum class Access { streaming, constant, coherent };

template <Access access, int V, class T>
PYACCEL_DEVICE Pack<T, V> load(const T* p) {
  constexpr int bytes = static_cast<int>(sizeof(T)) * V, piece = bytes < 16 ? bytes : 16;
  using Word = typename WordOf<piece>::type;
  const Word* from = reinterpret_cast<const Word*>(p);
  Word words[bytes / piece];
#pragma unroll
  for (int j = 0; j < bytes / piece; ++j) {
    if constexpr (access == Access::streaming) {
      words[j] = __ldcs(from + j);
    } else if constexpr (access == Access::constant) {
      words[j] = __ldg(from + j);
    } else {
      words[j] = from[j];
    }
  }
  Pack<T, V> pack;
  memcpy(&pack, words, bytes);
  return pack;
}

template <Access access = Access::streaming, int V, class T>
PYACCEL_DEVICE void store(T* p, const Pack<T, V>& pack) {
  constexpr int bytes = static_cast<int>(sizeof(T)) * V, piece = bytes < 16 ? bytes : 16;
  using Word = typename WordOf<piece>::type;
  Word words[bytes / piece];
  memcpy(words, &pack, bytes);
  Word* to = reinterpret_cast<Word*>(p);
#pragma unroll
  for (int j = 0; j < bytes / piece; ++j) {
    if constexpr (access == Access::streaming) {
      __stcs(to + j, words[j]);
    } else {
      to[j] = words[j];
    }
  }
}

PYACCEL_DEVICE float to_state(float v) {
  return v;
}
PYACCEL_DEVICE double to_state(double v) {
  return v;
}
PYACCEL_DEVICE float to_state(__half v) {
  return __half2float(v);
}
PYACCEL_DEVICE float to_state(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

// Rounded to nearest even; beyond the range of float16 to infinity.
template <class T>
PYACCEL_DEVICE T from_state(State<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// 1 or 0, by bit pattern: a select instead of a conversion.
template <class T>
PYACCEL_DEVICE T one_or_zero(bool set) {
  if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(set ? uint16_t{0x3c00} : uint16_t{0});
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __ushort_as_bfloat16(set ? uint16_t{0x3f80} : uint16_t{0});
  } else {
    return set ? T(1) : T(0);
  }
}

}  // namespace pyaccel::cuda
