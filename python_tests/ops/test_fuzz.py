"""Hypothesis over shapes and options, and a thousand calls an operator with arguments of every kind: each returns or explains itself."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron_cases import DTYPES, LAYOUTS, RESETS, SURROGATES, arrange, assert_close, leaf

from pyaccel import ops, reference
from pyaccel.reference.neuron import state_dtype

OPTIONS = dict(
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    reset=st.sampled_from(RESETS),
    detach=st.booleans(),
    surrogate=st.sampled_from(SURROGATES),
    leak=st.floats(0, 1),
    threshold=st.floats(0.25, 3),
    seed=st.integers(0, 2**31),
)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(T=st.integers(0, 40), step=st.lists(st.integers(0, 9), min_size=1, max_size=4), delay=st.booleans(), **OPTIONS)
def test_lif(T, step, dtype, layout, reset, detach, delay, surrogate, leak, threshold, seed):
    x = arrange(noise(seed, T, *step).to(dtype), layout)
    v, grad = noise(seed + 1, *step).to(state_dtype(dtype)), noise(seed + 2, T, *step).to(dtype)
    results = []
    for function in (ops.lif, reference.lif):
        current, membrane = leaf(x), leaf(v)
        spikes, after = function(
            current, membrane, leak=leak, threshold=threshold, reset=reset, detach_reset=detach, delay=delay, surrogate=surrogate
        )  # fmt: skip
        sent = [(o, g) for o, g in ((spikes, grad), (after, torch.ones_like(after))) if o.requires_grad]
        torch.autograd.backward([o for o, _ in sent], [g for _, g in sent])
        gradient = torch.zeros_like(x) if current.grad is None else current.grad  # T = 0
        results.append((spikes.detach(), after.detach(), gradient, membrane.grad))
    (s, a, g, m), (t, b, h, n) = results
    assert torch.equal(s, t) and torch.equal(a, b)
    # rectangles: a potential on the very edge may count as in or out
    if surrogate != "rectangle":
        assert_close(g, h, dtype)
        assert_close(m, n, state_dtype(dtype), max(1.0, float(n.abs().max()) if n.numel() else 1.0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(T=st.integers(1, 12), step=st.lists(st.integers(1, 9), min_size=2, max_size=4), **OPTIONS)
def test_bntt(T, step, dtype, layout, reset, detach, surrogate, leak, threshold, seed):
    """Against `ops.lif` on the normalised input: two kernels that share no loop."""
    state = state_dtype(dtype)
    x = arrange(noise(seed, T, *step).to(dtype), layout)
    weight, mean = 1 + 0.2 * noise(seed + 1, T, step[1]).to(state), noise(seed + 2, T, step[1]).to(state)
    var = noise(seed + 3, T, step[1]).to(state) ** 2 + 0.1
    grad = noise(seed + 4, T, *step).to(dtype)
    grid = (T, 1, step[1], *[1] * (len(step) - 2))
    options = dict(leak=leak, threshold=threshold, reset=reset, detach_reset=detach, surrogate=surrogate)
    fused, plain = leaf(x), leaf(x)
    spikes, after, _, _ = ops.bntt_lif(fused, weight, mean=mean, var=var, **options)
    y = (plain.to(state) - mean.reshape(grid)) * (weight * torch.rsqrt(var + 1e-4)).reshape(grid)
    wanted, end = ops.lif(y, **options)
    assert torch.equal(spikes, wanted.to(dtype)) and torch.equal(after, end)
    spikes.backward(grad), wanted.backward(grad.to(state))
    if surrogate != "rectangle":
        assert_close(fused.grad, plain.grad, dtype)


def any_tensor(rng: random.Random) -> torch.Tensor:
    shape = [rng.choice([0, 1, 2, 3, 4, 17]) for _ in range(rng.randrange(0, 6))]
    dtype = rng.choice([*DTYPES, torch.float32, torch.float32, torch.int64, torch.bool, torch.complex64, torch.uint8])
    tensor = torch.ones(shape, dtype=dtype)
    if rng.random() < 0.3 and tensor.dim() > 1:
        tensor = tensor.transpose(rng.randrange(tensor.dim()), rng.randrange(tensor.dim()))
    if rng.random() < 0.3 and tensor.dim():
        tensor = tensor[..., :: rng.choice([1, 2])]
    if rng.random() < 0.1:
        tensor = tensor.to("meta")
    if rng.random() < 0.2 and (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.detach().requires_grad_()
    return tensor


def anything(rng: random.Random):
    return rng.choice([
        lambda: any_tensor(rng), lambda: any_tensor(rng), lambda: None, lambda: rng.choice([0, 1, -1, 3, 1 << 40, -(1 << 70), 10**400]),
        lambda: rng.choice([0.5, 0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf")]), lambda: rng.choice(["soft", "", "atan", "x"]),
        lambda: [], lambda: object(), lambda: b"", lambda: True, lambda: 1j, lambda: torch.nn.Parameter(torch.ones(3)),
    ])()  # fmt: skip


def right(rng: random.Random, op: str) -> dict:
    """Arguments that fit together, of which some are then replaced."""
    dtype = rng.choice(DTYPES)
    state = state_dtype(dtype)
    T, step = rng.randrange(0, 5), [rng.choice([0, 1, 2, 5, 33]) for _ in range(rng.randrange(2, 5))]
    x = leaf(torch.randn(T, *step).to(dtype)) if rng.random() < 0.5 else torch.randn(T, *step).to(dtype)
    if op == "poisson_encode":
        return dict(image=torch.randn(step).to(dtype), steps=T, gain=0.5, seed=rng.getrandbits(64), stream=3, first_step=7, sample_ids=torch.arange(step[0]))
    neuron = dict(
        current=x, membrane=torch.zeros(step, dtype=state), leak=torch.full((step[1],), 0.9, dtype=state), threshold=1.0,
        reset=rng.choice(RESETS), detach_reset=rng.random() < 0.5, surrogate=rng.choice(SURROGATES), surrogate_scale=None, surrogate_width=2,
    )  # fmt: skip
    if op == "lif":
        return neuron | dict(delay=rng.random() < 0.5)
    given = dict(mean=torch.zeros(T, step[1], dtype=state), var=torch.ones(T, step[1], dtype=state)) if rng.random() < 0.5 else {}
    return neuron | dict(weight=torch.ones(T, step[1], dtype=state), eps=1e-4) | given


@pytest.mark.parametrize("op", ["lif", "bntt_lif", "poisson_encode"])
def test_a_thousand_random_calls_return_or_explain_themselves(op):
    rng = random.Random(op)
    torch.manual_seed(0)
    returned = explained = 0
    for n in range(1000):
        arguments = right(rng, op)
        for name in rng.sample(sorted(arguments), rng.choice([0, 1, 1, 2, 4])):
            arguments[name] = anything(rng)
        try:
            out = getattr(ops, op)(**arguments)
            out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
            if out and not out[0].is_meta:
                torch.autograd.backward(out, [torch.ones_like(o) for o in out])
            returned += 1
        except (TypeError, ValueError) as error:
            assert len(str(error)) > 20 and str(error).startswith(f"{op}: "), f"call {n}: {error}"
            explained += 1
        except RuntimeError as error:
            assert len(str(error)) > 20, f"call {n}: {error}"
            explained += 1
    assert returned > 200 and explained > 200
