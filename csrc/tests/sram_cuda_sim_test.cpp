// The bit-failure kernels for CUDA, their source unchanged, on the simulator of cuda_sim/, against the CPU kernels: every
// bit must agree. Random cases over widths, modes, sizes, alignments, first words and probabilities, threads in three
// orders; then a negative control.
//   g++ -std=c++20 -O1 -fopenmp -ffp-contract=off -Wno-unknown-pragmas -Wno-psabi -DPYACCEL_ISA=baseline
//       -DPYACCEL_VECTOR_BYTES=16 -Icsrc/tests/cuda_sim csrc/tests/sram_cuda_sim_test.cpp csrc/sram/*_cpu.cpp csrc/core/scratch.cpp
#include <cuda_runtime.h>

// Fibers never run at once, so an atomic is the plain operation.
inline unsigned atomicAdd(unsigned* at, unsigned v) { return std::exchange(*at, *at + v); }
inline unsigned atomicOr(unsigned* at, unsigned v) { return std::exchange(*at, *at | v); }
inline unsigned atomicAnd(unsigned* at, unsigned v) { return std::exchange(*at, *at & v); }
inline unsigned atomicXor(unsigned* at, unsigned v) { return std::exchange(*at, *at ^ v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
#define __grid_constant__

#include <string>

#include "../core/cuda_launch.h"
#include "../core/cuda_vector.h"
#include "../sram/kernels_cpu.h"
#undef __shared__
#define __shared__ static  // of the block: blocks run one after the other
#include "../sram/sram_cuda.cu"
#include "cuda_sim/simulator.h"

namespace {

using namespace pyaccel;
using namespace pyaccel::sram;

std::mt19937_64 random_bits(11);
uint64_t pick(uint64_t below) { return random_bits() % below; }

// The table of the specification in long double: this test compares two users of one table, so its last unit is free.
std::vector<uint32_t> counts(double p, int block) {
  std::vector<uint32_t> table;
  long double term = powl(1.0L - p, block), total = 0;
  for (int c = 0; c <= block; ++c) {
    total += term;
    const long double scaled = floorl(total * 4294967296.0L);
    table.push_back(scaled >= 4294967295.0L ? 0xffffffffu : static_cast<uint32_t>(scaled));
    if (table.back() == 0xffffffffu) return table;
    term *= (block - c) * static_cast<long double>(p) / ((c + 1) * (1.0L - p));
  }
  table.back() = 0xffffffffu;
  return table;
}

Plan random_plan(int word_bits, bool sparse) {
  static const double probabilities[] = {0, 1.0 / 256, 0.5, 0.1, 0.03, 0.01, 1e-3, 1e-4};
  Plan plan;
  plan.word_bits = word_bits;
  plan.sparse = sparse;
  for (int b = 0; b < word_bits; ++b) {
    const double p = !sparse && pick(12) == 0 ? 1.0 : probabilities[pick(8)] * (pick(2) ? 1 : 0.77);
    plan.planes[b].threshold = static_cast<uint64_t>(std::llround(p * 4294967296.0));
    int log2 = 6;
    while (log2 < 12 && p * (1 << log2) < 2) ++log2;
    plan.planes[b].block_log2 = log2;
    if (sparse && p > 0) plan.planes[b].counts = counts(p, 1 << log2);
  }
  return plan;
}

uint64_t random_first(int word_bits) {
  const uint64_t far[] = {0, 8, 4096, 12345, (uint64_t{1} << 36) / static_cast<uint64_t>(word_bits) - 1000, uint64_t{1} << 50};
  return far[pick(6)] + (pick(2) ? pick(77) : 0);
}

int failures = 0;
void expect(bool good, const std::string& what) {
  if (good) return;
  if (++failures < 10) std::fprintf(stderr, "differs: %s\n", what.c_str());
}

void flip_case() {
  static const int widths[] = {1, 2, 4, 8, 16, 32};
  static const int64_t sizes[] = {4, 8, 60, 2032, 2048, 2052, 9000, 33000};
  const int width = widths[pick(6)];
  const Plan plan = random_plan(width, pick(2));
  const int64_t bytes = sizes[pick(8)] + (width <= 8 ? static_cast<int64_t>(pick(4)) : 0);
  const size_t offset = pick(3) ? 0 : 1 + pick(3);
  Flip f{{&plan, random_bits(), static_cast<uint32_t>(random_bits()), random_first(width)}, pick(2) == 0, bytes};
  std::vector<uint64_t> cpu(static_cast<size_t>(bytes) / 8 + 3), gpu(cpu.size()), in(cpu.size());
  for (auto& word : in) word = random_bits();
  cpu = gpu = in;
  const bool in_place = pick(2);
  const auto at = [&](std::vector<uint64_t>& v) { return reinterpret_cast<uint8_t*>(v.data()) + offset; };
  f.in = at(in);
  f.out = at(cpu);
  sram::baseline::flip(f);
  if (in_place) f.in = at(gpu);
  f.out = at(gpu);
  sram::cuda::flip(f, 0, nullptr);
  expect(cpu == gpu, "flip W=" + std::to_string(width) + " sparse=" + std::to_string(plan.sparse) + " stuck=" + std::to_string(f.stuck) +
                         " bytes=" + std::to_string(bytes) + " offset=" + std::to_string(offset) + " first=" + std::to_string(f.draws.first_word));
}

template <class T>
void noise_case(Dtype dtype) {
  static const int widths[] = {1, 2, 4, 8, 16};
  static const int64_t sizes[] = {1, 7, 1000, 2048, 9001, 40000};
  const int width = widths[pick(5)];
  const Plan plan = random_plan(width, pick(2));
  Noise f{{&plan, random_bits(), static_cast<uint32_t>(random_bits()), random_first(width)}, dtype, width > 1 && pick(2) == 0, sizes[pick(6)]};
  std::normal_distribution<double> normal(0, 3);
  std::vector<T> x(static_cast<size_t>(f.elements)), cpu(x), gpu(x), grad(x);
  for (auto& v : x) v = static_cast<T>(normal(random_bits));
  for (auto& v : grad) v = static_cast<T>(normal(random_bits));
  x[0] = static_cast<T>(NAN);
  T scale = static_cast<T>(6.0 / f.high());
  f.scale = static_cast<double>(scale);
  if (pick(2)) f.scale_data = &scale;
  f.x = x.data();
  f.y = cpu.data();
  sram::baseline::noise(f);
  f.y = gpu.data();
  sram::cuda::noise(f, 0, nullptr);
  const std::string what = " W=" + std::to_string(width) + " sparse=" + std::to_string(plan.sparse) + " n=" + std::to_string(f.elements);
  expect(cpu == gpu, "noise" + what);
  NoiseBackward b{dtype, f.low(), f.high(), f.elements, f.scale_data, f.scale, x.data(), grad.data(), cpu.data()};
  sram::baseline::noise_backward(b);
  b.grad_x = gpu.data();
  sram::cuda::noise_backward(b, 0, nullptr);
  expect(cpu == gpu, "noise_backward" + what);
}

}  // namespace

int main() {
  for (const sim::Order order : {sim::Order::forward, sim::Order::backward, sim::Order::shuffled}) {
    sim::order = order;
    for (int n = 0; n < 60; ++n) flip_case();
    for (int n = 0; n < 25; ++n) noise_case<float>(Dtype::f32);
    for (int n = 0; n < 10; ++n) noise_case<double>(Dtype::f64);
  }
  if (failures > 0) return std::fprintf(stderr, "%d cases differ\n", failures), 1;
  // The comparison can fail: another seed gives other bits.
  const Plan plan = [] {
    Plan p = random_plan(8, false);
    for (auto& plane : p.planes) plane.threshold = uint64_t{1} << 30;
    return p;
  }();
  std::vector<uint8_t> zeros(4096), a(4096), b(4096);
  sram::baseline::flip({{&plan, 1, 0, 0}, false, 4096, zeros.data(), a.data()});
  sram::cuda::flip({{&plan, 2, 0, 0}, false, 4096, zeros.data(), b.data()}, 0, nullptr);
  expect(a != b, "the negative control");
  std::puts(failures == 0 ? "ok" : "the negative control did not differ");
  return failures;
}
