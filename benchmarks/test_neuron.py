"""The neuron family against its roofline, the plain torch loop and torch.compile of that loop.

r = time over the bytes that must move, timed as copies and adds of the same tensors in the same run: forward one copy
(8 bytes an element in float32); training one copy and one add (20 bytes); BNTT also one copy and two adds (32 bytes: the
statistics read apart). The loop is `for x in current.unbind(0)`; indexing `current[t]` would be quadratic in T.
"recycled": after pyaccel.recycle_memory(), as training runs. "fresh": every call gets new pages (glibc's default for
blocks above 32 MiB), measured in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from timing import Time, compiled, measure

import pyaccel
from pyaccel import ops, reference

pytestmark = pytest.mark.benchmark
LIF_SHAPES = [(4, 2**18), (4, 2**20), (25, 2**16), (25, 2**18), (25, 2**20), (100, 2**16), (100, 2**18)]
BNTT_SHAPES = [(25, 16, 64, 32, 32), (25, 16, 256, 8, 8), (25, 128, 16, 32, 32)]
NEURON = dict(leak=0.95, threshold=1.0)


@pytest.fixture(autouse=True)
def recycled():
    pyaccel.recycle_memory()


def lif_loop(current: torch.Tensor) -> torch.Tensor:
    return reference.lif(current, **NEURON)[0]


def bntt_loop(current: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One batch_norm a step, as every library does it, then the neuron."""
    steps = [
        torch.nn.functional.batch_norm(x, None, None, w, None, training=True, eps=1e-4)
        for x, w in zip(current.unbind(0), weight.unbind(0), strict=True)
    ]
    return lif_loop(torch.stack(steps))


def row(shape, dtype, fwd: Time, train: Time, copy: Time, add: Time, what: str, **more) -> dict:
    return {
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "what": what,
        "forward ms (CPU)": fwd.cpu * 1e3,
        "training ms (CPU)": train.cpu * 1e3,
        "r forward": fwd.cpu / copy.cpu,
        "r training": train.cpu / (copy.cpu + add.cpu),
        "r training (wall)": train.wall / (copy.wall + add.wall),
        **more,
    }


def trainer(function, current, *parameters, gradient):
    def step():
        current.grad = None
        out = function(current, *parameters)
        out.backward(gradient)

    return step


def quiet(function, *arguments):
    def run():
        with torch.no_grad():
            function(*arguments)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LIF_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_lif(shape, dtype, device, quick, table, benchmark):
    current = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    gradient = torch.randn(shape, dtype=dtype, device=device)
    out = torch.empty_like(gradient)

    def kernel(x):
        return ops.lif(x, **NEURON)[0]

    sample = current.detach()[:, :1000]
    assert torch.equal(kernel(sample), lif_loop(sample))
    jobs = {
        "copy": lambda: out.copy_(gradient),
        "add": lambda: torch.add(gradient, current.detach(), out=out),
        "kernel forward": quiet(kernel, current),
        "kernel training": trainer(kernel, current, gradient=gradient),
        "loop forward": quiet(lif_loop, current),
        "loop training": trainer(lif_loop, current, gradient=gradient),
    }
    seconds = None
    if not quick and dtype == torch.float32 and shape in [(4, 2**20), (25, 2**18), (25, 2**20)]:
        fast, seconds = compiled(lif_loop, current)
        start = time.perf_counter()
        fast(current).backward(gradient)
        seconds += time.perf_counter() - start
        jobs |= {"compile forward": quiet(fast, current), "compile training": trainer(fast, current, gradient=gradient)}
    t = measure(jobs, 2 if quick else 9, device)
    for what in ("kernel", "loop", "compile"):
        if f"{what} forward" in t:
            more = {"compile s": seconds} if what == "compile" else {}
            table.append(row(shape, dtype, t[f"{what} forward"], t[f"{what} training"], t["copy"], t["add"], what, **more))
    benchmark.pedantic(jobs["kernel training"], rounds=3, iterations=1)


@pytest.mark.parametrize("shape", BNTT_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_bntt(shape, device, quick, table, benchmark):
    dtype = torch.float32
    current = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    weight = torch.ones(shape[0], shape[2], device=device, requires_grad=True)
    gradient = torch.randn(shape, dtype=dtype, device=device)
    out = torch.empty_like(gradient)

    def kernel(x, w):
        return ops.bntt_lif(x, w, **NEURON)[0]

    sample = current.detach()[:, :, :2].contiguous().double()
    assert torch.equal(kernel(sample, weight[:, :2].double()), bntt_loop(sample, weight[:, :2].double()))
    jobs = {
        "copy": lambda: out.copy_(gradient),
        "add": lambda: torch.add(gradient, current.detach(), out=out),
        "kernel forward": quiet(kernel, current, weight),
        "kernel training": trainer(kernel, current, weight, gradient=gradient),
        "loop forward": quiet(bntt_loop, current, weight),
        "loop training": trainer(bntt_loop, current, weight, gradient=gradient),
    }
    t = measure(jobs, 2 if quick else 7, device)
    floor32 = t["copy"].cpu + 2 * t["add"].cpu
    for what in ("kernel", "loop"):
        training = t[f"{what} training"]
        more = {"of 32 bytes": training.cpu / floor32}
        table.append(row(shape, dtype, t[f"{what} forward"], training, t["copy"], t["add"], what, **more))
    benchmark.pedantic(jobs["kernel training"], rounds=3, iterations=1)


FRESH = """
import json, sys, time, torch, pyaccel
from statistics import median
from pyaccel import ops
recycle, steps, neurons = sys.argv[1] == "1", int(sys.argv[2]), int(sys.argv[3])
if recycle: pyaccel.recycle_memory()
x = torch.randn(steps, neurons, requires_grad=True); g = torch.randn(steps, neurons); out = torch.empty_like(g)
def cpu(f):
    f(); found = []
    for _ in range(7):
        start = time.process_time(); f(); found.append(time.process_time() - start)
    return median(found)
def step():
    x.grad = None
    ops.lif(x, leak=0.95)[0].backward(g)
print(json.dumps([cpu(lambda: out.copy_(g)) + cpu(lambda: torch.add(g, x.detach(), out=out)), cpu(step)]))
"""


@pytest.mark.parametrize("shape", [(25, 2**16), (25, 2**18), (25, 2**20)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_output_memory(shape, device, table, benchmark):
    """A plain training loop with and without recycled memory, each in a process of its own."""
    if device.type != "cpu":
        pytest.skip("CUDA has torch's caching allocator")
    found = {}
    for recycle in (0, 1):
        run = [sys.executable, "-c", FRESH, str(recycle), *map(str, shape)]
        found[recycle] = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    table.append({
        "shape": "x".join(map(str, shape)),
        "r training, fresh": found[0][1] / found[0][0],
        "r training, recycled": found[1][1] / found[1][0],
        "fresh / recycled": found[0][1] / found[1][1],
    })  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)


def test_call_overhead(device, table, benchmark):
    """`ops.lif` on a tiny tensor against an empty registered operator with autograd."""
    library = torch.library.Library("pyaccel_bench", "DEF")
    library.define("empty(Tensor x) -> Tensor")
    library.impl("empty", lambda x: torch.empty_like(x), "CompositeExplicitAutograd")
    torch.library.register_autograd("pyaccel_bench::empty", lambda ctx, g: g, lib=library)
    empty = torch.ops.pyaccel_bench.empty.default
    x = torch.randn(4, 8, device=device, requires_grad=True)

    def repeat(f):
        def run():
            for _ in range(500):
                f(x)

        return run

    t = measure({"empty": repeat(empty), "lif": repeat(lambda x: ops.lif(x))}, 9, device)
    table.append({
        "empty operator us": t["empty"].cpu / 500 * 1e6,
        "ops.lif us": t["lif"].cpu / 500 * 1e6,
        "ratio": t["lif"].cpu / t["empty"].cpu,
    })  # fmt: skip
    benchmark.pedantic(lambda: ops.lif(x), rounds=5)
