"""`ops.stdb_lif` as an operator: instruction sets, threads, opcheck, compilation, layouts, errors, fallback."""

from __future__ import annotations

import json

import pytest
import torch
from neuron_cases import DTYPES, arrange, assert_close, leaf
from torch.utils.flop_counter import FlopCounterMode

from pyaccel import extension, ops, reference
from pyaccel.reference.neuron import state_dtype

FORMS = ("exact", "fp32_underflow")


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.skipif(extension._C is None, reason="no compiled module")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_instruction_sets_agree(dtype, form):
    order, info = ("baseline", "avx2", "avx512"), extension._C.build_info()
    x, grad = (0.3 + noise(0, 140, 3, 145)).to(dtype), noise(1, 140, 3, 145).to(dtype)
    results = []
    for level in order[: order.index(info["best_isa"]) + 1]:
        extension._C.force_isa(level)
        try:
            current = leaf(x)
            spikes, u, since = ops.stdb_lif(current, leak=0.9, form=form)
            spikes.backward(grad)
        finally:
            extension._C.force_isa(info["isa"])
        results.append((spikes.detach(), u.detach(), since, current.grad))
    for other in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(other[:3], results[-1][:3], strict=True))
        assert_close(other[3], results[-1][3], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    x, grad = (0.3 + noise(0, 12, 40, 1999)).to(dtype), noise(1, 12, 40, 1999).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        current = leaf(x)
        spikes, u, since = ops.stdb_lif(current, leak=0.9)
        spikes.backward(grad)
        results.append((spikes.detach(), u.detach(), since, current.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


stdb, stdb_grad = (getattr(torch.ops.pyaccel, name).default for name in ("stdb_lif", "stdb_lif_backward"))
def numbers(form):
    return None, None, [0.9, 0.8, 0.3, 0.01, float(form)]


@pytest.mark.parametrize("T, step, dtype, layout", [
    (3, (2, 3), torch.float32, "contiguous"), (2, (2, 3, 4, 5), torch.float64, "channels_last"),
    (70, (1, 2, 3), torch.bfloat16, "contiguous"), (0, (2, 3), torch.float32, "contiguous"),
])  # fmt: skip
def test_opcheck(T, step, dtype, layout):
    x, v = arrange(noise(0, T, *step).to(dtype), layout), noise(1, *step).to(state_dtype(dtype))
    since = torch.full(step, 5, dtype=torch.int32)
    torch.library.opcheck(stdb, (leaf(x), leaf(v), since, *numbers(0)))
    torch.library.opcheck(stdb, (leaf(x), None, None, *numbers(1)))
    bits = stdb(x, v, since, *numbers(0))[3]
    torch.library.opcheck(stdb_grad, (x, v, since, bits, *numbers(0), list(x.stride()), True))
    torch.library.opcheck(stdb_grad, (x, None, None, bits, *numbers(1), list(x.stride()), False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [torch.float64, torch.float32, torch.bfloat16])
def test_leak_and_threshold_from_tensors_are_the_numbers(dtype, held):
    leak, threshold = torch.tensor(0.9, dtype=held), torch.tensor(0.8, dtype=held)
    x, grad, found = noise(0, 80, 3, 41).to(dtype), noise(1, 80, 3, 41).to(dtype), []
    for given in (dict(leak=leak, threshold=threshold), dict(leak=float(leak), threshold=float(threshold))):
        current = leaf(x)
        spikes, after, since = ops.stdb_lif(current, **given)
        spikes.backward(grad)
        found.append((spikes.detach(), after.detach(), since, current.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].any()


def test_opcheck_with_tensors_for_leak_and_threshold():
    given = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64), [1.0, 1.0, 0.3, 0.01, 0.0]
    x = noise(0, 5, 2, 9).float()
    torch.library.opcheck(stdb, (leaf(x), None, None, *given))
    torch.library.opcheck(stdb_grad, (x, None, None, stdb(x, None, None, *given)[3], *given, list(x.stride()), False))


def test_a_threshold_written_between_forward_and_backward_is_told():
    threshold, x = torch.tensor(0.8, dtype=torch.float64), leaf(noise(0, 5, 9).float())
    spikes = ops.stdb_lif(x, threshold=threshold)[0]
    threshold.fill_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


def test_compiles_without_breaks_and_gives_the_same_bits():
    torch._dynamo.reset()

    def model(x, v):
        spikes, u, since = ops.stdb_lif(2 * x, v, leak=0.9)
        return ops.stdb_lif(x, u, since, form="fp32_underflow")[0] + spikes

    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(noise(0, 8, 2, 30).float()), leaf(noise(1, 2, 30).float())]
        out = run(*inputs)
        out.sum().backward()
        results.append((out.detach(), *(i.grad for i in inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_meta_tensors_and_flops():
    spikes, u, since = ops.stdb_lif(torch.empty(6, 2, 9, device="meta", dtype=torch.float16))
    assert spikes.shape == (6, 2, 9) and u.dtype == torch.float32 and since.dtype == torch.int32 and since.is_meta
    x = leaf(torch.randn(5, 12))
    with FlopCounterMode(display=False) as counter:
        spikes = ops.stdb_lif(x)[0]
    assert counter.get_total_flops() == 4 * 60
    with FlopCounterMode(display=False) as counter:
        spikes.sum().backward()
    assert counter.get_total_flops() == 4 * 60


def test_layout_of_the_output_is_that_of_the_input():
    x = arrange(torch.randn(4, 2, 5, 3, 3), "channels_last")
    for t in ops.stdb_lif(x)[1:]:
        assert t.stride() == x.stride()[1:]
    current = leaf(x)
    spikes = ops.stdb_lif(current)[0]
    assert spikes.stride() == x.stride()
    spikes.backward(torch.randn(4, 2, 5, 3, 6)[..., ::2])
    assert current.grad.stride() == x.stride()


def test_inputs_are_left_alone_and_state_is_new():
    x, v, since = torch.randn(5, 33), torch.randn(33), torch.full((33,), 4, dtype=torch.int32)
    kept = x.clone(), v.clone(), since.clone()
    out = ops.stdb_lif(leaf(x), leaf(v), since)
    (out[0].sum() + out[1].sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip((x, v, since), kept, strict=True))
    out = ops.stdb_lif(torch.empty(0, 33), v, since)
    assert torch.equal(out[1], v) and torch.equal(out[2], since)
    assert out[1].data_ptr() != v.data_ptr() and out[2].data_ptr() != since.data_ptr()


def test_gradients_only_where_they_are_asked_for():
    x, v = torch.randn(4, 30), leaf(torch.randn(30))
    spikes, u, since = ops.stdb_lif(x, v)
    assert spikes.requires_grad and u.requires_grad and not since.requires_grad
    spikes.sum().backward()
    assert v.grad is not None and x.grad is None
    assert not ops.stdb_lif(x)[0].requires_grad
    with pytest.raises(NotImplementedError, match="pyaccel::stdb_lif_backward .*cannot be differentiated"):
        (g,) = torch.autograd.grad(
            ops.stdb_lif(y := leaf(x))[0].sum(), y, torch.ones((), requires_grad=True), create_graph=True
        )
        g.sum().backward()


X = torch.zeros(4, 2, 3)
INT = dict(dtype=torch.int32)


@pytest.mark.parametrize("arguments, kind, text", [
    (dict(current=[1.0]), TypeError, "stdb_lif: current must be a torch.Tensor [T, ...], got a list"),
    (dict(current=X.int()), TypeError, "stdb_lif: current must be float32, bfloat16, float16 or float64, got torch.int32"),
    (dict(current=torch.tensor(1.0)), ValueError, "stdb_lif: current must be [T, ...], got a 0-d tensor"),
    (dict(membrane=torch.zeros(2, 4)), ValueError, "stdb_lif: membrane must have shape [2, 3], got [2, 4]"),
    (dict(membrane=torch.zeros(2, 3).double()), TypeError, "stdb_lif: membrane must be torch.float32, got torch.float64"),
    (dict(since=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "stdb_lif: since must be torch.int32, got torch.int64; convert it with .to(torch.int32)"),
    (dict(since=torch.zeros(3, **INT)), ValueError, "stdb_lif: since must have shape [2, 3], got [3]"),
    (dict(since=torch.zeros(2, 3, device="meta", **INT)), ValueError, "stdb_lif: since is on meta, the other tensors on cpu"),
    (dict(since=5), TypeError, "stdb_lif: since must be a torch.Tensor, got a int"),
    (dict(leak=float("nan")), ValueError, "stdb_lif: leak must be a finite number, got nan"),
    (dict(leak=torch.tensor(1)), TypeError, "stdb_lif: leak must be float32, bfloat16, float16 or float64, got torch.int64"),
    (dict(leak=torch.ones(3)), ValueError, "stdb_lif: leak must have shape [], got [3]"),
    (dict(leak=torch.tensor(float("inf"))), ValueError, "stdb_lif: leak must be a finite number, got inf"),
    (dict(threshold=torch.tensor(-0.5)), ValueError, "stdb_lif: threshold must be a finite number above 0, got -0.5"),
    (dict(threshold=torch.ones((), device="meta")), ValueError, "stdb_lif: threshold is on meta, the other tensors on cpu"),
    (dict(threshold=torch.ones((), requires_grad=True)), ValueError, "stdb_lif: threshold must not require grad"),
    (dict(threshold=0.0), ValueError, "stdb_lif: threshold must be a finite number above 0, got 0.0"),
    (dict(threshold="1"), TypeError, "stdb_lif: threshold must be a number, got str"),
    (dict(alpha=float("inf")), ValueError, "stdb_lif: alpha must be a finite number, got inf"),
    (dict(beta=None), TypeError, "stdb_lif: beta must be a number, got NoneType"),
    (dict(form="fp32"), ValueError, "stdb_lif: form must be one of exact, fp32_underflow, got 'fp32'"),
])  # fmt: skip
def test_wrong_arguments(arguments, kind, text):
    with pytest.raises(kind) as caught:
        ops.stdb_lif(**(dict(current=X) | arguments))
    assert text in str(caught.value) and type(caught.value) is kind


@pytest.mark.parametrize("beta", [0.0, -0.01])
def test_a_beta_without_meaning_is_refused_or_computed_as_the_twin_does(beta):
    since, found = torch.full((1,), 2000, dtype=torch.int32), []
    for function in (ops.stdb_lif, reference.stdb_lif):
        v = torch.full((1,), 2.0, requires_grad=True)
        try:
            function(torch.zeros(1, 1), v, since, beta=beta, form="fp32_underflow")[0].sum().backward()
        except ValueError as error:
            assert "beta" in str(error)
            return
        found.append(v.grad)
    assert torch.equal(*found)


FALLBACK = """
import json, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
import torch
from pyaccel import extension, ops, reference

torch.set_num_threads(1)
torch.manual_seed(0)
assert extension._C is None
problems = []
x, v = 0.5 + torch.randn(120, 2, 3, 4, 5), torch.randn(2, 3, 4, 5)
last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
since = torch.full((2, 3, 4, 5), 30, dtype=torch.int32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, current in (("contiguous", x), ("last", last), ("sliced", x[..., ::2]), ("T=1", x[:1]), ("bf16", x.bfloat16()), ("f64", x.double())):
        for form in ("exact", "fp32_underflow"):
            for count in (None, since[..., : current.shape[-1]]):
                results = []
                for function in (ops.stdb_lif, reference.stdb_lif):
                    c = current.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                    m = v[..., : current.shape[-1]].to(torch.float64 if name == "f64" else torch.float32).clone().requires_grad_()
                    s, u, n = function(c, m, count, leak=0.9, form=form)
                    (s.float().sum() + (u * u).sum()).backward()
                    results.append((s.detach(), u.detach(), n, c.grad, m.grad))
                for k, (a, b) in enumerate(zip(*results)):
                    rtol = 1e-2 if name == "bf16" else 1e-5
                    if a.dtype != b.dtype or not torch.allclose(a.double(), b.double(), rtol=rtol, atol=1e-6):
                        problems.append(f"{name} {form} {k}")
    held = dict(leak=torch.tensor(0.9), threshold=torch.tensor(0.8))
    if not torch.equal(ops.stdb_lif(x, **held)[0], ops.stdb_lif(x, **{k: float(t) for k, t in held.items()})[0]):
        problems.append("tensors")
    try:
        ops.stdb_lif(x, threshold=torch.zeros(()))
        problems.append("threshold of zero")
    except ValueError as error:
        assert str(error) == "stdb_lif: threshold must be a finite number above 0, got 0.0"
    try:
        m = torch.ones(4, requires_grad=True)
        out = ops.stdb_lif(torch.zeros(0, 4), m)
        out[1].sum().backward()
        if m.grad is None or m.grad.tolist() != [1.0] * 4 or out[2].tolist() != [999] * 4:
            problems.append("T=0: values")
    except Exception as error:
        problems.append(f"T=0: {type(error).__name__} {error}")
print(json.dumps(dict(problems=problems, told=len([w for w in caught if w.category is RuntimeWarning]))))
"""


@pytest.fixture(scope="module")
def fallback(run_python):
    done = run_python(FALLBACK)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_compiled_module(fallback):
    assert fallback["told"] == 1
    assert [p for p in fallback["problems"] if not p.startswith("T=0")] == []


def test_no_steps_without_the_compiled_module(fallback):
    assert [p for p in fallback["problems"] if p.startswith("T=0")] == []
