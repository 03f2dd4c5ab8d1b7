"""`spike_conv2d`, `spike_linear`, `spike_avg_pool2d` against torch's layers: values, gradients, what they keep, errors."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron_cases import DTYPES, arrange, label, leaf, pairwise
from torch.utils.flop_counter import FlopCounterMode

from pyaccel import ops
from pyaccel.ops import spike_layers

BITS = {"binary": 1, "signed": 2, "pooled": 3, "pooled_signed": 4}
VALUES = {
    "binary": [0.0, 1.0],
    "signed": [-1.0, 0.0, 1.0],
    "pooled": [0.0, 0.25, 0.5, 0.75, 1.0],
    "pooled_signed": [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0],
}
# Sums over n products in another order than torch's, which may split them over chunks: relative to the largest entry.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(kind: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.tensor(VALUES[kind], dtype=dtype)
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: torch.Tensor | None, wanted: torch.Tensor | None, what: str) -> None:
    assert (got is None) == (wanted is None), what
    if wanted is None or wanted.numel() == 0:
        return
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, what
    error = float((got.double() - wanted.double()).abs().max())
    assert error <= BOUND[wanted.dtype] * max(float(wanted.double().abs().max()), 1e-30), f"{what}: off by {error}"


def compare(ours, theirs, spikes, weight, bias, seed=9):
    """Output and all gradients of two functions of (spikes, weight, bias)."""
    results = []
    for function in (ours, theirs):
        inputs = [None if t is None else leaf(t) for t in (spikes, weight, bias)]
        out = function(*inputs)
        out.backward(noise(seed, *out.shape, dtype=out.dtype))
        results.append((out.detach(), *(None if i is None else i.grad for i in inputs)))
    for name, got, wanted in zip(("output", "spikes", "weight", "bias"), *results, strict=True):
        close(got, wanted, name)
    return results[0]


CONVOLUTIONS = pairwise(
    lead=[(5,), (3, 2), (2, 1, 3), (1,), (0, 2), (2, 0), ()],
    channels=[(4, 6, 1), (4, 6, 2), (4, 8, 4), (1, 1, 1)],
    image=[(7, 9), (5, 5), (1, 5), (12, 3)],
    kernel=[(3, 3), (1, 1), (2, 3)],
    stride=[1, 2, (2, 1)],
    padding=[1, 2, (1, 2)],
    dilation=[1, (1, 2)],
    bias=[True, False],
    kind=list(BITS),
    dtype=DTYPES,
    layout=["contiguous", "channels_last", "sliced", "time_inside", "expanded"],
)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=label)
def test_conv2d_is_torchs(case):
    (inputs, outputs, groups), dtype = case["channels"], case["dtype"]
    lead = case["lead"]
    spikes = arrange(draw(case["kind"], *lead, inputs, *case["image"], dtype=dtype), case["layout"])
    if case["layout"] == "channels_last" and len(lead) == 1:
        spikes = spikes.contiguous(memory_format=torch.channels_last)
    weight, bias = noise(1, outputs, inputs // groups, *case["kernel"], dtype=dtype), noise(2, outputs, dtype=dtype)
    geometry = dict(stride=case["stride"], padding=case["padding"], dilation=case["dilation"], groups=groups)

    def theirs(s, w, b):
        out = F.conv2d(
            s.reshape(-1, *s.shape[-3:]) if s.numel() else s.new_zeros(0, *s.shape[-3:]) + s.sum(), w, b, **geometry
        )
        return out.reshape(*lead, *out.shape[1:])

    if lead == ():
        with pytest.raises(ValueError, match=r"spike_conv2d: spikes must be \[..., C, H, W\]"):
            ops.spike_conv2d(spikes, weight, **geometry)
        return
    compare(
        lambda s, w, b: ops.spike_conv2d(s, w, b, kind=case["kind"], **geometry),
        theirs,
        spikes,
        weight,
        bias if case["bias"] else None,
    )


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lead, inputs, outputs", [((3,), 7, 5), ((2, 3), 129, 10), ((2, 1, 2), 1, 1), ((0, 3), 9, 4), ((1,), 8, 3)]
)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "time_inside"])
def test_linear_is_torchs(kind, dtype, lead, inputs, outputs, layout):
    spikes = arrange(draw(kind, *lead, inputs, dtype=dtype), layout)
    weight, bias = noise(1, outputs, inputs, dtype=dtype), noise(2, outputs, dtype=dtype)
    for b in (bias, None):
        compare(lambda s, w, b: ops.spike_linear(s, w, b, kind=kind), F.linear, spikes, weight, b)


@pytest.mark.parametrize("inputs, outputs", [(0, 4), (4, 0)])
def test_linear_without_inputs_or_outputs(inputs, outputs):
    compare(ops.spike_linear, F.linear, torch.zeros(3, inputs), torch.zeros(outputs, inputs), None)


@pytest.mark.parametrize("kernel", [2, (2, 4), 3, (1, 2)])
@pytest.mark.parametrize("shape", [(3, 4, 5, 8, 8), (2, 3, 4, 9, 7), (4, 5, 8, 8)])
def test_avg_pool2d_gradient_keeps_channels_last(kernel, shape):
    """The same bits as in contiguous memory; powers of two stay channels-last on the way back."""
    spikes = torch.rand(shape).round()

    def last(images):
        flat = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, shape[:-3])

    found = []
    for layout in (lambda t: t, last):
        leaf = layout(spikes).requires_grad_()
        out = ops.spike_avg_pool2d(leaf, kernel)
        torch.manual_seed(0)
        weights = torch.randn(out.shape)
        if layout is last:
            weights = weights.flatten(0, -4).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:-3])
        found.append(torch.autograd.grad(out, leaf, weights)[0])
    assert torch.equal(*found)
    powers = kernel != 3
    assert found[1].flatten(0, -4).is_contiguous(memory_format=torch.channels_last) or not powers or 9 in shape


@pytest.mark.parametrize("kernel", [2, 3, (2, 1), (1, 3)])
@pytest.mark.parametrize(
    "shape", [(5, 7, 9), (2, 3, 8, 8), (4, 2, 3, 7, 9), (0, 2, 3, 4, 4), (2, 0, 3, 4, 4), (2, 2, 2, 1, 3, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_avg_pool2d_is_torchs(kernel, shape, dtype):
    spikes = draw("binary", *shape, dtype=dtype)

    def theirs(s):
        images = s.reshape(-1, *shape[-3:]) if s.numel() else s.new_zeros(0, *shape[-3:]) + s.sum()
        out = F.avg_pool2d(images, kernel)
        return out.reshape(*shape[:-2], *out.shape[-2:])

    for layout in ("contiguous", "channels_last", "sliced"):
        results = []
        for function in (lambda s: ops.spike_avg_pool2d(s, kernel), theirs):
            current = leaf(arrange(spikes, layout))
            out = function(current)
            out.backward(noise(3, *out.shape, dtype=dtype))
            results.append((out.detach(), current.grad))
        assert torch.equal(results[0][0], results[1][0])
        close(results[0][1], results[1][1], "spikes")


def test_pooled_spikes_have_the_values_of_their_kind():
    for kind in ("binary", "signed"):
        pooled = ops.spike_avg_pool2d(draw(kind, 4, 3, 6, 6), 2)
        ops.spike_conv2d(pooled, leaf(noise(0, 2, 3, 3, 3)), kind="pooled" if kind == "binary" else "pooled_signed")
    with pytest.raises(ValueError, match="kind='binary' cannot store"):
        ops.spike_conv2d(pooled, leaf(noise(0, 2, 3, 3, 3)))


def kept(function) -> tuple[list[torch.Tensor], torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = function()
    return saved, out


@pytest.mark.parametrize("kind", BITS)
def test_only_bits_of_the_spikes_are_kept(kind):
    spikes, weight, bias = leaf(draw(kind, 6, 3, 4, 5, 7)), leaf(noise(1, 8, 4, 3, 3)), leaf(noise(2, 8))
    saved, _ = kept(lambda: ops.spike_conv2d(spikes, weight, bias, padding=1, kind=kind))
    sizes = [t.numel() * t.element_size() for t in saved if t.data_ptr() != weight.data_ptr()]
    assert sizes == [BITS[kind] * 18 * ((4 * 5 * 7 + 7) // 8)]
    rows, matrix = leaf(draw(kind, 6, 3, 129)), leaf(noise(1, 8, 129))
    saved, _ = kept(lambda: ops.spike_linear(rows, matrix, bias, kind=kind))
    sizes = [t.numel() * t.element_size() for t in saved if t.data_ptr() != matrix.data_ptr()]
    assert sizes == [BITS[kind] * 18 * 17]
    saved, _ = kept(lambda: ops.spike_avg_pool2d(spikes, 2))
    assert saved == []


def test_a_frozen_weight_keeps_no_spikes():
    spikes, weight = leaf(draw("binary", 6, 4, 5, 7)), noise(1, 8, 4, 3, 3)
    saved, out = kept(lambda: ops.spike_conv2d(spikes, weight))
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]
    out.sum().backward()
    assert spikes.grad is not None
    matrix = noise(1, 8, 7)
    saved, out = kept(lambda: ops.spike_linear(spikes, matrix))
    assert [t.data_ptr() for t in saved] == [matrix.data_ptr()]
    # and values that no kind could keep are then welcome
    ops.spike_conv2d(torch.full((1, 4, 5, 7), 0.3), weight)


def test_nothing_is_packed_where_no_gradient_is_asked_for(monkeypatch):
    monkeypatch.setattr(spike_layers.packing, "pack", lambda *a: pytest.fail("packed"))
    with torch.no_grad():
        ops.spike_conv2d(draw("binary", 6, 4, 5, 7), leaf(noise(1, 8, 4, 3, 3)))
        ops.spike_linear(draw("binary", 6, 7), leaf(noise(1, 8, 7)))


def test_gradients_only_where_they_are_asked_for():
    spikes, weight, bias = draw("binary", 6, 4, 5, 7), leaf(noise(1, 8, 4, 3, 3)), noise(2, 8)
    ops.spike_conv2d(spikes, weight, bias).sum().backward()
    assert weight.grad is not None and spikes.grad is None and bias.grad is None
    assert not ops.spike_conv2d(spikes, weight.detach()).requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable|trying to differentiate twice"):
        (g,) = torch.autograd.grad(ops.spike_conv2d(leaf(spikes), weight).square().sum(), weight, create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("limit", [1, 4 * 140 * 2, 4 * 140 * 5, 1 << 30])
@pytest.mark.parametrize("last", [False, True])
def test_the_weights_gradient_in_pieces_is_that_of_the_whole(monkeypatch, limit, last):
    """Backward unpacks a few images at a time; 12 images of 140 values."""
    spikes = draw("signed", 12, 4, 5, 7, dtype=torch.float64)
    spikes = spikes.contiguous(memory_format=torch.channels_last) if last else spikes
    unpacked = []
    plain = spike_layers.packing.unpack
    monkeypatch.setattr(spike_layers, "UNPACKED_BYTES", 2 * limit)
    monkeypatch.setattr(spike_layers.packing, "unpack", lambda *a: (unpacked.append(a[2][0][0]), plain(*a))[1])
    compare(
        lambda s, w, b: ops.spike_conv2d(s, w, b, padding=1, kind="signed"), lambda s, w, b: F.conv2d(s, w, b, padding=1),
        spikes, noise(1, 3, 4, 3, 3, dtype=torch.float64), None,
    )  # fmt: skip
    assert unpacked == {1: [1] * 12, 4 * 140 * 2: [2] * 6, 4 * 140 * 5: [5, 5, 2], 1 << 30: [12]}[limit]


def test_one_spike_that_comes_back_wrong_is_caught(monkeypatch):
    plain = spike_layers.packing.unpack

    def broken(*arguments):
        spikes = plain(*arguments)
        spikes.view(-1)[17] = 1 - spikes.view(-1)[17]
        return spikes

    cases = [
        (ops.spike_conv2d, F.conv2d, draw("binary", 8, 4, 5, 7), noise(1, 3, 4, 3, 3)),
        (ops.spike_linear, F.linear, draw("binary", 8, 40), noise(1, 3, 40)),
    ]
    for ours, theirs, spikes, weight in cases:
        compare(ours, theirs, spikes, weight, None)
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="weight: off by"):
            patch.setattr(spike_layers.packing, "unpack", broken)
            compare(ours, theirs, spikes, weight, None)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_what_it_does_for_torchs_layers(kind, dtype):
    spikes, weight, bias = draw(kind, 3, 2, 4, 5, 7), noise(1, 8, 4, 3, 3), noise(2, 8)
    flat, matrix = draw(kind, 3, 2, 9), noise(1, 8, 9)
    cases = [
        (
            spikes,
            weight,
            lambda s, w, b: ops.spike_conv2d(s, w, b, kind=kind),
            lambda s, w, b: F.conv2d(s.flatten(0, 1), w, b).unflatten(0, (3, 2)),
        ),
        (flat, matrix, lambda s, w, b: ops.spike_linear(s, w, b, kind=kind), F.linear),
    ]
    for s, w, ours, theirs in cases:
        results = []
        for function in (ours, theirs):
            inputs = [leaf(t) for t in (s, w, bias)]
            with torch.autocast("cpu", dtype=dtype):
                out = function(*inputs)
            assert out.dtype == dtype
            out.backward(noise(4, *out.shape, dtype=dtype))
            results.append((out.detach(), *(i.grad for i in inputs)))
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == wanted.dtype
            assert (got.double() - wanted.double()).abs().max() <= BOUND[dtype] * wanted.double().abs().max()


@pytest.mark.parametrize("layer", ["conv2d", "linear"])
def test_autocast_leaves_float64_alone(layer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if layer == "linear":
            s, w = draw("binary", 3, 4, dtype=torch.float64), noise(0, 2, 4, dtype=torch.float64)
            assert ops.spike_linear(s, w).dtype == F.linear(s, w).dtype
        else:
            s, w = draw("binary", 3, 4, 5, 5, dtype=torch.float64), noise(0, 2, 4, 3, 3, dtype=torch.float64)
            assert ops.spike_conv2d(s, w).dtype == F.conv2d(s, w).dtype


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3), channels=st.integers(1, 4), image=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.integers(1, 3), padding=st.integers(0, 2), kind=st.sampled_from(list(BITS)),
    last=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_convolution(lead, channels, image, kernel, stride, padding, kind, last, seed):
    spikes = draw(kind, *lead, channels, *image, dtype=torch.float64, seed=seed)
    if last:
        spikes = spikes.movedim(-3, -1).contiguous().movedim(-1, -3)
    weight = noise(seed, 3, channels, *kernel, dtype=torch.float64)

    def theirs(s, w, b):
        out = F.conv2d(s.reshape(-1, *s.shape[-3:]), w, b, stride, padding)
        return out.reshape(*lead, *out.shape[1:])

    compare(
        lambda s, w, b: ops.spike_conv2d(s, w, b, stride=stride, padding=padding, kind=kind),
        theirs,
        spikes,
        weight,
        None,
    )


def test_an_empty_channels_last_batch():
    spikes = torch.zeros(0, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    weight = leaf(noise(0, 2, 4, 3, 3))
    ops.spike_conv2d(spikes, weight).sum().backward()
    assert (weight.grad == 0).all()


S, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3, requires_grad=True)
V, M = torch.zeros(2, 4), torch.zeros(6, 4, requires_grad=True)


@pytest.mark.parametrize("call, kind, text", [
    (lambda: ops.spike_conv2d([1], W), TypeError, "spike_conv2d: spikes must be a torch.Tensor [..., C, H, W], got a list"),
    (lambda: ops.spike_conv2d(S.bool(), W), TypeError, "spike_conv2d: spikes must be float32, bfloat16, float16 or float64, got torch.bool"),
    (lambda: ops.spike_conv2d(S[0], W), ValueError, "spike_conv2d: spikes must be [..., C, H, W], got [4, 5, 5]"),
    (lambda: ops.spike_conv2d(S, W[0]), ValueError, "spike_conv2d: weight must be [O, C/groups, kH, kW], got [4, 3, 3]"),
    (lambda: ops.spike_conv2d(S, W[:, :3]), ValueError, "spike_conv2d: weight must be [O, 4/1, kH, kW] for spikes [2, 4, 5, 5], got [6, 3, 3, 3]"),
    (lambda: ops.spike_conv2d(S, W, groups=2), ValueError, "spike_conv2d: weight must be [O, 4/2, kH, kW] for spikes [2, 4, 5, 5]"),
    (lambda: ops.spike_conv2d(S, W, kind="ternary"), ValueError, "spike_conv2d: kind must be one of binary, signed, pooled, pooled_signed, got 'ternary'"),
    (lambda: ops.spike_conv2d(S + 0.5, W), ValueError, "spike_conv2d: the spikes hold values that kind='binary' cannot store"),
    (lambda: ops.spike_linear(None, M), TypeError, "spike_linear: spikes must be a torch.Tensor [..., in], got a NoneType"),
    (lambda: ops.spike_linear(V[0], M), ValueError, "spike_linear: spikes must be [..., in], got [4]"),
    (lambda: ops.spike_linear(V, M[:, :3]), ValueError, "spike_linear: weight must be [out, 4] for spikes [2, 4], got [6, 3]"),
    (lambda: ops.spike_linear(V, M, kind="pool"), ValueError, "spike_linear: kind must be one of binary, signed, pooled, pooled_signed, got 'pool'"),
    (lambda: ops.spike_linear(V - 1, M), ValueError, "spike_linear: the spikes hold values that kind='binary' cannot store"),
    (lambda: ops.spike_avg_pool2d(V, 2), ValueError, "spike_avg_pool2d: spikes must be [..., C, H, W], got [2, 4]"),
    (lambda: ops.spike_avg_pool2d(S.int(), 2), TypeError, "spike_avg_pool2d: spikes must be float32, bfloat16, float16 or float64, got torch.int32"),
])  # fmt: skip
def test_wrong_arguments(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value) and type(caught.value) is kind


def test_padding_in_words_is_refused_by_name():
    with pytest.raises((ValueError, TypeError), match="spike_conv2d: padding"):
        ops.spike_conv2d(S, W, padding="same")


def test_compiles_without_breaks():
    torch._dynamo.reset()

    def model(x, w, m):
        s = ops.lif(x)[0]
        s = ops.spike_avg_pool2d(ops.lif(ops.spike_conv2d(s, w, padding=1))[0], 2)
        return ops.spike_linear(s.flatten(2), m, kind="pooled")

    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(1 + noise(0, 3, 2, 4, 4, 4)), leaf(noise(1, 4, 4, 3, 3)), leaf(noise(2, 5, 16))]
        out = run(*inputs)
        out.square().sum().backward()
        results.append((out.detach(), *(i.grad for i in inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_flops_of_the_convolution_are_counted():
    with FlopCounterMode(display=False) as counter:
        ops.spike_conv2d(S, W, padding=1)
    assert counter.get_total_flops() == 2 * 2 * 25 * 6 * 4 * 9


FALLBACK = """
import json, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
import torch
import torch.nn.functional as F
from pyaccel import extension, ops

assert extension._C is None
torch.manual_seed(0)
problems = []
for kind, values in (("binary", (0, 1)), ("signed", (-1, 0, 1)), ("pooled", (0, .25, .5, .75, 1)), ("pooled_signed", (-1, -.5, -.25, 0, .75))):
    images = torch.tensor(values, dtype=torch.float32)[torch.randint(len(values), (6, 4, 5, 7))]
    for spikes in (images, images.contiguous(memory_format=torch.channels_last)):
        found = []
        for function in (lambda s, w: ops.spike_conv2d(s, w, padding=1, kind=kind), lambda s, w: F.conv2d(s, w, padding=1)):
            w = torch.ones(3, 4, 3, 3, requires_grad=True)
            function(spikes, w).square().sum().backward()
            found.append(w.grad)
        if not torch.allclose(*found, rtol=1e-4):
            problems.append(kind)
    m = torch.ones(3, 7, requires_grad=True)
    ops.spike_linear(images, m, kind=kind).sum().backward()
    if not torch.allclose(m.grad, images.sum((0, 1, 2)).expand(3, 7), rtol=1e-5):
        problems.append("linear " + kind)
print(json.dumps(problems))
"""


def test_without_the_compiled_module(run_python):
    done = run_python(FALLBACK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
