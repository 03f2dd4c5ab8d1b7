"""The `prune_while_training` recipe: schedule and accounting to the digit, one path in both modes, kills survived."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyaccel import surgery
from pyaccel.cli import main
from pyaccel.recipes import prune_while_training as recipe
from pyaccel.recipes import report
from pyaccel.recipes.pruning_plan import planned_saving
from pyaccel.training import accuracy, load_checkpoint
from pyaccel.training.log import TIME_COLUMNS

TINY = ["--width", "0.1", "--epochs", "3", "--last_epoch", "1", "--seeds", "[0]", "--comparators", "[one_shot]"]


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize("epochs, macs_half, macs_eight, filters_eight, filters_first_half", [
    (60, 43.3, 58.0, 41.3, 41.9), (90, 42.8, 58.2, 40.9, 40.5), (100, 42.6, 58.3, 40.8, 40.2), (160, 42.2, 58.4, 40.5,
                                                                                                39.2),
    (200, 42.1, 58.4, 40.4, 38.9),
])  # fmt: skip
def test_the_specification_s_table_of_schedules(epochs, macs_half, macs_eight, filters_eight, filters_first_half):
    def percent(count, rate, ramp=1.0):
        return round(100 * planned_saving("vgg16", (3, 32, 32), epochs=epochs, rate=rate, ramp=ramp)[count], 1)

    assert percent("macs", 0.5) == macs_half and percent("macs", 0.8) == macs_eight
    assert percent("filters", 0.8) == filters_eight and percent("filters", 0.5, 0.5) == filters_first_half


def test_accesses_fall_with_products():
    found = planned_saving("vgg16", (3, 32, 32), epochs=100, rate=0.5)
    assert (round(100 * found["macs"], 1), round(100 * found["accesses"], 1)) == (42.6, 42.5)


def test_schedule():
    config = recipe.Config(epochs=10, first_epoch=2, last_epoch=5)
    assert [recipe.removed_share(e, config) for e in range(10)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    config = replace(config, interval=2)  # at the ends of 2 and 4, and of the last one
    assert [recipe.removed_share(e, config) for e in range(10)] == [0, 0, 0.25, 0.25, 0.75, 1, 1, 1, 1, 1]
    assert recipe.last_epoch(recipe.Config(epochs=160)) == 128


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    out = tmp_path_factory.mktemp("prune") / "run"
    assert main(["run", "prune_while_training", "--preset", "smoke", *TINY, "--out", str(out)]) == 0
    return out


def test_the_report_holds_every_kind_and_no_published_figure(smoke):
    found = report.read(smoke)
    assert {file.name for file in smoke.iterdir()} == {
        "config.yaml", "report.json", "report.md", "accuracy.png", "widths.png", "dense", "l1", "activation",
        "random", "one_shot",
    }  # fmt: skip
    assert {r.published for r in found.results} == {None} and {r.n for r in found.results} == {1}
    text = (smoke / "report.md").read_text()
    assert "one reading of the paper's single figure of 41 %" in text and "are this library's definitions" in text


def test_the_filters_that_the_schedule_asks_for_are_gone(smoke):
    """n(e) = round(O p share), of 6, 13 and 13 filters; accounting as the rows of the epochs add up."""
    found = rows(smoke / "l1/rate-0.5/seed-0")
    assert [int(row["filters"]) for row in found] == [32, 24, 17]
    dense = rows(smoke / "dense/seed-0")
    assert {row["filters"] for row in dense} == {"32"} and [row["macs"] for row in found][0] == dense[0]["macs"]
    spent = sum(float(row["macs"]) for row in found) / sum(float(row["macs"]) for row in dense)
    both = report.read(smoke)
    assert both["l1/0.5/compute_macs"].value == pytest.approx(spent)
    final = float(found[-1]["macs"])
    saved = 1 - sum(float(row["macs"]) for row in found) / (sum(float(row["macs"]) for row in dense) + 2 * final)
    assert both["l1/0.5/saved_macs"].value == pytest.approx(100 * saved)


def test_before_the_first_pruning_all_kinds_are_the_dense_network(smoke):
    first = {kind: rows(smoke / part)[0] for kind, part in (("dense", "dense/seed-0"), ("l1", "l1/rate-0.5/seed-0"),
                                                            ("activation", "activation/rate-0.5/seed-0"))}  # fmt: skip
    assert first["dense"] == first["l1"] == first["activation"]
    assert rows(smoke / "dense/seed-0")[2] != rows(smoke / "l1/rate-0.5/seed-0")[2]


def test_masks_follow_the_same_path(smoke, tmp_path):
    arguments = [
        "run",
        "prune_while_training",
        "--preset",
        "smoke",
        *TINY,
        "--criteria",
        "[random]",
        "--comparators",
        "[]",
    ]
    assert main([*arguments, "--mode", "mask", "--out", str(tmp_path)]) == 0
    masked, shrunk = (rows(folder / "random/rate-0.5/seed-0") for folder in (tmp_path, smoke))
    for mine, theirs in zip(masked, shrunk, strict=True):
        assert (mine["filters"], mine["macs"], mine["accesses"]) == (
            theirs["filters"],
            theirs["macs"],
            theirs["accesses"],
        )
        assert float(mine["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-3)
    tensors = load_checkpoint(tmp_path / "random/rate-0.5/seed-0/checkpoints").tensors
    assert len(tensors["0.weight"]) == 6 and int((tensors["0.weight"].flatten(1).abs().sum(1) == 0).sum()) == 3


def test_killed_after_a_pruning_and_run_again_is_undisturbed(smoke, tmp_path, monkeypatch):
    """The network has changed: the resumed one takes its sizes from the checkpoint, and ends on the same bits."""
    arguments = [
        "run",
        "prune_while_training",
        "--preset",
        "smoke",
        *TINY,
        "--criteria",
        "[activation]",
        "--out",
        str(tmp_path),
    ]
    whole = recipe.Pruner.after_epoch

    def killed(self, trainer, row, shape):
        whole(self, trainer, row, shape)
        if self.rate and trainer.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recipe.Pruner, "after_epoch", killed)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 143
    monkeypatch.setattr(recipe.Pruner, "after_epoch", whole)
    saved = load_checkpoint(tmp_path / "activation/rate-0.5/seed-0/checkpoints").tensors["0.weight"]
    assert len(saved) == 4  # of 6 filters: round(6 * 0.5 * 0.5) are gone, half of what will go
    assert main(arguments) == 0
    for part in ("activation/rate-0.5/seed-0", "one_shot/rate-0.5/seed-0"):
        assert rows(tmp_path / part) == rows(smoke / part), part
        mine, theirs = (load_checkpoint(folder / part / "checkpoints") for folder in (tmp_path, smoke))
        assert all(torch.equal(value, theirs.tensors[name]) for name, value in mine.tensors.items())
    events = [
        json.loads(line)["event"]
        for line in (tmp_path / "activation/rate-0.5/seed-0/log.jsonl").read_text().splitlines()
    ]
    assert events.count("start") == 1 and "resume" in events
    assert main(arguments) == 0  # nothing is trained twice
    first, again = report.read(smoke), report.read(tmp_path)
    assert again.results and all(first[r.name] == r for r in again.results if "time" not in r.name)


def test_wrong_fields_are_named(tmp_path, capsys):
    for flags, message in (
        (["--rates", "[0.0,0.5]"], "dense training is always part"),
        (["--mode", "cut"], "mode must be shrink or mask"),
        (["--criteria", "[l2]"], "criteria: expected some of l1, activation, random, got l2"),
        (["--last_epoch", "99"], "0 <= first <= last < epochs"),
        (["--model", "mlp"], "no convolution left to prune"),
    ):
        assert main(["run", "prune_while_training", "--preset", "smoke", *flags, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_less_than_a_point_is_lost_at_eighty_percent():
    """The specification's gate with its network on 8x8 digits: convolutions 32-32-64-64, SGD 0.05, 14 epochs, 2 seeds."""
    pytest.importorskip("sklearn")
    from pyaccel.data import Batches, open_images

    train, test = open_images("digits8", "train"), open_images("digits8", "test")

    def accuracy_after(rate: float, seed: int) -> float:
        torch.manual_seed(seed)
        parts, channels = [], 1
        for width in (32, 32, 64, 64):
            parts += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            parts += [nn.MaxPool2d(2)] if len(parts) in (6, 13) else []
            channels = width
        model: nn.Module = nn.Sequential(*parts, nn.Flatten(), nn.Linear(256, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        config = recipe.Config(epochs=14, last_epoch=8)
        widths = {name: len(gone) for name, gone in surgery.pruned_filters(model).items()}
        for epoch in range(14):
            if epoch == 12:
                optimizer.param_groups[0]["lr"] *= 0.1
            for batch in Batches(train, 64, seed=seed, shuffle=True, drop_last=True).epoch(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
                optimizer.step()
            share = rate * recipe.removed_share(epoch, config)
            model, optimizer = surgery.prune_filters(model, share, "l1", widths=widths, optimizer=optimizer)
            model, optimizer = surgery.shrink(model, optimizer)
        if rate:
            assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [6, 6, 13, 13]
            assert sum(p.numel() for p in model.parameters()) < 0.05 * 67_946
        else:
            assert sum(p.numel() for p in model.parameters()) == 67_946
        return accuracy(model, Batches(test, 360, shuffle=False, drop_last=False))["accuracy"]

    losses = [accuracy_after(0.0, seed) - accuracy_after(0.8, seed) for seed in (0, 1)]
    assert sum(losses) / 2 < 0.01, losses
