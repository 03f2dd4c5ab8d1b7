"""Parts of the `crossbar` recipe: its networks, controls, cells and report."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pyaccel.data import Batch
from pyaccel.hardware import CrossbarConfig
from pyaccel.recipes import crossbar, crossbar_measure
from pyaccel.recipes.classifier import Normalised
from pyaccel.recipes.crossbar_measure import (
    MODES,
    Cells,
    Measured,
    attacks_of,
    craft,
    fingerprint,
    gains,
    gaussian,
    measure,
    on_chip,
    without_gradient,
)  # fmt: skip
from pyaccel.recipes.crossbar_networks import LowBitPixels, LowBits, adversarial_loss, train_network, wrapper
from pyaccel.recipes.crossbar_report import results
from pyaccel.surgery import to_crossbars

CONFIG = replace(crossbar.SMOKE, device="cpu", chips=1, fgsm_eps=(0.1,), pgd_eps=(8,))
CHIP = CrossbarConfig(rows=16, columns=16, variation=0.1)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    ).eval()


def batches():
    torch.manual_seed(1)
    return [Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12)) for _ in range(2)]


WRAP = wrapper(CONFIG, "plain")


# ------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_low_bits_is_symmetric_and_straight_through(bits):
    torch.manual_seed(0)
    weight, quantise = (2 * torch.rand(50, 40) - 1).requires_grad_(), LowBits(bits)
    out, top = quantise(weight), 2 ** (bits - 1) - 1
    codes = out.detach() / weight.detach().abs().max() * top
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().unique().numel() == 2 * top + 1
    torch.testing.assert_close(quantise(-weight), -out)
    assert (out - weight).abs().max() <= weight.abs().max() / top / 2 * 1.0001
    (grad,) = torch.autograd.grad((out * 3).sum(), weight)
    assert (grad == 3).all()
    assert (quantise(torch.zeros(3, 3)) == 0).all()


def test_low_bit_pixels_pass_the_gradient():
    x = torch.linspace(0, 1, 101).requires_grad_()
    out = LowBitPixels(4)(x)
    assert out.detach().mul(15).round().unique().numel() == 16 and (out - x).abs().max() < 0.5 / 15 + 1e-6
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad == 1).all()


def test_adversarial_training_sees_attacked_images_and_repeats():
    config = replace(CONFIG, adversarial_eps=16.0, adversarial_step=8.0, adversarial_steps=3)
    model, batch = Normalised(network(), None, None).train(), batches()[0]
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].detach().clone())))
    loss, _ = adversarial_loss(config)(model, batch)
    assert [training for training, _ in seen] == [False] * 3 + [True] and model.training and model.model[1].training
    distance = (seen[-1][1] - batch.images).abs()
    assert 0.9 * 16 / 255 < distance.max() <= 16 / 255 + 1e-6
    plain = nn.functional.cross_entropy(copy.deepcopy(model).eval()(batch.images), batch.labels)
    assert loss > plain
    again, _ = adversarial_loss(config)(Normalised(network(), None, None).train(), batch)
    assert torch.equal(again, loss)


# ------------------------------------------------------------------------------------------------ controls
@pytest.mark.parametrize("calibration", ["none", "layer_gain"])
def test_the_gaussian_control_is_as_far_from_the_software_as_the_chip(calibration):
    plain = network()
    mapped = WRAP(to_crossbars(plain, replace(CHIP, calibration=calibration), chip=0))
    control = gaussian(plain, WRAP, mapped, 0, None)
    for (slope, residue), ours, layer in zip(
        gains(mapped).values(), (control.model[0], control.model[4]), (plain[0], plain[4]), strict=True
    ):
        wanted, found = layer.weight.detach(), ours.weight.detach()
        left = (found - slope * wanted).square().mean().sqrt() / (slope * wanted.square().mean().sqrt())
        assert abs(left.item() - residue) < 0.25 * residue  # 72 weights in the first layer
        assert (slope < 0.95) == (calibration == "none") and residue > 0.05
    assert torch.equal(plain[0].weight, network()[0].weight)  # the network itself is untouched
    other = gaussian(plain, WRAP, mapped, 1, None)
    assert not torch.equal(other.model[0].weight, control.model[0].weight)


def test_an_ideal_chip_changes_no_figure():
    """Negative control of the whole measurement: without wires and variation every mode is the software's."""
    config = replace(CONFIG, chips=2)
    chips = {"ideal": CHIP.ideal()}
    found = measure(config, network(), WRAP, chips, batches(), [], NoCells())
    for attack in attacks_of(config):
        for mode in MODES:
            assert found.chips["ideal"][f"{mode}/{attack.name}"] == [found.software[attack.name]] * 2, mode
    assert found.chips["ideal"]["residue"] == pytest.approx([0, 0], abs=1e-6)
    assert found.chips["ideal"]["slope"] == pytest.approx([1, 1], abs=1e-6)


def test_modes_differ_on_a_real_chip_and_each_is_what_it_says():
    config, shown, plain = replace(CONFIG, chips=1), batches(), network()
    crossbars = replace(CHIP, rows=64, columns=64, calibration="none")
    found = measure(config, plain, WRAP, {"c": crossbars}, shown, [], NoCells()).chips["c"]
    attack = attacks_of(config)[0]
    software, hardware, other = WRAP(copy.deepcopy(plain)), *(on_chip(plain, WRAP, crossbars, n, []) for n in (0, 1))

    def right(model, by):
        images = craft(by, attack, shown)
        return sum(int((model(x).argmax(1) == b.labels).sum()) for x, b in zip(images, shown, strict=True)) / 24

    assert found["SH/fgsm-0.1"] == [right(hardware, software)]
    assert found["HH/fgsm-0.1"] == [right(hardware, hardware)]
    assert found["HX/fgsm-0.1"] == [right(other, hardware)]


def test_images_without_gradient_are_counted():
    class Saturated(nn.Module):
        def forward(self, x):
            loud = (x.flatten(1).mean(1, keepdim=True) > 0.5).float() * 1e9
            return x.flatten(1)[:, :10] + loud * torch.eye(10)[0]

    x = torch.full((4, 1, 8, 8), 0.1)
    x[:3] = 0.9
    assert without_gradient(Saturated(), [Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4))]) == 0.75


def test_batch_statistics_are_measured_on_the_chip_and_on_its_control():
    plain, images = network(), [b.images for b in batches()]
    crossbars = replace(CHIP, calibration="bn_reestimate")
    chip = on_chip(plain, WRAP, crossbars, 0, images)
    assert not torch.allclose(chip.model[1].running_var, plain[1].running_var)
    control = gaussian(plain, WRAP, chip, 0, images)
    ratio = control.model[1].running_var / chip.model[1].running_var
    assert 0.5 < ratio.mean() < 2 and torch.equal(plain[1].running_var, torch.ones(8))


# --------------------------------------------------------------------------------------------------- cells
class NoCells:
    def get(self, name, measure):
        return measure()


def test_cells_keep_figures_by_name_and_weights(tmp_path):
    cells, calls = Cells(tmp_path, "abc"), []

    def one():
        calls.append(1)
        return 0.25

    assert [cells.get("16x16/20k/none/clean", one) for _ in range(3)] == [0.25] * 3 and len(calls) == 1
    assert Cells(tmp_path, "abc").get("16x16/20k/none/clean", one) == 0.25 and len(calls) == 1
    Cells(tmp_path, "abc").get("16x16/20k/none/HH", one)
    Cells(tmp_path, "other weights").get("16x16/20k/none/clean", one)
    assert len(calls) == 3
    file = tmp_path / "16x16/20k/none/clean.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"clean.json: not a figure as it was written .*; remove this file"):
        cells.get("16x16/20k/none/clean", one)


def test_processes_share_the_units_and_read_what_the_others_kept(tmp_path, monkeypatch):
    units, made = [f"unit-{i}" for i in range(5)], []

    def figure(unit):
        def one():
            made.append((rank, unit))
            return float(unit[-1])

        return {"value": Cells(tmp_path, "w").get(unit, one)}

    def others():
        """What the other processes have done when all meet."""
        for other in range(world):
            for unit in units[other::world] if other != rank else []:
                Cells(tmp_path, "w").get(unit, lambda unit=unit: float(unit[-1]))

    rank, world = 1, 3
    monkeypatch.setattr(crossbar_measure.distributed, "rank", lambda: rank)
    monkeypatch.setattr(crossbar_measure.distributed, "world", lambda: world)
    monkeypatch.setattr(crossbar_measure.distributed, "barrier", others)
    found = crossbar_measure._shared(units, figure)
    assert found == {unit: {"value": float(unit[-1])} for unit in units} and list(found) == units
    assert made == [(1, "unit-1"), (1, "unit-4")]


def test_a_fingerprint_sees_every_weight():
    one, other = network(), network()
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other[4].bias[3] += 1e-7
    assert fingerprint(one) != fingerprint(other)


# -------------------------------------------------------------------------------------------------- report
def measured(config, calibration="none"):
    attacked = {a.name: 0.5 for a in attacks_of(config)}
    chip = {name: [0.8] for name in ("clean", "gaussian", "no_gradient", "slope", "residue")}
    chip |= {f"{mode}/{a.name}": [0.6] for mode in MODES for a in attacks_of(config)}
    study = {"software": {"accuracy": 0.9}}
    study |= {
        f"{t}x{t}/20k/{c}": {"accuracy": 0.7, "slope": 0.4, "residue": 0.1}
        for t in (32, 64)
        for c in ("none", "layer_gain")
    }
    return Measured({"clean": 0.9, "no_gradient": 0.0, **attacked}, {f"64x64/20k/{calibration}": chip}, study)


def test_the_anchor_stands_only_beside_its_own_experiment():
    config = replace(CONFIG, networks=("plain",), seeds=(0,))
    for published in (False, True):
        found = {r.name: r for r in results(config, {("plain", 0): measured(config)}, published)}
        known = {name: r.published for name, r in found.items() if r.published is not None}
        assert known == (
            {"study/software/accuracy": 88.62, "study/64x64/20k/none/accuracy": 74.37} if published else {}
        )
        assert all(r.published_source for r in found.values())
    assert found["plain/64x64/20k/none/SH/fgsm-0.1/loss"].value == pytest.approx(20)
    assert found["plain/64x64/20k/none/SH/fgsm-0.1/minus_SW"].value == pytest.approx(10)
    assert found["plain/64x64/20k/none/clean_loss"].value == pytest.approx(10)
    assert found["plain/software/SW/fgsm-0.1/loss"].value == pytest.approx(40)
    assert found["study/64x64/20k/none/lost"].value == pytest.approx(20)


@pytest.mark.parametrize(
    "fields, text",
    [
        (
            dict(networks=("plain", "quanos")),
            "networks: expected some of plain, low_bit, pixel, adversarial, got quanos",
        ),
        (
            dict(calibrations=("gain",)),
            "calibrations: expected some of none, layer_gain, column_gain, bn_reestimate, got gain",
        ),
        (dict(tiles=()), "tiles: expected at least one value"),
        (dict(pgd_eps=(-1.0,)), r"pgd_eps must be positive, got \[-1.0\]"),
        (dict(scheme="double"), "scheme: expected some of differential, offset, got double"),
        (dict(defence_bits=1), "defence_bits must be in 2..8, got 1"),
        (dict(chips=0), "chips must be at least 1, got 0"),
        (dict(on_off=0.5), "r_min must be above 0 and below r_max"),
        (dict(r_sense=-1.0), "r_sense must be finite and at least 0"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_named(fields, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        crossbar.run(replace(CONFIG, **fields), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bn_reestimate_needs_a_network_with_batch_normalisation(tmp_path):
    pytest.importorskip("sklearn")
    config = replace(CONFIG, norm=None, calibrations=("bn_reestimate",))
    with pytest.raises(
        ValueError, match='"bn_reestimate" needs batch normalisation, which vgg8_crossbar is built without'
    ):
        crossbar.run(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert [name for name in crossbar.study_chips(config, nn.Linear(2, 2)) if "bn" in name] == []


def test_presets_name_their_data_and_networks(monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    assert crossbar.preset("smoke").data == "digits8" and crossbar.preset("desk").data is None
    assert crossbar.preset("desk", "digits").mean is None and crossbar.preset("desk", "/x").mean is not None
    paper = crossbar.preset("paper")
    assert paper.tiles == (16, 32, 64) and paper.chips == 5 and 128 in paper.study_tiles
    assert crossbar.preset("paper").networks == crossbar.NETWORKS
    with pytest.raises(ValueError, match="unknown preset 'big'"):
        crossbar.preset("big")
    with pytest.raises(ValueError, match="the preset desk of crossbar trains on CIFAR-10 and was given no data"):
        crossbar.run(crossbar.preset("desk"), out="never")
    assert json.dumps(crossbar.preset("paper").__dict__)  # a run folder can hold it


def test_deployed_low_bit_weights_are_on_their_levels_and_map(tmp_path):
    pytest.importorskip("sklearn")
    from pyaccel.recipes.classifier import open_data

    config = replace(CONFIG, epochs=1)
    train, test = open_data(config, "crossbar")
    trained = train_network(config, "low_bit", train, test, seed=0, out=tmp_path, resume="auto", free=crossbar.FREE)
    layers = [m for m in trained.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 8 and not any(parametrize.is_parametrized(m) for m in layers)
    for layer in layers:
        assert 2 < layer.weight.unique().numel() <= 15
    assert len(list(to_crossbars(trained, CHIP, chip=0).parameters())) == len(list(trained.parameters()))
