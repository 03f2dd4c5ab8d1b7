"""Without the compiled module everything runs on the plain-torch twins, after one warning that says why."""

from __future__ import annotations

import json

import pytest

SCRIPT = """
import json, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
import torch
import pyaccel
from pyaccel import extension, ops, reference

torch.set_num_threads(1)
torch.manual_seed(0)
assert extension._C is None and not extension.has_cuda()
told, problems = [], []

def same(name, a, b):
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
        problems.append(name)

def grads(outputs, inputs):
    torch.manual_seed(1)
    found = torch.autograd.grad(outputs, inputs, [torch.randn(o.shape, dtype=o.dtype) for o in outputs], allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs)]

def compare(name, op, twin, make, outputs, **options):
    results = []
    for function in (op, twin):
        inputs = make()
        out = function(*inputs["positional"], **inputs["named"], **options)
        leaves = [t for t in (*inputs["positional"], *inputs["named"].values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        results.append((out, grads([o for o in out[:outputs] if o.requires_grad], leaves)))
    for k, (a, b) in enumerate(zip(results[0][0], results[1][0])):
        same(f"{name} output {k}", a, b)
    for k, (a, b) in enumerate(zip(results[0][1], results[1][1])):
        same(f"{name} gradient {k}", a, b)
    return results[0][0]

x = torch.randn(6, 2, 3, 4, 5)
last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
leaf = lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()

def neuron(current, membrane=True):
    return lambda: dict(positional=[leaf(current), leaf(torch.ones(2, 3, 4, 5)) if membrane else None],
                        named=dict(leak=leaf(torch.tensor([0.9, 0.8, 0.7])), threshold=leaf(torch.tensor(0.8))))

def bntt(current):
    return lambda: dict(positional=[leaf(current), leaf(torch.ones(6, 3)), leaf(torch.ones(2, 3, 4, 5))],
                        named=dict(leak=leaf(torch.tensor(0.9)), threshold=leaf(torch.tensor([0.9, 0.8, 0.7]))))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = ops.lif(x)
    told.append(len([w for w in caught if w.category is RuntimeWarning]))
    text = next((str(w.message) for w in caught if w.category is RuntimeWarning), "")
    for reset in ("soft", "hard", "none"):
        for delay in (False, True):
            for detach in (True, False):
                compare(f"lif {reset} {delay} {detach}", ops.lif, reference.lif, neuron(x), 2, reset=reset, delay=delay, detach_reset=detach, surrogate="atan")
    for name, current in (("last", last), ("sliced", x[..., ::2].repeat_interleave(2, -1)[..., :5]), ("T=200", x.repeat(40, 1, 1, 1, 1)[:200])):
        spikes, v = compare("lif " + name, ops.lif, reference.lif, neuron(current), 2)
        if spikes.stride() != torch.empty_like(current).stride():
            problems.append(f"lif {name}: spikes strides {spikes.stride()} of {current.stride()}")
    compare("bntt", ops.bntt_lif, reference.bntt_lif, bntt(x), 2, surrogate="sigmoid")
    compare("bntt given", ops.bntt_lif, reference.bntt_lif, bntt(x), 2, mean=torch.zeros(6, 3), var=torch.ones(6, 3))
    out = compare("bntt last", ops.bntt_lif, reference.bntt_lif, bntt(last), 2)
    if out[0].stride() != last.stride():
        problems.append("bntt last: strides")
    image = x[0].contiguous(memory_format=torch.channels_last)
    make = lambda: dict(positional=[leaf(image), 3], named={})
    compare("encode", lambda *a, **k: [ops.poisson_encode(*a, **k)], lambda *a, **k: [reference.poisson_encode(*a, **k)], make, 1, seed=5, gain=0.5)
    if ops.poisson_encode(image, 3, seed=0).stride()[1:] != image.stride():
        problems.append("encode: strides")
    # Nothing to do, and only a part to do.
    for name, run in (
        ("T=0 membrane", lambda v: ops.lif(torch.zeros(0, 4), v)[1]),
        ("T=0 bntt", lambda v: ops.bntt_lif(torch.zeros(0, 2, 4), torch.zeros(0, 4), v.expand(2, 4), mean=torch.zeros(0, 4), var=torch.ones(0, 4))[1]),
    ):
        v = torch.randn(4, requires_grad=True)
        try:
            run(v).sum().backward()
            same(name, v.grad, torch.full((4,), 1.0 if "bntt" not in name else 2.0))
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__} {error}")
    leak = torch.tensor(0.5, requires_grad=True)
    try:
        ops.lif(torch.zeros(0, 4), leak=leak)[1].sum().backward()
        same("T=0 leak", leak.grad, torch.tensor(0.0))
    except Exception as error:
        problems.append(f"T=0 leak: {type(error).__name__} {error}")
    told.append(len([w for w in caught if w.category is RuntimeWarning]))
print(json.dumps(dict(told=told, text=text, problems=problems)))
"""


@pytest.fixture(scope="module")
def report(run_python):
    done = run_python(SCRIPT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_warning_says_why(report):
    assert report["told"] == [1, 1]
    assert "the compiled module pyaccel._C could not be imported (blocked for the test)" in report["text"]
    assert "the plain-torch reference runs instead" in report["text"] and "python -m pyaccel doctor" in report["text"]


def test_the_fallback_is_the_twin(report):
    assert report["problems"] == []
