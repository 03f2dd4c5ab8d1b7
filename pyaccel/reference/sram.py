"""Plain-torch twins of the failing-memory kernels: the definition of every bit in a form to be read.

Memory is a string of bits: words lie one after another, least significant bit first, so bit b of word e is flat bit
i = e*W + b of the (little-endian) memory, whatever integer type holds it. 2011.13392 and its companion papers give no
bit-level definition; this one is ours (docs/sram.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyaccel.reference.philox import DENSE_FLIP_HIGH, DENSE_FLIP_LOW, MASK, SPARSE_FLIP, STUCK_VALUE, philox

WORD_BITS = (1, 2, 4, 8, 16, 32)
MODES = ("dense", "sparse")
SEMANTICS = ("flip", "stuck")
DTYPE_BITS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.int32: 32}
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 4096
_CHUNK = 1 << 14  # bytes of memory treated at a time: the twin spends 100 bytes on each bit


def thresholds(probability: float | Sequence[float], word_bits: int) -> tuple[int, ...]:
    """T_b = round(p_b * 2^32) of each bit, LSB first; the effective probability is exactly T_b / 2^32."""
    values = [probability] * word_bits if isinstance(probability, (int, float)) else list(probability)
    return tuple(min(round(float(p) * 2.0**32), 1 << 32) for p in values)


def block_size(threshold: int) -> int:
    """Words that one sparse draw covers: the smallest power of two >= 2/p, within 64..4096."""
    size = SMALLEST_BLOCK
    while size < LARGEST_BLOCK and size * threshold < 2 << 32:
        size *= 2
    return size


@functools.lru_cache(maxsize=256)
def count_table(threshold: int, block: int) -> tuple[int, ...]:
    """C[c] = floor(2^32 * P(Binomial(block, threshold/2^32) <= c)), capped at 2^32-1, up to the first capped entry.

    In exact integers: no libm has a say in which cells fail.
    """
    p, q = threshold, (1 << 32) - threshold
    if q == 0:
        return (0,) * block + (MASK,)
    term = q**block  # of the total 2^(32 * block)
    total, table = 0, []
    for c in range(block + 1):
        total += term
        table.append(min(total >> (32 * block - 32), MASK))
        if table[-1] == MASK:
            break
        term = term * (block - c) * p // ((c + 1) * q)  # exact: C(n, c+1) p^(c+1) q^(n-c-1) is an integer
    return tuple(table)


def _bytes_of(seed: int, first: int, count: int, stream: int, domain: int) -> Tensor:
    """Stream bytes of flat bits first .. first+count: byte i mod 16 of Philox(i / 16)."""
    group = torch.arange(first // 16, (first + count - 1) // 16 + 1)
    words = philox(seed, group, group >> 32, stream, domain)
    split = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16, 24)], -1).reshape(-1)
    return split[first % 16 :][:count]


def dense_bits(limits: Sequence[int], first: int, count: int, seed: int, stream: int) -> Tensor:
    """Which of the flat bits first .. first+count fail: U(i) < T, with U = (high byte, 24 low bits). bool `[count]`."""
    i = torch.arange(first, first + count)
    high = _bytes_of(seed, first, count, stream, DENSE_FLIP_HIGH)
    words = philox(seed, i // 4, i >> 34, stream, DENSE_FLIP_LOW)
    low = words.take_along_dim((i % 4)[:, None], -1)[:, 0] >> 8
    return ((high << 24) | low) < torch.tensor(limits)[i % len(limits)]


def sparse_positions(threshold: int, plane: int, first: int, count: int, seed: int, stream: int) -> Tensor:
    """Words in first .. first+count whose bit `plane` fails, sorted: a binomial count for each block of words, then
    that many distinct positions by Floyd's method. int64."""
    if threshold == 0 or count == 0:
        return torch.empty(0, dtype=torch.int64)
    block, domain = block_size(threshold), SPARSE_FLIP | plane << 16
    table = torch.tensor(count_table(threshold, block))
    k = torch.arange(first // block, (first + count - 1) // block + 1)
    words = philox(seed, k, k >> 32, stream, domain)
    counts = torch.searchsorted(table, words[:, 0].contiguous(), right=True).clamp(max=len(table) - 1)
    chosen = torch.full((len(k), int(counts.max())), -1)
    for s in range(chosen.shape[1]):
        lane = (s + 1) % 4
        if lane == 0:
            words = philox(seed, k, k >> 32, stream, domain | (s + 1) // 4)
        j = block - counts + s
        r = (words[:, lane] * (j + 1)) >> 32
        repeated = (chosen == r[:, None]).any(1)
        chosen[:, s] = torch.where(s < counts, torch.where(repeated, j, r), -1)
    positions = (k[:, None] * block + chosen)[chosen >= 0]
    return positions[(positions >= first) & (positions < first + count)].sort().values


def failing_bits(limits: Sequence[int], first: int, words: int, seed: int, stream: int, mode: str) -> Tensor:
    """Which bits of words first .. first+words fail; bool `[words * word_bits]`, flat."""
    word_bits = len(limits)
    if mode == "dense":
        return dense_bits(limits, first * word_bits, words * word_bits, seed, stream)
    failed = torch.zeros(words, word_bits, dtype=torch.bool)
    for plane, threshold in enumerate(limits):
        failed[sparse_positions(threshold, plane, first, words, seed, stream) - first, plane] = True
    return failed.reshape(-1)


def _fail(memory: Tensor, limits, first: int, seed: int, stream: int, mode: str, semantics: str) -> Tensor:
    """uint8 memory in, failed memory out. `first`: word number of its first word."""
    shifts = torch.arange(8)
    bits = (memory[:, None] >> shifts) & 1
    failed = failing_bits(limits, first, memory.numel() * 8 // len(limits), seed, stream, mode).reshape(-1, 8)
    if semantics == "flip":
        read = bits ^ failed.to(bits.dtype)
    else:
        value = _bytes_of(seed, first * len(limits), bits.numel(), stream, STUCK_VALUE).reshape(-1, 8) & 1
        read = torch.where(failed, value.to(bits.dtype), bits)
    return (read << shifts).sum(1).to(torch.uint8)


def flip_bits(
    words: Tensor,
    probability: float | Sequence[float],
    *,
    word_bits: int | None = None,
    seed: int,
    stream: int = 0,
    first_element: int = 0,
    mode: str = "dense",
    semantics: str = "flip",
) -> Tensor:
    """Twin of `pyaccel.ops.flip_bits`, which documents it."""
    limits = thresholds(probability, DTYPE_BITS[words.dtype] if word_bits is None else word_bits)
    memory = words.contiguous().cpu().reshape(-1).view(torch.uint8)
    chunk = -(-_CHUNK // LARGEST_BLOCK) * LARGEST_BLOCK
    read = torch.empty_like(memory)
    for start in range(0, memory.numel(), chunk):
        first = first_element + start * 8 // len(limits)
        piece = slice(start, start + chunk)
        read[piece] = _fail(memory[piece], limits, first, seed, stream, mode, semantics)
    return read.view(words.dtype).reshape(words.shape).to(words.device)


def code_range(word_bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of the quantiser: symmetric two's complement, or unsigned."""
    top = (1 << (word_bits - 1)) - 1 if signed else (1 << word_bits) - 1
    return (-top if signed else 0), top


class _SramNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, probability, word_bits, signed, seed, stream, first_element, mode):
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        low, high = code_range(word_bits, signed)
        scale = torch.as_tensor(scale, dtype=state, device=x.device)
        nearest = torch.round(x.to(state) / scale)
        nearest = torch.where(nearest.isnan(), 0.0, nearest)
        ctx.save_for_backward((nearest >= low) & (nearest <= high))
        codes = nearest.clamp(low, high).to(torch.int64).cpu().reshape(-1)
        limits, noisy = thresholds(probability, word_bits), torch.empty_like(codes)
        weights = 1 << torch.arange(word_bits)
        for start in range(0, codes.numel(), _CHUNK):
            piece = codes[start : start + _CHUNK]
            failed = failing_bits(limits, first_element + start, piece.numel(), seed, stream, mode)
            mask = (failed.reshape(-1, word_bits) * weights).sum(1)
            word = (piece ^ mask) & ((1 << word_bits) - 1)
            # A two's complement word of W bits: its top bit counts -2^(W-1).
            noisy[start : start + _CHUNK] = word - ((word >> (word_bits - 1) & 1) << word_bits) if signed else word
        return (noisy.to(x.device, state).reshape(x.shape) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), *[None] * 8


def sram_noise(
    x: Tensor,
    scale: float | Tensor,
    probability: float | Sequence[float],
    *,
    word_bits: int = 8,
    signed: bool,
    seed: int,
    stream: int = 0,
    first_element: int = 0,
    mode: str = "dense",
) -> Tensor:
    """Twin of `pyaccel.ops.sram_noise`, which documents it."""
    return _SramNoise.apply(x, scale, probability, word_bits, signed, seed, stream, first_element, mode)
