"""The quantised products on a GPU: the same integers, and the same floats, as on the CPU, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyaccel import extension, ops
from pyaccel.nn import QuantConv2d, QuantLinear
from pyaccel.reference.qmac import BITS, code_dtype

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not extension.has_cuda(), reason="needs a GPU and a build with CUDA kernels"
)
PAIRS = list(itertools.product(BITS, BITS))


def codes_of(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape).to(code_dtype(bits))


def equal(cpu, cuda) -> bool:
    return all(torch.equal(a, b.cpu()) for a, b in zip(cpu, cuda, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_small_codes(bits):
    for length in (1, 31, 32, 33, 129):
        codes = codes_of(bits, 5, length)
        words = ops.pack_codes(codes, bits)
        assert torch.equal(ops.pack_codes(codes.cuda(), bits).cpu(), words)
        assert torch.equal(ops.unpack_codes(words.cuda(), bits, length).cpu(), codes)
    x = torch.cat([torch.randn(1001), torch.tensor([float("nan"), float("inf"), 0.05, 0.15, 0.25])])
    assert torch.equal(ops.quantize_codes(x.cuda(), 0.1, bits).cpu(), ops.quantize_codes(x, 0.1, bits))


@pytest.mark.parametrize("activation_bits,weight_bits", PAIRS)
def test_small_linear(activation_bits, weight_bits):
    for (batch, outputs), length in itertools.product([(1, 7), (3, 65), (40, 33), (70, 130)], [1, 31, 33, 1000, 4608, 70_000]):
        if length == 70_000 and batch > 3:
            continue
        a, w = (ops.pack_codes(codes_of(b, n, length), b) for b, n in ((activation_bits, batch), (weight_bits, outputs)))
        options = dict(activation_bits=activation_bits, weight_bits=weight_bits, length=length)
        assert equal(ops.quantized_linear(a, w, **options), ops.quantized_linear(a.cuda(), w.cuda(), **options)), (batch, outputs, length)


@pytest.mark.parametrize("activation_bits,weight_bits", PAIRS)
def test_small_convolution(activation_bits, weight_bits):
    for channels, outputs, groups, kernel, stride, padding, dilation in [
        (6, 8, 2, (3, 3), 1, 1, 1), (3, 70, 1, (3, 2), 2, (1, 0), 1), (8, 4, 4, (2, 3), (1, 3), (2, 1), (2, 1)), (16, 9, 1, 1, 1, 0, 1),
    ]:  # fmt: skip
        size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        a, w = codes_of(activation_bits, 2, channels, 9, 11), codes_of(weight_bits, outputs, channels // groups * size[0] * size[1])
        words = ops.pack_codes(w, weight_bits)
        options = dict(activation_bits=activation_bits, weight_bits=weight_bits, kernel_size=kernel, stride=stride, padding=padding,
                       dilation=dilation, groups=groups)  # fmt: skip
        assert equal(ops.quantized_conv2d(a, words, **options), ops.quantized_conv2d(a.cuda(), words.cuda(), **options))


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layers(batch, bits):
    layer = QuantLinear(256, 128, weight_bits=bits, activation_bits=bits)
    conv = QuantConv2d(16, 32, 3, padding=1, weight_bits=bits, activation_bits=bits)
    x, images = torch.rand(batch, 256), torch.rand(batch, 16, 9, 9)
    for module, given in ((layer, x), (conv, images)):
        module(given)
        module.eval()
        with torch.no_grad():
            cpu = module(given)
            assert torch.equal(module.cuda()(given.cuda()).cpu(), cpu)
