// One tile of products on the CPU: a few rows times a few vectors of lanes, over a stretch of K.
//
// Rows lie as they are (`rows`: broadcast from memory), lanes are interleaved (`panel`: [steps][lanes], one vector load
// each). A linear layer puts its outputs into the lanes and its batch into the rows; a convolution puts pixels into the
// lanes and outputs into the rows; so both store whole vectors, and no sum ever runs across a register.
//
// Layouts of a step, per row or lane:
//   pairs     2 codes as uint16          `vpmaddwd`: exact for every code up to 8 bits; 2 operations for 2 products a lane
//   quads     4 codes as uint8           `vpmaddubsw`, where `depth` sums of 2 products fit 16 bits; or `vpdpbusd`
//   digits    one byte of 4 or 6 bits    table lookup: the byte holds several codes, and a table gives the sum of
//                                        products with every byte of the other side (1- and 2-bit codes of equal width)
//   words     32 codes of one bit        AND and `vpopcntd`, as they lie packed
// What each bought, 512 x 1024 x 1024 on an AVX2 machine: docs/qmac.md.
#pragma once
#include <cstdint>

#include "../core/isa.h"

namespace pyaccel::qmac {

enum class Layout : int32_t { pairs, quads, digits, words };

// How a product runs. `tile(rows, r, stride, panel, steps, depth, out)`: `rows` <= max_rows rows, `stride` bytes apart;
// out[row * lanes + lane] = the sum over all steps, int32.
struct Product {
  Layout layout = Layout::pairs;
  int digit_bits = 0;  // digits: bits of a byte in use
  int max_rows = 1;
  int lanes = 1;
  int step_bytes = 1;       // of a panel: lanes * bytes a lane
  int codes = 1;            // of K a step
  int64_t depth = 1;        // steps before a narrow sum must be widened
  bool rows_signed = false, lanes_signed = false;  // codes of that side minus 128: the caller adds 128 * sum of the other's
  void (*tile)(int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int64_t depth, int32_t* out) = nullptr;
  // The same straight into P, rows `out_stride` elements apart, added to what is there where `add`; not every product has it.
  void (*tile_into)(int rows, const uint8_t* r, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* out, int64_t out_stride,
                    bool add) = nullptr;
};

// The product for codes of these widths (at most 8 bits each), `lane_bits` those of the side in the lanes;
// `lanes_are_weights` tells which side may be shifted by 128, where a machine wants that.
PYACCEL_DECLARE_KERNELS(                                                        //
    Product choose_product(int row_bits, int lane_bits, bool lanes_are_weights); \
    /* true and a product, where the machine has VNNI, VBMI or VPOPCNTDQ */     \
    bool choose_vnni(int row_bits, int lane_bits, bool lanes_are_weights, Product& product);)

}  // namespace pyaccel::qmac
