"""The recipe `source_free`: domains, the smoke preset from the command line to the report, its diagnostics,
resumption."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyaccel import models
from pyaccel.cli import main
from pyaccel.data import Batches, digits8
from pyaccel.recipes import domains, report, source_free
from pyaccel.training.log import TIME_COLUMNS

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")
PAIR = domains.SHIFTED
ARGUMENTS = [
    "run",
    "source_free",
    "--preset",
    "smoke",
    "--seeds",
    "[0]",
    "--steps",
    "80",
    "--watch_steps",
    "40",
    "--epochs",
    "5",
]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("source_free") / "run"
    assert main([*ARGUMENTS, "--variants", "[full,naive]", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def sources():
    """Source classifiers on the packaged digits, by seed, and the shifted target."""
    made = {}

    def make(seed, tmp):
        if seed not in made:
            config = source_free.preset("smoke")
            source, target = source_free.open_domains(config, PAIR)
            torch.manual_seed(seed)
            net = source_free.source_net(config, source.train)
            source_free.train_source(config, net, source, PAIR, seed, torch.device("cpu"), tmp / str(seed), "auto")
            made[seed] = config, net, target
        return made[seed]

    return make


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


def test_the_shift_is_deterministic_and_parts_are_disjoint():
    source, target = domains.shifted_digits()
    again = domains.shifted_digits()[1]
    assert (len(source.train) + len(source.test), len(target.train)) == (900, 897) and target.train is target.test
    assert torch.equal(target.train.images, again.train.images)
    pixels = {tuple(image.flatten().tolist()) for part in (source.train, source.test) for image in part.images}
    total = sum(len(digits8(part)) for part in ("train", "test"))
    assert len(pixels) > 890 and total == 1797
    # Contrast 0.7 and noise: nothing white is left, and black is no longer black.
    assert source.train.images.max() == 255 and float(target.train.images.float().mean()) < float(
        source.train.images.float().mean()
    )
    assert float((target.train.images == 0).float().mean()) < float((source.train.images == 0).float().mean())


def test_domains_of_one_size_and_channels(tmp_path, image_tree, idx_folder):
    idx_folder(tmp_path / "mnist", 28)
    idx_folder(tmp_path / "usps", 16)
    source, target = domains.open_pair(tmp_path, "mnist->usps", 20, whole_target=True)
    assert source.train.shape == source.test.shape == target.train.shape == (1, 20, 20)
    assert len(target.train) == 40 and target.train is target.test and len(source.train) == len(source.test) == 20
    apart = domains.open_pair(tmp_path, "mnist->usps", 20, whole_target=False)[1]
    assert len(apart.train) == len(apart.test) == 20
    flat = domains._same(
        domains.ImageSet(torch.full((1, 1, 16, 16), 77, dtype=torch.uint8), torch.tensor([0]), "a", "flat"), 9, 3
    )
    assert flat.shape == (3, 9, 9) and flat.images.unique().tolist() == [77]


def test_folders_with_images_inside_with_parts_and_without(tmp_path, image_tree):
    image_tree(tmp_path / "amazon/images", {f"{c}/{i}.png": (30, 40) for c in "ab" for i in range(10)})  # Office-31
    image_tree(tmp_path / "Art", {f"{c}/{i}.png": (30, 40) for c in "ab" for i in range(3)})  # Office-Home
    image_tree(
        tmp_path / "photo", {f"{p}/{c}/{i}.png": (30, 40) for p in ("train", "test") for c in "ab" for i in range(2)}
    )
    source, target = domains.open_pair(tmp_path, "amazon->Art", 12, whole_target=True)
    assert (len(source.train), len(source.test), len(target.train)) == (18, 2, 6) and target.test is target.train
    assert not set(source.train.files) & set(source.test.files) and source.train.shape == (3, 12, 12)
    pooled = domains.open_pair(tmp_path, "Art->photo", 12, whole_target=True)[1]
    assert len(pooled.train) == 8 and len(set(pooled.train.files)) == 8
    held = domains.in_memory(pooled)
    assert held.train is held.test and torch.equal(held.train.images[5], pooled.train[5][0])
    with pytest.raises(ValueError, match=r"expected source->target, two folders in the data folder, got 'Art'"):
        domains.open_pair(tmp_path, "Art", 12, whole_target=True)
    with pytest.raises(FileNotFoundError, match=r"webcam: no such folder; found Art, amazon, photo"):
        domains.open_pair(tmp_path, "amazon->webcam", 12, whole_target=True)
    image_tree(tmp_path / "Clipart", {f"{c}/{i}.png": (30, 40) for c in "abc" for i in range(3)})
    with pytest.raises(ValueError, match="2 and 3 classes; adaptation needs the same ones"):
        domains.open_pair(tmp_path, "Art->Clipart", 12, whole_target=True)


@pytest.fixture
def idx_folder():
    def make(folder, side, n=20):
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(side).integers(0, 256, (n, side, side), dtype=np.uint8)
        for prefix in ("train", "t10k"):
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
                b"\0\0\x08\x03" + np.array([n, side, side], ">u4").tobytes() + pixels.tobytes()
            )
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
                b"\0\0\x08\x01" + np.array([n], ">u4").tobytes() + (np.arange(n) % 10).astype(np.uint8).tobytes()
            )

    return make


@pytest.fixture
def image_tree():
    Image = pytest.importorskip("PIL.Image")

    def make(root, sizes):
        for number, (name, (height, width)) in enumerate(sizes.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), (number, 2 * number, 255 - number)).save(path)
        return root

    return make


def test_rounds_are_the_epochs_in_turn():
    batches = Batches(digits8("test"), 100, seed=1, shuffle=True, drop_last=True)
    expected = [b.sample_ids for epoch in range(4) for b in batches.epoch(epoch)][:10]
    rounds = source_free.Rounds(batches, 5)
    found = [b.sample_ids for number in range(2) for b in rounds.epoch(number)]
    assert (
        len(batches) == 3 and len(rounds) == 5 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    )
    assert torch.equal(next(iter(rounds.epoch(1, 3))).sample_ids, expected[8])


@pytest.mark.parametrize("seed", range(3))
def test_what_the_method_builds_on_holds(seed, sources, tmp_path_factory):
    """Before any adaptation: entropy sorts by accuracy, prototypes beat the argmax, kept labels beat dropped ones."""
    config, net, target = sources(seed, tmp_path_factory.mktemp("source"))
    found = source_free.diagnose(
        net, source_free.test_batches(config, target.train), target.train.labels, 100, torch.device("cpu")
    )
    quartiles = [found[f"quartile_{i}"] for i in range(1, 5)]
    assert quartiles == sorted(quartiles, reverse=True) and len(set(quartiles)) == 4
    assert found["prototypes"] > found["argmax"] == pytest.approx(sum(quartiles) / 4, abs=0.01)
    assert found["accuracy_kept"] > found["accuracy_dropped"] + 0.2
    assert 0 < found["kept"] < 1 and 1 <= found["fewest"] <= found["most"] <= 100 and 0 < found["eta"] <= 1


@pytest.mark.slow
def test_adapted_beats_source_only_and_naive_over_seeds(sources, tmp_path):
    """The robust signs of the specification's small test: the full method gains, its own argmax alone does not."""
    gains, naive = [], []
    for seed in range(3):
        config, net, target = sources(seed, tmp_path)
        before = source_free.score(config, net, target.test, torch.device("cpu"))
        for variant, gathered in (("full", gains), ("naive", naive)):
            model, _ = source_free.train_target(
                config, net, target, PAIR, variant, seed, torch.device("cpu"), tmp_path / f"{seed}-{variant}", "auto"
            )
            gathered.append(source_free.score(config, model, target.test, torch.device("cpu")) - before)
    assert sum(gains) / 3 > 0.02, gains
    assert sum(naive) / 3 < sum(gains) / 3 - 0.1, (gains, naive)


def test_the_report(smoke, capsys):
    found = report.read(smoke)
    assert {"adaptation.png", "entropy.png", "report.md", "report.json", "config.yaml"} <= {
        f.name for f in smoke.iterdir()
    }
    for variant in ("full", "naive"):
        final = found[f"{PAIR}/{variant}/accuracy"].value
        assert final == found[f"{PAIR}/{variant}/after/80"].value  # the last step, every target image
        assert final <= found[f"{PAIR}/{variant}/best_on_target_labels"].value
        assert found[f"{PAIR}/{variant}/gain"].value == pytest.approx(final - found[f"{PAIR}/source_only"].value)
    assert found[f"{PAIR}/naive/kept"].value == 1 > found[f"{PAIR}/full/kept"].value
    assert {r.published for r in found.results} == {None}
    text = (smoke / "report.md").read_text()
    assert "nothing is selected on target labels" in text and "own argmax, no prototypes, no filter" in text
    assert main(["report", str(smoke)]) == 0
    assert capsys.readouterr().out == text


def test_killed_and_resumed_is_undisturbed(smoke, tmp_path, monkeypatch):
    """Stopped in the middle of a round, between two choices of prototypes: the memory travels in the checkpoint."""
    arguments = [*ARGUMENTS, "--variants", "[full]", "--out", str(tmp_path)]
    original, stops = source_free.TwoHeads.set_step, [63]

    def stopping(self, step):
        if stops and step == stops[0]:
            import os
            import signal

            stops.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, step)

    monkeypatch.setattr(source_free.TwoHeads, "set_step", stopping)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 143 and not (tmp_path / "report.json").exists()
    assert main(arguments) == 0
    part = "digits8-to-shifted/seed-0"
    log = (tmp_path / part / "full/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in log].count("resume") == 1
    for name in ("source", "full"):
        assert rows(tmp_path / part / name) == rows(smoke / part / name)
    theirs = {r.name: r.value for r in report.read(smoke).results if not r.name.endswith("training_time")}
    mine = {r.name: r.value for r in report.read(tmp_path).results if not r.name.endswith("training_time")}
    assert mine == {name: theirs[name] for name in mine}


def test_accuracy_per_class():
    config = replace(source_free.preset("smoke"), per_class=True)
    source, _ = source_free.open_domains(config, PAIR)
    images = domains.ImageSet(source.test.images[:8], torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]), "0123456789", "x")

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]

    assert source_free.score(config, Always(), images, torch.device("cpu")) == pytest.approx(1 / 3)
    assert source_free.score(replace(config, per_class=False), Always(), images, torch.device("cpu")) == pytest.approx(
        6 / 8
    )


def test_presets_follow_the_folders(tmp_path):
    paper = source_free.preset("paper")
    assert (paper.steps, paper.adapt_lr, paper.feature_share, paper.refresh, paper.capacity, paper.adapt_batch) == (
        5000,
        1e-3,
        0.1,
        100,
        100,
        32,
    )
    assert len(paper.pairs) == 6 and (paper.size, paper.crop, paper.memory, paper.whole_target) == (
        256,
        224,
        "train",
        True,
    )
    for names, pairs, model in (
        (("Art", "Clipart", "Real World"), 12, "resnet50"),
        (("train", "validation"), 1, "resnet101"),
    ):
        home = tmp_path / names[-1]
        for name in names:
            (home / name).mkdir(parents=True)
        found = source_free.preset("paper", str(home))
        assert (len(found.pairs), found.model) == (pairs, model)
    assert found.per_class and "Art->Real World" in source_free.preset("paper", str(tmp_path / "Real World")).pairs


def test_the_paper_s_network_on_folders_with_weights_from_a_file(tmp_path, image_tree):
    """Office-31's layout, one step: ImageNet weights arrive in the features, windows of the given size are cut."""
    for domain in ("amazon", "webcam"):
        image_tree(tmp_path / domain / "images", {f"{c}/{i}.png": (80, 90) for c in "ab" for i in range(5)})
    donor = models.build("resnet18", classes=1000, input_shape=(3, 72, 72), width=0.1)
    from pyaccel.models.torchvision_layout import _names

    state = donor.state_dict()
    theirs = {name: state[ours] + (0.5 if name == "conv1.weight" else 0) for ours, name in _names(donor).items()}
    save_file(
        {k: v.clone() for k, v in theirs.items()}
        | {"fc.weight": donor.readout.weight.detach(), "fc.bias": donor.readout.bias.detach()},
        tmp_path / "imagenet.safetensors",
    )
    config = replace(
        source_free.preset("paper", str(tmp_path)), model="resnet18", width=0.1, pairs=("amazon->webcam",),
        weights=str(tmp_path / "imagenet.safetensors"),
        size=80, crop=72, epochs=1, steps=2, watch_steps=2, batch_size=4, adapt_batch=4,
    )  # fmt: skip
    net = source_free.source_net(config, source_free.open_domains(config, "amazon->webcam")[0].train)
    assert torch.equal(net.features[0].weight, theirs["conv1.weight"])
    assert sum(p.numel() for p in net.head.parameters()) == net.values * 256 + 256 + 256 * 2 + 2 and net.values == 51
    found = source_free.run(config, out=tmp_path / "run")
    assert found["amazon->webcam/full/accuracy"].n == 1 and found["amazon->webcam/full/accuracy"].published is None


def test_bad_fields_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    config = source_free.preset("smoke")
    for change, message in [
        ({"variants": ("full", "best")}, "variants: expected some of full, no_filter, no_source, naive, got best"),
        ({"memory": "fresh"}, "memory: expected some of train, clean, got fresh"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"adapt_lr": 0.0}, "adapt_lr must be positive"),
        ({"pairs": ("mnist->usps",)}, "adapts mnist->usps and was given no data: name the folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            source_free.run(replace(config, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
