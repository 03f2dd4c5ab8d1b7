// The crossbar family: what each kernel computes and what it is given. Plain data, borrowed pointers, no torch.
//
// A tile has M rows (driven at the left end) and N columns (sensed at the lower end). Between row node (i, j) and column
// node (i, j) sits a device of conductance g[i, j]; row and column wires have one resistor between neighbouring nodes, a
// driver resistor stands before the first node of a row and a sense resistor behind the last node of a column, which ends
// at virtual ground. All are linear, so the currents are I = G'^T V with a fixed matrix G', the effective conductance.
#pragma once
#include <cstdint>

#include "../core/dtype.h"

namespace pyaccel::crossbar {

// Ohm; every one may be 0.
struct Resistances {
  double driver = 0, wire_row = 0, wire_col = 0, sense = 0;
};

struct Tiles {
  Dtype dtype = Dtype::f32;  // f32 or f64
  int64_t count = 0, rows = 0, columns = 0;
};

// Above this, I + R Y is so ill-conditioned that float64 keeps fewer than half its digits: such a tile is refused.
constexpr double kLargestLoad = 1e8;

// Where a kernel stopped believing its input. `tile` < 0: nowhere.
struct Fault {
  enum Kind : int32_t { none, conductance, load } kind = none;
  int64_t tile = -1, row = 0, column = 0;
  double value = 0;  // the conductance (negative, infinite or NaN), or the load R * (sum of a column) above kLargestLoad
};

// G' of every tile. float64: relative error about 1e-12. float32: sums in float32 where the wires load the tile lightly
// (the usual case, see matrix_cpu.cpp), in float64 elsewhere; relative error below 5e-6 for entries above 1e-3 of the
// largest and below 1e-6 of the largest everywhere.
// Work a tile, multiplications with additions, M >= N: M N (N + M) / 2. Elimination runs along the longer side.
struct Matrix {
  Tiles tiles;
  Resistances ohm;
  const void* conductance = nullptr;  // [count, M, N] siemens
  void* effective = nullptr;          // [count, M, N] siemens
};

// dL/dg for a given dL/dG' by the field form of reverse mode: with `u - w` the voltage across a device,
//   dL/dg[i, j] = -sum over inputs l of (u - w)_l[i, j] * (u^ - w^)_l[i, j]
// where _l is the response to one volt on row l, and ^ that of the transposed network to row l of dL/dG'.
// Both fields climb from the sense end, W[i-1] = Q (W[i] + R J[i-1]), U[i-1] = Q U[i], Q = (I + R Y)^-1 of the ladder:
// two products of N x N with N x M a row on top of the forward work, about three times the forward in all.
struct MatrixGradient {
  Tiles tiles;
  Resistances ohm;
  const void* conductance = nullptr;
  const void* grad_effective = nullptr;    // [count, M, N]
  void* grad_conductance = nullptr;        // [count, M, N]
  int64_t history_bytes = 0;  // a thread: ladder states kept; beyond, they are computed twice, block by block
};

// One converter: code = round_half_even(v * inverse) clamped to -top .. top, value = code * step. top = 0: none.
// `step` and `inverse` are tensors of the dtype, one value or (per_column) one an output: ranges may come from data without
// the host ever waiting for them.
struct Converter {
  int32_t top = 0;
  bool per_column = false;
  const void* step = nullptr;
  const void* inverse = nullptr;
};

// y[b, c] = sum over row tiles t of adc(sum over rows k of t of x[b, k] * w[k, c] + noise), with one array w (or the
// difference of two), or (apart) each of two arrays through its own ADC, subtracted as codes. x has passed its DAC.
// Partial sums stay in registers, codes are added in the dtype (exactly up to 2^24 in float32).
// Noise: read_noise times a standard normal draw (domain 5) for index (read * batch + b) * outputs + c; reads count the
// tiles, and within a tile the arrays when read apart.
struct Matmul {
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, inputs = 0, outputs = 0, tile = 0;
  const void* x = nullptr;         // [batch, inputs]
  const void* positive = nullptr;  // [inputs, outputs]
  const void* negative = nullptr;  // [inputs, outputs] or null
  bool apart = false;
  Converter adc;
  double read_noise = 0;  // in units of a partial sum
  uint64_t seed = 0;
  uint32_t stream = 0;
  void* y = nullptr;  // [batch, outputs]
};

// The DAC: out[i] = step * clamp(round_half_even(x[i] * inverse)).
struct Quantize {
  Dtype dtype = Dtype::f32;
  int64_t count = 0;
  const void* x = nullptr;
  Converter converter;  // one value
  void* out = nullptr;
};

// Standard normal draws for elements first .. first + count - 1 of a counter domain, float32 arithmetic.
struct Normal {
  uint64_t seed = 0;
  uint32_t stream = 0, domain = 0;
  int64_t first = 0, count = 0;
  float* out = nullptr;
};

}  // namespace pyaccel::crossbar
