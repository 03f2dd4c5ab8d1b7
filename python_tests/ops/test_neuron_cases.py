"""The helpers of this folder can fail: a cover that misses a pair, or a comparison that lets everything pass, proves nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from neuron_cases import LAYOUTS, arrange, assert_close, assert_spikes_match, pairwise


def test_pairwise_covers_every_pair_with_few_cases():
    axes = dict(a=range(4), b="xyz", c=(True, False), d=range(5), e=(None, 1))
    cases = pairwise(**axes)
    for one, other in itertools.combinations(axes, 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(axes[one], axes[other]))
    assert len(cases) <= 30  # the product has 240; at least 20 are needed
    assert cases == pairwise(**axes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrange_keeps_values(layout):
    x = torch.randn(3, 2, 4, 5, 6)
    y = arrange(x, layout)
    wanted = x[:, :1].expand(x.shape) if layout == "expanded" else x
    assert torch.equal(y, wanted)
    assert y.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (y.data_ptr() % 16 == 0) == (layout != "offset")


def spikes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_spikes_that_flip_inside_the_band_match_until_then():
    wanted, got = spikes([1, 0, 1], [0, 0, 1], [1, 1, 0]), spikes([1, 0, 1], [0, 1, 1], [1, 0, 0])
    margin = torch.full((3, 3), 0.5)
    margin[1, 1] = -1e-7
    same = assert_spikes_match(got, wanted, margin, 1e-6, most=0.5)
    assert same.tolist() == [True, False, True]


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_first_flip_outside_the_band_is_caught(row):
    wanted = torch.zeros(3, 4)
    got = wanted.clone()
    got[row, 2] = 1
    margin = torch.full((3, 4), -1e-3)
    if row < 2:
        margin[row + 1, 2] = 0  # a later crossing excuses nothing
    with pytest.raises(AssertionError, match="1 neurons differ first"):
        assert_spikes_match(got, wanted, margin, 1e-6, most=1)


def test_many_flips_inside_the_band_are_caught():
    with pytest.raises(AssertionError, match="2 of 4 neurons flipped"):
        assert_spikes_match(spikes([1, 1, 0, 0]), spikes([0, 0, 0, 0]), torch.zeros(1, 4), 1e-6, most=0.25)


def test_a_nan_margin_excuses_nothing():
    with pytest.raises(AssertionError, match="differ first"):
        assert_spikes_match(spikes([1]), spikes([0]), torch.tensor([[float("nan")]]), 1e-6, most=1)


def test_close_is_relative_to_the_largest_and_knows_the_dtype():
    wanted = torch.tensor([100.0, 1.0])
    assert_close(wanted + 2e-3, wanted, torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(wanted + 4e-3, wanted, torch.float32)
    half = wanted.bfloat16()
    assert_close(half, half, torch.bfloat16)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(half * 1.02, half, torch.bfloat16)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.tensor([float("inf")]), torch.tensor([1.0]), torch.float32)
