"""The smoke preset from the command line to the report, undisturbed and killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyaccel
from pyaccel.cli import main
from pyaccel.recipes import bntt, report
from pyaccel.recipes.folder import read_config
from pyaccel.training.log import TIME_COLUMNS



def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


def events(folder):
    return [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]


def figures(folder):
    """Everything a report says but for times."""
    return [result for result in report.read(folder).results if not result.name.endswith("/training_time")]


def test_the_folder_holds_what_a_run_promises(smoke):
    assert {file.name for file in smoke.iterdir()} == {
        "config.yaml", "report.json", "report.md", "training.png", "accuracy.png", "raster.png", "gains.png",
        *bntt.NORMS,
    }  # fmt: skip
    written = json.loads((smoke / "report.json").read_text())
    assert list(written) == ["recipe", "preset", "config", "environment", "results"]
    assert {tuple(result) for result in written["results"]} == {
        ("name", "value", "std", "n", "unit", "published", "published_source")
    }
    assert written["config"] == read_config(smoke)
    assert (written["recipe"], written["preset"]) == ("bntt", "smoke")
    assert {"torch", "processor", "threads", "kernels"} <= set(written["environment"])


def test_every_figure_is_over_three_seeds_and_none_is_the_paper_s(smoke):
    results = report.read(smoke).results
    assert {result.n for result in results} == {3} and {result.published for result in results} == {None}
    assert all(result.std is not None and result.std >= 0 and result.published_source for result in results)


def test_bntt_beats_no_normalisation(smoke):
    """The specification's statistical check. BNTT against one BatchNorm is within noise here: nothing to assert."""
    found = report.read(smoke)
    assert found["bntt/accuracy"].value > found["none/accuracy"].value
    assert found["bntt/accuracy"].value > 90


def test_accuracy_rises_over_steps_and_ends_at_what_training_saw(smoke):
    found = report.read(smoke)
    for norm in bntt.NORMS:
        first, last = (found[f"{norm}/accuracy_after_step_{t}"].value for t in (1, 10))
        assert first < last == found[f"{norm}/accuracy"].value
        # The trainer evaluates by `forward`, the report by `step_logits`.
        seen = [100 * float(rows(smoke / norm / f"seed-{seed}")[-1]["eval_accuracy"]) for seed in range(3)]
        assert last == pytest.approx(sum(seen) / 3, abs=1e-9)


def test_the_report_says_that_nothing_is_saved_when_gains_have_not_decayed(smoke):
    assert report.read(smoke)["bntt/exit_step"].value == 10
    text = (smoke / "report.md").read_text()
    assert "**The exit is at the last step: the gains have not decayed below 0.1, so nothing is saved.**" in text
    assert "REMEMBERED" in text  # the provenance of the energy constants


def test_the_command_line_prints_and_rebuilds_the_report(smoke, capsys):
    text = (smoke / "report.md").read_text()
    assert main(["report", str(smoke)]) == 0
    assert capsys.readouterr().out == text
    (smoke / "report.md").unlink()
    assert main(["report", str(smoke)]) == 0
    assert capsys.readouterr().out == text == (smoke / "report.md").read_text()


def test_killed_and_run_again_is_undisturbed_and_finished_networks_are_not_retrained(smoke, tmp_path):
    arguments = [
        "run",
        "bntt",
        "--preset",
        "smoke",
        "--norms",
        "[bntt,none]",
        "--seeds",
        "[0,1]",
        "--out",
        str(tmp_path),
    ]
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "pyaccel", *arguments], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with process:
        for line in process.stderr:
            if line.startswith("none, seed 0: epoch 2/"):
                process.send_signal(signal.SIGTERM)
                break
        assert process.wait(60) == 143
    assert not (tmp_path / "report.json").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert main(arguments) == 0

    assert events(tmp_path / "bntt/seed-0").count("start") == 1
    assert "resume" in events(tmp_path / "bntt/seed-0") and "resume" in events(tmp_path / "none/seed-0")
    assert events(tmp_path / "bntt/seed-0").count("metrics") == 4  # no epoch was trained twice
    for part in ("bntt/seed-0", "none/seed-0", "bntt/seed-1", "none/seed-1"):
        assert rows(tmp_path / part) == rows(smoke / part), part

    before = figures(tmp_path)
    assert main(arguments) == 0
    assert figures(tmp_path) == before
    # More seeds are welcome in the same folder, another learning rate is not.
    assert main([*arguments, "--seeds", "[0]"]) == 0
    assert report.read(tmp_path)["bntt/accuracy"].n == 1


def test_a_folder_with_another_configuration_is_refused(smoke, capsys):
    assert main(["run", "bntt", "--preset", "smoke", "--lr", "0.1", "--out", str(smoke)]) == 2
    assert "another configuration (lr was 0.3, is now 0.1); choose another --out" in capsys.readouterr().err
    assert main(["run", "bntt", "--preset", "smoke", "--resume", "never", "--out", str(smoke)]) == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_continues_from_another_run(smoke, tmp_path):
    arguments = ["run", "bntt", "--preset", "smoke", "--norms", "[shared]", "--seeds", "[0]"]
    assert main([*arguments, "--resume", str(smoke), "--out", str(tmp_path / "new")]) == 0
    assert "resume" in events(tmp_path / "new/shared/seed-0") and "start" not in events(tmp_path / "new/shared/seed-0")
    assert not (tmp_path / "new/gains.png").exists()
    text = (tmp_path / "new/report.md").read_text()
    assert "Early exit" not in text and "One seed: no spread is known" in text


def test_desk_preset_on_the_layout_of_cifar10(tmp_path):
    pytest.importorskip("jsonargparse")
    data = tmp_path / "cifar"
    data.mkdir()
    noise = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = noise.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(data / name)
    arguments = ["run", "bntt", "--data", str(data), "--steps", "3", "--width", "0.1", "--train_images", "64",
                 "--epochs", "1", "--batch_size", "32", "--amp", "bf16", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(arguments) == 0
    found = report.read(tmp_path / "run")
    assert (found.config["model"], found.config["crop_padding"], found.config["flip"]) == ("vgg9_bntt", 4, True)
    assert {r.published for r in found.results} == {None}
    assert (
        "not the published experiment: other preset, network, training, data set"
        in (tmp_path / "run/report.md").read_text()
    )
    assert len([r for r in found.results if r.name.startswith("bntt/rate/")]) == 8
