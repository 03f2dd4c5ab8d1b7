"""Gradients of `ops.lif`: surrogates against their primitives, gradcheck where the function is smooth, chunks of time, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from neuron_cases import RESETS, SURROGATES, central_difference, leaf, parameter

from pyaccel import ops, reference
from pyaccel.reference.neuron import SURROGATES as DEFAULTS

DELAYS = (False, True)


def grid(threshold: float, n: int) -> torch.Tensor:
    """Potentials on both sides of the threshold that miss every kink of the surrogates."""
    return torch.linspace(-1.5, 3.5, n, dtype=torch.float64) * threshold + 1.234567e-3


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("scale, width", [(None, None), (0.7, 1.5), (2.0, 0.5)])
@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_the_slope_is_the_central_difference_of_its_primitive(surrogate, scale, width, threshold):
    keywords = dict(surrogate=surrogate, surrogate_scale=scale, surrogate_width=width)
    scale = DEFAULTS[surrogate][0] if scale is None else scale
    width = DEFAULTS[surrogate][1] if width is None else width
    u = grid(threshold, 101)
    wanted = central_difference(u, threshold, surrogate, scale, width)
    assert (wanted.abs() > 1e-4).sum() >= 10
    twin = reference.surrogate_slope(u, torch.tensor(threshold, dtype=torch.float64), surrogate, scale, width)
    torch.testing.assert_close(twin, wanted, rtol=1e-6, atol=1e-8)
    for dtype, rtol, atol in ((torch.float64, 1e-6, 1e-8), (torch.float32, 1e-4, 1e-5)):
        x = leaf(u.to(dtype)[None])
        ops.lif(x, threshold=threshold, **keywords)[0].sum().backward()
        torch.testing.assert_close(x.grad[0].double(), wanted, rtol=rtol, atol=atol)
        v = leaf(u.to(dtype))  # the delayed neuron fires on the membrane that it is given
        ops.lif(torch.zeros_like(x), v, threshold=threshold, delay=True, **keywords)[0].sum().backward()
        torch.testing.assert_close(v.grad.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_surrogate_has_silently_zero_gradients(surrogate, dtype):
    torch.manual_seed(0)
    x = leaf((1 + torch.randn(4, 200)).to(dtype))
    leak, threshold = parameter("scalar", (200,), dtype, 0.5, 1, 0), parameter("scalar", (200,), dtype, 0.5, 1, 0)
    ops.lif(x, leak=leak, threshold=threshold, surrogate=surrogate)[0].float().sum().backward()
    assert ((x.grad != 0).float().mean(1) > 0.1).all()
    assert leak.grad != 0 and threshold.grad != 0


def test_a_surrogate_scale_of_two_doubles_a_single_step():
    u = leaf(grid(1.0, 50)[None])
    one, two = (torch.autograd.grad(ops.lif(u, surrogate_scale=s)[0].sum(), u)[0] for s in (1.0, 2.0))
    assert torch.equal(2 * one, two)


@pytest.mark.parametrize("reset, delay", list(itertools.product(RESETS, DELAYS)))
@pytest.mark.parametrize("step", [(3,), (2, 3, 2)])
def test_gradcheck_of_the_membrane(reset, delay, step):
    """With a detached reset the membrane is smooth while no spike flips; its gradient is exact."""
    torch.manual_seed(4)
    x = torch.randn(5, *step, dtype=torch.float64, requires_grad=True)
    v = torch.randn(*step, dtype=torch.float64, requires_grad=True)
    leak = parameter("channel", step, torch.float64, 0.6, 0.9, 3)

    def membrane(x, v, leak):
        return ops.lif(x, v, leak=leak, threshold=0.8, reset=reset, delay=delay)[1]

    assert torch.autograd.gradcheck(membrane, (x, v, leak))


def test_gradcheck_over_checkpoints():
    torch.manual_seed(4)
    x = torch.randn(131, 1, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, dtype=torch.float64, requires_grad=True)
    leak = torch.tensor(0.97, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.lif(a[0], a[1], leak=a[2])[1], (x, v, leak))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("delay", DELAYS)
def test_a_detached_reset_is_another_gradient(surrogate, delay):
    torch.manual_seed(0)
    x = torch.randn(20, 100)
    for reset in ("soft", "hard"):
        found = []
        for detach in (True, False):
            current = leaf(x)
            s, v = ops.lif(current, leak=0.9, reset=reset, surrogate=surrogate, detach_reset=detach, delay=delay)
            (s.sum() + v.sum()).backward()
            found.append(current.grad)
        assert (found[0] - found[1]).abs().max() > 0.05
    assert torch.equal(*(torch.autograd.grad(ops.lif(c := leaf(x), reset="none", detach_reset=d)[0].sum(), c)[0] for d in (True, False)))


def test_a_detached_soft_reset_gives_the_threshold_no_gradient():
    x = torch.full((3, 40), 5.0)  # far from every slope of the triangle
    for detach, wanted in ((True, 0.0), (False, -120.0)):
        threshold = torch.tensor(1.0, requires_grad=True)
        ops.lif(x, threshold=threshold, detach_reset=detach)[1].sum().backward()
        assert threshold.grad == wanted


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("T, cuts", [(9, (1, 4)), (300, (1, 130, 171)), (129, (128,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_of_time_with_state_are_one_call(delay, reset, T, cuts, dtype):
    torch.manual_seed(T)
    x, v = torch.randn(T, 2, 3, 7, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    grad_s, grad_v = torch.randn_like(x), torch.randn_like(v)
    results = []
    for bounds in ((0, T), (0, *cuts, T)):
        current, membrane = leaf(x), leaf(v.clone())
        parameters = [parameter("channel", (2, 3, 7), dtype, low, 1, 5) for low in (0.8, 0.6)]
        keywords = dict(leak=parameters[0], threshold=parameters[1], reset=reset, delay=delay, detach_reset=False)
        spikes, state = [], membrane
        for a, b in itertools.pairwise(bounds):
            s, state = ops.lif(current[a:b], state, **keywords)
            spikes.append(s)
        spikes = torch.cat(spikes)
        torch.autograd.backward([spikes, state], [grad_s, grad_v])
        results.append((spikes.detach(), state.detach(), [p.grad for p in (current, membrane, *parameters)]))
    (s, w, whole), (t, u, parts) = results
    assert torch.equal(s, t) and torch.equal(w, u)
    # Sums over neurons and steps cancel: those of the parameters are compared in float64 alone.
    for a, b in zip(whole, parts, strict=True) if dtype == torch.float64 else zip(whole[:2], parts[:2], strict=True):
        assert (a - b).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-12) * a.abs().max()


def test_a_detached_state_truncates_the_gradient():
    torch.manual_seed(0)
    x = leaf(torch.randn(10, 50))
    _, v = ops.lif(x[:6], leak=0.9)
    ops.lif(x[6:], v.detach(), leak=0.9)[0].sum().backward()
    assert (x.grad[:6] == 0).all() and (x.grad[6:] != 0).any()


@pytest.mark.parametrize("T, kept", [(100, 0), (128, 0), (129, 4), (200, 6)])
def test_nothing_of_the_size_of_the_input_is_kept_but_the_input(T, kept):
    x, v = leaf(torch.randn(T, 3, 50)), leaf(torch.randn(3, 50))
    leak = torch.tensor(0.9, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.lif(x, v, leak=leak)
    assert sum(t.numel() for t in saved if t.data_ptr() == x.data_ptr()) == x.numel()
    rest = [t.numel() for t in saved if t.data_ptr() != x.data_ptr()]
    assert sum(rest) == (1 + kept) * 150 + 1
    assert kept == (T - 1) // 32 or T <= 128


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    x = torch.randn(300, 40)
    neuron = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.3, 1.0]
    assert torch.ops.pyaccel.lif(x, None, None, None, neuron, 0)[2].numel() == 0
    calls = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: calls.append(t), lambda t: t):
        spikes, _ = ops.lif(x)
        with torch.no_grad():
            ops.lif(leaf(x))
    assert not calls and not spikes.requires_grad


def test_double_backward_is_refused_in_words():
    x = leaf(torch.randn(4, 30))
    (g,) = torch.autograd.grad(ops.lif(x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="pyaccel::lif_backward .*cannot be differentiated"):
        g.sum().backward()


def test_only_what_is_asked_for_gets_a_gradient():
    x, v = torch.randn(4, 3, 30), torch.randn(3, 30)
    threshold = torch.tensor(1.0, requires_grad=True)
    ops.lif(x, v, threshold=threshold)[0].sum().backward()
    assert threshold.grad != 0 and x.grad is None and v.grad is None
    membrane = leaf(v)
    spikes, after = ops.lif(x, membrane)
    assert spikes.requires_grad and after.requires_grad
    assert not ops.lif(x, v)[0].requires_grad
    twin = leaf(v.clone())
    reference.lif(x, twin)[0].sum().backward()
    spikes.sum().backward()
    torch.testing.assert_close(membrane.grad, twin.grad)


def test_upstream_gradients_of_any_layout():
    torch.manual_seed(0)
    x = leaf(torch.randn(6, 4, 3, 5, 5).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))
    y = leaf(x.detach().contiguous())
    grad = torch.randn(6, 4, 3, 5, 10)[..., ::2]
    for t in (x, y):
        s, v = ops.lif(t, leak=0.9)
        torch.autograd.backward([s, v], [grad, torch.ones(()).expand(4, 3, 5, 5)])
    assert torch.equal(x.grad, y.grad) and x.grad.stride() == x.stride()
