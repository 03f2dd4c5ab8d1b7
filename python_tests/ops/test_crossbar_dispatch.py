"""The crossbar operators at every instruction-set level, compiled by torch, and without the compiled module."""

from __future__ import annotations

import pytest
import torch

from pyaccel import extension, ops

OHM = dict(r_driver=1e3, r_wire_row=5.0, r_wire_col=10.0, r_sense=1e3)
ORDER = ("baseline", "avx2", "avx512")
BEST = extension._C.build_info()["best_isa"] if extension._C is not None else "baseline"


def everything(dtype):
    torch.manual_seed(0)
    g = (torch.rand(3, 37, 21, dtype=dtype) * 4.5e-5 + 5e-6).requires_grad_()
    effective = ops.crossbar_matrix(g, **OHM)
    heavy = ops.crossbar_matrix(g, r_driver=1e3, r_wire_row=50.0, r_wire_col=5e3, r_sense=1e3)
    ((effective + heavy) * torch.rand(3, 37, 21, dtype=dtype)).sum().backward()
    x, w = torch.randn(19, 37, dtype=dtype), torch.rand(37, 29, dtype=dtype)
    noisy = ops.crossbar_matmul(x, w, tile=8, dac_bits=8, read_noise=0.5, seed=-3, stream=7)
    codes = ops.crossbar_matmul(x.round(decimals=1), w.round(decimals=1), tile=8, adc_bits=6, adc_range=5.01)
    return effective.detach(), heavy.detach(), g.grad, noisy, codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ORDER[: ORDER.index(BEST)])
def test_levels_agree(level, dtype):
    best, found = everything(dtype), None
    before = extension._C.build_info()["isa"]
    extension._C.force_isa(level)
    try:
        found = everything(dtype)
    finally:
        extension._C.force_isa(before)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-11
    for a, b in zip(found[:3], best[:3], strict=True):
        assert (a - b).abs().max() < tolerance * b.abs().max()
    torch.testing.assert_close(found[3], best[3], rtol=1e-5, atol=1e-5)  # the noise itself is float32
    torch.testing.assert_close(found[4], best[4], rtol=1e-5, atol=1e-5)


def test_compiles_without_a_break():
    def loss(g, x, key):
        effective = ops.crossbar_matrix(g, **OHM) * 2e4
        return ops.crossbar_matmul(x, effective, tile=4, adc_bits=8, adc_range=3.0, read_noise=0.1, seed=key).square().sum()

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, fast):
        torch.manual_seed(0)
        g = (torch.rand(9, 6) * 4.5e-5).requires_grad_()
        value = function(g, torch.randn(5, 9), torch.tensor([3, 4]))
        value.backward()
        results.append((value.detach(), g.grad))
    torch.testing.assert_close(*results)


SCRIPT = """
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
import torch
from pyaccel import extension, ops, reference
from pyaccel.hardware.mapping import normals

assert extension._C is None
OHM = dict(r_driver=1e3, r_wire_row=5.0, r_wire_col=10.0, r_sense=1e3)
torch.manual_seed(0)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    g = (torch.rand(2, 5, 4, dtype=torch.float64) * 4.5e-5).requires_grad_()
    out = ops.crossbar_matrix(g, **OHM)
    assert torch.equal(out, reference.crossbar_matrix(g, **OHM))
    (grad,) = torch.autograd.grad(out.sum(), g)
    (twin,) = torch.autograd.grad(reference.crossbar_matrix(g, **OHM).sum(), g)
    assert torch.equal(grad, twin)
    x, w = torch.randn(3, 5), torch.rand(5, 4)
    options = dict(tile=2, dac_bits=8, dac_range=2.0, adc_bits=6, adc_range=2.0, read_noise=0.1, seed=5)
    assert torch.equal(ops.crossbar_matmul(x, w, **options), reference.crossbar_matmul(x, w, **options))
    assert normals(3, 4, 10).dtype == torch.float32
assert len([w for w in told if "the plain-torch reference runs instead" in str(w.message)]) == 1, told
"""


def test_without_the_compiled_module(run_python):
    done = run_python(SCRIPT)
    assert done.returncode == 0, done.stderr
