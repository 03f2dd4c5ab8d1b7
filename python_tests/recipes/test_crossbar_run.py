"""The smoke preset of `crossbar` from the command line to the report, undisturbed and stopped."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from pyaccel.cli import main
from pyaccel.recipes import crossbar, report
from pyaccel.recipes.crossbar_measure import Cells

ARGUMENTS = ["run", "crossbar", "--preset", "smoke", "--networks", "[plain,pixel]", "--seeds", "[0]",
             "--attack_images", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    out = tmp_path_factory.mktemp("crossbar") / "run"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_the_folder_holds_what_a_run_promises(done):
    pytest.importorskip("matplotlib")
    assert {file.name for file in done.iterdir()} == {
        "config.yaml", "report.json", "report.md", "attacks.png", "map.png", "calibrations.png", "figures", "plain",
    }  # fmt: skip
    found = report.read(done)
    assert (found.recipe, found.preset) == ("crossbar", "smoke")
    assert {r.published for r in found.results} == {None} and all(r.published_source for r in found.results)


def test_every_figure_of_a_chip_names_tile_resistance_and_calibration(done):
    chips = [r for r in report.read(done).results if not r.name.startswith("study/") and "/software/" not in r.name]
    assert len(chips) > 100
    for result in chips:
        _, tile, resistance, calibration, *_ = result.name.split("/")
        assert tile in ("16x16", "64x64") and resistance == "20k" and calibration == "layer_gain"
        assert result.n == 2  # chips
    study = [r.name for r in report.read(done).results if r.name.startswith("study/") and r.name.endswith("/accuracy")]
    assert [name.split("/")[-2] for name in study[1:]] == ["none", "layer_gain", "column_gain", "bn_reestimate"]


def test_full_knowledge_of_a_chip_is_the_stronger_attack(done):
    """What tells a gradient that does not fit from robustness; the tendencies of the paper's abstract are reported."""
    found = report.read(done)
    gained = {
        mode: sum(
            found[f"plain/64x64/20k/layer_gain/{mode}/{a}/minus_SW"].value for a in ("fgsm-0.1", "fgsm-0.2", "pgd-16")
        )
        for mode in ("SH", "HH", "HX")
    }
    assert gained["HH"] < gained["SH"] and gained["HH"] < gained["HX"]


def test_losses_are_differences_of_what_stands_beside_them(done):
    found = report.read(done)
    for setup in ("64x64/20k/layer_gain", "16x16/20k/layer_gain"):
        for mode in ("SH", "HH"):
            names = [f"plain/{setup}/{mode}/pgd-16/{what}" for what in ("accuracy", "loss")]
            assert found[f"plain/{setup}/clean"].value - found[names[0]].value == pytest.approx(found[names[1]].value)


def test_without_giving_the_gain_back_a_network_is_lost(done):
    found = report.read(done)
    assert found["study/64x64/20k/none/accuracy"].value < found["study/64x64/20k/layer_gain/accuracy"].value - 20
    assert found["study/64x64/20k/none/slope"].value < 0.5


def test_the_report_says_what_it_measured(done, capsys):
    text = (done / "report.md").read_text()
    for words in ("## Controls: robustness or a gradient that does not fit", "## Robustness map", "## Calibrations",
                  "## Defences, alone and on chips", "differential mapping, rows by channel",
                  "a transfer effect, not robustness", "nothing stands beside its figures"):  # fmt: skip
        assert words in text, words
    assert main(["report", str(done)]) == 0
    assert capsys.readouterr().out == text


def test_stopped_while_measuring_it_goes_on_with_what_is_missing(done, tmp_path, monkeypatch):
    """A run stopped while measuring has trained, and has some of the figures: nothing of it is made twice."""
    folder, made, get = tmp_path / "run", [], Cells.get
    shutil.copytree(done, folder)
    files = sorted((folder / "figures").rglob("*.json"))
    (folder / "report.json").unlink()
    for file in files[1::3]:
        file.unlink()
    monkeypatch.setattr(
        Cells, "get", lambda self, name, measure: get(self, name, lambda: (measure(), made.append(name))[0])
    )
    with monkeypatch.context() as stopping:
        stopping.setattr(Cells, "get", stopped_after(Cells.get, 20))
        with pytest.raises(KeyboardInterrupt):
            crossbar.run(config_of(done), out=folder)
    assert len(made) == 20 and not (folder / "report.json").exists()
    again = crossbar.run(config_of(done), out=folder)
    assert len(made) == len(files[1::3]) and sorted((folder / "figures").rglob("*.json")) == files
    assert again.results == report.read(done).results
    events = [json.loads(line)["event"] for line in (folder / "plain/seed-0/log.jsonl").read_text().splitlines()]
    assert events.count("metrics") == config_of(done).epochs  # nothing was trained again


def stopped_after(get, count):
    """`Cells.get` that is interrupted before it measures figure number `count`."""
    left = [count]

    def stopping(self, name, measure):
        def one():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return measure()

        return get(self, name, one)

    return stopping


def config_of(folder):
    from pyaccel.recipes.folder import read_config

    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in read_config(folder).items()}
    return crossbar.Config(**fields)


def test_more_chips_tiles_and_attacks_fit_the_same_folder(done, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    made, get = [], Cells.get
    monkeypatch.setattr(Cells, "get", lambda self, n, m: get(self, n, lambda: made.append(n) or m()))
    assert (
        main(
            [
                *ARGUMENTS,
                "--networks",
                "[plain]",
                "--fgsm_eps",
                "[0.1,0.2,0.05]",
                "--pgd_eps",
                "[16]",
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    assert made and all("fgsm-0.05" in name for name in made)
    assert main([*ARGUMENTS, "--variation", "0.2", "--out", str(folder)]) == 2  # a fact of every figure


def test_desk_preset_on_the_layout_of_cifar10(tmp_path):
    pytest.importorskip("jsonargparse")
    data = tmp_path / "cifar"
    data.mkdir()
    noise = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = noise.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(data / name)
    arguments = ["run", "crossbar", "--preset", "desk", "--data", str(data), "--width", "0.03", "--train_images", "64",
                 "--epochs", "1", "--batch_size", "32", "--chips", "1", "--tiles", "[16]", "--r_min", "[2e4]",
                 "--networks", "[adversarial,plain]", "--fgsm_eps", "[0.1]", "--pgd_eps", "[8]", "--study_tiles",
                 "[128]", "--calibrations", "[bn_reestimate]", "--seeds", "[0]",
                 "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(arguments) == 0
    found = report.read(tmp_path / "run")
    assert {r.published for r in found.results} == {None}
    assert found["adversarial/64x64/20k/bn_reestimate/HH/pgd-8/accuracy"].n == 1
    assert "One seed: deviations are over chips alone." in (tmp_path / "run/report.md").read_text()
