"""Failing memory on a GPU: the same bits as on the CPU, which the other tests compare with plain torch."""

from __future__ import annotations

import pytest
import torch

from pyaccel import extension, ops
from pyaccel.hardware import SramConfig
from pyaccel.nn import NoisyMemory
from pyaccel.reference import sram

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not extension.has_cuda(), reason="needs a GPU and a build with CUDA kernels"
)
WIDTHS = [(w, dtype) for dtype, bits in sram.DTYPE_BITS.items() for w in sram.WORD_BITS if w <= bits]


def words(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("semantics", sram.SEMANTICS)
@pytest.mark.parametrize("mode", sram.MODES)
@pytest.mark.parametrize("size", [1, 7, 2048, 30_001], ids="small{}".format)
def test_every_width(size, mode, semantics):
    for number, (width, dtype) in enumerate(WIDTHS):
        memory = words(size, dtype)
        for first in (0, 3, 4096, (1 << 36) // width - 1000):
            p = [0.3 / (1 + b) for b in range(width - 1)] + [0.01]
            options = dict(word_bits=width, seed=number, stream=7, first_element=first, mode=mode, semantics=semantics)
            expected = ops.flip_bits(memory, p, **options)
            assert torch.equal(ops.flip_bits(memory.cuda(), p, **options).cpu(), expected)
            assert torch.equal(ops.flip_bits_(memory.cuda(), p, **options).cpu(), expected)
            assert torch.equal(ops.flip_bits(memory.cuda()[1:], 0.0, **options).cpu(), memory[1:])


@pytest.mark.parametrize("mode", sram.MODES)
def test_misaligned_small(mode):
    memory = words(5000, torch.uint8)
    for start in (1, 2, 3, 5):
        expected = ops.flip_bits(memory[start:], 0.05, seed=1, mode=mode)
        whole = memory.cuda()
        ops.flip_bits_(whole[start:], 0.05, seed=1, mode=mode)
        assert torch.equal(whole[start:].cpu(), expected) and torch.equal(whole[:start].cpu(), memory[:start])


@pytest.mark.parametrize("mode", sram.MODES)
def test_many_words(mode):
    memory = words(1 << 22, torch.int8)
    for p in (0.1, 1e-2, 1e-3, 1e-5):
        expected = ops.flip_bits(memory, p, seed=5, mode=mode)
        assert torch.equal(ops.flip_bits(memory.cuda(), p, seed=5, mode=mode).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids="small-{}".format)
@pytest.mark.parametrize("mode", sram.MODES)
def test_noise_and_its_gradient(mode, dtype):
    for width, signed in ((1, False), (2, True), (4, False), (8, True), (8, False), (16, True)):
        x = (torch.randn(9001, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        x[0] = float("nan")
        found = []
        for device in ("cpu", "cuda"):
            leaf = x.to(device).requires_grad_()
            options = dict(word_bits=width, signed=signed, seed=3, mode=mode, first_element=5)
            y = ops.sram_noise(leaf, 6.0 / sram.code_range(width, signed)[1], 0.03, **options)
            y.backward(torch.ones_like(y))
            found.append((y.detach().cpu(), leaf.grad.cpu()))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_module_on_the_device():
    memory = NoisyMemory(SramConfig(8, n8t=4, p6=0.1), 0.02, signed=True, redraw=True)
    x = torch.randn(1000)
    expected = [memory(x) for _ in range(2)]
    memory.set_pass(0)
    memory.cuda()
    assert all(torch.equal(memory(x.cuda()).cpu(), e) for e in expected)
