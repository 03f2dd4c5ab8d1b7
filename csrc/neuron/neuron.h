// The neuron family: what each kernel computes and what it is given. Plain data, borrowed pointers, no torch.
//
// A sequence is T rows of N neurons; row t starts at t * N, in the memory order of one step (contiguous or
// channels-last alike). Values are float32, float64, float16 or bfloat16; neuron state, statistics and parameter
// gradients are float32 (float64 for float64 values): "state type" below.
// A channel of neuron n is (n / inner) % channels: inner = H*W for contiguous images, 1 for channels-last.
#pragma once
#include <cstdint>

#include "../core/dtype.h"
#include "../core/host_device.h"

namespace pyaccel::neuron {

enum class Reset : int32_t { soft, hard, none };
enum class Surrogate : int32_t { triangle, rectangle, atan, sigmoid, fast_sigmoid };

// leak and threshold: one value for all, or (pointer set) one value of the state type a channel.
struct Parameter {
  double value = 0;
  const void* per_channel = nullptr;
};

// One number, or (pointer set) where it lies in the memory of the device: a kernel then reads it, so that nobody waits
// for the device and a captured graph sees what is written there later.
struct Scalar {
  double value = 1;
  const double* data = nullptr;
  PYACCEL_HD double get() const { return data != nullptr ? *data : value; }
};

struct Neuron {
  Parameter leak, threshold;
  Reset reset = Reset::soft;
  bool detach_reset = true;  // no gradient through the reset
  bool delay = false;        // the delayed neuron of the hybrid-conversion paper (lif only)
  Surrogate surrogate = Surrogate::triangle;
  double scale = 0, width = 1;  // of the surrogate
};

struct Sequence {
  Dtype dtype;
  int64_t steps = 0;     // T
  int64_t neurons = 0;   // N
  int64_t channels = 1;  // for per-channel parameters; 1 where there are none
  int64_t inner = 1;
};

// Prompt neuron:  u[t] = leak*v[t-1] + x[t];  s[t] = u[t] > threshold;  v[t] = reset(u[t], s[t]).
// Delayed neuron: s[t] = u[t-1] > threshold;  u[t] = leak*u[t-1] + x[t] - threshold*s[t]
//                 (hard: u[t] = leak*u[t-1]*(1-s[t]) + x[t]). State: u.
// Floor: 8 bytes an element (float32), 4 (bfloat16): read x, write s. float32 results are bit-identical to
// reference.lif on every device and instruction set: no fused multiply-add, one rounding an operation.
// Where a fired neuron has infinite u, a soft reset leaves the infinity and a hard reset leaves NaN (inf * 0).
struct LifForward {
  Neuron neuron;
  Sequence sequence;
  const void* current = nullptr;   // [T, N]
  const void* membrane = nullptr;  // [N] state type, or null: zeros
  void* spikes = nullptr;          // [T, N] of the dtype; packed: [T, ceil(N / 8)] bytes, bit n%8 of byte n/8
  void* membrane_out = nullptr;    // [N]
  void* checkpoints = nullptr;     // [(T-1) / checkpoint_every, N]: the state before steps every, 2*every, ...
  int64_t checkpoint_every = 0;    // 0: none are kept
  bool packed = false;
};

// With delta[t] = dL/du[t], phi = ds/du (surrogate), A = 0 for a hard reset of a fired neuron, else 1:
// prompt:  dv = leak*delta[t+1] (grad_membrane at the end);  delta[t] = g*phi(u[t]) + A*dv
// delayed: delta[t-1] = g[t]*phi(u[t-1]) + leak*A*delta[t]
// not detached: g is reduced by what the reset takes (threshold or u, times the gradient of the state).
// u is recomputed from x (on chip); nothing else of size T*N is read. Floor: 12 bytes (6 in bfloat16):
// read x, read g, write gx.
struct LifBackward {
  Neuron neuron;
  Sequence sequence;
  const void* current = nullptr;
  const void* membrane = nullptr;
  const void* checkpoints = nullptr;
  int64_t checkpoint_every = 0;
  const void* grad_spikes = nullptr;    // [T, N] of the dtype, or null: zeros
  const void* grad_membrane = nullptr;  // [N] state type, or null: zeros
  void* grad_current = nullptr;         // [T, N]
  void* grad_membrane_in = nullptr;     // [N], or null where not wanted
  void* grad_leak = nullptr;            // [N] partial sums a neuron, or null
  void* grad_threshold = nullptr;       // [N], or null
};

// Batch normalisation through time, fused with a prompt LIF neuron (2010.01729):
// y[t] = weight[t,c] * (x[t] - mean[t,c]) / sqrt(var[t,c] + eps);  u[t] = leak*v[t-1] + y[t]; ...
// element ((t*outer + o)*channels + c)*inner + i; statistics over (o, i): biased variance.
struct BnttShape {
  Dtype dtype;
  int64_t steps = 0, outer = 0, channels = 0, inner = 0;
};

struct BnttForward {
  Neuron neuron;
  BnttShape shape;
  double eps = 0;
  const void* current = nullptr;
  const void* weight = nullptr;    // [T, C] state type
  const void* membrane = nullptr;  // [outer*channels*inner] state type, or null
  bool batch_statistics = true;    // true: mean and var are written; false: they are read
  void* mean = nullptr;            // [T, C] state type
  void* var = nullptr;             // [T, C]
  void* spikes = nullptr;
  void* membrane_out = nullptr;
  bool packed = false;  // spikes as bits in memory order, rows padded to bytes; see packs_in_place
};

// Whether the kernel can write packed spikes: the channels of a thread must start and end on whole bytes.
constexpr bool packs_in_place(const BnttShape& s) {
  return s.inner > 0 && (s.inner % 8 == 0 || (8 % s.inner == 0 && s.channels * s.inner % 8 == 0));
}

// Sums over (o, i): S1 = sum delta, S2 = sum delta*(x - mean).  dweight = S2 / sqrt(var + eps);
// batch statistics: gx = p*(delta - S1/n - (x - mean)*S2/(n*(var + eps))), p = weight / sqrt(var + eps); given: gx = p*delta.
// `sums_only` stops after S1 and S2 (written to sums[2, T, C]); `sums_given` reads them from there, with `count`
// elements behind each: between the two a caller may add the sums of other ranks.
enum class BnttPhase : int32_t { whole, sums_only, sums_given };

struct BnttBackward {
  Neuron neuron;
  BnttShape shape;
  double eps = 0;
  const void* current = nullptr;
  const void* weight = nullptr;
  const void* membrane = nullptr;
  bool batch_statistics = true;
  const void* mean = nullptr;
  const void* var = nullptr;
  const void* grad_spikes = nullptr;
  const void* grad_membrane = nullptr;
  BnttPhase phase = BnttPhase::whole;
  void* sums = nullptr;  // [2, T, C] state type: S1, S2 (phase whole: null)
  double count = 0;      // elements behind S1, S2 (sums_given)
  void* grad_current = nullptr;
  void* grad_weight = nullptr;       // [T, C]
  void* grad_membrane_in = nullptr;  // or null
  void* grad_leak = nullptr;         // [C], or null
  void* grad_threshold = nullptr;    // [C], or null
};

// Only the statistics: mean and biased variance [T, C].
struct BnttStatistics {
  BnttShape shape;
  const void* current = nullptr;
  void* mean = nullptr;
  void* var = nullptr;
};

// The delayed neuron with the spike-time surrogate (STDB, 2005.01807): ds/du = alpha * exp(-beta * since) / threshold,
// since = steps from the neuron's last spike to this step (999 + t while it has none). It depends on spike times alone:
// backward reads one bit a neuron-step and no membrane.
// `fp32_underflow`: alpha * exp(-since)^beta as the official code rounds it in float32: 0 from 104 on.
enum class StdbForm : int32_t { exact, fp32_underflow };

struct StdbForward {
  Sequence sequence;
  Scalar leak, threshold;
  const void* current = nullptr;
  const void* membrane = nullptr;  // or null: zeros
  const int32_t* since = nullptr;  // [N], or null: 999
  void* spikes = nullptr;
  void* membrane_out = nullptr;
  int32_t* since_out = nullptr;
  uint8_t* bits = nullptr;  // [T, ceil(N / 8)] spikes for backward, or null
};

// delta[T-1] = grad_membrane;  delta[t-1] = g[t]*phi[t] + leak*delta[t];  gx = delta.
struct StdbBackward {
  Sequence sequence;
  Scalar leak, threshold;
  double alpha = 0.3, beta = 0.01;
  StdbForm form = StdbForm::exact;
  const int32_t* since = nullptr;  // before the first step, or null: 999
  const uint8_t* bits = nullptr;
  const void* grad_spikes = nullptr;    // or null
  const void* grad_membrane = nullptr;  // or null
  void* grad_current = nullptr;
  void* grad_membrane_in = nullptr;  // or null
};

// Spikes as bits: rows of `length` values <-> `planes` bit planes [planes, rows, ceil(length / 8)], element i in bit i % 8
// of byte i / 8. Plane k holds bit k of an integer code:
// 1: nonzero (binary spikes); 2: v in two's complement (signed spikes); 3: 4*v (2x2-pooled spikes); 4: 4*v in two's
// complement (pooled signed spikes). Unpacking gives the values back exactly.
struct Planes {
  Dtype dtype;
  int planes = 1;
  int64_t rows = 0, length = 0;
  const void* from = nullptr;
  void* to = nullptr;
};

// spikes[t, b, p] = sign(x) where U < floor(min(gain*|x|, 1) * 2^32), U the Philox word of (t, sample, pixel).
// p runs over a sample in logical (C, H, W) order; in memory, pixel p of a sample lies at
// (p / inner) + (p % inner) * channels for channels-last images, else at p. NaN never spikes.
struct Encode {
  Dtype dtype;
  int64_t steps = 0, samples = 0, pixels = 0;
  int64_t channels = 1, inner = 0;  // inner = H*W, used where channels_last
  bool channels_last = false;
  double gain = 1;
  uint64_t seed = 0;
  uint32_t stream = 0;
  uint32_t first_step = 0;
  // [seed, stream, first step] in the memory of the device: read by the kernel, in place of the three above, so that a
  // captured graph draws anew when they change.
  const int64_t* key = nullptr;
  const int64_t* sample_ids = nullptr;  // null: the position in the batch
  const void* image = nullptr;          // [samples, pixels]
  void* spikes = nullptr;               // [T, samples, pixels]
};

PYACCEL_HD void read_key(Encode& e) {
  if (e.key == nullptr) return;
  e.seed = static_cast<uint64_t>(e.key[0]);
  e.stream = static_cast<uint32_t>(e.key[1]);
  e.first_step = static_cast<uint32_t>(e.key[2]);
}

}  // namespace pyaccel::neuron
