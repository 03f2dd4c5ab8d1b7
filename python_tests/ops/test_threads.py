"""Results do not depend on the number of threads."""

from __future__ import annotations

import pytest
import torch
from neuron_cases import leaf

from pyaccel import ops

pytestmark = pytest.mark.filterwarnings("ignore")


def with_threads(function):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(function())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [(4, 8, 40, 40), (37, 1999), (3, 5)])
def test_lif(dtype, step):
    torch.manual_seed(0)
    x, grad = torch.randn(6, *step).to(dtype), torch.randn(6, *step).to(dtype)
    channels = torch.rand(step[1]) * 0.5 + 0.5

    def run():
        current, leak, threshold = leaf(x), leaf(channels), leaf(channels)
        spikes, v = ops.lif(current, leak=leak, threshold=threshold)
        (gx,) = torch.autograd.grad(spikes, current, grad)
        plain = leaf(x)
        (px,) = torch.autograd.grad(ops.lif(plain, leak=0.9)[0], plain, grad)
        return spikes.detach(), v.detach(), gx, px

    with_threads(run)


def test_learnable_parameters():
    torch.manual_seed(0)
    x, grad = torch.randn(6, 8, 16, 50, 50), torch.randn(6, 8, 16, 50, 50)

    def run():
        found = []
        for size in ((), (16,)):
            leak, threshold = leaf(torch.full(size, 0.9)), leaf(torch.full(size, 0.8))
            found += torch.autograd.grad(ops.lif(x, leak=leak, threshold=threshold)[0], (leak, threshold), grad)
        return found

    with_threads(run)


@pytest.mark.parametrize("step", [(4, 8, 40, 40), (37, 1999), (16, 130, 2, 2)])
def test_bntt(step):
    torch.manual_seed(0)
    x, grad = torch.randn(6, *step), torch.randn(6, *step)

    def run():
        current, weight, leak = leaf(x), leaf(torch.ones(6, step[1])), leaf(torch.full((step[1],), 0.9))
        spikes, v, mean, var = ops.bntt_lif(current, weight, leak=leak)
        return spikes.detach(), v.detach(), mean, var, *torch.autograd.grad(spikes, (current, weight, leak), grad)

    with_threads(run)


def test_encoder():
    x = torch.randn(16, 3, 50, 51)
    with_threads(lambda: [ops.poisson_encode(x, 10, seed=1)])
