// Arrays with guards, random cases and comparisons for the simulator's tests.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#endif

#include "../../core/cuda_vector.h"
#include "../../neuron/neuron.h"

namespace check {

inline int failures = 0;
inline std::string context;  // what is being tested

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s: %s\n", context.c_str(), what.c_str());
}

inline std::mt19937_64 random_bits(20240607);
inline int pick(int below) {
  return static_cast<int>(random_bits() % static_cast<uint64_t>(below));
}
inline bool coin() {
  return pick(2) == 1;
}
template <class T, size_t n>
T one_of(const T (&list)[n]) {
  return list[pick(static_cast<int>(n))];
}
inline double normal() {
  static std::normal_distribution<double> distribution;
  return distribution(random_bits);
}

// Device memory of a test: filled with NaN patterns, guarded on both sides (against reading too, with
// -fsanitize=address); `shifted` moves it off 16-byte alignment.
template <class T>
class Array {
 public:
  explicit Array(int64_t count, bool shifted = false) : count_(count), skip_(shifted ? sizeof(T) : 0) {
    bytes_.assign(static_cast<size_t>(count) * sizeof(T) + 2 * kGuard + skip_ + 16, 0xff);
    base_ = bytes_.data() + kGuard;
    while (reinterpret_cast<uintptr_t>(base_) % 16 != 0) ++base_;
    base_ += skip_;
    unsigned char* end = base_ + static_cast<size_t>(count_) * sizeof(T);
    ASAN_POISON_MEMORY_REGION(bytes_.data(), static_cast<size_t>(base_ - bytes_.data()));
    ASAN_POISON_MEMORY_REGION(end, static_cast<size_t>(bytes_.data() + bytes_.size() - end));
  }
  ~Array() {
    ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size());
    const unsigned char* end = base_ + static_cast<size_t>(count_) * sizeof(T);
    bool clean = true;
    for (const unsigned char* p = bytes_.data(); p < base_; ++p) clean &= *p == 0xff;
    for (const unsigned char* p = end; p < bytes_.data() + bytes_.size(); ++p) clean &= *p == 0xff;
    expect(clean, "write outside an array");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() { return reinterpret_cast<T*>(base_); }
  const T* data() const { return reinterpret_cast<const T*>(base_); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  static constexpr size_t kGuard = 64;
  int64_t count_;
  size_t skip_;
  std::vector<unsigned char> bytes_;
  unsigned char* base_ = nullptr;
};

template <class T>
void fill_normal(Array<T>& a, double mean, double deviation) {
  for (int64_t i = 0; i < a.size(); ++i)
    a[i] = pyaccel::cuda::from_state<T>(static_cast<pyaccel::cuda::State<T>>(mean + deviation * normal()));
}

// Relative to the value, or to the largest (or 1) where terms cancel.
struct Tolerance {
  double relative, of_largest;
};
template <class T>
Tolerance tolerance() {
  if (sizeof(T) == 8) return {1e-12, 1e-13};
  if (sizeof(T) == 4) return {2e-5, 2e-6};
  return std::is_same_v<T, __half> ? Tolerance{1e-3, 1e-5} : Tolerance{8e-3, 1e-5};
}

// Counts the elements that differ: a test may demand more than none.
template <class T>
int64_t differing(const Array<T>& got, const std::vector<double>& want, Tolerance limit) {
  double largest = 1;  // what the tests draw is of this size: single values cancel
  for (const double w : want) largest = std::max(largest, std::fabs(w));
  int64_t count = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double w = want[static_cast<size_t>(i)], g = static_cast<double>(pyaccel::cuda::to_state(got[i]));
    if (!(std::fabs(g - w) <= limit.relative * std::fabs(w) + limit.of_largest * largest)) ++count;
  }
  return count;
}
template <class T>
void expect_close(const Array<T>& got, const std::vector<double>& want, Tolerance limit, const std::string& what) {
  const int64_t count = differing(got, want, limit);
  expect(count == 0, what + ": " + std::to_string(count) + " of " + std::to_string(got.size()) + " differ");
}
template <class T>
void expect_equal(const Array<T>& got, const std::vector<T>& want, const std::string& what) {
  int64_t count = 0;
  for (int64_t i = 0; i < got.size(); ++i) count += std::memcmp(&got[i], &want[static_cast<size_t>(i)], sizeof(T)) != 0;
  expect(count == 0, what + ": " + std::to_string(count) + " of " + std::to_string(got.size()) + " differ in bits");
}

template <class T>
constexpr pyaccel::Dtype dtype_of() {
  if constexpr (std::is_same_v<T, double>) return pyaccel::Dtype::f64;
  else if constexpr (std::is_same_v<T, float>) return pyaccel::Dtype::f32;
  else if constexpr (std::is_same_v<T, __half>) return pyaccel::Dtype::f16;
  else return pyaccel::Dtype::bf16;
}

}  // namespace check
