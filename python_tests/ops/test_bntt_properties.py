"""Exact properties of BNTT (2010.01729), each of which an implementation that is subtly wrong would break."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from neuron_cases import leaf

from pyaccel import ops

F64 = torch.float64


def sample(T=6, step=(8, 3, 4, 5), dtype=F64, seed=0):
    torch.manual_seed(seed)
    return 1 + 2 * torch.randn(T, *step, dtype=dtype), torch.rand(T, step[1], dtype=dtype) + 0.5


def grads(out, wrt, upstream):
    return torch.autograd.grad(out, wrt, upstream)


def test_without_leak_every_step_is_a_network_of_its_own():
    x, weight = sample()
    x, weight = leaf(x), leaf(weight)
    spikes = ops.bntt_lif(x, weight, leak=0.0)[0]
    for t in range(6):
        alone = ops.bntt_lif(x[t : t + 1], weight[t : t + 1], leak=0.0)[0]
        assert torch.equal(alone[0], spikes[t])
        (g,) = grads(spikes[t].sum(), x, None) if t == 5 else torch.autograd.grad(spikes[t].sum(), x, retain_graph=True)
        others = [k for k in range(6) if k != t]
        assert (g[others] == 0).all() and (g[t] != 0).any()


def test_a_weight_of_zero_lets_no_input_in_but_still_learns():
    x, weight = sample()
    weight[3] = 0
    x, weight = leaf(x), leaf(weight)
    _, before, _, _ = ops.bntt_lif(x[:3], weight[:3], leak=0.8)
    _, u, _, _ = ops.bntt_lif(x[3:4], weight[3:4], before, leak=0.8, reset="none")
    assert torch.equal(u, 0.8 * before)
    spikes = ops.bntt_lif(x, weight, leak=0.8)[0]
    gx, gw = grads(spikes, (x, weight), torch.randn_like(spikes))
    assert (gx[3] == 0).all() and (gw[3] != 0).all() and (gx[2] != 0).any()


def test_the_scale_of_the_weights_before_it_does_not_matter():
    torch.manual_seed(0)
    image, kernel = torch.randn(5, 6, 2, 7, 7, dtype=F64), torch.randn(3, 2, 3, 3, dtype=F64)
    upstream, found = torch.randn(5, 6, 3, 7, 7, dtype=F64), []
    for scale in (1, 10):
        w = leaf(scale * kernel)
        x = F.conv2d(image.flatten(0, 1), w, padding=1).unflatten(0, (5, 6))
        spikes = ops.bntt_lif(x, torch.ones(5, 3, dtype=F64), eps=1e-13)[0]
        found.append((spikes.detach(), *grads(spikes, w, upstream)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1] * 10, found[0][1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("step", [(8, 3, 4, 5), (8, 3), (2, 3, 40)])
def test_sums_to_zero(step):
    x, weight = sample(step=step)
    over = [0, *range(2, len(step))]
    _, y, _, _ = ops.bntt_lif(x[:1], weight[:1], leak=0.0, reset="none")
    assert y.sum(over).abs().max() < 1e-12 and y.abs().max() > 0.5
    x = leaf(x)
    spikes, v, mean, var = ops.bntt_lif(x, weight)
    (g,) = grads((spikes, v), x, (torch.randn_like(spikes), torch.randn_like(v)))
    shape = (6, 1, step[1], *[1] * (len(step) - 2))
    normal = (x.detach() - mean.reshape(shape)) / var.reshape(shape).sqrt()
    over = [1, *range(3, x.dim())]
    assert g.sum(over).abs().max() < 1e-12
    assert (g * normal).sum(over).abs().max() < 1e-2 * (g * normal).abs().sum(over).max()  # not 0: eps
    x = leaf(x.detach())
    spikes = ops.bntt_lif(x, weight, eps=1e-14)[0]
    (g,) = grads(spikes, x, torch.randn_like(spikes))
    assert (g * normal).sum(over).abs().max() < 1e-10


def test_the_first_step_fires_as_often_as_a_normal_variable_exceeds_one():
    torch.manual_seed(0)
    n = 64 * 2 * 40 * 40
    rate = ops.bntt_lif(5 + 3 * torch.randn(1, 64, 2, 40, 40), torch.ones(1, 2))[0].mean().item()
    assert abs(rate - 0.15866) < 4 * (0.1587 * 0.8413 / n) ** 0.5


@pytest.mark.parametrize("threshold", [1.0, 0.7])
def test_bounds_of_the_membrane(threshold):
    x, weight = sample(dtype=torch.float32)
    v = torch.zeros(8, 3, 4, 5)
    fired = 0
    for t in range(6):
        now = dict(current=x[t : t + 1], weight=weight[t : t + 1], threshold=threshold)
        u = ops.bntt_lif(membrane=v, reset="none", **now)[1]
        spikes, v, _, _ = ops.bntt_lif(membrane=v, **now)
        s = spikes[0] == 1
        fired += int(s.sum())
        assert torch.equal(s, u > threshold)
        assert (v[s] > 0).all() and (v[~s] <= threshold).all()
        assert (v <= torch.maximum(u - threshold, torch.tensor(threshold))).all()
    assert fired > 100


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_layer_after_layer_is_step_after_step(dtype):
    """All steps in one call, or one call a step with the state handed on: the same bits, gradients within rounding."""
    x, weight = sample(T=9, dtype=dtype)
    upstream, results = torch.randn_like(x), []
    for chunks in ([9], [1] * 9, [2, 7]):
        current, gamma = leaf(x), leaf(weight.clone())
        spikes, v, means = [], None, []
        for c, w in zip(current.split(chunks), gamma.split(chunks), strict=True):
            s, v, mean, _ = ops.bntt_lif(c, w, v, leak=0.9)
            spikes.append(s), means.append(mean)
        spikes = torch.cat(spikes)
        results.append((spikes.detach(), v.detach(), torch.cat(means), *grads(spikes, (current, gamma), upstream)))
    for other in results[1:]:
        for a, b in zip(results[0][:3], other[:3], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(results[0][3:], other[3:], strict=True):
            assert (a - b).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-13) * a.abs().max()


def test_a_detached_state_truncates_the_gradient():
    x, weight = sample()
    x = leaf(x)
    v = ops.bntt_lif(x[:3], weight[:3])[1]
    spikes = ops.bntt_lif(x[3:], weight[3:], v.detach())[0]
    (g,) = grads(spikes, x, torch.ones_like(spikes) * torch.randn_like(spikes))
    assert (g[:3] == 0).all() and (g[3:] != 0).any()


def test_given_statistics_are_constants():
    x, weight = sample()
    x, mean, var = leaf(x), torch.randn(6, 3, dtype=F64), torch.rand(6, 3, dtype=F64) + 0.5
    spikes = ops.bntt_lif(x, weight, mean=mean, var=var, leak=0.9)[0]
    upstream = torch.randn_like(spikes)
    (g,) = grads(spikes, x, upstream)
    y = leaf((x.detach() - mean[:, None, :, None, None]) * (weight / (var + 1e-4).sqrt())[:, None, :, None, None])
    (delta,) = grads(ops.lif(y, leak=0.9)[0], y, upstream)
    torch.testing.assert_close(g, delta * (weight / (var + 1e-4).sqrt())[:, None, :, None, None], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", [(4, 2), (2, 2, 3), (2, 2, 40)])
@pytest.mark.parametrize("reset", ["soft", "hard", "none"])
def test_gradcheck_of_the_membrane(step, reset):
    x, weight = sample(T=3, step=step, seed=3)
    v, leak = leaf(torch.randn(step, dtype=F64)), leaf(torch.rand(2, dtype=F64))

    def membrane(x, weight, v, leak):
        return ops.bntt_lif(x, weight, v, leak=leak, threshold=0.8, reset=reset)[1]

    assert torch.autograd.gradcheck(membrane, (leaf(x), leaf(weight), v, leak), atol=1e-6)


def test_channels_last_is_the_same_function():
    x, weight = sample(dtype=torch.float32, step=(4, 5, 6, 6))
    y = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    statistics = ops.bntt_lif(x, weight)[2:]
    a, b = (ops.bntt_lif(t, weight, mean=statistics[0], var=statistics[1]) for t in (x, y))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and b[0].stride() == y.stride()


def test_a_detached_reset_is_another_gradient():
    x, weight = sample()
    found = []
    for detach in (True, False):
        current = leaf(x)
        spikes = ops.bntt_lif(current, weight, detach_reset=detach)[0]
        found.append(grads(spikes, current, torch.ones_like(spikes) * x)[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_nothing_of_the_size_of_the_input_is_kept_but_the_input():
    x, weight = (leaf(t) for t in sample(T=150, dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.bntt_lif(x, weight)
    assert sum(t.numel() for t in saved if t.data_ptr() == x.data_ptr()) == x.numel()
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) == 3 * 150 * 3


def test_double_backward_is_refused_in_words():
    x, weight = (leaf(t) for t in sample())
    (g,) = torch.autograd.grad(ops.bntt_lif(x, weight)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="pyaccel::bntt_lif_backward .*cannot be differentiated"):
        g.sum().backward()
