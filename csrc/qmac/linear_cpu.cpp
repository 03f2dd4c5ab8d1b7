// Quantised linear layer on the CPU (contract: qmac.h).
//
// Small batches stream the packed weights (stream_cpu.cpp): they read each weight once, packed. Larger ones run in tiles
// (tile_cpu.h): activations are unpacked once into rows, a block of outputs at a time is unpacked into panels, which
// costs about one operation a weight against one for every few rows of the batch. 16-bit codes are two 8-bit limbs:
// P = sum 2^(8 (i + j)) P_ij, each P_ij exact in 32 bits over a stretch of K, the total in 64.
#include <vector>

#include "block_cpu.h"
#include "kernels_cpu.h"
#include "stream_cpu.h"

namespace pyaccel::qmac::PYACCEL_ISA {
namespace {

constexpr int64_t kRowBytes = 8 << 20;  // activations unpacked at a time

void write_q(const Linear& f, int64_t row, int64_t sum) {
  if (f.sum_bytes == 4) static_cast<int32_t*>(f.q)[row] = static_cast<int32_t>(sum);
  else static_cast<int64_t*>(f.q)[row] = sum;
}

int64_t sum_row(const Linear& f, const uint32_t* row) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row);
  int64_t total = 0;
  if (f.activation_bits == 8) return sum_bytes(bytes, f.length);
  if (f.activation_bits == 16) {
    for (int64_t j = 0; j < f.length; ++j) total += load_any<uint16_t>(bytes + 2 * j);
    return total;
  }
  uint8_t codes[512 + 8];
  for (int64_t first = 0; first < f.length; first += 512) {
    const int64_t count = std::min<int64_t>(512, f.length - first);
    unpack_row(f.activation_bits, row, first, count, 0, codes);
    total += sum_bytes(codes, count);
  }
  return total;
}

// Outputs first .. (`count` <= lanes of them) as one panel.
void weight_panel(const Linear& f, const Product& p, int limb, int64_t first, int64_t count, int64_t first_step, int64_t steps,
                  uint8_t* panel) {
  const int64_t words = words_of(f.length, f.weight_bits);
  const auto row = [&](int64_t lane, uint8_t* to) {
    layout_row(p, p.lanes_signed, f.weight_bits, f.weights + (first + lane) * words, f.length, limb, first_step, steps, to);
  };
  alignas(64) uint8_t buffer[8 * (kPanelBytes / 32 + 16)];
  if (p.layout != Layout::digits) {
    for (int64_t lane = 0; lane < p.lanes; ++lane) {
      if (lane < count) row(lane, buffer);
      else memset(buffer, 0, static_cast<size_t>(4 * steps));
      uint8_t* to = panel + 4 * lane;
      for (int64_t s = 0; s < steps; ++s) memcpy(to + s * p.step_bytes, buffer + 4 * s, 4);
    }
    return;
  }
  const int64_t stride = steps + 16;
  for (int64_t lane = 0; lane < p.lanes; lane += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      if (lane + i < count) row(lane + i, buffer + i * stride);
      else memset(buffer + i * stride, 0, static_cast<size_t>(steps));
    }
    for (int64_t s = 0; s < steps; s += 8) {
      uint64_t square[8];
      for (int i = 0; i < 8; ++i) square[i] = load_any<uint64_t>(buffer + i * stride + s);
      transpose8(square);
      for (int64_t i = 0; i < std::min<int64_t>(8, steps - s); ++i)
        memcpy(panel + (s + i) * p.step_bytes + lane, &square[i], 8);
    }
  }
  for (int64_t at = 0; at < steps * p.step_bytes; at += kBytes) {
    uint8_t ordered[kBytes];
    interleave_halves(panel + at, ordered);
    memcpy(panel + at, ordered, kBytes);
  }
}

void tiled(const Linear& f) {
  const Product p = choose_product(limb_bits(f.activation_bits), limb_bits(f.weight_bits), true);
  const int activation_limbs = limbs_of(f.activation_bits), weight_limbs = limbs_of(f.weight_bits);
  const int64_t stride = row_stride(p, f.length), steps_all = ceil_div(f.length, p.codes), steps_block = block_steps(p);
  const int64_t superblock = std::max<int64_t>(64, kRowBytes / (stride * activation_limbs));
  const int64_t activation_words = words_of(f.length, f.activation_bits);
  for (int64_t start = 0; start < f.batch; start += superblock) {
    const int64_t batch = std::min(superblock, f.batch - start);
    auto* rows = static_cast<uint8_t*>(scratch(0, static_cast<size_t>(activation_limbs * batch * stride + 64)));
    parallel_shares(batch, threads_for(batch * f.length, batch), [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const uint32_t* packed = f.activations + (start + r) * activation_words;
        for (int limb = 0; limb < activation_limbs; ++limb)
          layout_row(p, p.rows_signed, f.activation_bits, packed, f.length, limb, 0, steps_all, rows + (limb * batch + r) * stride);
      }
    });
    const int64_t tiles = ceil_div(f.outputs, p.lanes), threads = threads_for(batch * f.outputs * f.length / 16, tiles * batch);
    const int64_t per_block = std::clamp<int64_t>(ceil_div(tiles, threads), 1, kTilesPerBlock), blocks = ceil_div(tiles, per_block);
    const int64_t parts = blocks >= threads ? 1 : std::min<int64_t>(ceil_div(threads, blocks), ceil_div(batch, p.max_rows));
    parallel_shares(blocks * parts, static_cast<int>(std::min(threads, blocks * parts)), [&](int64_t begin, int64_t end, int) {
      auto* panels = static_cast<uint8_t*>(scratch(2, static_cast<size_t>(per_block * steps_block * p.step_bytes)));
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first_tile = piece / parts * per_block, count = std::min(per_block, tiles - first_tile);
        const int64_t first_row = batch * (piece % parts) / parts, last_row = batch * (piece % parts + 1) / parts;
        const int64_t first_output = first_tile * p.lanes, outputs = std::min(count * p.lanes, f.outputs - first_output);
        const Run run{0, outputs, first_output};
        const Target target{static_cast<char*>(f.p) + start * f.outputs * f.sum_bytes, f.sum_bytes, f.outputs, &run, 1};
        bool accumulate = p.lanes_signed;
        if (accumulate) {  // 128 Q of each row
          const int64_t factor = shift_factor(f.weight_bits);
          for (int64_t r = first_row; r < last_row; ++r)
            for (int64_t o = first_output; o < first_output + outputs; ++o) {
              const int64_t at = (start + r) * f.outputs + o;
              if (f.sum_bytes == 4) static_cast<int32_t*>(f.p)[at] = static_cast<int32_t>(factor * static_cast<int32_t*>(f.q)[start + r]);
              else static_cast<int64_t*>(f.p)[at] = factor * static_cast<int64_t*>(f.q)[start + r];
            }
        }
        for (int64_t first = 0; first < steps_all; first += steps_block) {
          const int64_t steps = std::min(steps_block, steps_all - first);
          for (int w = 0; w < weight_limbs; ++w) {
            for (int64_t t = 0; t < count; ++t)
              weight_panel(f, p, w, first_output + t * p.lanes, std::min<int64_t>(p.lanes, f.outputs - first_output - t * p.lanes),
                           first, steps, panels + t * steps * p.step_bytes);
            for (int a = 0; a < activation_limbs; ++a) {
              multiply_block(p, rows + a * batch * stride + first * row_step_bytes(p), stride, first_row, last_row, panels, count,
                             steps, target, 8 * (w + a), accumulate);
              accumulate = true;
            }
          }
        }
      }
    });
  }
}

}  // namespace

void linear(const Linear& f) {
  parallel_shares(f.batch, threads_for(f.batch * f.length, f.batch), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) write_q(f, r, sum_row(f, f.activations + r * words_of(f.length, f.activation_bits)));
  });
  if (f.outputs == 0 || f.batch == 0) return;
  if (f.length == 0) {
    memset(f.p, 0, static_cast<size_t>(f.batch * f.outputs * f.sum_bytes));
    return;
  }
  if (!stream(f)) tiled(f);
}

}  // namespace pyaccel::qmac::PYACCEL_ISA
