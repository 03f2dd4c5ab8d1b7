"""`AnalogLinear` and `AnalogConv2d`: ideal chips equal the software layer; mapping, caching, gradients, converters."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from pyaccel import ops
from pyaccel.hardware import CrossbarConfig
from pyaccel.nn import AnalogConv2d, AnalogLinear
from pyaccel.nn.analog import effective_weight

SMALL = CrossbarConfig(rows=8, columns=8)


def linear(config=SMALL, **options):
    torch.manual_seed(0)
    return AnalogLinear(19, 11, config=config, **options)


def conv(config=SMALL, **options):
    torch.manual_seed(0)
    return AnalogConv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), config=config, **options)


@pytest.mark.parametrize("row_order", ["channel", "position"])
def test_ideal_chips_equal_the_software_layers(row_order):
    ideal = dataclasses.replace(SMALL.ideal(), row_order=row_order)
    x = torch.randn(4, 19)
    layer = linear(ideal)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    image, layer = torch.randn(2, 3, 9, 8), conv(ideal)
    expected = nn.functional.conv2d(image, layer.weight, layer.bias, (2, 1), (1, 0))
    torch.testing.assert_close(layer(image), expected, rtol=1e-5, atol=1e-5)
    fine = dataclasses.replace(ideal, dac_bits=16, adc_bits=16, adc_range=8.0)
    torch.testing.assert_close(conv(fine)(image), expected, rtol=1e-2, atol=5e-3)  # unfolded, through the converters


def test_row_order_decides_which_weights_share_a_tile():
    image = torch.randn(2, 3, 9, 8)
    outputs = [conv(dataclasses.replace(SMALL, row_order=order))(image) for order in ("channel", "position")]
    assert not torch.allclose(*outputs) and (outputs[0] - outputs[1]).norm() < 0.2 * outputs[0].norm()


def test_the_layer_multiplies_by_the_mapped_weight():
    layer = linear(dataclasses.replace(SMALL, variation=0.1), chip=5, name="fc")
    from pyaccel.nn.analog import stream_of

    mapped = effective_weight(layer.weight.detach().T, layer.config, chip=5, stream=stream_of("fc", "variation"))
    torch.testing.assert_close(layer.effective_weight(), mapped.T)
    x = torch.randn(2, 19)
    torch.testing.assert_close(layer(x), x @ mapped + layer.bias)


def test_chips_and_names_differ_and_repeat():
    noisy = dataclasses.replace(SMALL, variation=0.1)
    one, again = linear(noisy, chip=1).effective_weight(), linear(noisy, chip=1).effective_weight()
    assert torch.equal(one, again)
    assert not torch.equal(one, linear(noisy, chip=2).effective_weight())
    assert not torch.equal(one, linear(noisy, chip=1, name="other").effective_weight())


def test_remapped_after_an_update_and_only_then(monkeypatch):
    layer, calls = linear(), []
    solve = ops.crossbar_matrix
    monkeypatch.setattr(ops, "crossbar_matrix", lambda *a, **k: calls.append(1) or solve(*a, **k))
    x = torch.randn(3, 19)
    before = layer(x)
    assert torch.equal(layer(x), before) and len(calls) == 1
    torch.optim.SGD(layer.parameters(), lr=0.1).step()  # no gradient yet: nothing changes
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer(x), before) and len(calls) == 2
    layer.load_state_dict(linear().state_dict())
    torch.testing.assert_close(layer(x), before)
    layer.weight.data.mul_(2)  # not counted by torch
    layer.remap()
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_mapped_anew_when_the_model_changes_its_type(dtype):
    layer, x = linear(), torch.randn(3, 19)
    before = layer(x)
    layer.to(dtype)
    assert layer(x.to(dtype)).dtype == dtype and layer.effective_weight().dtype == dtype
    torch.testing.assert_close(layer(x.to(dtype)).float(), before, rtol=0.02, atol=0.02)
    layer.to("meta")
    assert layer._mapped is None


def test_mapped_inside_inference_mode_still_trains():
    layer, x = linear(), torch.randn(3, 19)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("adc", [False, True])
def test_straight_through_gradient(adc):
    config = dataclasses.replace(SMALL, adc_bits=16, adc_range=20.0) if adc else SMALL
    layer, x = linear(config), torch.randn(6, 19, requires_grad=True)
    weight = torch.randn(6, 11)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.T @ x.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, weight @ layer.effective_weight().detach(), rtol=1e-4, atol=1e-4)
    image, layer = torch.randn(2, 3, 9, 8), conv(config)
    layer(image).sum().backward()
    plain = copy.deepcopy(layer.weight).detach().requires_grad_()
    nn.functional.conv2d(image, plain, None, (2, 1), (1, 0)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.grad, rtol=1e-4, atol=1e-3)


def test_gradient_of_the_input_is_exact():
    """Full-knowledge attacks use this: finite differences of the mapped layer."""
    layer = conv(dataclasses.replace(SMALL, variation=0.1), dtype=torch.float64)
    image = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), image)


def test_training_through_the_solver_reduces_the_error_that_the_wires_make():
    """Non-ideality-aware: fit a linear map through uncalibrated wires, which straight-through steps also manage, and the
    exact gradient differs from the straight-through one."""
    torch.manual_seed(0)
    x, target = torch.randn(64, 19), torch.randn(64, 11)
    config = CrossbarConfig(rows=16, columns=16, calibration="none", gradient="solver")
    layer = linear(config)
    straight = linear(dataclasses.replace(config, gradient="straight_through"))
    for each in (layer, straight):
        (each(x) - target).square().mean().backward()
    similar = nn.functional.cosine_similarity(layer.weight.grad.flatten(), straight.weight.grad.flatten(), 0)
    assert 0.8 < similar < 0.9999
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_read_noise_draws_anew_each_pass_and_repeats_from_a_checkpoint():
    config = dataclasses.replace(SMALL, read_noise=1e-6)
    layer, x = linear(config), torch.randn(3, 19)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    other = linear(config)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("read", ["pair", "apart"])
@pytest.mark.parametrize("slices", [{}, dict(weight_bits=8, slice_bits=4)])
def test_converters_through_slices(read, slices):
    config = dataclasses.replace(SMALL, adc_bits=14, adc_range=12.0, dac_bits=12, read=read, **slices)
    layer, x = linear(config), torch.randn(5, 19)
    exact = nn.functional.linear(x, layer.effective_weight(), layer.bias)
    assert (layer(x) - exact).abs().max() < 0.03
    assert (linear(dataclasses.replace(config, adc_bits=4))(x) - exact).abs().max() > 0.03


def test_errors():
    with pytest.raises(TypeError, match="config must be a hardware.CrossbarConfig, got dict"):
        AnalogLinear(2, 2, config={})
    with pytest.raises(ValueError, match="groups must be 1, got 2"):
        AnalogConv2d(2, 2, 3, groups=2, config=SMALL)
    with pytest.raises(ValueError, match="padding must be a number or a pair, got 'same'"):
        AnalogConv2d(2, 2, 3, padding="same", config=SMALL)
    with pytest.raises(ValueError, match="its ADC has no range yet.*surgery.calibrate_converters"):
        linear(dataclasses.replace(SMALL, adc_bits=8))(torch.randn(1, 19))
    assert "chip=0, 8x8 differential layer_gain" in repr(linear())


# ---------------------------------------------------------------------------------------------- half types
CONVERTING = dataclasses.replace(SMALL, dac_bits=10, adc_bits=12, adc_range=12.0)


@pytest.mark.parametrize("config", [SMALL, CONVERTING], ids=["ideal readout", "converters"])
@pytest.mark.parametrize("make, shape", [(linear, (6, 19)), (conv, (2, 3, 9, 8))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models(config, make, shape, dtype):
    """As torch's layers: under autocast, from whatever type the layer before gave, and as a model of a half type."""
    layer, x = make(config), torch.randn(shape)
    exact = layer(x).detach()
    tolerance = dict(rtol=0.02, atol=0.02 * exact.abs().max().item())
    with torch.autocast("cpu", dtype):
        single, half = layer(x), layer(x.to(dtype))
    assert half.dtype == dtype
    for out in (single, half):
        torch.testing.assert_close(out.float(), exact, **tolerance)
    half.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0
    small = make(config).to(dtype)
    out = small(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, **tolerance)
    out.float().square().sum().backward()
    assert small.weight.grad.dtype == dtype
    largest = layer.weight.grad.abs().max().item()
    torch.testing.assert_close(small.weight.grad.float(), layer.weight.grad, rtol=0.1, atol=0.05 * largest)


def test_a_mapped_model_trains_under_autocast_through_converters_and_solver():
    for config in (CONVERTING, CrossbarConfig(rows=8, columns=8, gradient="solver")):
        torch.manual_seed(0)
        layer, x, y = linear(config), torch.randn(32, 19), torch.arange(32) % 11
        optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.02), []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(layer(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]


def test_calibration_under_autocast_keeps_ranges_in_float32():
    from pyaccel.surgery import calibrate_converters

    model = nn.Sequential(linear(dataclasses.replace(SMALL, adc_bits=8)), nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        calibrate_converters(model, [torch.randn(8, 19).bfloat16()])
        out = model(torch.randn(8, 19).bfloat16())
    assert model[0].adc_range.dtype == torch.float32 and out.isfinite().all()
