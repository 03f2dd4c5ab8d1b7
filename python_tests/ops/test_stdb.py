"""`ops.stdb_lif` against its plain-torch twin, the equations of its backward pass in Python floats, and known numbers."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron_cases import DTYPES, LAYOUTS, arrange, assert_close, label, leaf, pairwise

from pyaccel import ops, reference
from pyaccel.reference.neuron import state_dtype, stdb_backward

FORMS = ("exact", "fp32_underflow")
CASES = pairwise(
    step=[(1, 1, 1, 1), (0, 3, 2, 2), (1, 7, 1, 1), (2, 5, 3, 4), (7,), (129,), (2, 600)],
    dtype=DTYPES,
    layout=LAYOUTS,
    steps=[0, 1, 2, 25, 100],
    form=FORMS,
    membrane=[True, False],
    since=[True, False],
    leak=[1.0, 0.9, 0.0],
    threshold=[1.0, 0.37],
    slope=[(0.3, 0.01), (0.5, 0.035)],
    grads=["both", "spikes", "membrane"],
)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(case: dict, seed: int = 0) -> None:
    dtype, step, T = case["dtype"], case["step"], case["steps"]
    state, (alpha, beta) = state_dtype(dtype), case["slope"]
    options = dict(leak=case["leak"], threshold=case["threshold"], alpha=alpha, beta=beta, form=case["form"])
    x = arrange((0.4 + 0.8 * noise(seed, T, *step)).to(dtype), case["layout"])
    v = noise(seed + 1, *step).to(state) if case["membrane"] else None
    since = (
        torch.randint(1, 120, step, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        if case["since"]
        else None
    )
    upstream = noise(seed + 2, T, *step).to(dtype), noise(seed + 3, *step).to(state)
    results = []
    for function in (ops.stdb_lif, reference.stdb_lif):
        current, membrane = leaf(x), None if v is None else leaf(v.clone())
        spikes, after, counted = function(current, membrane, since, **options)
        pairs = dict(zip(("spikes", "membrane"), zip((spikes, after), upstream, strict=True), strict=True))
        pairs = list(pairs.values()) if case["grads"] == "both" else [pairs[case["grads"]]]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        found = [None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for t in (current, membrane)]
        results.append((spikes.detach(), after.detach(), counted, found))
    (s, u, n, ours), (s_, u_, n_, wanted) = results
    assert torch.equal(s, s_) and s.dtype == dtype
    assert torch.equal(u, u_) and u.dtype == state
    assert torch.equal(n, n_) and n.dtype == torch.int32
    # The kernel's exponential ends at exp(-87) = 2^-125.5: where every slope is smaller, the largest entry is no scale.
    for got, twin, kind, what in ((ours[0], wanted[0], dtype, "current"), (ours[1], wanted[1], state, "membrane")):
        if twin is not None:
            assert_close(got, twin, kind, max(float(twin.abs().max()), 1e-30) if twin.numel() else None, what)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_it_is_its_twin(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_steps(dtype):
    check(dict(step=(3, 43), dtype=dtype, layout="contiguous", steps=1000, form="exact", membrane=True, since=False, leak=0.95,
               threshold=1.0, slope=(0.3, 0.01), grads="both"))  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 150), step=st.lists(st.integers(0, 9), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS), form=st.sampled_from(FORMS), leak=st.floats(0, 1), threshold=st.floats(0.25, 3),
    alpha=st.floats(0, 2), beta=st.floats(0.001, 0.2), since=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_option(T, step, dtype, layout, form, leak, threshold, alpha, beta, since, seed):
    check(dict(step=tuple(step), dtype=dtype, layout=layout, steps=T, form=form, membrane=True, since=since, leak=leak,
               threshold=threshold, slope=(alpha, beta), grads="both"), seed)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leak, threshold", [(1.0, 1.0), (0.9, 0.7)])
def test_backward_is_the_recurrence_over_spike_times(form, leak, threshold):
    """delta[T-1] = 0, delta[t-1] = g[t] phi[t] + leak delta[t], in Python floats, spike times as the official code has them."""
    T, N, alpha, beta = 150, 30, 0.3, 0.01
    x, g = 0.1 + 0.5 * noise(0, T, N), noise(1, T, N)
    current = leaf(x)
    spikes, after, _ = ops.stdb_lif(current, leak=leak, threshold=threshold, alpha=alpha, beta=beta, form=form)
    spikes.backward(g)
    assert 0.05 < float(spikes.detach().mean()) < 0.9
    wanted = torch.zeros_like(x)
    for n in range(N):
        u, last, fired, slopes = 0.0, -1000, [], []
        for t in range(T):
            elapsed = (t - 1) - last
            held = (
                float(numpy.float32(math.exp(-elapsed))) ** beta
                if form == "fp32_underflow"
                else math.exp(-beta * elapsed)
            )
            slopes.append(alpha * held / threshold)
            fired.append(1.0 if u > threshold else 0.0)
            u = leak * u + float(x[t, n]) - threshold * fired[-1]
            last = t - 1 if fired[-1] else last
        assert fired == spikes[:, n].tolist() and abs(u - float(after[n].detach())) < 1e-9
        delta = 0.0
        for t in range(T - 1, -1, -1):
            wanted[t, n] = delta
            delta = float(g[t, n]) * slopes[t] + leak * delta
    # the official code's exponential is rounded to float32
    torch.testing.assert_close(current.grad, wanted, rtol=1e-9 if form == "exact" else 1e-7, atol=1e-9)
    assert (current.grad[-1] == 0).all() and (current.grad[:-1] != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_backward_from_spikes_alone_is_autograd_of_the_twin(form):
    x, v = leaf(0.3 + noise(0, 60, 40)), leaf(noise(1, 40))
    g, gv = noise(2, 60, 40), noise(3, 40)
    options = dict(leak=0.9, threshold=0.8, alpha=0.3, beta=0.01, form=form)
    spikes, after, _ = reference.stdb_lif(x, v, **options)
    torch.autograd.backward([spikes, after], [g, gv])
    found = stdb_backward(spikes.detach(), None, g, gv, **options)
    torch.testing.assert_close(found[0], x.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1], v.grad, rtol=1e-12, atol=1e-14)


def slope_at(since: torch.Tensor, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """The derivative of a single step's spike, by the steps since the last one."""
    v = torch.full(since.shape, 2.0, dtype=dtype, requires_grad=True)
    spikes, _, _ = ops.stdb_lif(torch.zeros(1, *since.shape, dtype=dtype), v, since.to(torch.int32), **options)
    return torch.autograd.grad(spikes.sum(), v)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 16])  # the scalar tail, and vectors
def test_known_values_of_the_surrogate(dtype, width):
    def value(since, form):
        found = slope_at(torch.full((width,), since), dtype, form=form)
        assert (found == found[0]).all()
        return float(found[0])

    for form in FORMS:
        for since, wanted in ((1, 0.2970), (10, 0.2715), (50, 0.1820)):
            assert abs(value(since, form) - wanted) < 5e-5
    assert abs(value(103, "fp32_underflow") - 0.1068) < 5e-5
    assert (
        value(104, "fp32_underflow") == 0.0
        and value(999, "fp32_underflow") == 0.0
        and value(100_000, "fp32_underflow") == 0.0
    )
    assert abs(value(104, "exact") - 0.106) < 5e-4 and abs(value(110, "exact") - 0.0999) < 5e-5
    assert abs(value(1000, "exact") - 1.4e-5) < 5e-7


@pytest.mark.parametrize("alpha, beta", [(0.3, 0.01), (0.5, 0.035)])
def test_fp32_underflow_is_the_official_expression_in_float32(alpha, beta):
    since = numpy.arange(1, 200)
    held = numpy.exp(-since.astype(numpy.float64)).astype(numpy.float32)
    wanted = numpy.float32(alpha) * held ** numpy.float32(beta)
    found = slope_at(torch.from_numpy(since), alpha=alpha, beta=beta, form="fp32_underflow")
    numpy.testing.assert_allclose(found.numpy(), wanted, rtol=3e-6)
    exact = slope_at(torch.from_numpy(since), alpha=alpha, beta=beta)
    assert (exact[:80] - found[:80]).abs().max() < 1e-6 and (exact[103:] - found[103:]).min() > 1e-4


def test_the_first_spike_of_a_neuron_has_no_gradient_where_float32_underflows():
    x = 0.2 + 0.5 * noise(0, 120, 200).float()
    first = {}
    for form in FORMS:
        current = leaf(x)
        spikes, _, _ = ops.stdb_lif(current, form=form)
        ordinal = spikes.detach().cumsum(0) * spikes.detach()
        first[form] = [
            torch.autograd.grad(spikes, current, (ordinal == k).float(), retain_graph=True)[0] for k in (1, 2)
        ]
    assert (first["fp32_underflow"][0] == 0).all()
    assert (first["fp32_underflow"][1] != 0).any()
    assert (first["exact"][0] != 0).any()


def test_neurons_that_never_fired_have_no_gradient_where_float32_underflows():
    for form, silent in (("fp32_underflow", True), ("exact", False)):
        x = leaf(torch.full((20, 5), -1.0))
        spikes, _, since = ops.stdb_lif(x, form=form)
        spikes.sum().backward()
        assert (spikes == 0).all() and (since == 999 + 20).all()
        assert bool((x.grad == 0).all()) is silent


def test_soft_reset_conserves_charge():
    x = 0.3 + noise(0, 200, 50)
    spikes, u, _ = ops.stdb_lif(x, threshold=0.7)
    assert float(spikes.sum()) > 1000
    assert (u - (x.sum(0) - 0.7 * spikes.sum(0))).abs().max() < 1e-11


def test_a_constant_current_is_coded_as_a_rate():
    V, T = 1.3, 300
    x = torch.linspace(0.01, 1.29, 60, dtype=torch.float64)
    spikes, _, _ = ops.stdb_lif(x.expand(T, 60), threshold=V)
    missing = x * T / V - spikes.sum(0)
    assert (missing >= -1e-9).all() and (missing < 2).all()


def test_a_leaky_neuron_below_its_fixed_point_never_fires():
    V, leak = 1.0, 0.9
    x = torch.tensor([0.5, 0.9, 0.99, 1.01, 1.5], dtype=torch.float64) * V * (1 - leak)
    spikes, _, _ = ops.stdb_lif(x.expand(400, 5), leak=leak, threshold=V)
    assert spikes.sum(0).tolist()[:3] == [0, 0, 0] and (spikes.sum(0)[3:] > 0).all()


def test_forward_is_the_delayed_neuron_and_since_counts_from_the_last_spike():
    x = 0.3 + noise(0, 90, 77).float()
    spikes, u, since = ops.stdb_lif(x, leak=0.9, threshold=0.8)
    delayed, v = ops.lif(x, leak=0.9, threshold=0.8, delay=True)
    assert torch.equal(spikes, delayed) and torch.equal(u, v)
    for n in range(77):
        times = spikes[:, n].nonzero().flatten().tolist()
        assert int(since[n]) == (90 - times[-1] if times else 999 + 90)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T, cuts", [(9, (1, 4)), (200, (1, 63, 64, 130)), (65, (64,)), (10, (0, 5))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_of_time_with_state_are_one_call(form, T, cuts, dtype):
    x, v, grad, grad_v = (
        noise(k, *s).to(dtype) for k, s in enumerate([(T, 2, 3, 7), (2, 3, 7), (T, 2, 3, 7), (2, 3, 7)])
    )
    results = []
    for bounds in ((0, T), (0, *cuts, T)):
        current, membrane, since, parts = leaf(0.3 + x), leaf(v.clone()), None, []
        state = membrane
        for a, b in itertools.pairwise(bounds):
            s, state, since = ops.stdb_lif(current[a:b], state, since, leak=0.9, form=form)
            parts.append(s)
        spikes = torch.cat(parts)
        torch.autograd.backward([spikes, state], [grad, grad_v])
        results.append((spikes.detach(), state.detach(), since, current.grad, membrane.grad))
    for a, b in zip(*[r[:3] for r in results], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*[r[3:] for r in results], strict=True):
        assert (a - b).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-12) * a.abs().max()


def test_a_detached_state_truncates_the_gradient():
    x = leaf(1 + noise(0, 10, 50))
    _, u, since = ops.stdb_lif(x[:6])
    ops.stdb_lif(x[6:], u.detach(), since)[0].sum().backward()
    assert (x.grad[:6] == 0).all() and (x.grad[6:] != 0).any()


def test_gradcheck_of_the_membrane():
    x, v = leaf(noise(0, 5, 2, 3)), leaf(noise(1, 2, 3))
    assert torch.autograd.gradcheck(lambda x, v: ops.stdb_lif(x, v, leak=0.8, threshold=0.9)[1], (x, v))


def saved_bytes(function) -> dict[int, int]:
    """Bytes kept for backward, by storage: what is kept twice counts once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.update({t.data_ptr(): t.numel() * t.element_size()}), t)[1], lambda t: t
    ):
        out = function()
    kept["output"] = out
    return kept


@pytest.mark.parametrize("T, step", [(100, (2, 3, 7)), (7, (129,)), (1, (8,))])
def test_one_bit_a_neuron_step_is_kept(T, step):
    n = math.prod(step)
    x = leaf(torch.randn(T, *step))
    kept = saved_bytes(lambda: ops.stdb_lif(x))
    del kept["output"]
    assert sum(kept.values()) == T * ((n + 7) // 8)
    since = torch.full(step, 5, dtype=torch.int32)
    kept = saved_bytes(lambda: ops.stdb_lif(x, torch.zeros(step), since))
    del kept["output"]
    assert sum(kept.values()) == T * ((n + 7) // 8) + 4 * n and x.data_ptr() not in kept


class EagerStdb(torch.autograd.Function):
    """The spike of the official code: it keeps the steps since the last spike of every neuron and step."""

    @staticmethod
    def forward(ctx, a, elapsed):
        ctx.save_for_backward(elapsed)
        return (a > 0).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        (elapsed,) = ctx.saved_tensors
        return grad * 0.3 * torch.exp(-1 * elapsed) ** 0.01, None


def eager_vgg(spikes, convolutions):
    """Time-major loop as in the official code: convolution, membrane, spike, pooling, layer after layer in every step."""
    T = spikes.shape[0]
    membranes, lasts, out = [0.0] * len(convolutions), [-1000.0] * len(convolutions), []
    for t in range(T):
        s = spikes[t]
        for k, convolution in enumerate(convolutions):
            current = convolution(s)
            u = membranes[k] if torch.is_tensor(membranes[k]) else torch.zeros_like(current)
            last = lasts[k] if torch.is_tensor(lasts[k]) else torch.full_like(current, -1000.0)
            a = u / 1.0 - 1.0
            fired = EagerStdb.apply(a, (t - 1) - last)
            membranes[k] = 1.0 * u + current - 1.0 * (a > 0).to(u.dtype)
            lasts[k] = torch.where(fired.detach() > 0, torch.full_like(last, t - 1), last)
            s = torch.nn.functional.avg_pool2d(fired, 2)
        out.append(s)
    return torch.stack(out)


def test_a_vgg_like_stack_keeps_a_twentieth_of_what_eager_code_keeps():
    torch.manual_seed(0)
    T, B = 100, 2
    spikes = torch.where(torch.rand(T, B, 3, 16, 16) < 0.4, torch.randn(T, B, 3, 16, 16).sign(), 0.0)
    weights = [2 * torch.randn(8, 3, 3, 3) / 5, 2 * torch.randn(16, 8, 3, 3) / 8, 2 * torch.randn(16, 16, 3, 3) / 9]

    def ours():
        s, kinds = spikes, ("signed", "pooled", "pooled")
        for w, kind in zip(parameters, kinds, strict=True):
            current = ops.spike_conv2d(s, w, padding=1, kind=kind)
            s = ops.spike_avg_pool2d(ops.stdb_lif(current, form="fp32_underflow")[0], 2)
        return s

    def eager():
        return eager_vgg(spikes, [lambda s, w=w: torch.nn.functional.conv2d(s, w, padding=1) for w in parameters])

    results = []
    for function in (ours, eager):
        parameters = [leaf(w.clone()) for w in weights]
        kept = saved_bytes(function)
        out = kept.pop("output")
        out.mean((0, 1)).square().sum().backward()
        results.append((sum(kept.values()), out.detach(), [w.grad for w in parameters]))
    assert 0.01 < float(results[0][1].mean()) < 0.9
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert results[0][0] * 20 <= results[1][0]


def test_a_neuron_that_is_slightly_off_is_caught():
    x = 0.3 + noise(0, 50, 200).float()

    def run(function, **options):
        current = leaf(x)
        spikes, u, _ = function(current, **(dict(leak=0.9) | options))
        spikes.sum().backward()
        return u.detach(), current.grad

    u, gradient = run(ops.stdb_lif)
    for wrong in (dict(leak=0.9001), dict(threshold=1.0001)):
        assert not torch.equal(u, run(reference.stdb_lif, **wrong)[0])
    for wrong in (dict(alpha=0.3003), dict(beta=0.0102)):
        with pytest.raises(AssertionError):
            assert_close(gradient, run(reference.stdb_lif, **wrong)[1], torch.float32)
