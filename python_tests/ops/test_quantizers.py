"""Quantisers: vectors of the specification (section 4), levels, gradients."""

import pytest
import torch

from pyaccel import ops
from pyaccel.ops.quantizers import codes_of

X = torch.tensor([-1, -0.6, -0.3, 0, 0.1, 0.34, 0.7, 1])


def test_symmetric_vectors():
    third = 1 / 3
    assert torch.allclose(ops.quantize_symmetric(X, 2), torch.tensor([-1, -third, -third, third, third, third, 1, 1]), atol=1e-6)
    wanted = torch.tensor([-1, -0.6, -0.333333, 0.066667, 0.066667, 0.333333, 0.733333, 1])
    assert torch.allclose(ops.quantize_symmetric(X, 4), wanted, atol=1e-6)
    assert ops.quantize_symmetric(X, 1).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1]


def test_affine_vectors():
    for bits, codes in ((2, [0, 1, 1, 2, 2, 2, 3, 3]), (4, [0, 3, 5, 8, 8, 10, 13, 15])):
        wanted = torch.tensor(codes) * 2 / ((1 << bits) - 1) - 1
        assert torch.allclose(ops.quantize_affine(X, bits), wanted, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_symmetric_has_no_zero_and_signed_zero_has(bits):
    zero = torch.zeros(3)
    if bits > 1:
        assert torch.allclose(ops.quantize_symmetric(zero, bits), torch.full((3,), 1 / ((1 << bits) - 1)), rtol=1e-3)
        assert (ops.quantize_symmetric(zero, bits, signed_zero=True) == 0).all()
    assert (ops.quantize_symmetric(torch.linspace(-1, 1, 1001), bits) != 0).all()
    grid = torch.linspace(-1, 1, 4001)
    kept = ops.quantize_symmetric(grid, bits, signed_zero=bits > 1)
    assert len(kept.unique()) <= (1 << bits) - (bits > 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_idempotent_monotone_and_close(bits):
    x = torch.linspace(-1.5, 1.5, 3001)
    y = ops.quantize_symmetric(x, bits)
    assert torch.allclose(ops.quantize_symmetric(y, bits), y, atol=1e-6)
    assert (y.diff() >= 0).all() and len(y.unique()) == 1 << bits
    assert (y - x.clamp(-1, 1)).abs().max() <= 1 / ((1 << bits) - 1) + 1e-6
    z = ops.quantize_affine(x, bits)
    assert torch.allclose(ops.quantize_affine(z, bits), z, atol=1e-6) and (z.diff() >= 0).all()


def test_gradient_is_one_inside_and_zero_outside():
    x = torch.tensor([-1.2, -1.0, 0.3, 1.0, 1.01], requires_grad=True)
    ops.quantize_symmetric(x, 3).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    y = torch.tensor([-0.1, 0.0, 0.7, 2.0, 2.1], requires_grad=True)
    (ops.quantize_range(y, 2.0, 3) * torch.arange(1.0, 6)).sum().backward()
    assert y.grad.tolist() == [0, 2, 3, 4, 0]
    w = torch.randn(50, requires_grad=True)
    for quantizer in ("symmetric", "signed_zero", "affine"):
        w.grad = None
        ops.fake_quantize(w, ops.weight_grid(w, 3, quantizer)).sum().backward()
        assert (w.grad == 1).all()


def test_weight_grid_equals_the_formula():
    """Division by max|W|, symmetric levels, multiplication: the same values as the grid's."""
    w = torch.randn(7, 30)
    largest = w.abs().max()
    for bits in (1, 2, 4, 8):
        wanted = ops.quantize_symmetric(w / largest, bits) * largest
        assert torch.allclose(ops.fake_quantize(w, ops.weight_grid(w, bits)), wanted, atol=1e-6)
    codes = codes_of(w, ops.weight_grid(w, 4))
    assert codes.min() >= 0 and codes.max() <= 15 and torch.equal(codes, codes.round())


@pytest.mark.parametrize("bits", [1, 3, 8, 12])
def test_range_quantizer_has_the_codes_of_the_kernel(bits):
    x = torch.rand(5000) * 4 - 0.5
    upper = torch.tensor(2.7)
    scale = (upper / ((1 << bits) - 1)).item()
    codes = ops.quantize_codes(x, scale, bits)
    assert torch.equal(ops.quantize_range(x, upper, bits), codes.float() * torch.tensor(scale))


def test_degenerate_weights():
    for quantizer in ("symmetric", "signed_zero", "affine"):
        for w in (torch.zeros(4, 4), torch.full((4, 4), 0.5), torch.empty(0, 3)):
            assert torch.isfinite(ops.fake_quantize(w, ops.weight_grid(w, 4, quantizer))).all()


def test_errors():
    with pytest.raises(ValueError, match="signed_zero needs at least 2 bits"):
        ops.weight_grid(X, 1, "signed_zero")
    with pytest.raises(ValueError, match="quantizer must be one of symmetric, signed_zero, affine, got 'log'"):
        ops.weight_grid(X, 4, "log")
    with pytest.raises(ValueError, match="bits must be in 1..16, got 17"):
        ops.quantize_range(X, 1.0, 17)
