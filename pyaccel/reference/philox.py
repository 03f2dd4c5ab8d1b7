"""Philox4x32-10 (Salmon et al., SC 2011) in plain torch integers: the draws of every random kernel, written to be read."""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF

# What each counter domain draws; the same table as csrc/core/philox.h.
DENSE_FLIP_HIGH, DENSE_FLIP_LOW, STUCK_VALUE, ENCODER, DEVICE_VARIATION, READ_NOISE, DROPOUT = range(7)
SPARSE_FLIP = 0x02000000


def philox(seed: int, index_low, index_high, stream, domain) -> torch.Tensor:
    """Four 32-bit words for each counter `(index_low, index_high, stream, domain)` under the key `seed` (64 bits).

    The counter words are int64 tensors (or ints) in 0..2^32-1 that broadcast; returns int64 `[..., 4]`.
    """
    words = [torch.as_tensor(w, dtype=torch.int64) & MASK for w in (index_low, index_high, stream, domain)]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # int64 wraps modulo 2^64, so both halves of the 64-bit product are right after masking.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], -1)


def philox_normal(seed: int, stream: int, domain: int, first: int, count: int) -> torch.Tensor:
    """Standard normal draws for elements first .. first + count - 1, float64 `[count]`.

    Element i belongs to the counter i // 4. Words (0, 1) of a counter make elements 0 and 1 of its four, words (2, 3)
    make 2 and 3, by Box and Muller: radius sqrt(-2 ln u) from the first word of the pair, angle 2 pi v from the second,
    cosine then sine; a word becomes a uniform as ((word >> 9) + 1/2) / 2^23, which float32 holds exactly.
    """
    block = torch.arange(first // 4, (first + count + 3) // 4)
    words = philox(seed, block, block >> 32, stream, domain)
    uniform = ((words >> 9).to(torch.float64) + 0.5) / 2**23
    radius = torch.sqrt(-2 * torch.log(uniform[:, 0::2]))
    angle = 2 * math.pi * uniform[:, 1::2]
    normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).reshape(-1)
    return normal[first % 4 : first % 4 + count]
