from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel.data import epoch_order
from pyaccel.data.order import AUGMENT, ORDER, SPLIT, philox_words

MASK = 2**64 - 1


def philox4x64(counter, key):
    """Ten rounds of Philox4x64 (Salmon et al. 2011) in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [q >> 64 ^ c[1] ^ k[0], q & MASK, p >> 64 ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_the_slow_philox_gives_the_published_vector():
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, MASK), st.integers(0, MASK), st.sampled_from([ORDER, AUGMENT, SPLIT]), st.integers(0, 13))
def test_words_follow_the_stated_key_and_counter(seed, epoch, purpose, count):
    blocks = [philox4x64([block, 0, epoch, purpose], [seed, 0]) for block in range(1, 5)]
    assert philox_words(count, seed, epoch, purpose).tolist() == sum(blocks, [])[:count]


GOLDEN = {
    (10, 0, 0): [0, 2, 9, 1, 8, 5, 4, 3, 6, 7],
    (10, 0, 1): [1, 9, 2, 8, 3, 5, 0, 4, 7, 6],
    (10, 1, 0): [3, 5, 2, 9, 7, 0, 8, 6, 1, 4],
    (1000, 42, 7): [689, 66, 187, 979, 936, 538, 858, 726, 839, 599],
    (50000, 2**64 - 1, 199): [399, 3538, 22051, 7012, 15030, 20545, 11697, 18343, 35193, 16511],
}


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN.items(), ids=str)
def test_order_is_fixed_for_good(arguments, expected):
    order = epoch_order(*arguments)
    assert order.dtype == torch.int64
    assert order[:10].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 2, 3, 7, 129, 1000]), st.integers(0, MASK), st.integers(0, 10**6))
def test_order_is_a_permutation_and_repeats(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.shape == (n,)
    assert order.sort().values.tolist() == list(range(n))
    assert torch.equal(order, epoch_order(n, seed, epoch))


def test_order_ignores_global_random_state():
    first = epoch_order(100, 3, 4)
    np.random.seed(1)
    torch.manual_seed(1)
    epoch_order(50, 9, 9)
    assert torch.equal(first, epoch_order(100, 3, 4))


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_is_equally_likely():
    places = torch.stack([epoch_order(5, 0, epoch) for epoch in range(2000)])
    counts = torch.stack([(places == value).sum(0) for value in range(5)])
    assert (counts - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(("arguments", "text"), [
    ((5, -1, 0), r"seed must satisfy 0 <= seed < 2\*\*64, got -1"),
    ((5, 2**64, 0), r"seed must satisfy 0 <= seed < 2\*\*64, got 18446744073709551616"),
    ((5, 0, -3), r"epoch must satisfy 0 <= epoch < 2\*\*64, got -3"),
    ((-1, 0, 0), "count must not be negative, got -1"),
])
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        epoch_order(*arguments)
