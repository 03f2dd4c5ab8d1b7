"""`crossbar_matmul` against the plain-torch twin and manual sums; converters, read noise and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel import ops, reference
from pyaccel.reference.philox import READ_NOISE


def operands(batch, inputs, outputs, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, inputs, dtype=dtype)
    return x, torch.rand(inputs, outputs, dtype=dtype), torch.rand(inputs, outputs, dtype=dtype)


def assert_codes_close(out, twin, step, reads):
    """Converters are discontinuous: a partial sum within rounding of a code boundary may take either code. Everything
    else must agree; the flips must be whole steps and rare."""
    error = (out - twin).double() / step
    flips = error.abs() > 0.5
    assert (error[~flips].abs() < 1e-3).all()
    assert ((error[flips] - error[flips].round()).abs() < 1e-3).all()
    assert flips.double().mean() < 1e-3 * reads


SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (5, 64, 33, 16), (70, 130, 65, 64), (7, 129, 24, 129), (4, 20, 9, 64)]


@pytest.mark.parametrize("batch, inputs, outputs, tile", SHAPES)
@pytest.mark.parametrize("read", ["pair", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dac, adc", [(None, 8), (6, None), (8, 6)])
def test_kernel_equals_the_plain_torch_twin(batch, inputs, outputs, tile, read, dtype, dac, adc):
    x, p, n = operands(batch, inputs, outputs, dtype)
    scale = ops.adc_range(x, p, n, tile=tile, read=read) * 0.8 if adc else None  # some clip
    options = dict(tile=tile, read=read, dac_bits=dac, dac_range=2.0 if dac else None, adc_bits=adc, adc_range=scale)
    out, twin = ops.crossbar_matmul(x, p, n, **options), reference.crossbar_matmul(x, p, n, **options)
    if adc is None:
        torch.testing.assert_close(out, twin, rtol=1e-5, atol=1e-4)
    else:
        assert_codes_close(out, twin, scale.double() / (2 ** (adc - 1) - 1), 2 * (inputs + tile - 1) // tile)


def test_tiling_equals_the_manual_sum():
    """Three row tiles, the last one lower; the ADC acts on each partial sum, so tiling matters, and is exactly this."""
    x, p, n = operands(6, 40, 10, torch.float64)
    out = ops.crossbar_matmul(x, p, n, tile=16, adc_bits=5, adc_range=12.0)
    manual = 0
    for first in (0, 16, 32):
        part = x[:, first : first + 16] @ (p - n)[first : first + 16]
        manual = manual + (part / (12 / 15)).round().clamp(-15, 15) * (12 / 15)
    torch.testing.assert_close(out, manual, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, ops.crossbar_matmul(x, p, n, tile=20, adc_bits=5, adc_range=12.0))


def test_apart_reads_two_codes():
    x, p, n = operands(4, 12, 6, torch.float64)
    step = 20 / 7

    def code(w):
        return (x @ w / step).round().clamp(-7, 7)

    out = ops.crossbar_matmul(x, p, n, tile=12, read="apart", adc_bits=4, adc_range=20.0)
    torch.testing.assert_close(out, (code(p) - code(n)) * step)


def test_without_converters_it_is_the_gemm():
    x, p, n = operands(9, 30, 11)
    assert torch.equal(ops.crossbar_matmul(x, p, n, tile=8), x @ (p - n))
    assert torch.equal(ops.crossbar_matmul(x, p, tile=8), x @ p)


def test_dac_clips_and_rounds_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0, 3.49]])
    out = ops.crossbar_matmul(x, torch.eye(8), tile=8, dac_bits=4, dac_range=7.0)
    assert torch.equal(out, torch.tensor([[0.0, 2.0, 2.0, 0.0, -2.0, 7.0, -7.0, 3.0]]))
    full = ops.crossbar_matmul(x, torch.eye(8), tile=8, dac_bits=16)  # default range: the largest input
    assert (full - x).abs().max() < 9 / 32767


def test_per_column_ranges():
    x, p, n = operands(5, 16, 7, torch.float64)
    scales = torch.linspace(1, 4, 7, dtype=torch.float64)
    out = ops.crossbar_matmul(x, p, n, tile=16, adc_bits=6, adc_range=scales)
    for c in range(7):
        one = ops.crossbar_matmul(x, p, n, tile=16, adc_bits=6, adc_range=scales[c].item())
        torch.testing.assert_close(out[:, c], one[:, c])


def test_calibrated_range_is_the_largest_partial_sum():
    x, p, n = operands(20, 25, 6, torch.float64)
    expected = torch.stack([(x[:, a:b] @ (p - n)[a:b]).abs().amax(0) for a, b in ((0, 10), (10, 20), (20, 25))]).amax(0)
    torch.testing.assert_close(ops.adc_range(x, p, n, tile=10), expected)
    apart = ops.adc_range(x, p, n, tile=25, read="apart")
    torch.testing.assert_close(apart, torch.maximum((x @ p).abs().amax(0), (x @ n).abs().amax(0)))
    fine = ops.crossbar_matmul(x, p, n, tile=10, adc_bits=16, adc_range=ops.adc_range(x, p, n, tile=10))
    assert (fine - x @ (p - n)).abs().max() < 3 * expected.max() / 32767  # nothing clips: half a step a tile
    assert (ops.adc_range(torch.zeros(3, 4), torch.ones(4, 2), tile=4) > 0).all()


def test_nan_stays_nan_and_does_not_spread_over_samples():
    x, p, n = operands(3, 8, 5)
    x[1, 2] = float("nan")
    out = ops.crossbar_matmul(x, p, n, tile=4, adc_bits=8, adc_range=4.0)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


# ---------------------------------------------------------------------------------------------------- noise
def test_read_noise_is_the_philox_draw_of_its_place():
    x, p, n = operands(5, 30, 7, torch.float64)
    for read, arrays in (("pair", 1), ("apart", 2)):
        out = ops.crossbar_matmul(x, p, n, tile=8, read=read, read_noise=0.3, seed=11, stream=2)
        draws = reference.philox_normal(11, 2, READ_NOISE, 0, 4 * arrays * 35)
        signs = torch.tensor([1.0, -1.0][:arrays], dtype=torch.float64)
        noise = (draws.reshape(4, arrays, 5, 7) * signs[None, :, None, None]).sum((0, 1)) * 0.3
        torch.testing.assert_close(out - x @ (p - n), noise, rtol=0, atol=5e-6)


def test_read_noise_statistics_and_keys():
    x, p = torch.zeros(200, 4), torch.zeros(4, 500)
    noise = ops.crossbar_matmul(x, p, tile=4, read_noise=2.0, seed=1)
    assert abs(noise.std().item() - 2) < 0.02 and abs(noise.mean().item()) < 0.03
    assert abs((noise / 2).pow(4).mean().item() - 3) < 0.1
    again = ops.crossbar_matmul(x, p, tile=4, read_noise=2.0, seed=torch.tensor([1, 0]))
    assert torch.equal(noise, again)
    for other in (dict(seed=2), dict(seed=1, stream=1)):
        different = ops.crossbar_matmul(x, p, tile=4, read_noise=2.0, **other)
        assert torch.corrcoef(torch.stack([noise.flatten(), different.flatten()]))[0, 1].abs() < 0.02


def test_read_noise_does_not_depend_on_threads():
    x, p, _ = operands(300, 16, 90)
    one = ops.crossbar_matmul(x, p, tile=8, read_noise=1.0, seed=3)
    torch.set_num_threads(2)  # every test starts with one
    assert torch.equal(ops.crossbar_matmul(x, p, tile=8, read_noise=1.0, seed=3), one)


# ------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("two", [True, False])
def test_straight_through_gradient(two):
    x, p, n = operands(6, 20, 5, torch.float64)
    if not two:
        n = None
    leaves = [t.requires_grad_() for t in (x, p, n) if t is not None]
    weight = torch.randn(6, 5, dtype=torch.float64)
    out = ops.crossbar_matmul(*leaves, tile=8, dac_bits=8, dac_range=1.0, adc_bits=6, adc_range=3.0, read_noise=0.1)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    through = reference.quantize(x.detach(), 8, 1.0)
    inside = x.detach().abs() <= 1.0
    assert 0 < inside.double().mean() < 1  # some inputs clip, some do not
    torch.testing.assert_close(found[0], (weight @ (p if n is None else p - n).detach().T) * inside)
    torch.testing.assert_close(found[1], through.T @ weight)
    if two:
        torch.testing.assert_close(found[2], -through.T @ weight)


def test_opcheck():
    x, p, n = (t.requires_grad_() for t in operands(4, 10, 3))
    key, scale = torch.tensor([5, 1]), torch.ones(3)
    torch.library.opcheck(
        torch.ops.pyaccel.crossbar_matmul.default, (x, p, n, torch.tensor(2.0), scale, key, 4, True, 8, 6, 0.1)
    )
    torch.library.opcheck(torch.ops.pyaccel.crossbar_matmul.default, (x, p, None, None, scale, None, 4, False, 0, 6, 0.0))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 40), inputs=st.integers(0, 70), outputs=st.integers(0, 70), tile=st.integers(1, 80),
    adc=st.sampled_from([None, 4, 12]), two=st.booleans(),
)  # fmt: skip
def test_any_size(batch, inputs, outputs, tile, adc, two):
    x, p, n = operands(batch, inputs, outputs, torch.float64)
    x, p, n = x.round(decimals=2), p.round(decimals=2), n.round(decimals=2) if two else None
    options = dict(tile=tile, dac_bits=12, dac_range=4.0, adc_bits=adc, adc_range=3.1 if adc else None)
    torch.testing.assert_close(
        ops.crossbar_matmul(x, p, n, **options), reference.crossbar_matmul(x, p, n, **options), rtol=1e-9, atol=1e-9
    )


def test_leading_dimensions_and_layouts():
    x, p, n = operands(12, 10, 7)
    options = dict(tile=4, adc_bits=8, adc_range=3.0)
    out = ops.crossbar_matmul(x, p, n, **options)
    assert torch.equal(ops.crossbar_matmul(x.reshape(3, 4, 10), p, n, **options), out.reshape(3, 4, 7))
    assert torch.equal(ops.crossbar_matmul(x[0], p, n, **options), out[0])
    assert torch.equal(ops.crossbar_matmul(x.T.contiguous().T, p.T.contiguous().T, n, **options), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("converters", [{}, dict(dac_bits=8, dac_range=3.0, adc_bits=8, adc_range=9.0)])
def test_half_types_are_computed_in_float32(dtype, converters):
    x, p, n = (t.to(dtype) for t in operands(6, 40, 9))
    exact = ops.crossbar_matmul(x.float(), p.float(), n.float(), tile=16, **converters)
    out = ops.crossbar_matmul(x, p, n, tile=16, **converters)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))
    assert torch.equal(ops.crossbar_matmul(x, p.float(), n.float(), tile=16, **converters), out)  # as under autocast
    scale = ops.adc_range(x, p, n, tile=16)
    assert scale.dtype == torch.float32
    leaf = x.clone().requires_grad_()
    options = dict(tile=16, dac_bits=8, dac_range=9.0, adc_bits=8, adc_range=scale.to(dtype))
    ops.crossbar_matmul(leaf, p, n, **options).sum().backward()
    torch.testing.assert_close(leaf.grad, (p.float() - n.float()).sum(1).expand(6, 40).to(dtype))


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(x=torch.ones(2, 3)), ValueError, r"x \[..., K\] and positive \[K, C\], got \[2, 3\] and \[4, 5\]"),
        (dict(x=torch.ones(2, 4).int()), TypeError, "x must be float32, float64, float16 or bfloat16, got torch.int32"),
        (dict(positive=torch.ones(4, 5).half()), TypeError, "positive must be torch.float32, got torch.float16"),
        (dict(x=torch.ones(2, 4).double()), TypeError, "positive must be torch.float64, got torch.float32"),
        (dict(negative=torch.ones(4, 4)), ValueError, r"negative must have shape \[4, 5\]"),
        (dict(tile=0), ValueError, "tile must be in 1.."),
        (dict(read="both"), ValueError, "read must be one of pair, apart, got 'both'"),
        (dict(read="apart", negative=None), ValueError, "read='apart' needs two arrays"),
        (dict(adc_bits=8), ValueError, r"adc_bits needs adc_range.*a tensor \[5\].*ops.adc_range"),
        (dict(adc_bits=1, adc_range=1.0), ValueError, "adc_bits must be in 2..16, got 1"),
        (dict(adc_bits=8, adc_range=-1.0), ValueError, "adc_range must be a finite number above 0, got -1"),
        (dict(adc_bits=8, adc_range=torch.ones(4)), ValueError, r"adc_range must have shape \[5\]"),
        (dict(dac_bits=20), ValueError, "dac_bits must be in 2..16, got 20"),
        (dict(read_noise=-1.0), ValueError, "read_noise must be at least 0"),
        (dict(read_noise=1.0, stream=-1), ValueError, "stream must be in 0.."),
    ],
)
def test_errors(options, error, text):
    arguments = {"x": torch.ones(2, 4), "positive": torch.ones(4, 5), "negative": torch.ones(4, 5), "tile": 2, **options}
    with pytest.raises(error, match=text):
        ops.crossbar_matmul(**arguments)
