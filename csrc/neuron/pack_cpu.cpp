// Spikes to bit planes and back (contract: neuron.h). Floor: the wide side of the copy, 4 bytes an element in float32.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../core/parallel.h"
#include "cells_cpu.h"
#include "kernels_cpu.h"

namespace pyaccel::neuron::PYACCEL_ISA {
namespace {

constexpr int64_t kPiece = 4096;  // elements a thread takes at a time: a multiple of 8, so pieces never share a byte

template <class S>
using Codes = decltype(Vec<S>{} > Vec<S>{});

// The code of every lane, and whether it gives the value back.
template <class S, int planes>
PYACCEL_INLINE Codes<S> code_of(Vec<S> v, Codes<S>& good) {
  constexpr S scale = planes >= 3 ? S(4) : S(1);
  constexpr int low = planes % 2 == 0 ? -(1 << (planes - 1)) : 0, high = planes % 2 == 0 ? (1 << (planes - 1)) - 1 : (1 << planes) - 1;
  const Vec<S> scaled = v * scale;
  const Codes<S> range = (scaled >= Vec<S>{} + S(low)) & (scaled <= Vec<S>{} + S(high));
  const Codes<S> code = __builtin_convertvector(range ? scaled : Vec<S>{}, Codes<S>);
  good &= range & (__builtin_convertvector(code, Vec<S>) == scaled);
  return code;
}

template <class S, int planes>
PYACCEL_INLINE Vec<S> value_of_code(Codes<S> code) {
  constexpr S scale = planes >= 3 ? S(0.25) : S(1);
  if constexpr (planes % 2 == 0) {  // sign extension
    const Codes<S> sign = Codes<S>{} + (1 << (planes - 1));
    code = (code ^ sign) - sign;
  }
  return __builtin_convertvector(code, Vec<S>) * scale;
}

// Row by row, piece by piece: body(row, first element, count).
template <class F>
void over_pieces(const Planes& f, const F& body) {
  const int64_t pieces = (f.length + kPiece - 1) / kPiece;
  parallel_shares(f.rows * pieces, threads_for(f.rows * f.length * size_of(f.dtype), f.rows * pieces), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      body(i / pieces, first, std::min(kPiece, f.length - first));
    }
  });
}

template <class E, int planes>
bool run_pack(const Planes& f) {
  using S = typename StateOf<E>::type;
  constexpr int64_t lanes = Simd<S>::lanes, eight = std::max<int64_t>(8, lanes);
  const int64_t bytes = (f.length + 7) / 8, plane = f.rows * bytes;
  std::atomic<bool> all_good{true};
  over_pieces(f, [&](int64_t row, int64_t first, int64_t count) {
    const E* from = static_cast<const E*>(f.from) + row * f.length + first;
    uint8_t* to = static_cast<uint8_t*>(f.to) + row * bytes + first / 8;
    Codes<S> good = Codes<S>{} == Codes<S>{};
    E tail[eight];
    for (int64_t j = 0; j < count; j += eight) {
      const E* source = from + j;
      if (j + eight > count) {
        std::memset(static_cast<void*>(tail), 0, sizeof(tail));
        std::copy_n(from + j, count - j, tail);
        source = tail;
      }
      uint32_t bits[planes] = {};
#pragma GCC unroll 4
      for (int64_t part = 0; part < eight / lanes; ++part) {
        const Codes<S> code = code_of<S, planes>(load_as<Vec<S>>(source + part * lanes), good);
#pragma GCC unroll 4
        for (int k = 0; k < planes; ++k) bits[k] |= mask_bits((code & (1 << k)) != Codes<S>{}) << (part * lanes);
      }
      for (int k = 0; k < planes; ++k)
        for (int64_t byte = 0; byte < eight / 8 && j / 8 + byte < (count + 7) / 8; ++byte)
          to[k * plane + j / 8 + byte] = static_cast<uint8_t>(bits[k] >> (8 * byte));
    }
    if (mask_bits(good) != (lanes == 32 ? ~0u : (1u << lanes) - 1)) all_good = false;
  });
  return all_good;
}

template <class E, int planes>
void run_unpack(const Planes& f) {
  using S = typename StateOf<E>::type;
  constexpr int64_t lanes = Simd<S>::lanes, eight = std::max<int64_t>(8, lanes);
  const int64_t bytes = (f.length + 7) / 8, plane = f.rows * bytes;
  over_pieces(f, [&](int64_t row, int64_t first, int64_t count) {
    const uint8_t* from = static_cast<const uint8_t*>(f.from) + row * bytes + first / 8;
    E* to = static_cast<E*>(f.to) + row * f.length + first;
    E tail[eight];
    for (int64_t j = 0; j < count; j += eight) {
      const bool whole = j + eight <= count;
      E* target = whole ? to + j : tail;
      uint32_t bits[planes] = {};
      for (int k = 0; k < planes; ++k)
        for (int64_t byte = 0; byte < eight / 8 && j / 8 + byte < (count + 7) / 8; ++byte)
          bits[k] |= static_cast<uint32_t>(from[k * plane + j / 8 + byte]) << (8 * byte);
#pragma GCC unroll 4
      for (int64_t part = 0; part < eight / lanes; ++part) {
        Codes<S> code{};
#pragma GCC unroll 4
        for (int k = 0; k < planes; ++k) code |= mask_of_bits<S>(bits[k] >> (part * lanes)) & (1 << k);
        store_as<false>(target + part * lanes, value_of_code<S, planes>(code));
      }
      if (!whole) std::copy_n(tail, count - j, to + j);
    }
  });
}

template <class F>
auto with_planes(const Planes& f, const F& run) {
  switch (f.planes) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    default: return run(std::integral_constant<int, 4>{});
  }
}

}  // namespace

bool pack(const Planes& f) {
  bool good = true;
  with_element(f.dtype, [&](auto e) {
    with_planes(f, [&](auto planes) { good = run_pack<decltype(e), planes.value>(f); });
  });
  return good;
}

void unpack(const Planes& f) {
  with_element(f.dtype, [&](auto e) {
    with_planes(f, [&](auto planes) { run_unpack<decltype(e), planes.value>(f); });
  });
}

}  // namespace pyaccel::neuron::PYACCEL_ISA
