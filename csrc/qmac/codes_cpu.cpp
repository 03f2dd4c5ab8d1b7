// Codes on the CPU: pack, unpack, quantise, dequantise, the signed form that the library's product wants (contracts:
// qmac.h). All bound by memory: eight codes a 64-bit word, or one SIMD vector of floats at a time.
#include <algorithm>

#include "../core/parallel.h"
#include "kernels_cpu.h"
#include "rows_cpu.h"

namespace pyaccel::qmac::PYACCEL_ISA {
namespace {

// Returns the OR of all codes, so that one test tells whether any was out of range.
template <int bits>
uint64_t pack_row(const uint8_t* from, int64_t length, uint8_t* to, int64_t row_bytes) {
  uint64_t seen = 0;
  int64_t j = 0, at = 0;
  if constexpr (bits == 8) {
    memcpy(to, from, static_cast<size_t>(length));
    at = length;
  } else {
    for (; j + 8 <= length; j += 8, at += bits) {
      const uint64_t x = load_any<uint64_t>(from + j);
      seen |= x;
      const uint64_t packed = gather<bits>(x);
      memcpy(to + at, &packed, bits);
    }
    if (j < length) {
      uint64_t x = 0;
      memcpy(&x, from + j, static_cast<size_t>(length - j));
      seen |= x;
      const uint64_t packed = gather<bits>(x);
      const int64_t rest = std::min<int64_t>(bits, row_bytes - at);
      memcpy(to + at, &packed, static_cast<size_t>(rest));
      at += rest;
    }
  }
  memset(to + at, 0, static_cast<size_t>(row_bytes - at));
  return seen & ~repeat((1ull << bits) - 1, 8);
}

uint64_t pack_wide_row(const int32_t* from, int64_t length, uint8_t* to, int64_t row_bytes) {
  uint64_t seen = 0;
  for (int64_t j = 0; j < length; ++j) {
    seen |= static_cast<uint32_t>(from[j]);
    const uint16_t code = static_cast<uint16_t>(from[j]);
    memcpy(to + 2 * j, &code, 2);
  }
  memset(to + 2 * length, 0, static_cast<size_t>(row_bytes - 2 * length));
  return seen & ~uint64_t{0xffff};
}

}  // namespace

void pack(Pack& p) {
  const int64_t row_bytes = 4 * words_of(p.length, p.bits);
  bool good = true;
#pragma omp parallel for reduction(&& : good) num_threads(threads_for(p.rows * p.length, p.rows)) schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    uint8_t* to = reinterpret_cast<uint8_t*>(p.words) + r * row_bytes;
    const uint8_t* from = static_cast<const uint8_t*>(p.codes) + r * p.length;
    uint64_t outside;
    switch (p.bits) {
      case 1: outside = pack_row<1>(from, p.length, to, row_bytes); break;
      case 2: outside = pack_row<2>(from, p.length, to, row_bytes); break;
      case 4: outside = pack_row<4>(from, p.length, to, row_bytes); break;
      case 8: outside = pack_row<8>(from, p.length, to, row_bytes) & 0; break;
      default: outside = pack_wide_row(static_cast<const int32_t*>(p.codes) + r * p.length, p.length, to, row_bytes);
    }
    good = good && outside == 0;
  }
  p.in_range = good;
}

void unpack(const Pack& p) {
  const int64_t row_words = words_of(p.length, p.bits);
  parallel_shares(p.rows, threads_for(p.rows * p.length, p.rows), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.words + r * row_words);
      if (p.bits == 16) {
        int32_t* to = static_cast<int32_t*>(p.codes) + r * p.length;
        for (int64_t j = 0; j < p.length; ++j) to[j] = load_any<uint16_t>(from + 2 * j);
        continue;
      }
      uint8_t* to = static_cast<uint8_t*>(p.codes) + r * p.length;
      const int64_t whole = p.bits == 8 ? p.length : p.length / 8 * 8;
      spread_row(p.bits, from, whole, to);
      if (whole < p.length) {
        uint8_t rest[8];
        spread_row(p.bits, from + whole / 8 * p.bits, p.length - whole, rest);
        memcpy(to + whole, rest, static_cast<size_t>(p.length - whole));
      }
    }
  });
}

void quantize(const Quantize& f) {
  constexpr float magic = 8388608.0f;  // 2^23: adding it rounds a number in 0..2^16 to an integer, half to even
  const auto code_of = [&](auto x) PYACCEL_LAMBDA_INLINE {
    using V = decltype(x);
    const V zero{}, top = zero + f.levels, scaled = x / f.scale;
    V v = scaled > zero ? scaled : zero;  // NaN compares false: 0
    v = v < top ? v : top;
    return (v + magic) - magic;
  };
  parallel_shares(f.count, threads_for(4 * f.count, f.count), [&](int64_t begin, int64_t end, int) {
    int64_t i = begin;
    for (; i + kInts <= end; i += kInts) {
      const Ints code = __builtin_convertvector(code_of(load_vec(f.x + i)), Ints);
      if (f.wide) {
        store_any(static_cast<int32_t*>(f.codes) + i, code);
      } else {
        typedef uint8_t Narrow __attribute__((vector_size(kInts)));
        store_any(static_cast<uint8_t*>(f.codes) + i, __builtin_convertvector(code, Narrow));
      }
    }
    for (; i < end; ++i) {
      const int32_t code = static_cast<int32_t>(code_of(f.x[i]));
      if (f.wide) static_cast<int32_t*>(f.codes)[i] = code;
      else static_cast<uint8_t*>(f.codes)[i] = static_cast<uint8_t>(code);
    }
  });
}

namespace {

template <class T>
void dequantize_as(const Dequantize& f) {
  constexpr int kLanes = kBytes / 8;
  typedef T Sums __attribute__((vector_size(kLanes * sizeof(T))));
  typedef double Doubles __attribute__((vector_size(kBytes)));
  typedef float Floats __attribute__((vector_size(kBytes / 2)));
  const int64_t group = f.outputs / std::max<int64_t>(f.groups, 1);
  const bool rows = f.inner == 1;  // P [batch, outputs], Q [batch]: the lanes run over the outputs
  const int64_t pieces = rows ? f.batch : f.batch * f.outputs, length = rows ? f.outputs : f.inner;
  parallel_shares(pieces, threads_for(8 * pieces * length, pieces), [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const T* p = static_cast<const T*>(f.p) + piece * length;
      const T* q = static_cast<const T*>(f.q);
      float* y = f.y + piece * length;
      const int64_t b = rows ? piece : piece / f.outputs, o = rows ? 0 : piece % f.outputs;
      const int64_t start = rows ? b * f.groups : (b * f.groups + o / group) * length;
      const auto value = [&](int64_t i) PYACCEL_LAMBDA_INLINE {
        const T sum_q = rows ? q[start + i / group] : q[start + i];
        double v = f.p_scale * static_cast<double>(p[i]) + f.q_scale * static_cast<double>(sum_q);
        if (f.bias != nullptr) v += static_cast<double>(f.bias[rows ? i : o]);
        return static_cast<float>(v);
      };
      int64_t i = 0;
      if (!rows || f.groups == 1) {
        for (; i + kLanes <= length; i += kLanes) {
          Doubles sum_q;
          if (rows) sum_q = Doubles{} + static_cast<double>(q[start]);
          else sum_q = __builtin_convertvector(load_any<Sums>(q + start + i), Doubles);
          Doubles v = f.p_scale * __builtin_convertvector(load_any<Sums>(p + i), Doubles) + f.q_scale * sum_q;
          if (f.bias != nullptr) {
            if (rows) v += __builtin_convertvector(load_any<Floats>(f.bias + i), Doubles);
            else v += static_cast<double>(f.bias[o]);
          }
          store_any(y + i, __builtin_convertvector(v, Floats));
        }
      }
      for (; i < length; ++i) y[i] = value(i);
    }
  });
}

}  // namespace

void dequantize(const Dequantize& f) {
  if (f.sum_bytes == 4) dequantize_as<int32_t>(f);
  else dequantize_as<int64_t>(f);
}

void to_signed(const Signed& f) {
  const int64_t row_words = words_of(f.length, 8);
  parallel_shares(f.rows, threads_for(f.rows * f.length, f.rows), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(f.words + r * row_words);
      uint8_t* to = reinterpret_cast<uint8_t*>(f.codes) + r * f.length;
      f.sums[r] = static_cast<int32_t>(sum_bytes(from, f.length));
      int64_t j = 0;
      for (; j + kBytes <= f.length; j += kBytes) store_any(to + j, load_any<Bytes>(from + j) ^ 0x80);
      for (; j < f.length; ++j) to[j] = from[j] ^ 0x80;
    }
  });
}

}  // namespace pyaccel::qmac::PYACCEL_ISA
