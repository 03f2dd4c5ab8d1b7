"""Energy and compression of section 5, to the printed digit."""

import pytest
import torch
from torch import nn

from pyaccel import surgery
from pyaccel.hardware import LayerCost, MacEnergy, compression, efficiency, layer_costs


def test_the_table_of_the_physical_model():
    gating, subword = MacEnergy(mode="data_gating"), MacEnergy()
    for bits, dg, sp in ((16, 1, 1), (8, 0.325, 0.275), (4, 0.15625, 0.08125), (2, 0.1140625, 0.0265625)):
        assert gating.energy(bits) == pytest.approx(dg, abs=1e-12) and subword.energy(bits) == pytest.approx(sp, abs=1e-12)


def test_efficiency_and_compression_examples():
    layers = [LayerCost("a", 100, 1000, 8, 8)]
    assert f"{efficiency(layers, MacEnergy(mode='data_gating')):.3f}" == "3.077"
    assert f"{efficiency(layers, MacEnergy()):.3f}" == "3.636"
    assert compression(layers) == 4 and compression(layers, 16) == 2 and compression(layers, 8) == 1
    assert efficiency([LayerCost("a", 1, 7, 16, 16)], MacEnergy()) == 1
    # section 5.1: 71 % of the MACs at 4 bits, the rest at 8, is twice as efficient as 8 bits
    mixed = [LayerCost("a", 1, 71, 4, 4), LayerCost("b", 1, 29, 8, 8)]
    assert efficiency(mixed, MacEnergy(), 8) == pytest.approx(2, abs=0.01)
    assert efficiency([LayerCost("a", 1, 70, 4, 4), LayerCost("b", 1, 30, 8, 8)], MacEnergy(), 8) < 2


def test_widths_between_and_unequal_ones():
    assert MacEnergy().energy(5) == MacEnergy().energy(8) and MacEnergy().energy(1) == MacEnergy().energy(2)
    gating = MacEnergy(mode="data_gating")
    assert gating.energy(5) == pytest.approx(0.1 + 0.9 * 25 / 256) and gating.energy(4, 8) == pytest.approx(0.1 + 0.9 * 32 / 256)
    assert MacEnergy().energy(4, 8) == MacEnergy().energy(8)
    layers = [LayerCost("a", 100, 1, 3, 3), LayerCost("b", 300, 1, 5, 5)]
    assert compression(layers) == pytest.approx(32 * 400 / (300 + 1500))
    assert compression(layers, stored=True) == pytest.approx(32 * 400 / (400 + 2400))


def test_the_other_models_are_labelled():
    assert MacEnergy(model="linear45").energy(16) == pytest.approx(1.65)
    assert MacEnergy(model="multiplier_estimate").energy(16) == pytest.approx(2.72)
    flat = MacEnergy(alpha=0.0)
    for bits in (2, 4, 8):  # the estimate table is the case alpha = 0, to its printed digits
        ratio = MacEnergy(model="multiplier_estimate").energy(bits) / MacEnergy(model="multiplier_estimate").energy(16)
        assert ratio == pytest.approx(flat.energy(bits), rel=0.01)
    table = MacEnergy(model="table", table={"subword_parallel": {4: 1.0, 8: 3.0}})
    assert table.energy(3) == 1.0 and table.energy(5) == 3.0
    assert MacEnergy(voltage={4: 0.5}).energy(4) == pytest.approx(0.08125 / 4)
    assert MacEnergy().label == "physical, subword_parallel, alpha=0.1" and table.label == "table, subword_parallel"


def test_layer_costs():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 10))
    costs = layer_costs(model, torch.rand(2, 4, 5, 6))
    assert [(c.weights, c.macs, c.weight_bits) for c in costs] == [(6 * 2 * 6, 3 * 4 * 6 * 2 * 6, 32), (720, 720, 32)]
    quantised = surgery.quantize(model, [5, 3])
    assert [(c.weight_bits, c.macs) for c in layer_costs(quantised, torch.rand(2, 4, 5, 6))] == [(5, 864), (3, 720)]
    assert quantised.training and quantised[0].activation_max == 0


def test_errors():
    with pytest.raises(ValueError, match="MacEnergy: model must be one of physical"):
        MacEnergy(model="measured")
    with pytest.raises(ValueError, match="model 'table' needs table"):
        MacEnergy(model="table")
    with pytest.raises(ValueError, match="the table has no precision of 16 bits or more, only"):
        MacEnergy(model="table", table={"subword_parallel": {8: 1.0}}).energy(16)
    with pytest.raises(ValueError, match="bits must be a whole number in 1..16, got 32"):
        MacEnergy().energy(32)
    with pytest.raises(ValueError, match="reference must be 32, 16 or 8"):
        compression([LayerCost("a", 1, 1)], 4)
