"""Subword-parallel quantised products: packed unsigned codes in, exact integer sums out (quanos, section 7).

    P = sum_k w_k a_k,   Q = sum_k a_k

P and Q are the same integers on every device, instruction set and thread count. With w = s w_code + o and
a = t a_code, the real product is t (s P + o Q): `dequantize_sums`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks
from pyaccel.ops.int_mm import SMALL_BATCH, library_product, library_serves
from pyaccel.ops.library import register
from pyaccel.reference.qmac import BITS, code_dtype, sum_dtype, words_of


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes into 32-bit words, little-endian: code j of a row lies in bits j*bits .. j*bits + bits - 1.

    Args:
        codes: `[..., length]`, uint8, or int32 for 16 bits; values below 2^bits.
        bits: 1, 2, 4, 8 or 16.

    Returns:
        int32 `[..., ceil(length * bits / 32)]`; what a row leaves of its last word is 0.

    Raises:
        ValueError: also for a code out of range, on the CPU. On CUDA nothing is read back: such codes lose their high bits.
    """
    _bits("pack_codes", "bits", bits)
    _codes("pack_codes", "codes", codes, bits, "[..., length]")
    return _pack(codes, bits)


def unpack_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_codes`: int32 words `[..., ceil(length * bits / 32)]` to codes `[..., length]`, uint8 (int32
    for 16 bits)."""
    _bits("unpack_codes", "bits", bits)
    checks.whole("unpack_codes", "length", length, 0, 1 << 40)
    _words("unpack_codes", "words", words, bits, length, None)
    return _unpack(words, bits, length)


def quantized_linear(
    activation_words: Tensor, weight_words: Tensor, *, activation_bits: int, weight_bits: int, length: int
) -> tuple[Tensor, Tensor]:
    """P = activations @ weights^T and Q = the sum of each row of activations, exact, from packed codes.

    8x8-bit products of more than 8 rows go through `torch._int_mm` where a known product at first use shows that it is
    exact and fast (`ops.int_mm`); where it is wrong (it saturates on CPUs without VNNI), one warning says so.

    Args:
        activation_words: int32 `[B, ceil(length * activation_bits / 32)]`, see `pack_codes`.
        weight_words: int32 `[O, ceil(length * weight_bits / 32)]`. Bits beyond `length` never count.
        activation_bits, weight_bits: 1, 2, 4, 8 or 16, each operand its own.

    Returns:
        P `[B, O]`, Q `[B]`: int32 where the widths sum to at most 16 and length (2^kw - 1)(2^ka - 1) < 2^31, else int64.
    """
    op = "quantized_linear"
    _bits(op, "activation_bits", activation_bits)
    _bits(op, "weight_bits", weight_bits)
    checks.whole(op, "length", length, 0, 1 << 31)
    _words(op, "activation_words", activation_words, activation_bits, length, 2)
    _words(op, "weight_words", weight_words, weight_bits, length, 2)
    _same_device(op, activation_words, weight_words)
    return _linear(activation_words, weight_words, activation_bits, weight_bits, length)


def quantized_conv2d(
    activation_codes: Tensor, weight_words: Tensor, *, activation_bits: int, weight_bits: int, kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Convolution of codes with packed weights: P as `conv2d` would give it, Q the sum of each patch; exact integers.

    Padding is code 0 and adds nothing to either. No library offers integer sums of a convolution: this kernel is ours.

    Args:
        activation_codes: `[B, C, H, W]`, uint8, or int32 for 16 bits; values below 2^activation_bits.
        weight_words: int32 `[O, ceil(K * weight_bits / 32)]`, K = C / groups * kernel height * kernel width, the codes of
            `weight.flatten(1)`.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.

    Returns:
        P `[B, O, OH, OW]`, Q `[B, groups, OH, OW]`: int32 or int64 as in `quantized_linear`, with length K.

    Raises:
        ValueError: also for a code out of range, on the CPU. On CUDA nothing is read back: such codes give wrong sums.
    """
    op = "quantized_conv2d"
    _bits(op, "activation_bits", activation_bits)
    _bits(op, "weight_bits", weight_bits)
    _codes(op, "activation_codes", activation_codes, activation_bits, "[B, C, H, W]")
    if activation_codes.dim() != 4:
        raise ValueError(f"{op}: activation_codes must be [B, C, H, W], got {checks.shape_of(activation_codes)}")
    kernel, strides = _pair(op, "kernel_size", kernel_size, 1), _pair(op, "stride", stride, 1)
    pads, dilations = _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1)
    channels = activation_codes.shape[1]
    checks.whole(op, "groups", groups, 1, max(1, channels))
    if channels % groups:
        raise ValueError(f"{op}: groups must divide the {channels} channels of activation_codes, got {groups}")
    length = channels // groups * kernel[0] * kernel[1]
    _words(op, "weight_words", weight_words, weight_bits, length, 2)
    if weight_words.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {weight_words.shape[0]} rows of weight_words, got {groups}")
    _same_device(op, activation_codes, weight_words)
    for axis, size, k, p, d in zip("HW", activation_codes.shape[2:], kernel, pads, dilations, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(f"{op}: the kernel spans {d * (k - 1) + 1} along {axis}, the padded input has {size + 2 * p}")
    return _conv2d(
        activation_codes, weight_words, activation_bits, weight_bits, kernel, strides, pads, dilations, groups
    )  # fmt: skip


def quantize_codes(x: Tensor, scale: float, bits: int) -> Tensor:
    """codes = round(clamp(x / scale, 0, 2^bits - 1)), half to even; NaN gives 0. float32 in, any nominal width 1..16.

    Returns uint8 codes up to 8 bits, int32 above, in the shape and layout of `x`. No gradient.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        came = x.dtype if isinstance(x, Tensor) else checks.shape_of(x)
        raise TypeError(f"quantize_codes: x must be a float32 tensor, got {came}; convert it with .float()")
    checks.whole("quantize_codes", "bits", bits, 1, 16)
    return _quantize(x.detach(), checks.number("quantize_codes", "scale", scale, above=0.0), bits)


def dequantize_sums(p: Tensor, q: Tensor, *, p_scale: float, q_scale: float, bias: Tensor | None = None) -> Tensor:
    """y = p_scale P + q_scale Q + bias, in float64 in this order, rounded once to float32: equal on every device.

    p: `[B, O]` or `[B, O, OH, OW]`; q: `[B]` or `[B, groups, OH, OW]`, of p's dtype; bias: float32 `[O]`. No gradient.
    """
    op = "dequantize_sums"
    if not isinstance(p, Tensor) or p.dtype not in (torch.int32, torch.int64) or p.dim() < 2:
        raise TypeError(f"{op}: p must be int32 or int64 [B, O, ...], got {checks.shape_of(p)}")
    groups = q.shape[1] if isinstance(q, Tensor) and q.dim() > 1 else 1
    checks.like(op, "q", q, (p.shape[0], groups, *p.shape[2:]) if p.dim() > 2 else p.shape[:1], p.dtype, p.device)
    if groups == 0 or p.shape[1] % groups:
        raise ValueError(f"{op}: the groups of q must divide the {p.shape[1]} outputs of p, got {groups}")
    if bias is not None:
        checks.like(op, "bias", bias, p.shape[1:2], torch.float32, p.device)
        bias = bias.detach()
    return _dequantize(p, q, bias, checks.number(op, "p_scale", p_scale), checks.number(op, "q_scale", q_scale))


# ---- checks
def _bits(op: str, name: str, bits: object) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, BITS))}, got {bits!r}; a width between lives in the next container")


def _codes(op: str, name: str, codes: object, bits: int, wanted: str) -> None:
    if not isinstance(codes, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor {wanted}, got {checks.shape_of(codes)}")
    if codes.dtype != code_dtype(bits):
        raise TypeError(f"{op}: {name} of {bits} bits must be {code_dtype(bits)}, got {codes.dtype}; convert them with .to({code_dtype(bits)})")
    if codes.dim() < 1:
        raise ValueError(f"{op}: {name} must be {wanted}, got {checks.shape_of(codes)}")


def _words(op: str, name: str, words: object, bits: int, length: int, dims: int | None) -> None:
    if not isinstance(words, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor of int32 words, got {checks.shape_of(words)}")
    if words.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32 words (see pack_codes), got {words.dtype}")
    wanted = words_of(length, bits)
    if words.dim() < 1 or (dims is not None and words.dim() != dims) or words.shape[-1] != wanted:
        rows = "[..., " if dims is None else "[rows, "
        raise ValueError(f"{op}: {name} of {length} codes of {bits} bits must be {rows}{wanted}], got {checks.shape_of(words)}")


def _same_device(op: str, a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{op}: activations are on {a.device}, weight_words on {b.device}; move them with .to({str(a.device)!r})")


def _pair(op: str, name: str, value: object, low: int) -> list[int]:
    pair = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{op}: {name} must be an integer or two, got {value!r}")
    return [checks.whole(op, name, v, low, 1 << 20) for v in pair]


# ---- kernels
def _pack_output(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], words_of(codes.shape[-1], bits)), dtype=torch.int32)


def _pack_kernel(codes, bits):
    out = _pack_output(codes, bits)
    rows = codes.numel() // codes.shape[-1] if codes.shape[-1] else 0
    good = extension._C.qmac.pack(codes.contiguous().reshape(rows, codes.shape[-1]), bits, out.view(rows, out.shape[-1]))
    if not good:
        raise ValueError(_out_of_range("pack_codes", "codes", codes, bits))
    return out


def _out_of_range(op: str, name: str, codes: Tensor, bits: int) -> str:
    return f"{op}: {name} must be in 0..{(1 << bits) - 1} for {bits} bits, got {codes.min().item()}..{codes.max().item()}"


def _pack_fallback(codes, bits):
    if codes.device.type == "cpu" and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ValueError(_out_of_range("pack_codes", "codes", codes, bits))
    return reference.pack_codes(codes, bits)


def _unpack_output(words: Tensor, bits: int, length: int) -> Tensor:
    return words.new_empty((*words.shape[:-1], length), dtype=code_dtype(bits))


def _unpack_kernel(words, bits, length):
    out = _unpack_output(words, bits, length)
    rows = out.numel() // length if length else 0
    if rows:
        extension._C.qmac.unpack(words.contiguous().reshape(rows, words.shape[-1]), bits, out.view(rows, length))
    return out


def _linear_output(activation_words, weight_words, activation_bits, weight_bits, length):
    dtype = sum_dtype(activation_bits, weight_bits, length)
    batch = activation_words.shape[0]
    return activation_words.new_empty((batch, weight_words.shape[0]), dtype=dtype), activation_words.new_empty(batch, dtype=dtype)


def _linear_kernel(activation_words, weight_words, activation_bits, weight_bits, length):
    p, q = _linear_output(activation_words, weight_words, activation_bits, weight_bits, length)
    a, w = activation_words.contiguous(), weight_words.contiguous()
    eight = activation_bits == weight_bits == 8 and p.dtype == torch.int32 and a.shape[0] > SMALL_BATCH and p.numel() and length
    if eight and library_serves(a.device):
        found = library_product(a, w, length)
        if found is not None:
            return found
    extension._C.qmac.linear(a, w, activation_bits, weight_bits, length, p, q)
    return p, q


def _linear_fallback(activation_words, weight_words, activation_bits, weight_bits, length):
    return reference.quantized_linear(
        activation_words, weight_words, activation_bits=activation_bits, weight_bits=weight_bits, length=length
    )


def _conv2d_output(codes, weight_words, activation_bits, weight_bits, kernel, stride, padding, dilation, groups):
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(codes.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    dtype = sum_dtype(activation_bits, weight_bits, codes.shape[1] // groups * kernel[0] * kernel[1])
    batch, outputs = codes.shape[0], weight_words.shape[0]
    return codes.new_empty((batch, outputs, *size), dtype=dtype), codes.new_empty((batch, groups, *size), dtype=dtype)


def _conv2d_kernel(codes, weight_words, activation_bits, weight_bits, kernel, stride, padding, dilation, groups):
    p, q = _conv2d_output(codes, weight_words, activation_bits, weight_bits, kernel, stride, padding, dilation, groups)
    good = extension._C.qmac.convolution(
        codes.contiguous(), weight_words.contiguous(), activation_bits, weight_bits, kernel, stride, padding, dilation, groups, p, q
    )  # fmt: skip
    if not good:
        raise ValueError(_out_of_range("quantized_conv2d", "activation_codes", codes, activation_bits))
    return p, q


def _conv2d_fallback(codes, weight_words, activation_bits, weight_bits, kernel, stride, padding, dilation, groups):
    if codes.device.type == "cpu" and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << activation_bits:
        raise ValueError(_out_of_range("quantized_conv2d", "activation_codes", codes, activation_bits))
    return reference.quantized_conv2d(
        codes, weight_words, activation_bits=activation_bits, weight_bits=weight_bits, kernel_size=kernel, stride=stride,
        padding=padding, dilation=dilation, groups=groups,
    )  # fmt: skip


def _quantize_output(x: Tensor, bits: int) -> Tensor:
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    like = torch.preserve_format if dense else torch.contiguous_format
    return torch.empty_like(x, dtype=torch.int32 if bits > 8 else torch.uint8, memory_format=like)


def _quantize_kernel(x, scale, bits):
    codes = _quantize_output(x, bits)
    if codes.is_contiguous():
        x = x.contiguous()
    extension._C.qmac.quantize(x, scale, float((1 << bits) - 1), codes)
    return codes


def _dequantize_output(p: Tensor) -> Tensor:
    return p.new_empty(p.shape, dtype=torch.float32)


def _dequantize_kernel(p, q, bias, p_scale, q_scale):
    y = _dequantize_output(p)
    bias = None if bias is None else bias.contiguous()
    extension._C.qmac.dequantize(p.contiguous(), q.contiguous(), bias, p_scale, q_scale, y)
    return y


_pack = register(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    kernel=_pack_kernel,
    fake=_pack_output,
    fallback=_pack_fallback,
    differentiable=False,
)
_unpack = register(
    "unpack_codes(Tensor words, int bits, int length) -> Tensor",
    kernel=_unpack_kernel,
    fake=_unpack_output,
    fallback=lambda words, bits, length: reference.unpack_codes(words, bits, length),
    differentiable=False,
)
_linear = register(
    "quantized_linear(Tensor activation_words, Tensor weight_words, int activation_bits, int weight_bits, int length) -> (Tensor, Tensor)",
    kernel=_linear_kernel,
    fake=_linear_output,
    fallback=_linear_fallback,
    differentiable=False,
)
_conv2d = register(
    "quantized_conv2d(Tensor activation_codes, Tensor weight_words, int activation_bits, int weight_bits, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> (Tensor, Tensor)",
    kernel=_conv2d_kernel,
    fake=_conv2d_output,
    fallback=_conv2d_fallback,
    differentiable=False,
)
_quantize = register(
    "quantize_codes(Tensor x, float scale, int bits) -> Tensor",
    kernel=_quantize_kernel,
    fake=lambda x, scale, bits: _quantize_output(x, bits),
    fallback=lambda x, scale, bits: reference.quantize_codes(x, scale, bits),
    differentiable=False,
)
_dequantize = register(
    "dequantize_sums(Tensor p, Tensor q, Tensor? bias, float p_scale, float q_scale) -> Tensor",
    kernel=_dequantize_kernel,
    fake=lambda p, q, bias, p_scale, q_scale: _dequantize_output(p),
    fallback=lambda p, q, bias, p_scale, q_scale: reference.dequantize_sums(p, q, p_scale=p_scale, q_scale=q_scale, bias=bias),
    differentiable=False,
)
