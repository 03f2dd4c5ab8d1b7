"""The plain-torch twins against loops over Python floats, written from the equations in the docstring of `ops.lif`.

Gradients are checked by forward mode: the loops carry a tangent, with the surrogate in place of the spike's derivative.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pyaccel import reference
from pyaccel.reference.neuron import SURROGATES, state_dtype


def phi(a: float, surrogate: str, scale: float, width: float) -> float:
    if surrogate == "triangle":
        return scale * max(0.0, 1 - abs(a) / width)
    if surrogate == "rectangle":
        return scale / width if abs(a) < width / 2 else 0.0
    if surrogate == "atan":
        return scale * (width / 2) / (1 + (math.pi / 2 * width * a) ** 2)
    if surrogate == "sigmoid":
        sig = 1 / (1 + math.exp(-width * a))
        return scale * width * sig * (1 - sig)
    return scale / (1 + width * abs(a)) ** 2


def naive(x, v, leak, threshold, reset, detach, delay, slope, tangent=None):
    """One neuron. x: T floats. tangent: (dx, dv, dleak, dthreshold). Returns spikes, v, dspikes, dv."""
    dx, dv, dleak, dthr = tangent if tangent else ([0.0] * len(x), 0.0, 0.0, 0.0)
    spikes, dspikes = [], []
    for now, dnow in zip(x, dx, strict=True):
        u, du = (v, dv) if delay else (leak * v + now, dleak * v + leak * dv + dnow)
        s = 1.0 if u > threshold else 0.0
        ds = slope(u / threshold - 1) / threshold * (du - u / threshold * dthr)
        through, of_threshold = (0.0, 0.0) if detach else (ds, dthr)
        if delay:
            if reset == "hard":
                v = leak * (u * (1 - s)) + now
                dv = dleak * u * (1 - s) + leak * (du * (1 - s) - u * through) + dnow
            else:
                v, dv = leak * u + now, dleak * u + leak * du + dnow
                if reset == "soft":
                    v, dv = v - threshold * s, dv - of_threshold * s - threshold * through
        elif reset == "soft":
            v, dv = u - threshold * s, du - of_threshold * s - threshold * through
        elif reset == "hard":
            v, dv = u * (1 - s), du * (1 - s) - u * through
        else:
            v, dv = u, du
        spikes.append(s), dspikes.append(ds)
    return spikes, v, dspikes, dv


OPTIONS = list(itertools.product(("soft", "hard", "none"), (True, False), (False, True)))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reset, detach, delay", OPTIONS)
def test_lif_is_the_naive_loop(reset, detach, delay, surrogate):
    torch.manual_seed(3)
    T, N, leak, threshold, (scale, width) = 6, 5, 0.8, 0.7, SURROGATES[surrogate]
    x = torch.randn(T, N, dtype=torch.float64).requires_grad_()
    v = torch.randn(N, dtype=torch.float64).requires_grad_()
    leak_, threshold_ = (torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in (leak, threshold))
    options = dict(reset=reset, detach_reset=detach, delay=delay)
    spikes, after = reference.lif(x, v, leak=leak_, threshold=threshold_, surrogate=surrogate, **options)
    grad_spikes, grad_after = torch.randn(T, N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    torch.autograd.backward([spikes, after], [grad_spikes, grad_after])

    def slope(a):
        return phi(a, surrogate, scale, width)

    found = {"leak": 0.0, "threshold": 0.0}
    for n in range(N):
        one = x[:, n].tolist(), v[n].item(), leak, threshold, reset, detach, delay, slope
        s, end, _, _ = naive(*one)
        assert spikes[:, n].tolist() == s
        assert after[n].item() == end

        def derivative(*tangent, one=one, n=n):
            _, _, ds, dv = naive(*one, tangent)
            return sum(a * b for a, b in zip(ds, grad_spikes[:, n].tolist(), strict=True)) + dv * grad_after[n].item()

        for t in range(T):
            unit = [float(k == t) for k in range(T)]
            assert x.grad[t, n].item() == pytest.approx(derivative(unit, 0.0, 0.0, 0.0), abs=1e-12)
        still = [0.0] * T
        assert v.grad[n].item() == pytest.approx(derivative(still, 1.0, 0.0, 0.0), abs=1e-12)
        found["leak"] += derivative(still, 0.0, 1.0, 0.0)
        found["threshold"] += derivative(still, 0.0, 0.0, 1.0)
    assert leak_.grad.item() == pytest.approx(found["leak"], abs=1e-11)
    assert threshold_.grad.item() == pytest.approx(found["threshold"], abs=1e-11)
    assert 0 < spikes.sum() < spikes.numel()


def test_surrogate_slope_is_the_table_and_fills_in_defaults():
    u = torch.linspace(-2, 3, 101, dtype=torch.float64)
    for surrogate, (scale, width) in SURROGATES.items():
        got = reference.surrogate_slope(u, torch.tensor(0.7, dtype=torch.float64), surrogate, scale, width)
        assert got.tolist() == pytest.approx([phi(v / 0.7 - 1, surrogate, scale, width) / 0.7 for v in u.tolist()], abs=1e-13)
        x = u[None].clone().requires_grad_()
        reference.lif(x, threshold=0.7, surrogate=surrogate)[0].sum().backward()
        torch.testing.assert_close(x.grad[0], got, rtol=1e-12, atol=1e-14)
    assert SURROGATES["triangle"] == (0.3, 1.0) and SURROGATES["fast_sigmoid"] == (1.0, 25.0)


def test_channel_parameters_act_on_dimension_one_of_the_state():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    leak, threshold = torch.tensor([0.5, 0.9, 1.0]).double(), torch.tensor([0.4, 1.0, 0.7]).double()
    spikes, v = reference.lif(x, leak=leak, threshold=threshold)
    for c in range(3):
        s, w = reference.lif(x[:, :, c], leak=float(leak[c]), threshold=float(threshold[c]))
        assert torch.equal(spikes[:, :, c], s) and torch.equal(v[:, c], w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_spikes_keep_the_dtype_and_the_state_is_wide(dtype):
    spikes, v = reference.lif(torch.randn(3, 4).to(dtype))
    assert spikes.dtype == dtype and v.dtype == state_dtype(dtype)
    assert state_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_no_steps_return_the_state():
    v = torch.randn(4)
    spikes, after = reference.lif(torch.empty(0, 4), v)
    assert spikes.shape == (0, 4) and torch.equal(after, v)
    assert torch.equal(reference.lif(torch.empty(0, 4))[1], torch.zeros(4))


def bntt_by_hand(x, weight, eps, leak, threshold, grad, batch=True, mean=None, var=None):
    """papers: 2010.01729, unrolled; the gradient by its closed form, detached soft reset, triangle surrogate. [T, B, C, P]."""
    over = (1, 3)
    if batch:
        mean, var = x.mean(over), x.var(over, unbiased=False)
    sigma = (var + eps).sqrt()[:, None, :, None]
    normal = (x - mean[:, None, :, None]) / sigma
    gamma, v, us = weight[:, None, :, None], torch.zeros_like(x[0]), []
    for y in gamma * normal:
        us.append(leak * v + y)
        v = us[-1] - threshold * (us[-1] > threshold).to(x.dtype)
    u = torch.stack(us)
    slope = 0.3 / threshold * (1 - (u / threshold - 1).abs()).clamp(min=0)
    delta, carried = torch.empty_like(x), torch.zeros_like(x[0])
    for t in reversed(range(len(x))):
        carried = delta[t] = grad[t] * slope[t] + leak * carried
    dgamma = (delta * normal).sum(over)
    inner = delta - delta.mean(over, keepdim=True) - normal * (delta * normal).mean(over, keepdim=True) if batch else delta
    return (u > threshold).to(x.dtype), v, gamma / sigma * inner, dgamma


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("leak, threshold", [(0.95, 1.0), (0.8, 0.7), (0.0, 1.3)])
def test_bntt_is_the_closed_form(batch, leak, threshold):
    torch.manual_seed(5)
    x = (2 * torch.randn(5, 4, 3, 6, dtype=torch.float64) + 1).requires_grad_()
    weight = (torch.rand(5, 3, dtype=torch.float64) + 0.5).requires_grad_()
    given = {} if batch else dict(mean=torch.rand(5, 3).double(), var=torch.rand(5, 3).double() + 1)
    grad = torch.randn(5, 4, 3, 6, dtype=torch.float64)
    spikes, v, mean, var = reference.bntt_lif(x, weight, leak=leak, threshold=threshold, **given)
    spikes.backward(grad)
    s, w, dx, dgamma = bntt_by_hand(x.detach(), weight.detach(), 1e-4, leak, threshold, grad, batch, **given)
    assert torch.equal(spikes, s)
    for got, wanted in ((v, w), (x.grad, dx), (weight.grad, dgamma)):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    if batch:
        torch.testing.assert_close(mean, x.detach().mean((1, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(var, x.detach().var((1, 3), unbiased=False), rtol=1e-12, atol=1e-12)


def test_bntt_normalises_like_torch_does_step_by_step():
    torch.manual_seed(6)
    x = torch.randn(4, 6, 3, 5, 2, dtype=torch.float64)
    weight = torch.rand(4, 3, dtype=torch.float64)
    v = torch.zeros(6, 3, 5, 2, dtype=torch.float64)
    running_mean, running_var = torch.zeros(4, 3).double(), torch.ones(4, 3).double()
    spikes, after, mean, var = reference.bntt_lif(x, weight, leak=0.9)
    for t in range(4):
        u = 0.9 * v + F.batch_norm(x[t], running_mean[t], running_var[t], weight[t], None, True, 0.1, 1e-4)
        assert torch.equal(spikes[t], (u > 1).double())
        v = u - (u > 1).double()
    torch.testing.assert_close(after, v, rtol=1e-12, atol=1e-12)
    n = 6 * 5 * 2
    torch.testing.assert_close(0.1 * mean, running_mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(0.9 + 0.1 * var * n / (n - 1), running_var, rtol=1e-12, atol=1e-14)
