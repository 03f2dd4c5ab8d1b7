// A serial stand-in for the CUDA runtime: with this folder first on the include path, g++ compiles the .cu files of
// csrc/ unchanged and their kernels run on the CPU, thread by thread (see cuda_sim_test.cpp).
//
// Each thread of a block is a fiber. Blocks run one after the other, threads in an order that `order` sets; a barrier
// or a shuffle hands over to the next thread. What this finds: wrong indices, missing barriers (results depend on the
// order), barriers and shuffles that not every thread reaches, misaligned wide accesses, shared memory that is read
// before it is written (filled with NaN patterns), written behind its end, or not asked for. What it cannot: speed, the
// memory model.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int __clz(int v) {
  return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v));
}

namespace sim {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

enum class Order { forward, backward, shuffled };
inline Order order = Order::forward;
inline bool record_only = false;  // launches are counted, not run
inline int launches = 0;

enum class State { ready, barrier, exchange, done };
struct Fiber {
  jmp_buf resume;
  std::unique_ptr<char[]> stack;  // null: has not run yet
  State state = State::done;
  uint64_t sent[2] = {};  // to the other lanes, two exchanges in turn
  unsigned exchanges = 0;
  int lane_mask = 0;
};
constexpr size_t kStack = 128 * 1024, kShared = 163 * 1024, kGuard = 4096;
inline std::vector<Fiber> fibers(1024);
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::map<const void*, int> allowed_shared;

// Back to the scheduler, until it is this thread's turn again. (swapcontext would do, at two system calls a switch.)
inline void wait(State state) {
  Fiber& me = fibers[threadIdx.x];
  me.state = state;
  if (_setjmp(me.resume) == 0) _longjmp(scheduler, 1);
}

inline void live() {
  while (true) {  // one block after the other
    body();
    wait(State::done);
  }
}

inline void take_turn(Fiber& f) {
  if (_setjmp(scheduler) != 0) return;
  if (f.stack != nullptr) _longjmp(f.resume, 1);
  f.stack = std::make_unique<char[]>(kStack);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// In which order the threads of a block have their turn.
inline void arrange(std::vector<unsigned>& sequence) {
  static std::mt19937 random(7);
  const unsigned threads = static_cast<unsigned>(sequence.size());
  for (unsigned i = 0; i < threads; ++i) sequence[i] = order == Order::backward ? threads - 1 - i : i;
  if (order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), random);
}

inline void run_block(unsigned threads) {
  std::vector<unsigned> sequence(threads);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].state = State::ready;
    fibers[i].exchanges = 0;
  }
  while (true) {
    arrange(sequence);
    bool ran = false;
    for (const unsigned i : sequence) {
      if (fibers[i].state != State::ready) continue;
      threadIdx.x = i;
      take_turn(fibers[i]);
      ran = true;
    }
    unsigned done = 0, at_barrier = 0;
    for (unsigned i = 0; i < threads; ++i) {
      done += fibers[i].state == State::done;
      at_barrier += fibers[i].state == State::barrier;
    }
    if (done == threads) return;
    if (at_barrier == threads) {
      for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::ready;
      continue;
    }
    for (unsigned warp = 0; warp < threads; warp += 32) {
      unsigned ready = 0;
      for (unsigned i = warp; i < warp + 32 && i < threads; ++i)
        ready += fibers[i].state == State::exchange && fibers[i].lane_mask == fibers[warp].lane_mask &&
                 fibers[i].exchanges == fibers[warp].exchanges;
      if (ready != 32) continue;
      for (unsigned i = warp; i < warp + 32; ++i) fibers[i].state = State::ready;
      ran = true;
    }
    if (!ran) fail("a barrier or a shuffle is not reached by every thread");
  }
}

}  // namespace sim

inline void __syncthreads() {
  sim::wait(sim::State::barrier);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) sim::fail("shuffle without the whole warp");
  sim::Fiber& me = sim::fibers[threadIdx.x];
  const unsigned turn = me.exchanges % 2;
  std::memcpy(&me.sent[turn], &value, sizeof(T));
  ++me.exchanges;
  me.lane_mask = lane_mask;
  sim::wait(sim::State::exchange);
  const unsigned other = threadIdx.x ^ static_cast<unsigned>(lane_mask);
  std::memcpy(&value, &sim::fibers[other].sent[turn], sizeof(T));
  return value;
}

template <class T>
const T* sim_checked(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) sim::fail("misaligned access");
  return p;
}
template <class T>
T __ldcs(const T* p) {
  return *sim_checked(p);
}
template <class T>
T __ldg(const T* p) {
  return *sim_checked(p);
}
template <class T>
void __stcs(T* p, const T& value) {
  *const_cast<T*>(sim_checked(p)) = value;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
namespace sim {
inline cudaError_t last_error = cudaSuccess;
inline int device = 0;
char* shared_memory();  // of the block: see simulator.h
}  // namespace sim
inline cudaError_t cudaGetLastError() {
  return std::exchange(sim::last_error, cudaSuccess);
}
inline const char* cudaGetErrorName(cudaError_t) {
  return "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = sim::device, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return sim::device = device, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > static_cast<int>(sim::kShared)) return cudaErrorInvalidValue;
  sim::allowed_shared[kernel] = value;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = config->blockDim.x;
  const int shared = static_cast<int>(config->dynamicSmemBytes);
  const auto found = sim::allowed_shared.find(reinterpret_cast<const void*>(kernel));
  const int limit = found == sim::allowed_shared.end() ? 48 * 1024 : found->second;
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || config->gridDim.x == 0 || shared > limit)
    return sim::last_error = cudaErrorInvalidValue;
  ++sim::launches;
  if (sim::record_only) return cudaSuccess;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  sim::body = [&] { kernel(Parameters(arguments)...); };
  char* memory = sim::shared_memory();
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = block;
    std::memset(memory, 0xff, static_cast<size_t>(shared) + sim::kGuard);  // NaN in every type
    sim::run_block(threads);
    for (size_t i = 0; i < sim::kGuard; ++i)
      if (static_cast<unsigned char>(memory[static_cast<size_t>(shared) + i]) != 0xff)
        sim::fail("write behind the shared memory asked for");
  }
  return cudaSuccess;
}
