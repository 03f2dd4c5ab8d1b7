"""`ops.lif` against its plain-torch twin: the forward pass bit for bit, gradients within honest bounds."""

from __future__ import annotations

import pytest
import torch
from neuron_cases import (
    DTYPES,
    LAYOUTS,
    RESETS,
    SURROGATES,
    arrange,
    assert_close,
    label,
    leaf,
    pairwise,
    parameter,
    parameter_shares,
)

from pyaccel import ops, reference
from pyaccel.reference.neuron import state_dtype

STEPS_SHAPES = [(1, 1, 1, 1), (0, 3, 2, 2), (1, 7, 1, 1), (3, 1, 1, 43), (2, 5, 3, 4), (7,), (129,), (2, 70)]
CASES = pairwise(
    step=STEPS_SHAPES,
    dtype=DTYPES,
    layout=LAYOUTS,
    steps=[0, 1, 2, 25, 100, 129, 1000],
    surrogate=SURROGATES,
    reset=RESETS,
    detach=[True, False],
    delay=[False, True],
    membrane=[True, False],
    leak=["number", "scalar", "channel"],
    threshold=["number", "scalar", "channel"],
    grads=["both", "spikes", "membrane"],
)


def check(case: dict, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype, step, T = case["dtype"], case["step"], case["steps"]
    state = state_dtype(dtype)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = arrange((0.4 + 0.8 * noise(T, *step)).to(dtype), case["layout"])
    membrane = noise(*step).to(state) if case["membrane"] else None
    options = dict(
        reset=case["reset"], detach_reset=case["detach"], delay=case["delay"], surrogate=case["surrogate"]
    )  # fmt: skip
    grads = noise(T, *step).to(dtype), noise(*step).to(state)
    if case["grads"] == "spikes":
        grads = grads[0], torch.zeros_like(grads[1])
    if case["grads"] == "membrane":
        grads = torch.zeros_like(grads[0]), grads[1]

    def run(function):
        inputs = [
            leaf(x),
            None if membrane is None else leaf(membrane.clone()),
            parameter(case["leak"], step, dtype, 0.6, 1.0, seed + 1),
            parameter(case["threshold"], step, dtype, 0.5, 1.2, seed + 2),
        ]
        spikes, after = function(inputs[0], inputs[1], leak=inputs[2], threshold=inputs[3], **options)
        outputs = {"both": [spikes, after], "spikes": [spikes], "membrane": [after]}[case["grads"]]
        asked = [i for i in inputs if isinstance(i, torch.Tensor)]
        upstream = {"both": grads, "spikes": grads[:1], "membrane": grads[1:]}[case["grads"]]
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
        found = [None] * len(asked)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
        gradient = {id(i): g for i, g in zip(asked, found, strict=True)}
        return spikes.detach(), after.detach(), [gradient.get(id(i)) for i in inputs], inputs

    spikes, after, found, inputs = run(ops.lif)
    s, v, wanted, _ = run(reference.lif)
    assert torch.equal(spikes, s) and spikes.dtype == dtype
    assert torch.equal(after, v) and after.dtype == state
    wanted = [torch.zeros_like(i) if g is None and isinstance(i, torch.Tensor) else g for g, i in zip(wanted, inputs, strict=True)]
    found = [torch.zeros_like(i) if g is None and isinstance(i, torch.Tensor) else g for g, i in zip(found, inputs, strict=True)]
    assert_close(found[0], wanted[0], dtype, what="current")
    if membrane is not None:
        scale = max(float(wanted[1].abs().max()), float(grads[1].abs().max())) if membrane.numel() else 0.0
        assert_close(found[1], wanted[1], state, scale, "membrane")
    if T == 0 or x.numel() == 0 or T > 200:  # the shares take a graph a step
        scales = [None, None]
    else:
        shares = parameter_shares(x, membrane, grads, inputs[2], inputs[3], **options)
        scales = [float(share.abs().sum()) for share in shares]
    for name, got, twin, scale in zip(("leak", "threshold"), found[2:], wanted[2:], scales, strict=True):
        if got is not None:
            assert_close(got, twin, state, scale, name)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_lif_is_its_twin(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_lif_is_its_twin_in_every_combination(dtype, layout, surrogate):
    axes = [
        dict(step=step, dtype=dtype, layout=layout, surrogate=surrogate, steps=steps, reset=reset, detach=detach,
             delay=delay, membrane=membrane, leak=leak, threshold=threshold, grads="both")
        for step in [(2, 3, 1, 11), (129,)] for steps in (1, 5) for reset in RESETS for detach in (True, False)
        for delay in (False, True) for membrane in (True, False)
        for leak in ("number", "scalar", "channel") for threshold in ("number", "scalar", "channel")
    ]  # fmt: skip
    for seed, case in enumerate(axes):
        check(case, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_large_tensors_take_the_path_past_the_caches_and_stay_equal(dtype, offset):
    T, n = 4, 13 << 20 >> {torch.float64: 5, torch.float32: 4}.get(dtype, 3)
    n = n // 64 * 64
    base = torch.empty(T * n + offset, dtype=dtype)
    x = base[offset:].view(T, n).copy_(torch.randn(T, n))
    assert x.numel() * x.element_size() > 12 << 20
    grad = torch.randn(T, n).to(dtype)
    results = []
    for function in (ops.lif, reference.lif):
        current = leaf(x)
        spikes, v = function(current, leak=0.9, threshold=0.7)
        spikes.backward(grad)
        results.append((spikes.detach(), v.detach(), current.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 1 << 16])  # tails and vectors
def test_every_16_bit_value_is_read_right(dtype, n):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, n)
    for row in (x if n > 1 else x[::257]):
        _, v = ops.lif(row[None], reset="none", leak=0.0)
        assert torch.equal(v.nan_to_num(nan=123.0), row.float().nan_to_num(nan=123.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_of_float_is_rounded_right_on_its_way_out(dtype):
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).to(torch.int32).view(torch.float32)
    exact = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halfway = (exact + exact.roll(-1)) / 2
    edges = torch.tensor([info.max, info.max * 1.0001, info.tiny, info.tiny / 3, info.smallest_normal / 2**11, 65519.99, 65520.0])
    g = torch.cat([patterns, exact, halfway, edges, -edges])
    g = g[torch.isfinite(g)]
    for values in (g, g[:257]):  # vectors and tails
        x = torch.zeros(1, values.numel(), dtype=dtype, requires_grad=True)
        ops.lif(x, reset="none")[1].backward(values)
        assert torch.equal(x.grad[0], values.to(dtype))


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", [False, True])
def test_what_is_not_finite_goes_the_way_of_the_twin(reset, delay):
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    x = torch.zeros(3, 6, 40)
    x[0] = odd[:, None]
    v = torch.zeros(6, 40)
    v[:, 20:] = odd.flip(0)[:, None]
    got = ops.lif(x, v, reset=reset, delay=delay, leak=0.9)
    wanted = reference.lif(x, v, reset=reset, delay=delay, leak=0.9)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 0, 3, 2, 2), (4, 2, 0, 2, 2), (4, 2, 3, 0, 5), (0, 2, 3, 2, 2), (3, 0), (0,)])
def test_nothing_to_do_is_valid_in_every_layout(layout, shape):
    current = leaf(arrange(torch.zeros(shape), layout))
    leak = torch.tensor(0.9, requires_grad=True)
    spikes, v = ops.lif(current, leak=leak)
    assert spikes.shape == shape and v.shape == shape[1:]
    (spikes.sum() + v.sum()).backward()
    assert current.grad.shape == shape and leak.grad == 0


def test_layout_of_the_output_is_that_of_the_input():
    x = arrange(torch.randn(4, 2, 5, 3, 3), "channels_last")
    spikes, v = ops.lif(x)
    assert spikes.stride() == x.stride() and v.stride() == x.stride()[1:]
    spikes, v = ops.lif(arrange(torch.randn(4, 2, 5, 3, 3), "sliced"))
    assert spikes.is_contiguous() and v.is_contiguous()


def test_inputs_are_left_alone():
    x, v = torch.randn(5, 33), torch.randn(33)
    leak, threshold = torch.tensor(0.9, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    kept = x.clone(), v.clone()
    current, membrane = leaf(x), leaf(v)
    spikes, after = ops.lif(current, membrane, leak=leak, threshold=threshold)
    (spikes.sum() + after.sum()).backward()
    assert torch.equal(x, kept[0]) and torch.equal(v, kept[1])
    assert after.data_ptr() != v.data_ptr()
    assert ops.lif(torch.empty(0, 33), v)[1].data_ptr() != v.data_ptr()


@pytest.mark.parametrize("wrong", [dict(leak=0.9001), dict(threshold=1.0001), dict(reset="hard"), dict(delay=True)])
def test_a_neuron_that_is_slightly_off_is_caught(wrong):
    torch.manual_seed(0)
    x = torch.randn(50, 200)
    right = dict(leak=0.9, threshold=1.0)
    _, v = ops.lif(x, **right)
    assert torch.equal(v, reference.lif(x, **right)[1])
    assert not torch.equal(v, reference.lif(x, **(right | wrong))[1])


def test_prompt_and_delayed_coincide_one_step_apart_only_without_leak():
    """The delayed neuron fires on the last step's membrane: s'[t+1] = s[t] where nothing leaks."""
    torch.manual_seed(1)
    x = (torch.randint(-8, 16, (60, 50)) / 8).double()  # dyadic: sums are exact, whatever their order
    for reset in ("soft", "none"):
        prompt, v = ops.lif(x, leak=1.0, reset=reset)
        delayed, u = ops.lif(x, leak=1.0, reset=reset, delay=True)
        assert torch.equal(prompt[:-1], delayed[1:]) and delayed[0].sum() == 0
        assert torch.equal(v, u - (prompt[-1] if reset == "soft" else 0))
    prompt, delayed = (ops.lif(x, leak=0.9, delay=d)[0] for d in (False, True))
    assert not torch.equal(prompt[:-1], delayed[1:])
