"""The `snn_robustness` recipe where a network is dead: the run goes on, and no figure passes for robustness."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyaccel.recipes import plots, report, snn_robustness
from pyaccel.recipes.snn_robustness_measure import Bench, controls, share
from pyaccel.recipes.snn_robustness_report import describe, results

DEAD = 2  # steps: two spiking layers, each a step late, so that nothing reaches the output
SMALL = replace(
    snn_robustness.preset("smoke"), train_images=300, test_images=60, watch_images=20, attack_images=30, epochs=3,
    balance_images=64, balance_steps=20, tune_epochs=1, pgd_steps=2, networks=("ann", "conv", "bp"), seeds=(0,),
    surrogates=("atan",), draws=2, conv_steps=20, agree_steps=(DEAD, 20), sweep_leaks=(1.0,), sweep_at=10,
)  # fmt: skip


def test_a_dead_network_costs_no_run_and_is_no_figure(tmp_path):
    pytest.importorskip("sklearn")
    config = replace(SMALL, steps=DEAD, sweep_steps=(DEAD, 10))
    snn_robustness.run(config, out=tmp_path, resume="never")  # though both sweeps come to T = 10, leak 1
    found = {result.name: result for result in report.read(tmp_path).results}
    eps, figure = f"{config.eps[0]:g}", "sweep/steps/2/white"
    for name in (
        figure,
        f"bp/white/pgd/{eps}",
        f"ann/black/bp/fgsm/{eps}",
        "bp/control/tuned surrogate",
        "agreement/2/cosine",
    ):
        assert name not in found and found[f"{name}/no_gradient"].value == 1
    for name in ("sweep/steps/10/white", f"ann/white/pgd/{eps}", "sweep/leak/1/white", "agreement/20/cosine"):
        assert f"{name}/no_gradient" not in found and 0 < found[name].value < 100
    assert found["sweep/steps/10/white"].value == found["sweep/leak/1/white"].value
    # What is left to attack it, and what chance is, are figures.
    transfer = found["bp/control/transfer from the artificial network"].value
    assert found["bp/control/worst of all"].value == transfer and found[f"{figure[:-5]}clean"].value < 30
    assert not any(name.startswith("bp_minus_ann") or name.startswith("bp/white") and "loss" in name for name in found)
    text = (tmp_path / "report.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| T = 2, leak 1"))
    assert row.count("no gradient") == 1 and text.count("it is a dead network") == 5  # once a section that needs it
    if plots.available():
        assert (tmp_path / "white_box.png").exists() and (tmp_path / "sweeps.png").exists()


def test_a_seed_without_gradient_is_counted_and_leaves_no_mean_of_the_others():
    alive = {"sweep/leak/1/clean": 0.5, "sweep/leak/1/white": 0.25, "sweep/leak/1/transfer": 0.5}
    config = replace(SMALL, networks=("bp",), sources=(), sweep_steps=(), seeds=(0, 1))
    found = results(config, {0: alive, 1: alive | {"sweep/leak/1/white": None}})
    made = report.Report("snn_robustness", "smoke", dict(vars(config)), {}, found)
    (section,) = (s for s in describe(made) if s.title == "Time steps and leak")
    assert section.table[1][1:] == ("50.0 ± 0.0", "no gradient (1 of 2 seeds)", "50.0 ± 0.0")
    assert any("it is a dead network" in line for line in section.text)
    whole = report.Report("snn_robustness", "smoke", dict(vars(config)), {}, results(config, {0: alive, 1: alive}))
    (section,) = (s for s in describe(whole) if s.title == "Time steps and leak")
    assert section.table[1][2] == "25.0 ± 0.0" and not any("dead" in line for line in section.text)


def test_only_a_missing_gradient_is_forgiven_and_nothing_withstood_is_not_everything(five_images):
    bench = Bench(replace(SMALL, batch_size=2, surrogates=()), five_images)

    def wrong(x, y):
        raise ValueError("attack: eps must be >= 0")

    with pytest.raises(ValueError, match="eps must be"):
        bench.made(wrong)
    dead = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.Threshold(1e9, 0.0)).eval()
    assert bench.made(bench.fgsm(dead, 0.1)) is None and share(bench.right(dead, None)) is None

    class Own(dict):
        seed = 0

    found = controls(bench.config, bench, Own(ann=dead, bp=dead), "bp", 0.1)
    assert found["bp/control/worst of all"] is None and set(found.values()) == {None}
