"""Philox against its published known answers, and against a second implementation in Python integers."""

from __future__ import annotations

import random

import pytest
import torch

from pyaccel.reference import philox
from pyaccel.reference.philox import ENCODER

ONES = 0xFFFFFFFF


def philox_integers(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


# From the Random123 distribution (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES), (ONES, ONES, ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("key, counter, words", KNOWN)
def test_known_answers(key, counter, words):
    wanted = [int(w, 16) for w in words.split()]
    assert philox_integers(key, counter) == wanted
    assert philox(key[0] | key[1] << 32, *counter).tolist() == wanted


def test_random_counters_and_broadcasting():
    rng = random.Random(1)
    counters = [[rng.getrandbits(32) for _ in range(4)] for _ in range(50)]
    key = (rng.getrandbits(32), rng.getrandbits(32))
    seed = key[0] | key[1] << 32
    together = philox(seed, *(torch.tensor(c) for c in zip(*counters, strict=True)))
    assert together.tolist() == [philox_integers(key, tuple(c)) for c in counters]
    grid = philox(seed, torch.arange(3)[:, None], torch.arange(2)[None], 7, 9)
    assert grid.shape == (3, 2, 4)
    assert grid[2, 1].tolist() == philox_integers(key, (2, 1, 7, 9))


def test_a_negative_seed_is_its_64_bit_pattern():
    assert torch.equal(philox(-1, 5, 6, 7, 8), philox((1 << 64) - 1, 5, 6, 7, 8))


def test_the_encoder_draws_from_its_domain():
    assert ENCODER == 3
