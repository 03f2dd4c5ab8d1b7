"""Plain-torch twins of the quantised multiply-accumulate kernels (quanos, section 7): the definition, and the oracle.

Integers throughout; products go through float64, which is exact below 2^53, a stretch of K at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (1, 2, 4, 8, 16)  # widths of a container
STRETCH = 1 << 20  # 2^20 products of 16-bit codes stay below 2^53


def words_of(length: int, bits: int) -> int:
    """32-bit words of a row of `length` codes."""
    return -(-length * bits // 32)


def code_dtype(bits: int) -> torch.dtype:
    """Unpacked codes: uint8, int32 for 16 bits."""
    return torch.int32 if bits == 16 else torch.uint8


def sum_dtype(activation_bits: int, weight_bits: int, length: int) -> torch.dtype:
    """int32 where the widths sum to at most 16 and K (2^kw - 1) (2^ka - 1) < 2^31, else int64."""
    largest = length * ((1 << activation_bits) - 1) * ((1 << weight_bits) - 1)
    return torch.int32 if activation_bits + weight_bits <= 16 and largest < 1 << 31 else torch.int64


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Twin of `pyaccel.ops.pack_codes`, which documents it."""
    *batch, length = codes.shape
    per_word = 32 // bits
    padded = F.pad(codes.to(torch.int64), (0, words_of(length, bits) * per_word - length))
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = ((padded & ((1 << bits) - 1)).reshape(*batch, -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """Twin of `pyaccel.ops.unpack_codes`, which documents it."""
    shifts = torch.arange(32 // bits, device=words.device) * bits
    codes = (words.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :length].to(code_dtype(bits))


def quantized_linear(
    activation_words: Tensor, weight_words: Tensor, *, activation_bits: int, weight_bits: int, length: int
) -> tuple[Tensor, Tensor]:
    """Twin of `pyaccel.ops.quantized_linear`, which documents it."""
    a = unpack_codes(activation_words, activation_bits, length).to(torch.float64)
    w = unpack_codes(weight_words, weight_bits, length).to(torch.float64)
    dtype = sum_dtype(activation_bits, weight_bits, length)
    p = a.new_zeros((a.shape[0], w.shape[0]), dtype=torch.int64)
    for first in range(0, length, STRETCH):
        p += (a[:, first : first + STRETCH] @ w[:, first : first + STRETCH].T).to(torch.int64)
    return p.to(dtype), a.sum(1).to(dtype)


def quantized_conv2d(
    activation_codes: Tensor, weight_words: Tensor, *, activation_bits: int, weight_bits: int, kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Twin of `pyaccel.ops.quantized_conv2d`, which documents it. Exact for K up to 2^20."""
    channels = activation_codes.shape[1] // groups
    length = channels * kernel_size[0] * kernel_size[1]
    weight = unpack_codes(weight_words, weight_bits, length).to(torch.float64).reshape(-1, channels, *kernel_size)
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    a = activation_codes.to(torch.float64)
    dtype = sum_dtype(activation_bits, weight_bits, length)
    ones = weight.new_ones((groups, channels, *kernel_size))
    return F.conv2d(a, weight, **geometry).to(dtype), F.conv2d(a, ones, **geometry).to(dtype)


def quantize_codes(x: Tensor, scale: float, bits: int) -> Tensor:
    """Twin of `pyaccel.ops.quantize_codes`, which documents it."""
    levels = (1 << bits) - 1
    codes = torch.round(torch.clamp(torch.nan_to_num(x / torch.tensor(scale, dtype=torch.float32), nan=0.0), 0, levels))
    return codes.to(torch.int32 if bits > 8 else torch.uint8)


def dequantize_sums(p: Tensor, q: Tensor, *, p_scale: float, q_scale: float, bias: Tensor | None = None) -> Tensor:
    """Twin of `pyaccel.ops.dequantize_sums`, which documents it."""
    q = q.to(torch.float64).reshape(p.shape[0], -1, *p.shape[2:])
    y = p_scale * p.to(torch.float64) + q_scale * q.repeat_interleave(p.shape[1] // q.shape[1], 1)
    if bias is not None:
        y = y + bias.to(torch.float64).reshape(-1, *[1] * (p.dim() - 2))
    return y.to(torch.float32)
