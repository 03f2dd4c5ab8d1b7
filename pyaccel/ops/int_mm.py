"""`torch._int_mm` for 8x8-bit products, behind a known answer.

The library runs at the rate of the unit where it has VNNI or tensor cores. On a CPU without VNNI, or capped below it by
an environment variable, it either saturates at 16 bits and returns wrong integers for full-range int8, without a word,
or falls back to a plain loop (AMD processors without AVX-512: exact, and thirty times slower than the kernel here). So
the first use on a device multiplies matrices that would show it; one warning says so where the library is wrong. Which
of two exact kernels runs never changes a result.
"""

from __future__ import annotations

import functools
import time
import warnings

import torch
from torch import Tensor

from pyaccel import extension

SMALL_BATCH = 8  # up to here the kernel that streams packed weights serves better


@functools.cache
def library_is_exact(device: torch.device) -> bool:
    """Whether `torch._int_mm` multiplies full-range int8 exactly on `device`; warns once where not."""
    size, length = 32, 512
    k, i = torch.arange(length), torch.arange(size)[:, None]
    # rows of the extremes, of one sign and of both, and rows of every value
    a = torch.where(i % 2 == 0, torch.where(i % 4 == 0, 127, -128), (k * 37 + i * 101) % 256 - 128).to(torch.int8)
    b = torch.where(i % 3 == 0, torch.where(i % 2 == 0, 127, -128), (k * 91 + i * 57) % 256 - 128).to(torch.int8)
    wanted = (a.double() @ b.double().T).to(torch.int64)
    try:
        found = torch._int_mm(a.to(device), b.to(device).T).cpu().to(torch.int64)
        wrong = int((found != wanted).sum())
        reason = f"{wrong} of {wanted.numel()} sums of a known product are wrong" if wrong else ""
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = f"it fails: {str(error).splitlines()[0]}"
    if reason:
        warnings.warn(
            f"pyaccel: torch._int_mm is not exact for full-range int8 on '{device}' ({reason}); pyaccel's own exact kernel "
            "runs instead. CPUs without VNNI behave so, and those capped below it (ONEDNN_MAX_CPU_ISA).",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


@functools.cache
def library_serves(device: torch.device) -> bool:
    """Whether 8x8-bit products go through the library on `device`: exact, and on a CPU no slower than the kernel here."""
    if not library_is_exact(device):
        return False
    if device.type != "cpu":
        return True
    size, length = 128, 512
    words = torch.arange(size * length // 4, dtype=torch.int32).reshape(size, -1)
    p, q = words.new_empty((size, size)), words.new_empty(size)

    def seconds(product) -> float:
        """The shorter of two runs."""
        found = []
        for _ in range(2):
            start = time.perf_counter()
            product()
            found.append(time.perf_counter() - start)
        return min(found)

    ours = seconds(lambda: extension._C.qmac.linear(words, words, 8, 8, length, p, q))
    return seconds(lambda: library_product(words, words, length)) <= ours


def library_product(activation_words: Tensor, weight_words: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
    """P and Q of 8-bit codes: both sides minus 128 through `torch._int_mm`, then corrected by the row sums::

        sum w a = sum (w - 128)(a - 128) + 128 (sum a + sum w) - 128^2 K

    None where the library refuses the shape.
    """
    batch, outputs = activation_words.shape[0], weight_words.shape[0]
    if activation_words.is_cuda and (batch <= 16 or outputs % 8 or length % 8):
        return None
    a, q = _signed(activation_words, length)
    w, sums = _signed(weight_words, length)
    p = torch._int_mm(a, w.T)
    p += (q * 128)[:, None]
    p += sums * 128 - 16384 * length
    return p, q


def _signed(words: Tensor, length: int) -> tuple[Tensor, Tensor]:
    codes = words.new_empty((words.shape[0], length), dtype=torch.int8)
    sums = words.new_empty(words.shape[0])
    extension._C.qmac.to_signed(words, length, codes, sums)
    return codes, sums
