"""Adversarial noise sensitivity and the bit rules: the checks of the specification (section 8, 4 and 5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyaccel import attacks, models, ops, surgery
from pyaccel.recipes.quanos_ans import (
    activations,
    assign_bits,
    equal_memory,
    noise_sensitivity,
    rank_correlation,
    weight_layers,
)

EXAMPLE = dict(enumerate([0.12, 0.35, 0.5, 0.41, 0.22, 0.9, 0.6]))  # of section 2


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 6, 6, generator=generator)
    x *= torch.linspace(0.2, 1, 40).view(-1, 1, 1, 1)  # images of different size: the two ratios must differ
    return x, torch.randint(0, 4, (40,), generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def test_one_linear_layer_is_the_formula(batch):
    x, y = batch
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4, bias=False)).eval()
    weight, d = model[1].weight.detach().double(), (attacks.fgsm(model, x, y, 0.05) - x).flatten(1).double()
    moved, size = (d @ weight.T).norm(dim=1), (x.flatten(1).double() @ weight.T).norm(dim=1)
    wanted = {
        "image": (moved / size).mean(),
        "unnormalised": moved.mean(),
        "batch": (moved.square().sum() / size.square().sum()).sqrt(),
    }
    for ratio, value in wanted.items():
        found = noise_sensitivity(model, x, y, 0.05, ratio=ratio, batch_size=7)
        assert list(found) == ["1"] and found["1"] == pytest.approx(float(value), rel=1e-4)
    assert abs(wanted["image"] / wanted["batch"] - 1) > 0.05


def test_no_attack_no_sensitivity_and_more_attack_more(batch):
    model = network()
    assert set(noise_sensitivity(model, *batch, 0.0).values()) == {0.0}
    weak, strong = noise_sensitivity(model, *batch, 0.02), noise_sensitivity(model, *batch, 0.1)
    assert list(weak) == ["0", "4", "7"] and all(0 < weak[name] < strong[name] for name in weak)


def test_a_layer_scaled_keeps_the_ratio_and_scales_the_difference(batch):
    """What tells the two definitions apart."""
    model, scaled = network(), network()
    with torch.no_grad():
        scaled[4].weight *= 8
        scaled[7].weight /= 8
    for ratio, factor in (("image", 1), ("batch", 1), ("unnormalised", 8)):
        plain, other = (noise_sensitivity(m, *batch, 0.05, ratio=ratio) for m in (model, scaled))
        assert other["4"] == pytest.approx(factor * plain["4"], rel=1e-5)
        assert other["7"] == pytest.approx(plain["7"], rel=1e-4)


def test_batch_cuts_do_not_matter_and_the_mode_is_put_back(batch):
    model = network().train()
    statistics = model[1].running_mean.clone()
    whole, cut = (noise_sensitivity(model, *batch, 0.05, batch_size=n) for n in (40, 9))
    assert whole == pytest.approx(cut, rel=1e-5)
    assert model.training and torch.equal(model[1].running_mean, statistics)


def test_activations_are_behind_the_non_linearity_and_before_pooling(batch):
    model = network()
    found = activations(model, batch[0])
    assert torch.equal(found["0"], model[:3](batch[0])) and torch.equal(found["4"], model[:6](batch[0]))
    assert torch.equal(found["7"], model(batch[0]))


def test_quantised_layers_run_as_deployed(batch, monkeypatch):
    model = surgery.quantize(network().train(), [8, 3, 4])
    model(batch[0])
    called = []
    original = ops.quantized_conv2d
    monkeypatch.setattr(ops, "quantized_conv2d", lambda *a, **k: (called.append(1), original(*a, **k))[1])
    found = noise_sensitivity(model, *batch, 0.1)
    assert called and all(value > 0 for value in found.values())


@pytest.mark.parametrize("name,layers,shared", [("vgg19", 17, 0), ("resnet18", 21, 3)])
def test_networks_of_the_paper(name, layers, shared):
    """A shortcut has the value of the convolution that it joins, the second of its block."""
    torch.manual_seed(0)
    model = models.build(name, classes=5, input_shape=(3, 32, 32), width=0.05, spiking=False)
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 5
    for _ in range(3):
        model(x)
    found = noise_sensitivity(model, x, y, 8 / 255)
    assert list(found) == list(weight_layers(model)) and len(found) == layers
    pairs = [(found[n], found[n.replace("shortcut.0", "body.3")]) for n in found if "shortcut" in n]
    assert len(pairs) == shared and all(a == b > 0 for a, b in pairs)
    bits = assign_bits(found, "inverse")
    quantised = surgery.quantize(model, bits)
    assert [m.weight_bits for m in weight_layers(quantised).values()] == list(bits.values())


def test_dead_layers_and_errors(batch):
    model = network()
    with torch.no_grad():
        model[4].weight.copy_(-model[4].weight.abs())
    assert noise_sensitivity(model, *batch, 0.0)["4"] == 0.0

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(36, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.flatten(1))))

    with pytest.raises(ValueError, match="runs no non-linearity module .* use nn.ReLU"):
        noise_sensitivity(Functional(), *batch, 0.1)
    with pytest.raises(ValueError, match="ratio must be one of image, batch, unnormalised, got 'mean'"):
        noise_sensitivity(model, *batch, 0.1, ratio="mean")
    with pytest.raises(ValueError, match="got 40 images, 3 labels"):
        noise_sensitivity(model, batch[0], batch[1][:3], 0.1)


def test_the_examples_of_both_rules():
    assert list(assign_bits(EXAMPLE, "proportional").values()) == [2, 6, 9, 7, 4, 16, 11]
    assert list(assign_bits(EXAMPLE, "inverse").values()) == [16, 11, 8, 10, 14, 2, 6]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(2, 16), st.data())
def test_rules_keep_their_bounds_and_order(values, initial, data):
    least = data.draw(st.integers(1, initial))
    sensitivity = {str(i): v for i, v in enumerate(values)}
    for rule, sign in (("inverse", -1), ("proportional", 1)):
        bits = assign_bits(sensitivity, rule, initial=initial, least=least)
        assert all(least <= k <= initial for k in bits.values())
        if min(values) == max(values):
            assert set(bits.values()) == {initial}
            continue
        assert bits[max(sensitivity, key=sensitivity.get)] == (initial if rule == "proportional" else least)
        ordered = [bits[name] for name in sorted(sensitivity, key=lambda n: sign * sensitivity[n])]
        assert ordered == sorted(ordered)


def test_rounding_is_half_up_and_a_second_round_starts_from_the_widths_so_far():
    assert assign_bits({"a": 5 / 32, "b": 1.0}, "proportional")["a"] == 3  # 2.5; to even would be 2
    first = assign_bits(EXAMPLE, "inverse")
    second = assign_bits(EXAMPLE, "inverse", initial=first)
    assert second[0] == 16 and second[5] == 2 and all(second[n] <= first[n] for n in first)
    assert second[1] == math.floor(11 * (1 - 0.23 / 0.78) + 0.5)


def test_rule_errors():
    with pytest.raises(ValueError, match="rule must be one of inverse, proportional, got 'linear'"):
        assign_bits(EXAMPLE, "linear")
    for wrong in ({}, {"a": float("nan")}, {"a": -1.0}):
        with pytest.raises(ValueError, match="expected finite sensitivities >= 0"):
            assign_bits(wrong, "inverse")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 16)), min_size=1, max_size=12))
def test_equal_memory_is_never_more_and_short_by_less_than_one_layer(layers):
    weights = {str(i): n for i, (n, _) in enumerate(layers)}
    bits = {str(i): k for i, (_, k) in enumerate(layers)}
    found = equal_memory(weights, bits)
    wanted, got = (sum(weights[n] * b[n] for n in weights) for b in (bits, found))
    assert max(found.values()) - min(found.values()) <= 1 and 0 <= wanted - got < max(weights.values())
    if max(bits.values()) == min(bits.values()):
        assert found == bits


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)  # a tie: ranks 1.5, 1.5, 3
    assert rank_correlation([1, 1], [2, 2]) == 1.0 and rank_correlation([1, 1], [1, 2]) == 0.0
