"""`ops.bntt_lif` against its twin. With the same statistics spikes and membrane are equal to the bit; statistics themselves,
being sums, agree within rounding, and spikes behind them but for a band at the threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from neuron_cases import (
    DTYPES,
    LAYOUTS,
    RESETS,
    SURROGATES,
    arrange,
    assert_close,
    assert_spikes_match,
    label,
    leaf,
    pairwise,
    parameter,
    parameter_shares,
)

from pyaccel import ops, reference
from pyaccel.reference.neuron import state_dtype

# [B, C, ...]: one value a channel, no batch, fully connected, small maps (columns), large maps (one channel at a time).
SHAPES = [(1, 1), (7, 129), (3, 5, 1, 1), (2, 3, 2, 2), (2, 70, 3, 1), (3, 2, 7, 9), (1, 3, 129), (40, 3, 1)]
CASES = pairwise(
    step=SHAPES,
    dtype=DTYPES,
    layout=LAYOUTS,
    steps=[1, 2, 25],
    surrogate=SURROGATES,
    reset=RESETS,
    detach=[True, False],
    batch=[True, False],
    membrane=[True, False],
    leak=["number", "scalar", "channel"],
    threshold=["number", "scalar", "channel"],
    grads=["both", "spikes", "membrane"],
)


def grid(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.reshape(values.shape[0], 1, values.shape[1], *[1] * (x.dim() - 3))


def over(x: torch.Tensor) -> list[int]:
    return [1, *range(3, x.dim())]


def pinned(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> dict:
    """Batch statistics with exactly these values and the gradient of batch statistics."""
    wide = x.double()
    own_mean = wide.mean(over(x))
    own_var = ((wide - grid(own_mean, x)) ** 2).mean(over(x))
    own = ((own_mean, mean), (own_var, var))
    return dict(zip(("mean", "var"), ((o + (v.double() - o).detach()).to(v.dtype) for o, v in own), strict=True))


def twin(x, weight, membrane=None, *, mean, var, eps=1e-4, leak=0.95, **neuron):
    """`reference.bntt_lif` with given statistics, but 1/sqrt rounded correctly, as the kernels do: torch.rsqrt does on a
    CPU, where torch.sqrt of float32 is off by one unit now and then."""
    y = (x - grid(mean, x)) * grid(weight * torch.rsqrt(var + eps), x)
    return *reference.lif(y, membrane, leak=leak, **neuron), mean, var


def on_an_edge(y, membrane, leak, threshold, reset: str, width: float) -> bool:
    """Whether a potential lies within a rounding of where the rectangle jumps: its slope is then either of two."""

    def spread(value):
        return value.detach().reshape(-1, *[1] * (y.dim() - 3)) if isinstance(value, torch.Tensor) and value.dim() else value

    leak, threshold = (v.detach() if isinstance(v, torch.Tensor) else v for v in (spread(leak), spread(threshold)))
    v = torch.zeros_like(y[0]) if membrane is None else membrane
    for now in y:
        u = leak * v + now
        if (((u / threshold - 1).abs() - width / 2).abs() < 1e-6).any():
            return True
        v = {"soft": u - threshold * (u > threshold), "hard": u * (u <= threshold), "none": u}[reset]
    return False


def check(case: dict, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype, step, T = case["dtype"], case["step"], case["steps"]
    state = state_dtype(dtype)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = arrange((0.5 + 2 * noise(T, *step)).to(dtype), case["layout"])
    weight = (1 + 0.3 * noise(T, step[1])).to(state)
    membrane = noise(*step).to(state) if case["membrane"] else None
    given = {}
    if not case["batch"]:
        given = dict(mean=noise(T, step[1]).to(state), var=(0.5 + noise(T, step[1]) ** 2).to(state))
    options = dict(reset=case["reset"], detach_reset=case["detach"], surrogate=case["surrogate"], surrogate_width=case.get("width"))
    upstream = noise(T, *step).to(dtype), noise(*step).to(state)
    taken = {"both": (0, 1), "spikes": (0,), "membrane": (1,)}[case["grads"]]

    def run(function, statistics):
        inputs = [
            leaf(x),
            leaf(weight.clone()),
            None if membrane is None else leaf(membrane.clone()),
            parameter(case["leak"], step, dtype, 0.6, 1.0, seed + 1),
            parameter(case["threshold"], step, dtype, 0.5, 1.2, seed + 2),
        ]
        current = inputs[0].to(state) if function is twin else inputs[0]  # one rounding of the gradient, at the end
        outputs = function(
            current, *inputs[1:3], **statistics(current), leak=inputs[3], threshold=inputs[4], **options
        )  # fmt: skip
        asked = [i for i in inputs if isinstance(i, torch.Tensor)]
        sent = [upstream[k].to(outputs[k].dtype) for k in taken]
        found = torch.autograd.grad([outputs[k] for k in taken], asked, sent, allow_unused=True)
        found = [torch.zeros_like(i) if g is None else g for g, i in zip(found, asked, strict=True)]
        gradient = {id(i): g for i, g in zip(asked, found, strict=True)}
        return outputs, [gradient.get(id(i)) for i in inputs], inputs

    (spikes, after, mean, var), found, inputs = run(ops.bntt_lif, lambda _: given)
    assert not mean.requires_grad and not var.requires_grad and mean.dtype == var.dtype == state
    if case["batch"]:
        wide = x.double()
        spread = max(1.0, float(wide.abs().max()))
        exact = (1e-14, 1e-13) if dtype == torch.float64 else (2e-7, 2e-6)
        assert (mean - wide.mean(over(x))).abs().max() <= exact[0] * spread
        assert (var - wide.var(over(x), unbiased=False)).abs().max() <= exact[1] * spread
        fixed = lambda leaf_: pinned(leaf_, mean, var)  # noqa: E731
    else:
        assert torch.equal(mean, given["mean"]) and torch.equal(var, given["var"])
        fixed = lambda _: given  # noqa: E731
    (s, v, _, _), wanted, _ = run(twin, fixed)
    assert torch.equal(spikes, s.to(dtype)) and spikes.dtype == dtype
    if case["batch"] and dtype == torch.float64:
        assert_close(after, v, dtype)  # pinning rounds once more
    else:
        assert torch.equal(after, v)

    width = case.get("width", 1.0)
    if case["surrogate"] == "rectangle" and dtype != torch.float64:
        y = (x.to(state) - grid(mean, x)) * grid(weight / (var + 1e-4).sqrt(), x)
        if on_an_edge(y, membrane, inputs[3], inputs[4], case["reset"], width):
            return check(case | dict(width=width * 1.0007), seed)

    # Scales: sums of absolute values, before anything cancels.
    constant = dict(mean=mean, var=var)
    plain = run(twin, lambda _: constant)[1][0].double()
    centred = x.double() - grid(mean.double(), x)
    of_weight = float((plain * centred / grid(weight.double(), x)).abs().sum(over(x)).max())
    y = centred * grid(weight.double() / (var.double() + 1e-4).sqrt(), x)
    padded = [upstream[k] if k in taken else torch.zeros_like(upstream[k]) for k in (0, 1)]
    shares = [float(p.abs().sum()) for p in parameter_shares(y, membrane, padded, inputs[3], inputs[4], **options)]
    of_membrane = 1.0 if found[2] is None else max(1.0, float(wanted[2].abs().max()))
    scales = [float(plain.abs().max()), of_weight, of_membrane, *shares]
    for name, got, expected, scale in zip(("current", "weight", "membrane", "leak", "threshold"), found, wanted, scales, strict=True):
        if got is not None:
            assert_close(got, expected, dtype if name == "current" else state, scale, name)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bntt_is_its_twin(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_bntt_is_its_twin_in_every_combination(dtype, layout, surrogate):
    axes = [
        dict(step=step, dtype=dtype, layout=layout, surrogate=surrogate, steps=4, reset=reset, detach=detach, batch=batch,
             membrane=membrane, leak=leak, threshold=threshold, grads="both")
        for step in [(2, 3, 1, 5), (2, 2, 9, 11)] for reset in RESETS for detach in (True, False)
        for batch in (False, True) for membrane in (True, False)
        for leak in ("number", "scalar", "channel") for threshold in ("number", "scalar", "channel")
    ]  # fmt: skip
    for seed, case in enumerate(axes):
        check(case, seed)


def test_the_reciprocal_root_of_the_twin_is_rounded_correctly():
    var = torch.rand(10_001) + 1e-3
    assert torch.equal(torch.rsqrt(var), torch.from_numpy(1 / np.sqrt(var.numpy())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [(16, 8, 9, 9), (64, 70), (8, 3, 32, 32)])
def test_spikes_behind_batch_statistics_match_but_for_a_band(dtype, step):
    torch.manual_seed(1)
    x = (3 + 2 * torch.randn(20, *step)).to(dtype)
    weight = torch.rand(20, step[1]) + 0.5
    spikes, after, _, _ = ops.bntt_lif(x, weight)
    s, v, mean, var = reference.bntt_lif(x, weight)
    u, state = [], torch.zeros(step)
    for y in (x.float() - grid(mean, x)) * grid(weight / (var + 1e-4).sqrt(), x):
        u.append(0.95 * state + y)
        state = u[-1] - (u[-1] > 1).float()
    same = assert_spikes_match(spikes, s, torch.stack(u) - 1, 2e-5, most=0.01)
    assert (after - v)[same].abs().max() < 2e-5
    assert 0.1 < spikes.float().mean() < 0.3


@pytest.mark.parametrize("shape", [(6, 4, 3, 50, 50), (4, 16, 128, 2, 2)])
def test_a_mean_far_from_zero_costs_no_digits(shape):
    torch.manual_seed(0)
    x = (1e4 + torch.randn(shape)).requires_grad_()
    _, _, mean, var = ops.bntt_lif(x, torch.ones(shape[0], shape[2]))
    wide = x.detach().double()
    torch.testing.assert_close(mean.double(), wide.mean(over(x)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var(over(x), unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_take_the_path_past_the_caches_and_stay_equal(dtype):
    torch.manual_seed(0)
    shape = (2, 8, 16, 128, 128) if dtype == torch.float32 else (2, 16, 16, 128, 128)
    x = torch.randn(shape, dtype=dtype)
    assert x.numel() * x.element_size() > 12 << 20
    statistics = dict(mean=torch.randn(2, 16), var=torch.rand(2, 16) + 0.5)
    weight, grad, results = torch.rand(2, 16) + 0.5, torch.randn(shape, dtype=dtype), []
    for function in (ops.bntt_lif, twin):
        current = leaf(x)
        spikes, v, _, _ = function(current, weight, **statistics)
        spikes.backward(grad)
        results.append((spikes.detach(), v, current.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2], dtype)


def test_an_empty_time_or_batch_is_valid():
    v = torch.randn(2, 3).requires_grad_()
    for given in ({}, dict(mean=torch.zeros(0, 3), var=torch.ones(0, 3))):
        spikes, after, mean, var = ops.bntt_lif(torch.empty(0, 2, 3), torch.empty(0, 3), v, **given)
        assert spikes.shape == (0, 2, 3) and mean.shape == var.shape == (0, 3)
        assert torch.equal(after, v)
        (g,) = torch.autograd.grad(after, v, torch.full((2, 3), 7.0))
        assert torch.equal(g, torch.full((2, 3), 7.0))
    weight = torch.ones(2, 3, requires_grad=True)
    spikes, after, mean, _ = ops.bntt_lif(torch.empty(2, 0, 3), weight)
    assert spikes.shape == (2, 0, 3) and after.shape == (0, 3) and mean.isnan().all()
    spikes.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2, 3))
    assert ops.bntt_lif(torch.empty(2, 4, 0), torch.empty(2, 0))[0].shape == (2, 4, 0)


@pytest.mark.parametrize("wrong", ["weight a step late", "leak", "eps", "biased"])
def test_slightly_wrong_numbers_are_caught(wrong):
    torch.manual_seed(0)
    x, weight = torch.randn(10, 6, 4, 5), torch.rand(10, 4) + 0.5
    _, v, mean, var = ops.bntt_lif(x, weight, leak=0.9)
    right = dict(weight=weight, mean=mean, var=var, leak=0.9, eps=1e-4)
    assert torch.equal(v, twin(x, **right)[1])
    off = {
        "weight a step late": dict(weight=weight.roll(1, 0)),
        "leak": dict(leak=0.9001),
        "eps": dict(eps=1e-5),
        "biased": dict(var=var * 30 / 29),
    }[wrong]
    assert not torch.equal(v, twin(x, **(right | off))[1])
