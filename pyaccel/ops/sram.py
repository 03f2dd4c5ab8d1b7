"""`flip_bits`, `flip_bits_` and `sram_noise`: memory that fails, the same bits everywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks
from pyaccel.ops.library import register
from pyaccel.reference import sram as twin
from pyaccel.reference.neuron import state_dtype

NOISE_BITS = (1, 2, 4, 8, 16)  # float32 holds no 32-bit code
SPARSE, STUCK = twin.MODES.index("sparse"), twin.SEMANTICS.index("stuck")
LARGEST_FIRST = 1 << 58  # element numbers stay below 2^64 bits
Probability = float | Sequence[float]


def flip_bits(
    words: Tensor,
    probability: Probability,
    *,
    word_bits: int | None = None,
    seed: int | Tensor,
    stream: int = 0,
    first_element: int = 0,
    mode: str = "dense",
    semantics: str = "flip",
) -> Tensor:
    """The words as a failing memory returns them: each bit fails on its own, with the probability of its position.

    Which bits fail depends on (seed, stream, word number, mode) alone: not on device, threads, instruction set, or how the
    memory is cut. The definition, to the bit, is in docs/sram.md. Not differentiable (words are integers).

    Args:
        words: int8, uint8, int16 or int32, any shape; numbered in logical (row-major) order.
        probability: one value in [0, 1] for every bit, or `word_bits` of them, bit 0 = least significant.
        word_bits: W = 1, 2, 4, 8, 16 or 32, at most the width of the dtype; default: that width. Narrower words lie
            packed, least significant bits first (two 4-bit words a byte).
        seed, stream: the key, 64 bits, and the stream, 32 bits. `seed` may also be an int64 tensor `[seed, stream,
            first_element]` on the CPU, which keeps compiled graphs from being specialised to their values.
        first_element: number of the first word, for memory that is treated in pieces.
        mode: "dense" is nested: with one seed a lower probability only takes failures away (one seed is one chip).
            "sparse" costs time in proportion to the failures; an equally valid sample, but another one, not nested.
        semantics: "flip": a failing bit reads inverted; its probability is a bit error rate. "stuck": a failing cell
            reads 0 or 1, fixed, with equal odds, so that the bit error rate is HALF the probability on balanced data.

    Returns:
        A tensor like `words`.
    """
    width, probabilities = _checked("flip_bits", words, word_bits, probability)
    key = _key("flip_bits", seed, stream, first_element)
    return _flip_bits(
        words,
        key,
        probabilities,
        width,
        checks.choice("flip_bits", "mode", mode, twin.MODES) == SPARSE,
        checks.choice("flip_bits", "semantics", semantics, twin.SEMANTICS) == STUCK,
    )


def flip_bits_(
    words: Tensor,
    probability: Probability,
    *,
    word_bits: int | None = None,
    seed: int | Tensor,
    stream: int = 0,
    first_element: int = 0,
    mode: str = "dense",
    semantics: str = "flip",
) -> Tensor:
    """`flip_bits` in place; sparse mode then touches only the memory that fails. Returns `words`."""
    width, probabilities = _checked("flip_bits_", words, word_bits, probability)
    key = _key("flip_bits_", seed, stream, first_element)
    _flip_bits_in_place(
        words,
        key,
        probabilities,
        width,
        checks.choice("flip_bits_", "mode", mode, twin.MODES) == SPARSE,
        checks.choice("flip_bits_", "semantics", semantics, twin.SEMANTICS) == STUCK,
    )
    return words


def sram_noise(
    x: Tensor,
    scale: float | Tensor,
    probability: Probability,
    *,
    word_bits: int = 8,
    signed: bool,
    seed: int | Tensor,
    stream: int = 0,
    first_element: int = 0,
    mode: str = "dense",
) -> Tensor:
    """Values as they come back from failing memory: quantised to W-bit words, bits flipped, dequantised.

    q = clamp(round(x / scale)), half to even, in [-(2^(W-1)-1), 2^(W-1)-1] (two's complement) where `signed`, else in
    [0, 2^W - 1]; a NaN is stored as 0; then `flip_bits` on the words; y = q * scale. The gradient is straight-through:
    that of y where the quantiser did not clip, 0 where it did. `scale` gets no gradient.

    Args:
        x: float32, bfloat16, float16 or float64, any shape; elements numbered in logical (row-major) order.
        scale: the step of the code, positive: a float, or a 0-d tensor on x's device (float32; float64 for float64).
        word_bits: 1, 2, 4, 8 or 16 (signed words need 2).
        probability, seed, stream, first_element, mode: as in `flip_bits`.

    Returns:
        y, of the shape and dtype of `x`.
    """
    checks.floating("sram_noise", "x", x, 0, "of any shape")
    if word_bits not in NOISE_BITS or (signed and word_bits == 1):
        allowed = "2, 4, 8 or 16 for signed words" if signed else "1, 2, 4, 8 or 16"
        raise ValueError(f"sram_noise: word_bits must be {allowed}, got {word_bits!r}")
    probabilities = _probabilities("sram_noise", probability, word_bits)
    if isinstance(scale, Tensor):
        checks.like("sram_noise", "scale", scale, (), state_dtype(x.dtype), x.device)
        if scale.requires_grad:
            raise ValueError("sram_noise: scale has no gradient here; pass scale.detach()")
        step, value = scale, 1.0
    else:
        step, value = None, checks.number("sram_noise", "scale", scale, above=0.0)
    key = _key("sram_noise", seed, stream, first_element)
    sparse = checks.choice("sram_noise", "mode", mode, twin.MODES) == SPARSE
    return _sram_noise(x, step, key, value, probabilities, word_bits, bool(signed), sparse)


def _checked(op: str, words: Tensor, word_bits: int | None, probability: Probability) -> tuple[int, list[float]]:
    if not isinstance(words, Tensor):
        raise TypeError(f"{op}: words must be a torch.Tensor of integers, got {checks.shape_of(words)}")
    if words.dtype not in twin.DTYPE_BITS:
        raise TypeError(
            f"{op}: words must be int8, uint8, int16 or int32, got {words.dtype}; quantise first, or use ops.sram_noise"
        )
    widest = twin.DTYPE_BITS[words.dtype]
    width = widest if word_bits is None else word_bits
    if width not in twin.WORD_BITS or width > widest:
        allowed = ", ".join(str(w) for w in twin.WORD_BITS if w <= widest)
        raise ValueError(f"{op}: word_bits must be one of {allowed} for {words.dtype}, got {word_bits!r}")
    return width, _probabilities(op, probability, width)


def _probabilities(op: str, probability: Probability, word_bits: int) -> list[float]:
    if isinstance(probability, Tensor):
        raise TypeError(f"{op}: probability must be numbers on the host, got a tensor; use .tolist()")
    if isinstance(probability, (int, float)) and not isinstance(probability, bool):
        values = [float(probability)] * word_bits
    elif isinstance(probability, Sequence) and not isinstance(probability, str):
        values = [float(p) for p in probability]
    else:
        raise TypeError(f"{op}: probability must be a number or a sequence of numbers, got {type(probability).__name__}")
    if len(values) != word_bits:
        raise ValueError(
            f"{op}: probability must be one number, or one for each of the {word_bits} bits of a word (bit 0 first), "
            f"got {len(values)}"
        )
    for p in values:
        if not 0.0 <= p <= 1.0 or math.isnan(p):
            raise ValueError(f"{op}: a probability must be in [0, 1], got {p}")
    return values


def _key(op: str, seed: int | Tensor, stream: int, first_element: int) -> Tensor:
    """The int64 tensor [seed, stream, first_element]: values that change with each call and must not enter a graph."""
    if isinstance(seed, Tensor):
        checks.like(op, "seed", seed, (3,), torch.int64, torch.device("cpu"))
        return seed
    checks.whole(op, "seed", seed, -(1 << 63), (1 << 64) - 1)
    checks.whole(op, "stream", stream, 0, (1 << 32) - 1)
    checks.whole(op, "first_element", first_element, 0, LARGEST_FIRST)
    return torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed, stream, first_element])


@functools.lru_cache(maxsize=128)
def _plan(probabilities: tuple[float, ...], word_bits: int, sparse: bool):
    """Thresholds and binomial tables of the kernels, made once for each set of probabilities."""
    planes = []
    for limit in twin.thresholds(probabilities, word_bits):
        block = twin.block_size(limit)
        table = twin.count_table(limit, block) if limit and sparse else ()
        planes.append((limit, block.bit_length() - 1, table))
    return extension._C.sram.Plan(sparse, planes)


def _draw(key: Tensor) -> dict:
    seed, stream, first = key.tolist()
    return dict(seed=seed, stream=stream, first_element=first)


# ---- flip_bits


def _flip(words: Tensor, out: Tensor, key, probability, word_bits, sparse, stuck) -> None:
    plan = _plan(tuple(probability), word_bits, sparse)
    extension._C.sram.flip(words, out, plan, *key.tolist(), stuck)


def _flip_kernel(words, key, probability, word_bits, sparse, stuck):
    dense = words.contiguous()
    out = torch.empty_like(dense, memory_format=torch.contiguous_format)
    _flip(dense, out, key, probability, word_bits, sparse, stuck)
    return out if words.is_contiguous() else torch.empty_like(words).copy_(out)


def _flip_kernel_in_place(words, key, probability, word_bits, sparse, stuck):
    dense = words.contiguous()
    _flip(dense, dense, key, probability, word_bits, sparse, stuck)
    if dense is not words:
        words.copy_(dense)


def _flip_fallback(words, key, probability, word_bits, sparse, stuck):
    out = reference.flip_bits(
        words,
        probability,
        word_bits=word_bits,
        mode=twin.MODES[sparse],
        semantics=twin.SEMANTICS[stuck],
        **_draw(key),
    )
    return torch.empty_like(words).copy_(out)


def _flip_fallback_in_place(words, *arguments):
    words.copy_(_flip_fallback(words, *arguments))


_flip_bits = register(
    "flip_bits(Tensor words, Tensor key, float[] probability, int word_bits, bool sparse, bool stuck) -> Tensor",
    kernel=_flip_kernel,
    fake=lambda words, *_: torch.empty_like(words),
    fallback=_flip_fallback,
)
_flip_bits_in_place = register(
    "flip_bits_(Tensor(a!) words, Tensor key, float[] probability, int word_bits, bool sparse, bool stuck) -> ()",
    kernel=_flip_kernel_in_place,
    fake=lambda *_: None,
    fallback=_flip_fallback_in_place,
)


# ---- sram_noise


def _noise_kernel(x, scale, key, value, probability, word_bits, signed, sparse):
    dense = x.contiguous()
    y = torch.empty_like(dense, memory_format=torch.contiguous_format)
    plan = _plan(tuple(probability), word_bits, sparse)
    extension._C.sram.noise(dense, scale, value, plan, signed, *key.tolist(), y)
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)


def _noise_fallback(x, scale, key, value, probability, word_bits, signed, sparse):
    step = value if scale is None else scale
    y = reference.sram_noise(
        x.detach(), step, probability, word_bits=word_bits, signed=signed, mode=twin.MODES[sparse], **_draw(key)
    )
    return torch.empty_like(x).copy_(y)


def _noise_setup(ctx, inputs, output):
    x, scale, _, value, _, word_bits, signed, _ = inputs
    ctx.save_for_backward(x, scale)
    ctx.options = (value, *twin.code_range(word_bits, signed))


def _noise_backward(ctx, grad):
    x, scale = ctx.saved_tensors
    return _sram_noise_backward(grad, x, scale, *ctx.options), *[None] * 7


def _backward_kernel(grad, x, scale, value, low, high):
    dense = x.contiguous()
    grad_x = torch.empty_like(dense, memory_format=torch.contiguous_format)
    extension._C.sram.noise_backward(grad.contiguous(), dense, scale, value, low, high, grad_x)
    return grad_x if x.is_contiguous() else torch.empty_like(x).copy_(grad_x)


def _backward_fallback(grad, x, scale, value, low, high):
    state = state_dtype(x.dtype)
    code = torch.round(x.to(state) / (value if scale is None else scale)).nan_to_num(0.0)
    return torch.empty_like(x).copy_(torch.where((code >= low) & (code <= high), grad, 0.0))


_sram_noise_backward = register(
    "sram_noise_backward(Tensor grad, Tensor x, Tensor? scale, float value, int low, int high) -> Tensor",
    kernel=_backward_kernel,
    fake=lambda grad, x, *_: torch.empty_like(x),
    fallback=_backward_fallback,
)
_sram_noise = register(
    "sram_noise(Tensor x, Tensor? scale, Tensor key, float value, float[] probability, int word_bits, bool signed, bool sparse)"
    " -> Tensor",
    kernel=_noise_kernel,
    fake=lambda x, *_: torch.empty_like(x),
    fallback=_noise_fallback,
    setup_context=_noise_setup,
    backward=_noise_backward,
)
