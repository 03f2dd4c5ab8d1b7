"""The smoke preset of `sram_noise` from command line to report: whole, stopped in its search, with given weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pyaccel.cli import main
from pyaccel.recipes import report, sram_noise
from pyaccel.recipes.sram_noise_bench import Bench
from pyaccel.training.weights import save_weights

SEEDS = "[0,1]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    out = tmp_path_factory.mktemp("sram_noise") / "run"
    assert main(["run", "sram_noise", "--preset", "smoke", "--seeds", SEEDS, "--out", str(out)]) == 0
    return out


def lines(file):
    return [json.loads(line)[0] for line in file.read_text().splitlines()]


def figures(folder):
    return report.read(folder).results


def test_the_folder_holds_what_a_run_promises(folder):
    pytest.importorskip("matplotlib")
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml", "report.json", "report.md", "gains.png", "epsilon.png", "bit_errors.png", "vgg5",
    }  # fmt: skip
    text = (folder / "report.md").read_text()
    for title in ("Does the gain survive averaging over noise?", "vgg5: accuracy against epsilon", "vgg5: chosen sites",
                  "Ablations", "vgg5: attack on parameters", "Accuracy against bit error rate",
                  "How it was measured"):  # fmt: skip
        assert f"## {title}" in text
    for name in ("gains.png", "epsilon.png", "bit_errors.png"):
        assert f"]({name})" in text and (folder / name).read_bytes()[:4] == b"\x89PNG"
    found = report.read(folder)
    assert found["vgg5/none/clean"].n == 2 and {r.published for r in found.results} == {None}
    screened = [r for r in found.results if r.name.startswith("vgg5/screen/") and r.name.endswith("/gain")]
    assert len(screened) == 9 * 2  # five weights and four outputs, two settings


def test_the_network_learned_and_attacks_hurt(folder):
    found = report.read(folder)
    assert found["vgg5/none/clean"].value > 90
    assert abs(found["vgg5/none/clean"].value - found["vgg5/unquantised/clean"].value) < 2
    falling = [found[f"vgg5/none/fgsm/A/{eps:.4f}/accuracy"].value for eps in sram_noise.SMOKE.epsilons]
    assert found["vgg5/none/clean"].value > falling[0] > falling[1] > falling[2]
    key = "vgg5/parameters/n8t=1"
    assert found[f"{key}/none/drop"].value == 0 and found[f"{key}/surgical/rounds=1/drop"].value > 60
    # As many flips, aimed and not aimed.
    assert found[f"{key}/surgical/budget=20/drop"].value > found[f"{key}/random/budget=20/drop"].value + 20
    sweep = [found[f"vgg5/sweep/weight/n8t=1/p={p:g}/accuracy"].value for p in (1e-3, 1e-2, 1e-1)]
    assert sweep[0] > sweep[2] + 20


def test_stopped_in_its_search_and_run_again_is_undisturbed(folder, tmp_path, monkeypatch):
    config = replace(sram_noise.preset("smoke"), seeds=(0,))
    whole, left = Bench.fgsm, [9]

    def fgsm(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Bench, "fgsm", fgsm)
    with pytest.raises(KeyboardInterrupt):
        sram_noise.run(config, out=tmp_path)
    monkeypatch.undo()
    cells = tmp_path / "vgg5/seed-0/cells.jsonl"
    before = lines(cells)
    assert 1 <= len(before) < 9 and not (tmp_path / "report.json").exists()
    with open(cells, "a") as file:
        file.write('["half a ce')
    sram_noise.run(config, out=tmp_path)
    after = lines(cells)
    assert after[: len(before)] == before and len(set(after)) == len(after)  # nothing was measured twice
    assert set(after) == set(lines(folder / "vgg5/seed-0/cells.jsonl"))

    def forbidden(*_):
        raise AssertionError("measured again")

    for name in ("fgsm", "pgd", "accuracy"):
        monkeypatch.setattr(Bench, name, forbidden)
    assert sram_noise.run(config, out=folder).results == figures(tmp_path)  # from the cells of the undisturbed run


def test_given_weights_are_not_trained(folder, tmp_path):
    from pyaccel.recipes.classifier import open_data, split

    config = replace(sram_noise.preset("smoke"), seeds=(0,), n8t=(4,), repeats=1, test_repeats=1, progressive_rounds=0)
    images = split(open_data(config, "sram_noise")[0], config.selection_images)[0]
    model = sram_noise.build(config, 0, images, 5)
    save_weights(model, tmp_path / "weights.safetensors")
    given = replace(config, weights=(str(tmp_path / "weights.safetensors"),))
    found = sram_noise.run(given, out=tmp_path / "run")
    assert not (tmp_path / "run/vgg5/seed-0/checkpoints").exists()
    with torch.no_grad():
        assert found["vgg5/unquantised/clean"].value < 50  # the weights that were given: never trained
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        sram_noise.run(replace(config, weights=("nowhere",)), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_measurements_may_change_in_a_folder_training_may_not(folder, capsys):
    arguments = ["run", "sram_noise", "--preset", "smoke", "--seeds", "[0]", "--out", str(folder)]
    assert main([*arguments, "--lr", "0.2"]) == 2
    assert "another configuration (lr was 0.1, is now 0.2)" in capsys.readouterr().err
    assert main([*arguments, "--tolerance", "1"]) == 0
    assert report.read(folder).config["tolerance"] == 1


@pytest.mark.slow
def test_processes_share_the_images_and_change_no_figure(tmp_path, run_python):
    """Two processes measure given weights as one does: draws belong to images, wherever they are computed."""
    pytest.importorskip("sklearn")
    script = f"""
import sys
from dataclasses import replace
import torch, torch.distributed as dist, torch.multiprocessing as mp
from pyaccel.recipes import sram_noise
from pyaccel.recipes.classifier import open_data
from pyaccel.training.weights import save_weights

FOLDER = {str(tmp_path)!r}
CONFIG = replace(
    sram_noise.preset("smoke"), seeds=(0,), epochs=2, n8t=(1,), repeats=2, test_repeats=1, progressive_rounds=1,
    weights=(FOLDER + "/weights.safetensors",), selection_images=600,
)

def worker(rank, world, out):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(FOLDER + "/store", world), rank=rank, world_size=world)
    sram_noise.run(CONFIG, out=FOLDER + "/" + out)
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    images = open_data(CONFIG, "sram_noise")[0]
    model = sram_noise.build(CONFIG, 0, images, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pixels, labels = images.batch(torch.arange(256))
    for _ in range(15):  # enough that gradients are not noise
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels / 255), labels).backward()
        optimizer.step()
    save_weights(model.eval(), CONFIG.weights[0])
    worker(0, 1, "one")
    mp.spawn(worker, (2, "two"), nprocs=2)
"""
    file = tmp_path / "two.py"
    file.write_text(script)
    done = run_python(f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')")
    assert done.returncode == 0, done.stderr
    one, two = (report.read(tmp_path / out).results for out in ("one", "two"))
    assert [r.name for r in one] == [r.name for r in two]
    for ours, theirs in zip(one, two, strict=True):
        # 600 and 360 images: sums in another order may move one or two of them
        assert theirs.value == pytest.approx(ours.value, abs=0.6), ours.name
    cells = [set(lines(tmp_path / out / "vgg5/seed-0/cells.jsonl")) for out in ("one", "two")]
    assert len(lines(tmp_path / "two/vgg5/seed-0/cells.jsonl")) == len(cells[1]) > 20
