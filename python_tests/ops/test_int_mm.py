"""The known-answer product in front of torch._int_mm: what it lets through, and what it catches."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from pyaccel import extension, ops
from pyaccel.ops import int_mm

pytestmark = pytest.mark.skipif(extension._C is None, reason="the compiled module is absent")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    int_mm.library_is_exact.cache_clear(), int_mm.library_serves.cache_clear()
    yield
    int_mm.library_is_exact.cache_clear(), int_mm.library_serves.cache_clear()


def saturating(a, b):
    """What a library without VNNI computes: sums of two products clipped to 16 bits."""
    a, b = a.to(torch.int64), b.to(torch.int64)
    pairs = (a[:, :, None] * b[None]).reshape(a.shape[0], -1, 2, b.shape[1]).sum(2)
    return pairs.clamp(-32768, 32767).sum(1).to(torch.int32)


def test_a_saturating_library_is_caught_and_named_once(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.warns(RuntimeWarning, match=r"torch._int_mm is not exact for full-range int8 on 'cpu' \(\d+ of 1024 sums of a known"):
        assert not int_mm.library_is_exact(CPU)
    a, w = torch.full((20, 64), 255, dtype=torch.uint8), torch.full((24, 64), 255, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, q = ops.quantized_linear(ops.pack_codes(a, 8), ops.pack_codes(w, 8), activation_bits=8, weight_bits=8, length=64)
    assert (p == 255 * 255 * 64).all() and (q == 255 * 64).all()


def test_a_library_that_refuses_is_named(monkeypatch):
    def refuse(a, b):
        raise RuntimeError("no such product here")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with pytest.warns(RuntimeWarning, match="it fails: no such product here"):
        assert not int_mm.library_serves(CPU)


def test_the_library_is_used_where_exact_and_fast(monkeypatch):
    """And gives P and Q as the kernel does: the correction by row sums is right."""
    calls = []

    def exact(a, b):
        calls.append(tuple(a.shape))
        return (a.double() @ b.double()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", exact)
    monkeypatch.setattr(int_mm.time, "perf_counter", iter(range(0, 10_000, 1)).__next__)  # every run takes equally long
    a, w = torch.randint(0, 256, (20, 77), dtype=torch.uint8), torch.randint(0, 256, (24, 77), dtype=torch.uint8)
    p, q = ops.quantized_linear(ops.pack_codes(a, 8), ops.pack_codes(w, 8), activation_bits=8, weight_bits=8, length=77)
    assert (20, 77) in calls
    assert torch.equal(p, (a.double() @ w.double().T).to(torch.int32)) and torch.equal(q, a.sum(1).to(torch.int32))


def test_small_batches_and_other_widths_never_ask(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", None)
    for batch, bits in ((8, 8), (20, 4)):
        a = torch.ones(batch, 32, dtype=torch.uint8)
        words = ops.pack_codes(a, bits)
        assert (ops.quantized_linear(words, words, activation_bits=bits, weight_bits=bits, length=32)[0] == 32).all()


@pytest.mark.parametrize("cap", ["SSE41", "AVX2", "AVX512_CORE"])
def test_sums_stay_exact_under_a_capped_library(cap):
    """ONEDNN_MAX_CPU_ISA takes VNNI away from the library: whatever it then does, P stays exact."""
    script = (
        "import torch\nfrom pyaccel import ops\n"
        "a = torch.randint(0, 256, (64, 512), dtype=torch.uint8); w = torch.randint(0, 256, (64, 512), dtype=torch.uint8)\n"
        "a[:8] = 255; w[:8] = 255; a[8:12] = 0\n"
        "p, _ = ops.quantized_linear(ops.pack_codes(a, 8), ops.pack_codes(w, 8), activation_bits=8, weight_bits=8, length=512)\n"
        "assert torch.equal(p, (a.double() @ w.double().T).to(torch.int32))\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": cap, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cap", ["DEFAULT", "AVX2", "AVX512_CORE"])
def test_the_guard_never_trusts_a_capped_library_that_is_wrong(cap):
    """What the guard says of the library, against the library itself on full-range products it has not seen."""
    script = """
import warnings
import torch
from pyaccel.ops import int_mm
warnings.simplefilter("ignore")
trusted, exact = int_mm.library_is_exact(torch.device("cpu")), True
for seed in range(4):
    torch.manual_seed(seed)
    a, b = (torch.randint(-128, 128, (48, 640)).to(torch.int8) for _ in range(2))
    a[::3], b[::2] = (127, -128)[seed % 2], (-128, 127)[seed // 2]
    exact &= torch.equal(torch._int_mm(a, b.T).double(), a.double() @ b.double().T)
assert exact or not trusted, "wrong sums passed the guard"
print(trusted, exact)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if cap == "DEFAULT" else {"ONEDNN_MAX_CPU_ISA": cap})
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
