"""Philox4x32-10 (Salmon et al., SC 2011) in plain torch integers: the draws of every random kernel, written to be read."""

from __future__ import annotations

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
