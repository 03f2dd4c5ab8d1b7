"""What torch needs to know about an operator: schema, fakes, autograd, compilation without breaks, FLOPs; and the fallback."""

from __future__ import annotations

import pytest
import torch
from neuron_cases import RESETS, leaf
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from pyaccel import ops

lif, bntt, encode = (getattr(torch.ops.pyaccel, name).default for name in ("lif", "bntt_lif", "poisson_encode"))
lif_backward, bntt_backward = (getattr(torch.ops.pyaccel, name).default for name in ("lif_backward", "bntt_lif_backward"))


def numbers(reset=0, detach=True, delay=False):
    return ([0.9, 0.8, float(reset), float(detach), float(delay), 2.0, 1.0, 2.0],)


def tensors(T, step, dtype=torch.float32, last=False):
    torch.manual_seed(0)
    x = torch.randn(T, *step, dtype=dtype)
    if last:
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return x, torch.randn(step, dtype=state), torch.rand(step[1], dtype=state) + 0.5, torch.rand((), dtype=state) + 0.5


SAMPLES = [(3, (2, 3), torch.float32, False), (2, (2, 3, 4, 5), torch.float64, True), (40, (1, 2, 3), torch.bfloat16, False), (0, (2, 3), torch.float32, False)]


EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(op, args, test_utils=EVERYTHING):
    torch.library.opcheck(op, args, test_utils=test_utils)


@pytest.mark.parametrize("T, step, dtype, last", SAMPLES)
def test_opcheck_lif(T, step, dtype, last):
    x, v, channel, scalar = tensors(T, step, dtype, last)
    opcheck(lif, (leaf(x), leaf(v), leaf(channel), leaf(scalar), *numbers(0, False), 16 if T > 16 else 0))
    opcheck(lif, (leaf(x), None, None, None, *numbers(1, True, True), 0))
    opcheck(lif, (x, v, None, scalar, *numbers(2), 0))


@pytest.mark.parametrize("T, step, dtype, last", SAMPLES)
def test_opcheck_lif_backward(T, step, dtype, last):
    x, v, channel, scalar = tensors(T, step, dtype, last)
    every = 16 if T > 16 else 0
    spikes, after, kept = lif(x, v, channel, scalar, *numbers(), every)
    opcheck(lif_backward, (spikes, after, x, v, kept, channel, scalar, *numbers(), every, [True] * 4))
    opcheck(lif_backward, (None, after, x, None, x.new_empty(0, dtype=v.dtype), None, None, *numbers(), 0, [True, False, False, False]))


@pytest.mark.parametrize("T, step, dtype, last", SAMPLES[:3])
def test_opcheck_bntt(T, step, dtype, last):
    x, v, channel, scalar = tensors(T, step, dtype, last)
    weight, mean, var = (torch.rand(T, step[1], dtype=v.dtype) + 0.5 for _ in range(3))
    opcheck(bntt, (leaf(x), leaf(weight), leaf(v), None, None, leaf(channel), leaf(scalar), *numbers(), 1e-4))
    opcheck(bntt, (leaf(x), weight, None, mean, var, None, None, *numbers(1), 1e-4))


@pytest.mark.parametrize("T, step, dtype, last", SAMPLES[:3])
def test_opcheck_bntt_backward(T, step, dtype, last):
    x, v, channel, scalar = tensors(T, step, dtype, last)
    weight = torch.rand(T, step[1], dtype=v.dtype) + 0.5
    spikes, after, mean, var = bntt(x, weight, v, None, None, channel, scalar, *numbers(), 1e-4)
    rest = (x, weight, v, mean, var, channel, scalar, *numbers(), 1e-4)
    n = x[0, :, 0].numel()
    *found, _ = bntt_backward(spikes, after, *rest, True, [True] * 5, 0, None, 0.0)
    opcheck(bntt_backward, (spikes, after, *rest, True, [True] * 5, 0, None, 0.0))
    opcheck(bntt_backward, (spikes, None, *rest, False, [True, True, False, False, False], 0, None, 0.0))
    opcheck(bntt_backward, (spikes, after, *rest, True, [False] * 5, 1, None, 0.0), EVERYTHING[:3])  # what a phase does not compute is undefined
    # In two phases, as over several processes: the sums first, then the rest from them.
    sums = bntt_backward(spikes, after, *rest, True, [False] * 5, 1, None, 0.0)[5]
    halves = bntt_backward(spikes, after, *rest, True, [True, False, True, True, True], 2, sums, float(n))
    opcheck(bntt_backward, (spikes, after, *rest, True, [True, False, True, True, True], 2, sums, float(n)), EVERYTHING[:3])
    for k in (0, 2, 3, 4):
        torch.testing.assert_close(halves[k], found[k], rtol=1e-5 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5), (0, 3)])
def test_opcheck_encoder(shape):
    image, key = torch.randn(shape), torch.tensor([1, 2, 3])
    opcheck(encode, (leaf(image), None, key, 1.0, 3))
    if len(shape) == 4:
        opcheck(encode, (leaf(image.contiguous(memory_format=torch.channels_last)), torch.arange(2), key, 0.5, 2))


def test_every_operator_is_checked_here():
    """A new neuron operator needs an opcheck above (other families have test files of their own)."""
    ours = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyaccel::")}
    assert {"lif", "lif_backward", "bntt_lif", "bntt_lif_backward", "poisson_encode"} <= ours


@pytest.mark.parametrize("reset", RESETS)
def test_compiles_without_breaks_and_gives_the_same_bits(reset):
    torch._dynamo.reset()
    x, v, channel, scalar = tensors(5, (2, 3, 4))
    weight = torch.rand(5, 3)

    def model(x, v, leak, threshold, weight):
        spikes, v = ops.lif(2 * x, v, leak=leak, threshold=threshold, reset=reset, detach_reset=False)
        more, w, mean, _ = ops.bntt_lif(spikes + x, weight, v, leak=leak)
        return more, w, mean

    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(t.clone()) for t in (x, v, channel, scalar, weight)]
        out = run(*inputs)
        (out[0].sum() + out[1].sum()).backward()
        results.append([*out, *(i.grad for i in inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiles_through_inductor():
    torch._dynamo.reset()
    x = torch.randn(3, 2, 30)
    compiled = torch.compile(lambda x: ops.lif(x + 1, leak=0.9)[0] * 2, fullgraph=True)
    try:
        got = compiled(x)
    except torch._inductor.exc.InductorError as error:  # no working C++ compiler beside torch
        pytest.skip(f"inductor cannot compile here: {str(error)[:100]}")
    assert torch.equal(got, ops.lif(x + 1, leak=0.9)[0] * 2)


def test_a_new_key_needs_no_new_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    image = torch.rand(2, 3, 4, 4)

    @torch.compile(fullgraph=True, backend=counter)
    def draw(image, key):
        return ops.poisson_encode(image, 4, seed=key)

    draws = [draw(image, torch.tensor([seed, stream, step])) for seed, stream, step in ((0, 0, 0), (1, 0, 0), (1, 5, 0), (-9, 5, 99))]
    assert counter.frame_count == 1
    assert torch.equal(draws[2], ops.poisson_encode(image, 4, seed=1, stream=5))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_another_batch_size_compiles_once_more_at_most():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: ops.lif(x, leak=0.9)[0], fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 7):
        assert run(torch.randn(4, batch, 6)).shape == (4, batch, 6)
    assert counter.frame_count <= 2


def test_flops():
    x, weight = leaf(torch.randn(5, 4, 3, 7)), leaf(torch.ones(5, 3))
    n = x.numel()
    for run, forward, backward in (
        (lambda: ops.lif(x)[0], 4, 12),
        (lambda: ops.bntt_lif(x, weight)[0], 9, 21),
    ):
        with FlopCounterMode(display=False) as counter:
            spikes = run()
        assert counter.get_total_flops() == forward * n
        with FlopCounterMode(display=False) as counter:
            spikes.sum().backward()
        assert counter.get_total_flops() == backward * n
    with FlopCounterMode(display=False) as counter:
        ops.poisson_encode(torch.rand(2, 30), 4, seed=0)
    assert counter.get_total_flops() == 60


def test_meta_tensors_give_shapes():
    x, weight = torch.empty(6, 2, 3, 4, 5, device="meta", dtype=torch.bfloat16), torch.empty(6, 3, device="meta")
    spikes, v = ops.lif(x)
    assert spikes.is_meta and spikes.shape == x.shape and spikes.dtype == torch.bfloat16
    assert v.is_meta and v.shape == (2, 3, 4, 5) and v.dtype == torch.float32
    spikes, v, mean, var = ops.bntt_lif(x, weight)
    assert spikes.shape == x.shape and v.shape == (2, 3, 4, 5) and mean.shape == var.shape == (6, 3)
    assert ops.poisson_encode(x[0], 9, seed=0).shape == (9, 2, 3, 4, 5)
    current = torch.empty(6, 8, device="meta", requires_grad=True)
    ops.lif(current)[0].sum().backward()
    assert current.grad.shape == (6, 8)


def test_checkpointing_recomputes_the_same_bits():
    torch.manual_seed(0)
    x, weight, found = torch.randn(4, 6, 3, 5), torch.rand(4, 3), []
    for keep in (True, False):
        current = leaf(x)

        def layer(c):
            return ops.bntt_lif(c, weight)[0]

        out = layer(current) if keep else torch.utils.checkpoint.checkpoint(layer, current, use_reentrant=False)
        (out * x).sum().backward()
        found.append(current.grad)
    assert torch.equal(*found)


FLOATING = {
    "lif": lambda x: ops.lif(x)[1],
    "lif_packed": lambda x: ops.lif(x, packed=True)[1],
    "bntt_lif": lambda x: ops.bntt_lif(x, torch.ones(3, 2))[0],
    "bntt_lif_packed": lambda x: ops.bntt_lif(x, torch.ones(3, 2), packed=True)[0],
    "bntt_statistics": lambda x: torch.ops.pyaccel.bntt_statistics(x)[0],
    "stdb_lif": lambda x: ops.stdb_lif(x)[1],
    "poisson_encode": lambda x: ops.poisson_encode(x, 3, seed=0),
    "sram_noise": lambda x: ops.sram_noise(x, 0.1, 0.1, signed=True, seed=0),
    "crossbar_matrix": lambda x: ops.crossbar_matrix(x.abs() + 1, r_driver=1.0, r_wire_row=1.0, r_wire_col=1.0, r_sense=1.0),
    "crossbar_matmul": lambda x: ops.crossbar_matmul(x.flatten(1), torch.ones(80, 4), tile=16, adc_bits=4, adc_range=8.0),
}


@pytest.mark.parametrize("name", FLOATING)
def test_forward_mode_is_refused_not_silently_zero(name):
    x, text = torch.randn(3, 4, 2, 10), f"pyaccel::{name} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=text):
        torch.func.jvp(FLOATING[name], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        FLOATING[name](x)  # without a tangent there is nothing to refuse
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=text):
            FLOATING[name](dual)


def test_functional_transforms():
    x = torch.randn(2, 3, 40)
    with pytest.raises(RuntimeError, match="functorch"):  # torch.library has no functional gradients: an error, not zeros
        torch.func.grad(lambda a: ops.lif(a, leak=0.9)[0].sum())(x[0])
    assert torch.equal(torch.func.vmap(lambda a: ops.lif(a, leak=0.9)[0])(x), torch.stack([ops.lif(a, leak=0.9)[0] for a in x]))
