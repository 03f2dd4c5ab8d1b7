"""Fake quantisation with straight-through gradients (quanos, section 4): real values on the levels of k-bit codes.

A `Grid` says what a code means: value = scale * code + offset, code in 0..levels. The gradient of every quantiser is 1
inside its range and 0 outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyaccel.ops import checks

WEIGHT_QUANTIZERS = ("symmetric", "signed_zero", "affine")


@dataclass(frozen=True)
class Grid:
    """value = scale * code + offset, code = 0..levels; `scale` and `offset` are 0-d tensors."""

    scale: Tensor
    offset: Tensor
    levels: int


def weight_grid(weight: Tensor, bits: int, quantizer: str = "symmetric") -> Grid:
    """The grid of a weight tensor, from its own range (one a layer), float32.

    - "symmetric": levels evenly over [-max|W|, max|W|], 2^bits of them. **There is no code for zero**, for any width:
      at 2 bits the levels are -1, -1/3, 1/3, 1 (times max|W|), and a weight of 0 becomes 1/3: pruned weights come back.
    - "signed_zero": 2^bits - 1 levels, -(2^(bits-1) - 1) .. 2^(bits-1) - 1, zero among them; needs 2 bits.
    - "affine": 2^bits levels over [min W, max W].
    """
    checks.whole("weight_grid", "bits", bits, 1, 16)
    checks.choice("weight_grid", "quantizer", quantizer, WEIGHT_QUANTIZERS)
    if quantizer == "signed_zero" and bits == 1:
        raise ValueError("weight_grid: signed_zero needs at least 2 bits (1 bit would leave only zero); use symmetric")
    w = weight.detach().to(torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    if quantizer == "affine":
        low, high = (w.min(), w.max()) if w.numel() else (w.new_zeros(()), w.new_zeros(()))
        levels = (1 << bits) - 1
        return Grid(((high - low) / levels).clamp_min(tiny), low, levels)
    largest = (w.abs().max() if w.numel() else w.new_zeros(())).clamp_min(tiny * 65536)
    levels = (1 << bits) - 1 if quantizer == "symmetric" else (1 << bits) - 2
    return Grid(2 * largest / levels, -largest, levels)


def codes_of(x: Tensor, grid: Grid) -> Tensor:
    """The codes of `x`: round((x - offset) / scale), half to even, clamped to 0..levels; as float32."""
    return torch.round((x.detach().to(torch.float32) - grid.offset) / grid.scale).clamp(0, grid.levels)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, low, high):
        ctx.save_for_backward((x >= low) & (x <= high))
        return values

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """`x` on the values of `grid`, of the dtype of `x`; gradient 1 inside the range of the grid, 0 outside."""
    scale, offset = (t.to(torch.float64 if x.dtype == torch.float64 else torch.float32) for t in (grid.scale, grid.offset))
    values = (codes_of(x, grid).to(scale.dtype) * scale + offset).to(x.dtype)
    # the range itself, not the last value: rounding of scale * levels must not cut the largest weight's gradient
    low, high = grid.offset, grid.offset + grid.scale * grid.levels
    slack = grid.scale * grid.levels * 2**-20
    return _StraightThrough.apply(x, values, low - slack, high + slack)


def quantize_symmetric(x: Tensor, bits: int, *, signed_zero: bool = False) -> Tensor:
    """`x` in [-1, 1] (clamped) on symmetric levels: 2 (round((x + 1)/2 (2^k - 1)) / (2^k - 1) - 1/2).

    No level is 0 (see `weight_grid`): quantize_symmetric(0) is +1/3 at 2 bits, +1/7 at 3, +1/15 at 4. `signed_zero=True`
    gives the 2^k - 1 levels round(x n) / n, n = 2^(k-1) - 1, with zero among them.
    """
    checks.floating("quantize_symmetric", "x", x, 0, "of any shape")
    checks.whole("quantize_symmetric", "bits", bits, 2 if signed_zero else 1, 16)
    levels = (1 << bits) - 1 - int(signed_zero)
    clamped = x.detach().clamp(-1, 1)
    values = 2 * (torch.round((clamped + 1) / 2 * levels) / levels - 0.5)
    return _StraightThrough.apply(x, values, -1.0, 1.0)


def quantize_affine(x: Tensor, bits: int) -> Tensor:
    """`x` on 2^bits levels over its own range: q = round((x - min)(2^k - 1)/(max - min)), value q (max - min)/(2^k - 1) + min."""
    checks.floating("quantize_affine", "x", x, 0, "of any shape")
    checks.whole("quantize_affine", "bits", bits, 1, 16)
    if x.numel() == 0:
        return x
    low, high = x.detach().min(), x.detach().max()
    levels = (1 << bits) - 1
    width = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    values = torch.round((x.detach() - low) * levels / width) * width / levels + low
    return _StraightThrough.apply(x, values, low, high)


def quantize_range(x: Tensor, upper: float | Tensor, bits: int) -> Tensor:
    """`x` on 2^bits levels over [0, upper], codes round(clamp(x / scale, 0, 2^bits - 1)), scale = upper / (2^bits - 1).

    The codes are those of `quantize_codes(x, scale, bits)` to the bit. Negative values become 0.
    """
    checks.floating("quantize_range", "x", x, 0, "of any shape")
    checks.whole("quantize_range", "bits", bits, 1, 16)
    levels = (1 << bits) - 1
    scale = torch.as_tensor(upper, dtype=torch.float32, device=x.device) / levels
    codes = torch.round((x.detach().to(torch.float32) / scale).clamp(0, levels))
    values = (codes.to(x.dtype) * scale.to(x.dtype)) if x.dtype == torch.float64 else (codes * scale).to(x.dtype)
    return _StraightThrough.apply(x, values, 0.0, scale * levels * (1 + 2**-20))
