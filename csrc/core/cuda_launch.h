// Launching CUDA kernels: the tensor's device, checked launches, shared memory above 48 KB.
// Kernels never allocate: scratch comes from the caller, so every launch may be captured in a CUDA graph.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pyaccel::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no error behind for the next caller, unless it is sticky
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

// After a launch: turns a refused launch, or a fault of an earlier kernel, into an exception that names `kernel`.
inline void launch_check(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

// Makes `device` current and restores the caller's device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Where kernels go. The device must be current: see DeviceGuard.
struct Queue {
  int device = 0;
  void* stream = nullptr;
};

constexpr int kPlainShared = 48 * 1024;     // what every kernel may use
constexpr int kLargestShared = 163 * 1024;  // what a block of every target (sm_80 and later data-centre parts) may use

// A block may use more than 48 KB of dynamic shared memory only after its kernel has been told so, once a device.
// After the first use no CUDA call remains here, so a warmed-up kernel can be captured.
inline void allow_shared(const void* kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& known = allowed[{kernel, device}];
  if (known >= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  // Several blocks must fit side by side, or too few bytes are in flight: shared memory first, cache second.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), "cudaFuncSetAttribute");
  known = bytes;
}

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  int shared = 0;  // bytes of dynamic shared memory
};

// Starts `kernel` and checks the launch. `name` is what an error calls it. An empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Queue& queue,
            Arguments&&... arguments) {
  if (grid.blocks <= 0) return;
  if (grid.blocks > INT32_MAX)
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(grid.blocks) +
                                " blocks, more than one launch may have; split the batch");
  if (grid.shared > kPlainShared) allow_shared(reinterpret_cast<const void*>(kernel), queue.device, grid.shared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
  launch_check(name);
}

}  // namespace pyaccel::cuda
