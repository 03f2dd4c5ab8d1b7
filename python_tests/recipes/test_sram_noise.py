"""The parts of `sram_noise`: selection by its rules, cells on disk, the bench against the modules it is made of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyaccel import attacks, models
from pyaccel.hardware import SramConfig
from pyaccel.nn import set_memory_pass
from pyaccel.recipes import sram_noise
from pyaccel.recipes.report import Report, markdown, summarise
from pyaccel.recipes.sram_noise import DESK, DESK_DIGITS, PAPER, SMOKE, Config
from pyaccel.recipes.sram_noise_bench import EVALUATION, Bench, Cells, fingerprint, sites_of
from pyaccel.recipes.sram_noise_measure import Study, gradient_of
from pyaccel.recipes.sram_noise_parameters import averaged, parameter_attacks
from pyaccel.recipes.sram_noise_report import describe, results, verdict
from pyaccel.recipes.sram_noise_search import Measured, Screened, combine, everywhere, retained, screen
from pyaccel.surgery import with_noisy_memory

# ------------------------------------------------------------------------------------------------------------ selection

BASE = Measured([0.9], [0.3])


def screened(site, n8t, clean, *attacked):
    return Screened(site, (n8t, 0.1), Measured([clean] * len(attacked), attacked))


def test_a_gain_counts_above_two_standard_errors_within_the_tolerance():
    assert Measured([0.9], [0.32, 0.34, 0.36]).gains(BASE)  # 0.04 against 2 * 0.02 / sqrt(3)
    assert not Measured([0.9], [0.26, 0.34, 0.42]).gains(BASE)  # the same mean, four times the deviation
    assert not Measured([0.9], [0.28, 0.28, 0.28]).gains(BASE)
    assert Measured([0.885], [0.3]).within(BASE, 0.02) and not Measured([0.875], [0.3]).within(BASE, 0.02)


def test_one_setting_a_site_best_site_first():
    cells = [
        screened("a", 1, 0.50, 0.9, 0.9),  # clean accuracy is gone
        screened("a", 2, 0.89, 0.34, 0.34),
        screened("a", 3, 0.89, 0.33, 0.33),
        screened("b", 1, 0.90, 0.36, 0.36),
        screened("c", 1, 0.90, 0.2, 0.5),  # within noise
    ]
    assert [(c.site, c.setting[0]) for c in retained(cells, BASE, 0.02)] == [("b", 1), ("a", 2)]
    every = everywhere(cells, BASE, 0.02)
    assert every == {"a": (2, 0.1), "b": (1, 0.1), "c": (1, 0.1)}
    assert everywhere(cells[:1], BASE, 0.02) == {"a": (1, 0.1)}  # nothing tolerable: the least costly one


def test_greedy_combination_adds_what_helps_and_nothing_else():
    gain = {"a": 0.05, "b": 0.03, "c": -0.01, "d": 0.02}
    cost = {"a": 0.01, "b": 0.00, "c": 0.00, "d": 0.02}
    asked = []

    def measure(placement):
        asked.append(dict(placement))
        return Measured([0.9 - sum(cost[s] for s in placement)], [0.3 + sum(gain[s] for s in placement)])

    kept = [screened(site, 4, 0.9, 0.3 + max(gain[site], 0.001)) for site in "abcd"]
    chosen = combine(measure, kept, BASE, 0.02)
    assert list(chosen) == ["a", "b"]  # c lowers, d costs too much clean accuracy in this company
    assert asked == [{"a": (4, 0.1)}] + [
        {"a": (4, 0.1), "b": (4, 0.1)}, {"a": (4, 0.1), "b": (4, 0.1), "c": (4, 0.1)},
        {"a": (4, 0.1), "b": (4, 0.1), "d": (4, 0.1)},
    ]  # fmt: skip
    assert combine(measure, [], BASE, 0.02) == {}


def test_neighbours_are_tried_and_taken_where_they_are_better():
    def measure(placement):
        return Measured([0.9], [0.3 + sum({3: 0.03, 4: 0.02, 5: 0.01, 0: 0.01}[n8t] for n8t, _ in placement.values())])

    kept = [screened("a", 4, 0.9, 0.33), screened("b", 4, 0.9, 0.32)]
    assert combine(measure, kept, BASE, 0.02) == {"a": (4, 0.1), "b": (4, 0.1)}
    assert combine(measure, kept, BASE, 0.02, neighbours=True) == {"a": (4, 0.1), "b": (3, 0.1)}
    low = [screened("a", 4, 0.9, 0.33), screened("b", 0, 0.9, 0.32)]
    with pytest.raises(KeyError, match="1"):  # -1 is no number of bits, 1 is: it is asked for
        combine(measure, low, BASE, 0.02, neighbours=True)


def test_every_site_meets_every_setting():
    found = screen(lambda placement: Measured([0.5], [0.5]), ["a", "b"], [(1, 0.1), (4, 0.01)])
    assert [(c.site, c.setting) for c in found] == [(s, c) for s in "ab" for c in ((1, 0.1), (4, 0.01))]


def test_what_the_attackers_differentiate():
    outputs, weights = {"0/weight": (1, 0.1), "2/activation": (1, 0.1)}, {"0/weight": (1, 0.1)}
    assert [gradient_of(level, outputs, 7) for level in "ABC"] == [("noisy", 1), ("clean", 1), ("averaged", 7)]
    assert [gradient_of(level, weights, 7) for level in "ABC"] == [("noisy", 1), ("clean", 1), ("noisy", 1)]
    assert {gradient_of(level, {}, 7) for level in "ABC"} == {("noisy", 1)}


# ---------------------------------------------------------------------------------------------------------------- cells


def test_cells_are_measured_once_and_survive_a_kill_while_one_is_written(tmp_path):
    calls = []

    def measure(value):
        calls.append(value)
        return value

    file = tmp_path / "cells.jsonl"
    cells = Cells(file, 1)
    third = 1 / 3
    assert cells.get({"a": (1, 0.1)}, lambda: measure([third])) == [third]
    assert cells.get({"a": [1, 0.1]}, lambda: measure(None)) == [third]
    assert cells.get({"b": 1}, lambda: measure({"x": None})) == {"x": None}
    with open(file, "a") as opened:
        opened.write('["[1, {\\"c\\": 1}]", 0.')  # killed here
    again = Cells(file, 1)
    assert again.get({"a": (1, 0.1)}, lambda: measure(None)) == [third] and calls == [[third], {"x": None}]
    assert again.get({"c": 1}, lambda: measure(3)) == 3
    assert Cells(file, 1).get({"c": 1}, lambda: measure(None)) == 3
    assert Cells(file, 2).get({"c": 1}, lambda: measure(4)) == 4  # another network


def test_the_fingerprint_sees_every_weight_and_buffer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = fingerprint(model)
    assert fingerprint(model) == before
    model[1].running_mean += 1e-6
    changed = fingerprint(model)
    model[0].weight.data[0, 0] += 1e-6
    assert len({before, changed, fingerprint(model)}) == 3


# ---------------------------------------------------------------------------------------------------------------- bench


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.build("vgg5", classes=4, spiking=False, input_shape=(1, 8, 8), width=0.1).eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(30, 1, 8, 8, generator=generator), torch.randint(0, 4, (30,), generator=generator)


def bench_of(network, images, batch_size=30):
    return Bench(network, [(images[0] - 0.4) / 0.3], (0.4,), (0.3,), batch_size, torch.device("cpu"))


PLACED = {"4/weight": (1, 0.05), "2/activation": (2, 0.1)}


def test_sites_are_weights_and_outputs_behind_them(network):
    assert sites_of(network) == [
        "0/weight", "2/activation", "4/weight", "6/activation", "7/weight", "9/activation", "12/weight",
        "14/activation", "15/weight",
    ]  # fmt: skip
    residual = models.build("resnet18", classes=4, spiking=False, width=0.05)
    found = sites_of(residual)
    assert (
        "readout/weight" in found and "features.5.shortcut.0/weight" in found and "features.3.relu/activation" in found
    )
    assert sum(site.endswith("/weight") for site in found) == 21  # 17 convolutions, 3 shortcuts, the read-out


def test_the_bench_is_with_noisy_memory_and_its_own_pass(network, images):
    x, y = images
    bench = bench_of(network, images)
    bench.place(PLACED, 5)
    safe = {site: SramConfig(n8t=8) for site in sites_of(network)}
    sites = safe | {site: SramConfig(n8t=n8t, p6=p) for site, (n8t, p) in PLACED.items()}
    model = with_noisy_memory(network, sites, calibration=[(x - 0.4) / 0.3], seed=5)
    set_memory_pass(model, EVALUATION)
    logits = model((x - 0.4) / 0.3)
    assert bench.accuracy(x, y) == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    set_memory_pass(bench.model, EVALUATION)
    assert torch.allclose(bench.model(x), logits, atol=1e-5)
    bench.place({}, 9)  # the baseline: no trace of the chip before
    quiet = with_noisy_memory(network, safe, calibration=[(x - 0.4) / 0.3])
    assert torch.allclose(bench.model(x), quiet((x - 0.4) / 0.3), atol=1e-5)


@pytest.mark.parametrize(("gradient", "samples"), [("noisy", 1), ("clean", 1), ("averaged", 3)])
def test_no_figure_depends_on_how_images_are_batched(network, images, gradient, samples):
    x, y = images
    figures = []
    for batch_size in (30, 7):
        bench = bench_of(network, images, batch_size)
        bench.place(PLACED, 3)
        figures.append([bench.accuracy(x, y), *bench.fgsm(x, y, [0.02, 0.1], gradient, samples)])
    assert figures[0] == pytest.approx(figures[1], abs=1.01 / 30)  # sums in another order may move one image
    other = bench_of(network, images)
    seen = set()
    for chip in range(6):
        other.place(PLACED, chip)
        seen.add(tuple(other.fgsm(x, y, [0.02, 0.1], gradient, samples)))
    assert len(seen) > 1  # chips matter


def test_fgsm_and_pgd_are_those_of_the_attacks(network, images):
    x, y = images
    bench = bench_of(network, images)
    bench.place(PLACED, 3)
    set_memory_pass(bench.model, 0)
    attacked = attacks.fgsm(bench.model, x, y, 0.1)
    assert bench.fgsm(x, y, [0.1]) == [bench.accuracy(attacked, y)]
    set_memory_pass(bench.model, 0)
    attacked = attacks.pgd(bench.model, x, y, 0.1, 0.025, 4, gradient="averaged", samples=2)
    assert bench.pgd(x, y, 0.1, 4, "averaged", 2) == bench.accuracy(attacked, y)


def test_measured_magnitude_of_a_site(network, images):
    bench = bench_of(network, images)
    assert bench.magnitude("7/weight", images[0]) == 0.0
    for site in ("7/weight", "2/activation"):
        bench.place({site: (4, 0.1)}, 1)
        assert bench.magnitude(site, images[0]) == pytest.approx(SramConfig(n8t=4, p6=0.1).mu, rel=0.25)
        assert bench.magnitude("4/weight", images[0]) == 0.0


def test_parameter_attacks_name_their_controls(network, images, tmp_path):
    x, y = images
    cells = Cells(tmp_path / "cells.jsonl", 0)
    options = dict(
        n8t=2, batch_size=10, voltage_p=[0.3], surgical_rounds=[1], budgets=[12], progressive_rounds=2, chips=[0, 1]
    )
    found = parameter_attacks(network, (x[:8], y[:8]), x, y, cells, **options)
    assert list(found) == ["none", "voltage/p=0.3", "surgical/rounds=1", "random/rounds=1", "surgical/budget=12",
                           "random/budget=12", "progressive"]  # fmt: skip
    assert found["none"]["flips"] == 0 and found["surgical/budget=12"]["flips"] == 12
    assert 1 <= found["progressive"]["flips"] <= 16
    flips = found["surgical/rounds=1"]["flips"]
    assert abs(found["random/rounds=1"]["flips"] - flips) < 6 * flips**0.5
    assert 0 < found["random/budget=12"]["flips"] < 40
    assert parameter_attacks(None or network, (x[:8], y[:8]), x, y, Cells(cells.file, 0), **options) == found
    mixed = averaged([{"accuracy": 0.5, "confidence_wrong": None}, {"accuracy": 1.0, "confidence_wrong": 0.4}])
    assert (
        mixed["accuracy"] == 0.75
        and mixed["confidence_wrong"] is None
        and mixed["noise_std"] == pytest.approx(0.125**0.5)
    )


# --------------------------------------------------------------------------------------------------------------- report


def study(a, b, c, chosen):
    """A hand-made study: baseline 30 % under FGSM, 80 % clean; a, b, c: accuracy of the attackers, %."""
    one = Measured([0.8], [0.3])
    placements = {"chosen": chosen, "all": {}, "weights": {}, "activations": {}}
    found = Study(0.81, one, [Screened("2/activation", (1, 0.1), Measured([0.79], [0.35], 0.02))], placements)
    for placement in ("none", "chosen", "all", "weights", "activations"):
        found.clean[placement] = [0.8] if placement == "none" else [0.79, 0.77]
        for level, value in zip("ABC", (a, b, c), strict=True):
            for attack, eps in (("fgsm", 0.1), ("pgd", 0.1)):
                values = [0.3] if placement == "none" else [value / 100 - 0.01, value / 100 + 0.01]
                found.attacked[placement, attack, level, eps] = values
    figures = {"accuracy": 0.2, "confidence_wrong": 0.9, "confidence": 0.8, "flips": 7}
    found.parameters[4] = {
        "none": figures | {"accuracy": 0.8, "flips": 0}, "voltage/p=0.5": figures,
        "surgical/rounds=1": figures | {"confidence_wrong": None},
    }  # fmt: skip
    for kind in ("weight", "activation"):
        found.sweep[kind, 4, 0.01] = [0.7, 0.72]
    return found


CONFIG = Config(
    preset="test", networks=("vgg5",), seeds=(0, 1, 2), epsilons=(0.1,), screening_eps=0.1, pgd_epsilons=(0.1,),
    n8t=(1,), probabilities=(0.1,), bank_n8t=(4,), voltage_p=(0.5,), sweep_p=(0.01,),
)  # fmt: skip


def report_of(*studies, config=CONFIG):
    config = replace(config, seeds=tuple(range(len(studies))))
    found = results(config, {("vgg5", seed): s for seed, s in enumerate(studies)}, 500)
    return Report("sram_noise", "test", json.loads(json.dumps(vars(config))), {}, found)


ONE = {"2/activation": (1, 0.1)}


def test_figures_by_hand():
    report = report_of(study(36, 38, 31, ONE), study(38, 38, 33, ONE))
    key = "vgg5/chosen/fgsm"
    assert report[f"{key}/A/0.1000/accuracy"].value == pytest.approx(37)
    assert report[f"{key}/A/0.1000/gain"].value == pytest.approx(7)
    assert report[f"{key}/A/0.1000/gain"].std == pytest.approx(2**0.5)
    assert report[f"{key}/C/0.1000/loss"].value == pytest.approx(78 - 32)  # AL = CA - AA
    assert report[f"{key}/least/0.1000/gain"].value == pytest.approx(2)
    assert report[f"{key}/A/0.1000/noise_std"].value == pytest.approx(2**0.5)
    assert report["vgg5/screen/2/activation/n8t=1/p=0.1/gain"].value == pytest.approx(5)
    assert report["vgg5/screen/2/activation/n8t=1/p=0.1/cost"].value == pytest.approx(1)
    assert report["vgg5/parameters/n8t=4/voltage/p=0.5/drop"].value == pytest.approx(60)
    assert report["vgg5/parameters/n8t=4/voltage/p=0.5/confidence_wrong"].value == pytest.approx(90)
    assert all(result.published is None for result in report.results)
    text = markdown(report, describe(report))
    assert "2 of 2" in text and "none wrong" in text and "only the abstract could be read" in text


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([(36, 36, 30), (37, 36, 30), (36, 36, 31)], "the gain does not survive averaging over noise"),
        ([(36, 36, 36), (37, 36, 37), (36, 36, 36)], "the gain survives averaging over noise"),
        ([(36, 25, 36), (37, 26, 37), (36, 25, 36)], "may choose between the three leaves nothing"),
        ([(40, 36, 33), (41, 36, 33), (40, 36, 34)], "part of the gain survives averaging over noise"),
        ([(35, 36, 35), (26, 36, 26), (31, 36, 31)], "no gain on test images to begin with"),
        ([(36, 36, 36)], "one seed, no verdict"),
    ],
)
def test_the_verdict_is_plain(seeds, said):
    report = report_of(*(study(*seed, ONE) for seed in seeds))
    assert said in verdict(report, "vgg5")
    assert verdict(report, "vgg5") in describe(report)[0].text


def test_the_verdict_when_nothing_was_chosen():
    report = report_of(study(30, 30, 30, {}), study(30, 30, 30, {}))
    assert "no site qualified on the selection images" in verdict(report, "vgg5")
    assert "**No site qualified for any seed.**" in markdown(report, describe(report))


def test_a_chosen_neighbour_that_was_not_screened_is_in_the_table():
    report = report_of(study(36, 36, 36, {"2/activation": (2, 0.1)}), study(36, 36, 36, ONE))
    text = markdown(report, describe(report))
    assert "not tried alone" in text
    assert text.count("1 of 2") == 2


def test_published_figures_are_nowhere():
    with pytest.raises(ValueError, match="say where"):
        summarise("x", [1.0], "%", published_source="")
    assert {r.published_source for r in report_of(study(36, 36, 36, ONE)).results} == {
        "the paper's abstract gives ranges, without eps, layers or split; its tables were not at hand"
    }


# --------------------------------------------------------------------------------------------------- presets and errors


def test_presets():
    assert PAPER.networks == ("vgg19", "resnet18") and PAPER.n8t == tuple(range(1, 8))
    assert PAPER.repeats >= 5 and DESK.repeats >= 5 and len(PAPER.seeds) > 1 and len(DESK.seeds) > 1
    assert sram_noise.preset("desk", "digits") == replace(DESK_DIGITS, data="digits")
    assert sram_noise.preset("desk", "/cifar") == replace(DESK, data="/cifar")
    with pytest.raises(ValueError, match="unknown preset 'big'; known are smoke, desk, paper"):
        sram_noise.preset("big")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="vgg19"), "name them in networks, got model 'vgg19'"),
        (dict(networks=("vgg99",)), "networks: expected some of .*, got vgg99"),
        (dict(n8t=(8,)), "n8t: expected some of 0, 1, 2, 3, 4, 5, 6, 7, got 8"),
        (dict(probabilities=(0.0,)), r"probabilities must be in \(0, 1\], got \[0.0\]"),
        (dict(samples=1), "samples must be at least 2: attacker C averages over draws, got 1"),
        (dict(screening_eps=0.07), "screening_eps must be one of epsilons, got 0.07"),
        (dict(weights=("a", "b")), "weights: expected one file for each of the 1 networks, got 2"),
        (dict(repeats=0), "repeats must be at least 1, got 0"),
        (dict(selection_images=5000), "a selection split of 5000 .*leaves nothing of 1437"),
        (dict(networks=("vgg19",)), "images of 8x8 are too small for this network"),
    ],
)
def test_wrong_fields_are_named_before_anything_is_written(change, message, tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        sram_noise.run(replace(SMOKE, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_data_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    with pytest.raises(ValueError, match="the preset desk of sram_noise trains on CIFAR-10 .*--data digits"):
        sram_noise.run(sram_noise.preset("desk"), out=tmp_path / "run")
