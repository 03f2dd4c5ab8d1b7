// The arithmetic of one node of a row wire, written once. V is a scalar (CUDA) or a SIMD vector over rows (CPU).
//
// Looking left from node j, its device left out: an impedance (0 behind an ideal driver, so never an infinite admittance).
// Looking right, past the next segment: an admittance. Every formula is a sum of positive terms: nothing cancels.
#pragma once
#include "../core/host_device.h"

namespace pyaccel::crossbar {

// The admittance of node j and all beyond it, its device included: x = g + right.
// Seen through the segment of resistance r before the node: x / (1 + r x); the voltage falls by 1 / (1 + r x).
template <class V>
PYACCEL_HD V fall(V x, double r) {
  return 1.0 / (1.0 + r * x);
}

template <class V>
PYACCEL_HD V left_of_next(V left, V g, double wire) {
  return wire + left / (1.0 + g * left);
}

// S[j, j] of the row's admittance between column nodes: g in series with the rest of its row.
template <class V>
PYACCEL_HD V own_admittance(V left, V g, V right) {
  return g * (1.0 + right * left) / (1.0 + (g + right) * left);
}

// Voltage of row node j for one volt on column node j, the driver at ground. -S[k, j] = g_k * this * the falls j+1 .. k.
template <class V>
PYACCEL_HD V coupling(V left, V g, V right) {
  return g * left / (1.0 + (g + right) * left);
}

}  // namespace pyaccel::crossbar
