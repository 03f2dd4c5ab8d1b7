"""`crossbar_matmul`: a matrix product cut into crossbar tiles, with DAC, read noise and ADC."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks
from pyaccel.ops.library import register

READS = ("pair", "apart")
HALF = (torch.float16, torch.bfloat16)


def crossbar_matmul(
    x: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    tile: int,
    read: str = "pair",
    dac_bits: int | None = None,
    dac_range: float | Tensor | None = None,
    adc_bits: int | None = None,
    adc_range: float | Tensor | None = None,
    read_noise: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
) -> Tensor:
    """`x @ (positive - negative)` as crossbars of `tile` rows compute it::

        y[b, c] = sum over row tiles t of ADC( sum over rows k of t of DAC(x[b, k]) * w[k, c]  +  read_noise * n )

    read="pair": one ADC sees the difference of the two arrays; "apart": each array has its own ADC, and the codes are
    subtracted. Both converters are symmetric, 2^bits - 1 levels from -range to range with zero among them, half to
    even, clipped. n is standard normal (Philox, domain 5): the same on every device, whatever the batch is cut into
    threads. With no converter and no noise this is, and runs as, one GEMM.

    Gradients are straight-through: those of `DAC(x) @ (positive - negative)`, none for inputs that the DAC clips; an
    ADC that clips does not stop its gradient.

    Args:
        x: `[..., K]`, float32, float64, or a half type, of either sign. positive, negative: `[K, C]` of the same dtype,
            or float32 where x is of a half type; such as the effective conductances of `crossbar_matrix`, reassembled;
            in any unit. With a half type everything is computed in float32 and the result rounded to x's type.
        tile: rows of a tile, >= 1; the last tile may be lower.
        dac_bits, adc_bits: 2..16, None: ideal.
        dac_range: full scale of the inputs, a number or a 0-d tensor; None: the largest |x| of this call.
        adc_range: full scale of a partial sum, a number or a tensor, 0-d or `[C]`; needed with adc_bits. `adc_range()`
            calibrates it.
        read_noise: standard deviation of a read, in units of a partial sum.
        seed, stream: the key (64 bits) and stream (32 bits) of the noise; `seed` may be an int64 tensor `[seed,
            stream]` on the CPU, which keeps compiled graphs from being specialised to the values.

    Returns:
        `[..., C]`. Codes are summed exactly while their sum stays below 2^24 (float32). NaN inputs give NaN.
    """
    op = "crossbar_matmul"
    half = x.dtype if isinstance(x, Tensor) and x.dtype in HALF else None
    x, positive, negative, dac_range, adc_range = _single(x, positive, negative, dac_range, adc_range)
    _operands(op, x, positive, negative, tile)
    apart = checks.choice(op, "read", read, READS) == 1
    if apart and negative is None:
        raise ValueError(f"{op}: read='apart' needs two arrays; give negative, or use read='pair'")
    dac_bits = 0 if dac_bits is None else checks.whole(op, "dac_bits", dac_bits, 2, 16)
    adc_bits = 0 if adc_bits is None else checks.whole(op, "adc_bits", adc_bits, 2, 16)
    read_noise = checks.number(op, "read_noise", read_noise)
    if read_noise < 0:
        raise ValueError(f"{op}: read_noise must be at least 0, got {read_noise:g}")
    if not (dac_bits or adc_bits or read_noise):
        y = x @ (positive if negative is None else positive - negative)
        return y if half is None else y.to(half)
    if adc_bits and adc_range is None:
        raise ValueError(
            f"{op}: adc_bits needs adc_range, the full scale of a partial sum: a number, a tensor "
            f"[{positive.shape[1]}], or what pyaccel.ops.adc_range measures on sample inputs"
        )
    if dac_bits and dac_range is None:
        dac_range = x.detach().abs().amax() if x.numel() else 1.0
    key = _key(op, seed, stream) if read_noise else None
    y = _crossbar_matmul(
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), positive, negative,
        _full_scale(op, "dac_range", dac_range, x, ()) if dac_bits else None,
        _full_scale(op, "adc_range", adc_range, x, (positive.shape[1],)) if adc_bits else None,
        key, tile, apart, dac_bits, adc_bits, read_noise,
    )  # fmt: skip
    y = y.reshape(*x.shape[:-1], positive.shape[1])
    return y if half is None else y.to(half)


def adc_range(x: Tensor, positive: Tensor, negative: Tensor | None = None, *, tile: int, read: str = "pair") -> Tensor:
    """Calibration: the largest |partial sum| of every column over all row tiles (and arrays, read apart), for samples.

    Arguments as in `crossbar_matmul`; returns `[C]` (float32 for half types), without gradient. A column that never
    carries current gets the smallest positive number instead of 0.
    """
    op = "adc_range"
    x, positive, negative = _single(x, positive, negative)
    _operands(op, x, positive, negative, tile)
    if checks.choice(op, "read", read, READS) == 1 and negative is not None:
        arrays = [positive, negative]
    else:
        arrays = [positive if negative is None else positive - negative]
    flat, tiny = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1]), torch.finfo(x.dtype).tiny
    largest = x.new_full(positive.shape[1:], tiny)
    for first in range(0, x.shape[-1] if flat.shape[0] else 0, tile):
        for array in arrays:
            partial = flat[:, first : first + tile] @ array.detach()[first : first + tile]
            largest = torch.maximum(largest, partial.abs().amax(0))
    return largest


def _single(x: object, *others: object) -> list:
    """All tensors of half types in float32, where x is of one; else everything as it came."""
    if not (isinstance(x, Tensor) and x.dtype in HALF):
        return [x, *others]
    return [t.float() if isinstance(t, Tensor) and t.dtype in HALF else t for t in (x, *others)]


def _operands(op: str, x: object, positive: object, negative: object, tile: object) -> None:
    if not isinstance(x, Tensor) or not isinstance(positive, Tensor):
        came = f"{checks.shape_of(x)} and {checks.shape_of(positive)}"
        raise TypeError(f"{op}: x and positive must be torch.Tensors, got {came}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 1 or positive.dim() != 2 or positive.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{op}: expected x [..., K] and positive [K, C], got {checks.shape_of(x)} and {checks.shape_of(positive)}"
        )
    checks.like(op, "positive", positive, positive.shape, x.dtype, x.device)
    if negative is not None:
        checks.like(op, "negative", negative, positive.shape, x.dtype, x.device)
    checks.whole(op, "tile", tile, 1, 1 << 20)


def _full_scale(op: str, name: str, value: float | Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if isinstance(value, Tensor):
        checks.like(op, name, value, () if value.dim() == 0 else shape, x.dtype, x.device)
        return value.detach()
    return x.new_tensor(checks.number(op, name, value, above=0.0))


def _key(op: str, seed: int | Tensor, stream: int) -> Tensor:
    if isinstance(seed, Tensor):
        checks.like(op, "seed", seed, (2,), torch.int64, torch.device("cpu"))
        return seed
    checks.whole(op, "seed", seed, -(1 << 63), (1 << 64) - 1)
    checks.whole(op, "stream", stream, 0, (1 << 32) - 1)
    return torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed, stream])


def _top(bits: int) -> int:
    return 2 ** (bits - 1) - 1 if bits else 0


def _converter(full_scale: Tensor, bits: int) -> Tensor:
    """[step, 1/step], one value or one a column, as the kernels take it; a range of 0 converts everything to 0."""
    step = full_scale.clamp_min(torch.finfo(full_scale.dtype).tiny * 2.0**20) / _top(bits)
    return torch.stack([step, 1 / step])


def _through_dac(x: Tensor, dac_range: Tensor | None, bits: int) -> Tensor:
    return x if dac_range is None else reference.quantize(x, bits, dac_range)


def _kernel(x, positive, negative, dac_range, adc_range, key, tile, apart, dac_bits, adc_bits, read_noise):
    kernels = extension._C.crossbar
    x, positive = x.contiguous(), positive.contiguous()
    negative = None if negative is None else negative.contiguous()
    out = x.new_empty(x.shape[0], positive.shape[1])
    if dac_bits:
        codes = torch.empty_like(x)
        kernels.quantize(x, _top(dac_bits), _converter(dac_range, dac_bits), codes)
        x = codes
    seed, stream = key.tolist() if key is not None else (0, 0)
    adc = _converter(adc_range, adc_bits) if adc_bits else None
    kernels.matmul(x, positive, negative, tile, apart, _top(adc_bits), adc, read_noise, seed, stream, out)
    return out


def _fake(x, positive, *rest):
    return x.new_empty(x.shape[0], positive.shape[1])


def _fallback(x, positive, negative, dac_range, adc_range, key, tile, apart, dac_bits, adc_bits, read_noise):
    seed, stream = key.tolist() if key is not None else (0, 0)
    return reference.crossbar_matmul(
        x, positive, negative, tile=tile, read=READS[apart], dac_bits=dac_bits or None, dac_range=dac_range,
        adc_bits=adc_bits or None, adc_range=adc_range, read_noise=read_noise, seed=seed, stream=stream,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, positive, negative, dac_range, *_, ctx.dac_bits, _, _ = inputs
    ctx.save_for_backward(x, positive, negative, dac_range)


def _backward(ctx, grad):
    x, positive, negative, dac_range = ctx.saved_tensors
    grad_x = grad_positive = grad_negative = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ (positive if negative is None else positive - negative).mT
        if dac_range is not None:
            grad_x = torch.where(x.abs() <= dac_range, grad_x, 0.0)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        found = _through_dac(x, dac_range, ctx.dac_bits).mT @ grad
        grad_positive = found if ctx.needs_input_grad[1] else None
        grad_negative = -found if ctx.needs_input_grad[2] else None
    return grad_x, grad_positive, grad_negative, *(None,) * 8


_crossbar_matmul = register(
    "crossbar_matmul(Tensor x, Tensor positive, Tensor? negative, Tensor? dac_range, Tensor? adc_range, Tensor? key, "
    "int tile, bool apart, int dac_bits, int adc_bits, float read_noise) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    fallback=_fallback,
    setup_context=_setup_context,
    backward=_backward,
)
