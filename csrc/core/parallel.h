// One parallel loop for every CPU kernel, on the OpenMP pool that torch uses too (same libgomp, see docs).
#pragma once
#include <omp.h>

#include <cstdint>

namespace pyaccel {

// Work below this many bytes is not worth waking a thread.
constexpr int64_t kBytesPerThread = 128 * 1024;

inline __attribute__((always_inline)) int threads_for(int64_t bytes, int64_t pieces) {
  int64_t threads = omp_get_max_threads();
  if (threads > bytes / kBytesPerThread + 1) threads = bytes / kBytesPerThread + 1;
  if (threads > pieces) threads = pieces;
  return threads < 1 ? 1 : static_cast<int>(threads);
}

// body(first, last, thread) over contiguous shares of 0..pieces; which thread does what never changes a result.
template <class Body>
inline __attribute__((always_inline)) void parallel_shares(int64_t pieces, int threads, const Body& body) {
  if (threads <= 1) {
    body(int64_t{0}, pieces, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), k = omp_get_thread_num();
    body(pieces * k / n, pieces * (k + 1) / n, static_cast<int>(k));
  }
}

}  // namespace pyaccel
