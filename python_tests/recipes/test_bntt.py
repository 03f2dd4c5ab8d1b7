from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyaccel.data import ImageSet
from pyaccel.recipes import bntt
from pyaccel.recipes.activity import LayerActivity
from pyaccel.recipes.bntt import DESK_DIGITS, PAPER, SMOKE, Measurement, exit_step
from pyaccel.recipes.classifier import is_cifar10, milestones
from pyaccel.recipes.bntt_report import describe, results
from pyaccel.recipes.report import Report, markdown

# ---------------------------------------------------------------------------------------------------------- definitions


def gains(*rows):
    """One layer a row, its gains over time, for two channels around each value."""
    return [torch.tensor([[value - 0.05, value + 0.05] for value in row]) for row in rows]


def test_exit_is_after_the_last_step_at_which_any_layer_has_gain():
    layers = gains([0.9, 0.05, 0.0, 0.0], [0.5, 0.6, 0.2, 0.0])
    assert exit_step(layers, 0.1) == 3
    assert exit_step(layers, 0.3) == 2
    assert exit_step(layers[:1], 0.1) == 1
    assert exit_step(gains([0.0, 0.0, 0.3]), 0.1) == 3  # a gap before does not end it


def test_exit_bounds_and_the_level_itself():
    assert exit_step(gains([1.0] * 5), 0.1) == 5
    assert exit_step(gains([0.0] * 5), 0.1) == 1
    level = [torch.tensor([[1.0], [0.25], [0.0]])]
    assert exit_step(level, 0.25) == 2  # "at least" the threshold
    assert exit_step(level, 0.2500001) == 1


def test_exit_options():
    layers = [torch.tensor([[0.5, 0.5], [0.3, -0.3], [-0.2, -0.2]])]
    assert exit_step(layers, 0.1) == 1
    assert exit_step(layers, 0.1, over="max") == 2
    assert exit_step(layers, 0.1, absolute=True) == 3


def test_learning_rate_drops_where_the_published_loop_drops_it():
    assert milestones(100) == [51, 71, 91]
    epochs, rate, published = 100, 0.3, []
    for epoch in range(epochs):
        published.append(rate)
        if epoch in (0.5 * epochs, 0.7 * epochs, 0.9 * epochs):
            rate /= 10
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    scheduler, ours = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones(epochs), 0.1), []
    for _ in range(epochs):
        ours.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours == pytest.approx(published)


def test_paper_preset_is_the_published_setting():
    assert (PAPER.model, PAPER.width, PAPER.steps, PAPER.leak, PAPER.gain) == ("vgg9_bntt", 1.0, 25, 0.95, 0.5)
    assert (PAPER.lr, PAPER.momentum, PAPER.weight_decay, PAPER.batch_size, PAPER.epochs) == (0.3, 0.9, 1e-4, 256, 100)
    assert (PAPER.crop_padding, PAPER.flip, PAPER.std) == (4, True, (0.2023, 0.1994, 0.2010))
    assert PAPER.train_images is None and PAPER.watch_images is None


def test_desk_preset_depends_on_the_data(monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    assert bntt.preset("desk", "digits").model == "vgg5"
    assert bntt.preset("desk", "/a/path").model == bntt.preset("desk").model == "vgg9_bntt"
    monkeypatch.setenv("PYACCEL_DATA", "digits")
    assert bntt.preset("desk").model == "vgg5"
    with pytest.raises(ValueError, match="unknown preset 'big'; known are smoke, desk, paper"):
        bntt.preset("big")


def test_the_three_networks_start_from_the_same_weights():
    images = ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), "01", "two")
    first, *others = [bntt.build(SMOKE, images, norm, 3) for norm in bntt.NORMS]
    for other in others:
        assert torch.equal(first.readout.weight, other.readout.weight)
        assert torch.equal(first.classifier[0].synapse.weight, other.classifier[0].synapse.weight)
    another = bntt.build(SMOKE, images, "bntt", 4)
    assert not torch.equal(first.readout.weight, another.readout.weight)


# ---------------------------------------------------------------------------------------------------- published figures


@pytest.fixture
def measured():
    """A hand-made measurement of a network of two layers, 25 steps."""
    layers = [
        LayerActivity("features.0", macs=1000, inputs=10, neurons=20, events=50.0, spikes=30.0),
        LayerActivity("readout", macs=200, inputs=20, neurons=0, events=30.0),
    ]
    rising = [0.5 + 0.01 * t for t in range(25)]
    history = [{"seconds": 2.0}, {"seconds": 3.0}]

    def make(norm, exit_step=None):
        return Measurement(rising, layers, {}, exit_step if norm == "bntt" else None, history)

    return lambda exit_step: {(norm, 0): make(norm, exit_step) for norm in bntt.NORMS}


def report_of(config, measured, departures=()):
    return Report("bntt", config.preset, {**vars(config)}, {}, results(config, measured, departures))


def test_figures_by_hand(measured):
    report = report_of(PAPER, measured(20))
    assert report["bntt/accuracy"].value == pytest.approx(74.0)
    assert report["bntt/accuracy_at_exit"].value == pytest.approx(69.0) == report["bntt/accuracy_after_step_20"].value
    assert report["bntt/rate/features.0"].value == pytest.approx(1.5)  # 30 spikes of 20 neurons
    assert report["bntt/incoming_rate/features.0"].value == pytest.approx(5.0)
    assert report["bntt/energy_float32/dense"].value == pytest.approx(1200 * 4.6e-3)
    assert report["bntt/energy_float32/spikes"].value == pytest.approx((1000 * 5 + 200 * 1.5) * 0.9e-3)
    assert report["bntt/energy_float32/normalisation"].value == pytest.approx(25 * 20 * 4.6e-3)
    assert report["none/energy_int32/normalisation"].value == 0
    assert report["none/energy_int32/dense_over_spiking"].value == pytest.approx(1200 * 3.2 / (5300 * 0.1))
    assert report["bntt/training_time"].value == 5.0
    assert report["bntt_minus_none/accuracy"].value == 0.0


def test_the_published_figure_stands_only_beside_the_published_experiment(measured):
    report = report_of(PAPER, measured(20))
    assert report["bntt/accuracy"].published == 90.5 and report["bntt/accuracy_at_exit"].published == 90.3
    assert "last epoch" in report["bntt/accuracy"].published_source
    assert "90.5" in markdown(report, describe(report))
    assert report_of(PAPER, measured(25))["bntt/accuracy_at_exit"].published is None
    others = report_of(PAPER, measured(20), ["network", "data set"])
    assert {result.published for result in others.results} == {None}
    assert others["bntt/accuracy"].published_source == "not the published experiment: other network, data set"
    assert "90.5" not in markdown(others, describe(others))
    names = {r.name for r in report.results if r.published is not None}
    assert names == {"bntt/accuracy", "bntt/accuracy_at_exit"}


def test_what_makes_a_run_another_experiment():
    small = ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), "01", "two")
    assert bntt.departures(PAPER, small, small) == ["data set"]
    assert bntt.departures(replace(PAPER, steps=8, lr=0.1, seeds=(1, 2)), small, small) == [
        "network", "training", "data set",
    ]  # fmt: skip


@pytest.mark.parametrize(("blue", "original"), [(0.2616, True), (0.2606, False)])  # the second: a JPEG copy
def test_cifar10_is_known_by_its_numbers(blue, original):
    def channel(deviation):
        """1,024 pixels, some of them bright, whose deviation is the wanted one."""
        options = [(abs(bright / 255 * (k / 1024 * (1 - k / 1024)) ** 0.5 - deviation), bright, k)
                   for bright in range(150, 256) for k in range(1, 512)]  # fmt: skip
        _, bright, k = min(options)
        return torch.arange(1024).lt(k).mul(bright).to(torch.uint8)

    image = torch.stack([channel(d) for d in (0.2470, 0.2435, blue)]).view(1, 3, 32, 32)

    def images(count):
        return ImageSet(image.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64), "0", "expanded")

    assert is_cifar10(images(50_000), images(10_000)) is original
    assert not is_cifar10(images(49_999), images(10_000))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norms=("bntt", "layer")), "norms: expected some of bntt, shared, none, got layer"),
        (dict(norms=()), "norms: expected at least one value and none twice"),
        (dict(seeds=(1, 1)), r"seeds: expected at least one value and none twice, got \[1, 1\]"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(lr=0.0), "lr must be positive, got 0.0"),
        (dict(exit_over="median"), "exit_over must be mean or max, got 'median'"),
        (dict(model="vgg99"), "unknown model 'vgg99'; known are .*vgg11_bntt.*vgg5.*vgg9_bntt"),
        (dict(model="vgg11_bntt"), "images of 8x8 are too small for this network"),
    ],
)
def test_wrong_fields_are_named_before_anything_is_written(change, message, tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        bntt.run(replace(SMOKE, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_data_says_how_to_get_it_or_to_choose_digits(monkeypatch, tmp_path):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz.*--data PATH.*--preset desk --data digits"):
        bntt.run(bntt.preset("desk"), out=tmp_path / "run")


def test_digits_preset_fits_digits():
    images = ImageSet(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]), "0123456789", "two")
    model = bntt.build(DESK_DIGITS, images, "bntt", 0)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
