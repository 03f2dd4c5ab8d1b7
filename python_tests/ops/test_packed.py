"""`packed=True`: the same spikes as bits, for inference."""

from __future__ import annotations

import pytest
import torch
from neuron_cases import DTYPES, arrange, leaf

from pyaccel import ops

STEPS = [(7,), (129,), (2, 3, 5, 7), (1, 2, 9, 9), (0, 3), (4, 64, 1, 1)]


def bits_by_hand(spikes: torch.Tensor) -> list[list[int]]:
    """Value n of a step, in logical order, is bit n % 8 of byte n // 8."""
    rows = []
    for step in spikes.flatten(1).tolist() if spikes[0].numel() else [[]] * len(spikes):
        row = [0] * ((len(step) + 7) // 8)
        for n, value in enumerate(step):
            row[n // 8] |= int(value) << n % 8
        rows.append(row)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("delay", [False, True])
def test_lif(dtype, step, layout, delay):
    torch.manual_seed(0)
    x = arrange((1 + torch.randn(5, *step)).to(dtype), layout)
    spikes, v = ops.lif(x, leak=0.9, delay=delay)
    bits, after = ops.lif(x, leak=0.9, delay=delay, packed=True)
    assert bits.dtype == torch.uint8 and bits.tolist() == bits_by_hand(spikes)
    assert torch.equal(after, v)
    assert torch.equal(ops.unpack_spikes(bits, spikes.shape, dtype), spikes)


@pytest.mark.parametrize("step", [(7, 129), (2, 3, 5, 7), (2, 2, 9, 9), (4, 64, 1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_bntt(step, layout):
    torch.manual_seed(0)
    x, weight = arrange(torch.randn(5, *step), layout), torch.ones(5, step[1])
    given = dict(mean=torch.zeros(5, step[1]), var=torch.ones(5, step[1]))
    spikes, v, _, _ = ops.bntt_lif(x, weight, **given)
    bits, after, _, _ = ops.bntt_lif(x, weight, packed=True, **given)
    assert bits.tolist() == bits_by_hand(spikes) and torch.equal(after, v)


def test_packed_spikes_carry_no_gradient():
    x = leaf(torch.randn(3, 2, 9))
    with pytest.raises(ValueError, match="lif: packed spikes carry no gradient"):
        ops.lif(x, packed=True)
    with torch.no_grad():
        assert ops.lif(x, packed=True)[0].dtype == torch.uint8
