"""Counter-based draws: the order of an epoch, and the words behind augmentation and packaged splits.

Every word is a pure function of (seed, epoch, purpose, position), so the bits depend neither on how many processes
run nor on what was drawn before. numpy keeps the raw output of a bit generator stable over its versions, which it
does not promise for `Generator.permutation` and its like.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Purposes: one counter word, so that draws for different ends share a seed and stay independent.
ORDER, AUGMENT, SPLIT = range(3)


def philox_words(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """The first `count` raw words (uint64 [count]) of Philox4x64-10: key (seed, 0), counter (block, 0, epoch, purpose).

    Blocks of four words, numbered from 1. The first words do not depend on `count`.
    ValueError: seed or epoch outside 0 <= value < 2**64, or negative count.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must satisfy 0 <= {name} < 2**64, got {value}")
    key, counter = np.array([seed, 0], np.uint64), np.array([0, 0, epoch, purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` visits n samples: a permutation of 0..n-1 (int64 [n]).

    A pure function of its arguments: the stable argsort of one Philox word a sample. ValueError as `philox_words`.
    """
    return torch.from_numpy(np.argsort(philox_words(n, seed, epoch, ORDER), kind="stable").astype(np.int64, copy=False))
