"""`to_crossbars`: an ideal chip is the software model; the input is untouched; what cannot be mapped is named."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from pyaccel.hardware import CrossbarConfig
from pyaccel.nn import AnalogConv2d, AnalogLinear
from pyaccel.surgery import analog_layers, calibrate_converters, reestimate_batchnorm, to_crossbars

CONFIG = CrossbarConfig(rows=16, columns=16, variation=0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 20),
        nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def images(n=16):
    torch.manual_seed(1)
    return torch.rand(n, 1, 8, 8)


def test_an_ideal_chip_is_the_software_model():
    model = network().eval()
    mapped = to_crossbars(model, CONFIG.ideal(), chip=3)
    torch.testing.assert_close(mapped(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_untouched_input_same_names_and_kinds():
    model = network()
    before = copy.deepcopy(model.state_dict())
    mapped = to_crossbars(model, CONFIG, chip=0)
    assert [type(m) for m in mapped] == [
        AnalogConv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, AnalogLinear, nn.ReLU, AnalogLinear,
    ]  # fmt: skip
    assert [n for n, _ in mapped.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [type(m) for m in model][0] is nn.Conv2d
    with torch.no_grad():
        for p in mapped.parameters():
            p.add_(1)
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    assert list(analog_layers(mapped)) == ["0", "5", "7"] and analog_layers(mapped)["5"].qualified_name == "5"


def test_chips():
    model, x = network().eval(), images()
    one, same, other = (to_crossbars(model, CONFIG, chip=c)(x) for c in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_digital_layers_and_their_children_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    mapped = to_crossbars(model, CONFIG, chip=0, digital=["1"])
    assert list(analog_layers(mapped)) == ["0"]


def test_a_layer_used_twice_stays_one_layer():
    layer = nn.Linear(4, 4)
    mapped = to_crossbars(nn.Sequential(layer, nn.ReLU(), layer), CONFIG, chip=0)
    assert mapped[0] is mapped[2] and type(mapped[0]) is AnalogLinear


def test_a_single_layer_is_a_model():
    assert type(to_crossbars(nn.Linear(3, 2), CONFIG, chip=0)) is AnalogLinear


def test_the_gradient_of_the_image_is_that_of_the_chip():
    model = network().eval().double()
    mapped = to_crossbars(model, CONFIG, chip=0)
    x = images(1).double().requires_grad_()
    (grad,) = torch.autograd.grad(mapped(x)[0, 2], x)
    step = torch.zeros_like(x)
    for place in (3, 17, 40):
        step.zero_().view(-1)[place] = 1e-6
        with torch.no_grad():
            slope = ((mapped(x + step) - mapped(x - step))[0, 2] / 2e-6).item()
        assert abs(slope - grad.view(-1)[place].item()) < 1e-6
    (software,) = torch.autograd.grad(model(x)[0, 2], x)
    assert not torch.allclose(software, grad)


def test_training_a_mapped_model():
    mapped, x, y = to_crossbars(network(), CONFIG, chip=0), images(32), torch.arange(32) % 5
    optimizer, losses = torch.optim.Adam(mapped.parameters(), lr=5e-3), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(mapped(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_calibrating_converters():
    model, x = network().eval(), images()
    config = dataclasses.replace(CONFIG, adc_bits=12, dac_bits=12)
    mapped = to_crossbars(model, config, chip=0)
    mapped.train()
    mapped[3].eval()  # modes are given back one by one
    calibrate_converters(mapped, [x[:8], x[8:]])
    assert mapped.training and not mapped[3].training
    mapped.eval()
    ranges = {name: layer.adc_range for name, layer in analog_layers(mapped).items()}
    assert ranges["0"].shape == (1, 6) and all((r > 0).all() for r in ranges.values())
    exact = to_crossbars(model, CONFIG, chip=0)
    assert (mapped(x) - exact(x)).abs().max() < 0.02
    restored = to_crossbars(model, config, chip=0).eval()
    restored.load_state_dict(mapped.state_dict())
    assert torch.equal(restored(x), mapped(x))


def test_reestimating_batch_norm():
    model, x = network().eval(), images(64)
    reestimate_batchnorm(model, [x])  # statistics of these images, before the wires
    uncalibrated = dataclasses.replace(CONFIG, calibration="bn_reestimate")
    mapped = to_crossbars(model, uncalibrated, chip=0)
    shifted = (mapped[1].running_mean - mapped[0](x).mean((0, 2, 3))).abs().max()
    assert shifted > 1e-3  # the wires moved what the statistics describe
    reestimate_batchnorm(mapped, [x[:32], x[32:]])
    assert mapped[1].momentum == 0.1 and not mapped.training
    torch.testing.assert_close(mapped[1].running_mean, mapped[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


class _Owner(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "layer, text",
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"cannot map 'inner', Conv2d\(4, 4, .*groups=2.*digital=\('inner',\)"),
        (nn.Conv2d(4, 4, 3, padding="same"), "cannot map 'inner'"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "cannot map 'inner'"),
        (nn.MultiheadAttention(4, 2), "cannot map 'inner.out_proj', NonDynamicallyQuantizableLinear"),
        (nn.ReLU(), "no nn.Linear or nn.Conv2d left to map"),
    ],
)
def test_what_cannot_be_mapped_is_named(layer, text):
    with pytest.raises(ValueError, match=text):
        to_crossbars(_Owner(layer), CONFIG, chip=0)


def test_errors():
    with pytest.raises(ValueError, match="digital names 'head', but the model has no such layer"):
        to_crossbars(network(), CONFIG, chip=0, digital=["head"])
    mapped = to_crossbars(network(), CONFIG, chip=0)
    with pytest.raises(ValueError, match="no layer of this model has an ADC"):
        calibrate_converters(mapped, [images()])
    with pytest.raises(ValueError, match="reestimate_batchnorm: needs at least one batch"):
        reestimate_batchnorm(mapped, [])
    with pytest.raises(ValueError, match="has no batch normalisation"):
        reestimate_batchnorm(nn.Linear(2, 2), [images()])
