// The effective conductance matrix of crossbar tiles and its gradient on CUDA (contract: crossbar.h).
//
// One block a tile at a time, all of it in float64: block_ladder.h, whose phases a test runs on the CPU in shuffled order.
// [Y | J] and the panels live in shared memory where they fit (up to 64 x 64: 86 KB, two blocks a multiprocessor of an
// H100), else in the block's scratch (L2). Version 1, never run: about 10 barriers and 3,000 cycles a panel, bound by shared
// memory in the rank-8 update (4 x 4 elements an item); predicted 50 to 70 ms for the 7,200 tiles of VGG16 on an H200.
// Next: registers for [Y | J] and DMMA for the update, which is 20 to 30 ms on paper.
#include <algorithm>

#include "../core/cuda_launch.h"
#include "block_ladder.h"
#include "crossbar_cuda.h"

namespace pyaccel::crossbar::cuda {

using namespace ::pyaccel::cuda;
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 264;                      // two a multiprocessor of the largest present card
constexpr int64_t kMostScratch = int64_t{1} << 30;

struct ThreadBlock {
  template <class F>
  __device__ __forceinline__ void each(int64_t count, const F& f) {
    // 32-bit counting: a phase of a tile has far fewer than 2^31 items (checked on the host)
    for (int e = static_cast<int>(threadIdx.x); e < static_cast<int>(count); e += kThreads) f(static_cast<int64_t>(e));
    __syncthreads();
  }
};

struct Where {
  TileView view;
  BlockSizes size;
  int64_t tiles, cells;
  double* scratch;
  int64_t per_block;  // doubles
  bool shared;        // whether `fast` is in shared memory
};

template <class E>
__global__ void __launch_bounds__(kThreads, 2) matrix_kernel(const Where w, const E* conductance, E* effective) {
  extern __shared__ double memory[];
  __shared__ int fault;
  ThreadBlock block;
  double* bulk = w.scratch + blockIdx.x * w.per_block;
  double* fast = w.shared ? memory : bulk + w.size.bulk;
  const BlockLadder<ThreadBlock, E> ladder(block, w.view, w.size, fast, bulk, &fault);
  for (int64_t t = blockIdx.x; t < w.tiles; t += gridDim.x) ladder.solve(conductance + t * w.cells, effective + t * w.cells);
}

template <class E>
__global__ void __launch_bounds__(kThreads, 1)  // its shared memory leaves no room for a second block at 64 x 64
    gradient_kernel(const Where w, const E* conductance, const E* grad_effective, E* grad_conductance) {
  extern __shared__ double memory[];
  __shared__ int fault;
  ThreadBlock block;
  double* bulk = w.scratch + blockIdx.x * w.per_block;
  double* fast = w.shared ? memory : bulk + w.size.bulk;
  const BlockLadder<ThreadBlock, E> ladder(block, w.view, w.size, fast, bulk, &fault);
  for (int64_t t = blockIdx.x; t < w.tiles; t += gridDim.x)
    ladder.gradient(conductance + t * w.cells, grad_effective + t * w.cells, grad_conductance + t * w.cells);
}

Where where(const Tiles& tiles, const Resistances& ohm, bool gradient, void* scratch) {
  const TileView view = view_of(tiles, ohm);
  const BlockSizes size(view, gradient);
  const bool shared = size.fast * int64_t{8} <= kLargestShared;
  return {view, size, tiles.count, tiles.rows * tiles.columns, static_cast<double*>(scratch),
          size.bulk + (shared ? 0 : size.fast), shared};
}

Grid grid_of(const Where& w, int64_t bytes) {
  const int64_t blocks = std::min(w.tiles, bytes / (w.per_block * 8));
  if (blocks < 1) throw std::invalid_argument("crossbar_matrix: too little scratch for one tile");
  if (w.size.n * w.size.ld > INT32_MAX / 2)
    throw std::invalid_argument("crossbar_matrix: tiles are too large for the CUDA kernel; use smaller tiles");
  return {blocks, kThreads, w.shared ? static_cast<int>(w.size.fast * 8) : 0};
}

}  // namespace

int64_t scratch_bytes_of_a_block(const Tiles& tiles, const Resistances& ohm, bool gradient) {
  return where(tiles, ohm, gradient, nullptr).per_block * 8;
}

int64_t scratch_bytes(const Tiles& tiles, const Resistances& ohm, bool gradient) {
  const int64_t one = scratch_bytes_of_a_block(tiles, ohm, gradient);
  return one * std::max<int64_t>(1, std::min({tiles.count, kBlocks, kMostScratch / one}));
}

void matrix(const Matrix& f, void* scratch, int64_t bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  const Where w = where(f.tiles, f.ohm, false, scratch);
  const Grid grid = grid_of(w, bytes);
  if (f.tiles.dtype == Dtype::f64)
    launch("crossbar_matrix", matrix_kernel<double>, grid, {device, stream}, w, static_cast<const double*>(f.conductance),
           static_cast<double*>(f.effective));
  else
    launch("crossbar_matrix", matrix_kernel<float>, grid, {device, stream}, w, static_cast<const float*>(f.conductance),
           static_cast<float*>(f.effective));
}

void matrix_gradient(const MatrixGradient& f, void* scratch, int64_t bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  const Where w = where(f.tiles, f.ohm, true, scratch);
  const Grid grid = grid_of(w, bytes);
  if (f.tiles.dtype == Dtype::f64)
    launch("crossbar_matrix_backward", gradient_kernel<double>, grid, {device, stream}, w,
           static_cast<const double*>(f.conductance), static_cast<const double*>(f.grad_effective),
           static_cast<double*>(f.grad_conductance));
  else
    launch("crossbar_matrix_backward", gradient_kernel<float>, grid, {device, stream}, w,
           static_cast<const float*>(f.conductance), static_cast<const float*>(f.grad_effective),
           static_cast<float*>(f.grad_conductance));
}

}  // namespace pyaccel::crossbar::cuda
