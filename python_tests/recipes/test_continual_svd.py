"""The recipe `continual_svd`: tasks, the smoke preset from the command line to the report, controls, resumption."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyaccel.cli import main
from pyaccel.data import ImageSet, digits8
from pyaccel.models import ContinualNet
from pyaccel.recipes import continual_svd, continual_tasks, report
from pyaccel.recipes.continual_svd_report import forgetting
from pyaccel.surgery import factorize
from pyaccel.training.log import TIME_COLUMNS

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")
ARGUMENTS = ["run", "continual_svd", "--preset", "smoke", "--seeds", "[1]", "--epochs", "3"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("continual") / "run"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def figures(folder):
    return [result for result in report.read(folder).results if not result.name.endswith("/training_time")]


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


def test_the_published_orders():
    """Of seed 1, as the released models list them; tasks counted from 1 there."""
    assert [k + 1 for k in continual_tasks.order(20, 1)] == [
        12,
        6,
        18,
        20,
        10,
        1,
        17,
        2,
        16,
        7,
        11,
        14,
        15,
        13,
        8,
        4,
        9,
        3,
        19,
        5,
    ]
    assert [continual_tasks.FIVE_SETS[k] for k in continual_tasks.order(5, 1)] == [
        "mnist",
        "svhn",
        "fashion_mnist",
        "cifar10",
        "notmnist",
    ]


def test_tasks_are_blocks_of_classes_relabelled():
    train, test = digits8("train"), digits8("test")
    tasks = continual_tasks.split_by_class(train, test, 5, None, None)
    assert [task.name for task in tasks] == [f"classes {k}-{k + 1}" for k in (0, 2, 4, 6, 8)]
    assert sum(len(task.train) for task in tasks) == len(train) and sum(len(task.test) for task in tasks) == len(test)
    for k, task in enumerate(tasks):
        assert task.classes == 2 and task.train.classes == (str(2 * k), str(2 * k + 1))
        expected = train.images[train.labels == 2 * k + 1]
        assert torch.equal(task.train.images[task.train.labels == 1], expected)
    with pytest.raises(ValueError, match="10 classes cannot be cut into 3 tasks"):
        continual_tasks.split_by_class(train, test, 3, None, None)
    with pytest.raises(ValueError, match="10 classes cannot be cut into 10 tasks of equally many, at least 2"):
        continual_tasks.split_by_class(train, test, 10, None, None)


def test_several_sets_are_padded_to_32_with_three_channels(tmp_path, idx_files):
    mnist, usps = idx_files(tmp_path / "mnist", 28), idx_files(tmp_path / "usps", 16)
    first, second = continual_tasks.several_sets(tmp_path, ("mnist", "usps"))
    assert first.train.shape == second.test.shape == (3, 32, 32)
    assert torch.equal(first.train.images[:, 2, 2:30, 2:30], mnist) and torch.equal(
        second.train.images[:, 0, 8:24, 8:24], usps
    )
    assert int(first.train.images.sum()) == 3 * int(mnist.sum())
    assert first.mean == (0.1,) * 3 and first.std == (0.2752,) * 3
    with pytest.raises(
        FileNotFoundError, match=r"svhn: no such folder; this protocol reads one folder a data set, mnist, svhn"
    ):
        continual_tasks.several_sets(tmp_path, ("mnist", "svhn"))
    with pytest.raises(ValueError, match="expected some of .*got imagenet"):
        continual_tasks.several_sets(tmp_path, ("imagenet",))


@pytest.fixture
def idx_files():
    def make(folder, side, n=12):
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(side).integers(0, 256, (n, side, side), dtype=np.uint8)
        for prefix in ("train", "t10k"):
            header = b"\0\0\x08\x03" + np.array([n, side, side], ">u4").tobytes()
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
            labels = (np.arange(n) % 10).astype(np.uint8)
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
                b"\0\0\x08\x01" + np.array([n], ">u4").tobytes() + labels.tobytes()
            )
        return torch.from_numpy(pixels)

    return make


def test_forgetting():
    assert forgetting([[0.9], [0.5, 0.8], [0.7, 0.6, 1.0]]) == pytest.approx((0.2 + 0.2) / 2)
    assert forgetting([[0.9]]) == 0


def test_nothing_is_forgotten_and_the_controls_forget(smoke):
    found = report.read(smoke)
    assert found["svd/largest_logit_change"].value == 0 and found["svd/forgetting"].value == 0
    assert found["decayed/largest_logit_change"].value > 0.1 and found["sequential/largest_logit_change"].value > 0.1
    for u in range(1, 6):
        column = {found[f"svd/after/{t}/{u}"].value for t in range(u, 6)}
        assert len(column) == 1
    assert found["svd/accuracy"].value > 90
    assert {r.published for r in found.results} == {None}
    assert found["svd/accuracy"].published_source.startswith("not the published experiment: other preset, model")


def test_ranks_sizes_and_compute_are_consistent(smoke):
    found, shapes = report.read(smoke), [(9, 16), (144, 32), (288, 32)]
    ranks = [[found[f"svd/rank/{t}/{layer + 1}"].value for layer in range(3)] for t in range(1, 6)]
    assert all(
        a <= b for first, second in zip(ranks, ranks[1:], strict=False) for a, b in zip(first, second, strict=True)
    )
    held = sum(r * (c + o + 1) for r, (c, o) in zip(ranks[-1], shapes, strict=True))
    heads = 5 * (128 * 2 + 2)
    assert found["svd/parameters/convolutions"].value == held and found["svd/parameters/readouts"].value == heads
    assert (
        found["svd/size"].value == pytest.approx(4e-6 * (held + heads)) and found["svd/parameters/prefixes"].value == 15
    )
    dense = sum(c * o for c, o in shapes)
    assert found["individual/size"].value == pytest.approx(4e-6 * (5 * dense + heads))
    assert found["individual_over_svd/size"].value == pytest.approx((5 * dense + heads) / (held + heads))
    pixels = (64, 64, 16)
    assert found["svd/macs/merged"].value == sum(p * c * o for p, (c, o) in zip(pixels, shapes, strict=True))
    assert all(0 < found[f"svd/frozen_penalty/{t}"].value < 100 for t in range(1, 6))
    two = sum(p * r * (c + o) for p, r, (c, o) in zip(pixels, ranks[-1], shapes, strict=True))
    assert found["svd/macs/two_convolutions"].value == two


def test_the_report_and_its_plots(smoke, capsys):
    names = {file.name for file in smoke.iterdir()}
    assert {
        "accuracy.png",
        "ranks.png",
        "matrix_svd.png",
        "matrix_sequential.png",
        "matrix_decayed.png",
        "report.md",
    } <= names
    text = (smoke / "report.md").read_text()
    assert "control: decay reaches the frozen factors" in text and "One seed: no spread is known" in text
    assert main(["report", str(smoke)]) == 0
    assert capsys.readouterr().out == text


def test_continues_where_it_was_and_trains_nothing_twice(smoke, tmp_path):
    """A run that has only its first two tasks, and half of the third, ends as the undisturbed one."""
    arguments = [*ARGUMENTS, "--methods", "[svd]", "--out", str(tmp_path)]
    stopped = {"svd/seed-1/task-3": 2}
    original = continual_svd.train_classifier

    def stopping(*positional, out, **named):
        part = str(out.relative_to(tmp_path))
        if part in stopped:
            from pyaccel.training import Trainer

            save, limit = Trainer._end_epoch, stopped.pop(part)

            def end(trainer):
                improved = save(trainer)
                if trainer.epoch == limit:
                    trainer._save()
                    raise SystemExit(143)
                return improved

            Trainer._end_epoch = end
            try:
                return original(*positional, out=out, **named)
            finally:
                Trainer._end_epoch = save
        return original(*positional, out=out, **named)

    continual_svd.train_classifier = stopping
    try:
        with pytest.raises(SystemExit):
            main(arguments)
        assert not (tmp_path / "report.json").exists()
        assert main(arguments) == 0
    finally:
        continual_svd.train_classifier = original
    for t in range(1, 6):
        assert rows(tmp_path / f"svd/seed-1/task-{t}") == rows(smoke / f"svd/seed-1/task-{t}")
    mine = {r.name: r.value for r in figures(tmp_path)}
    theirs = {r.name: r.value for r in figures(smoke)}
    assert mine == {name: theirs[name] for name in mine}
    log = (tmp_path / "svd/seed-1/task-3/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in log].count("resume") == 1


def test_bad_fields_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    config = continual_svd.preset("smoke")
    for change, message in [
        ({"methods": ("svd", "ewc")}, "methods: expected some of svd, individual, sequential, decayed, got ewc"),
        ({"protocol": "permuted"}, "protocol: expected some of split, mini_imagenet, sets, got permuted"),
        ({"growth": "much"}, "growth: expected some of mean, full, none, got much"),
        ({"tasks": 3}, "10 classes cannot be cut into 3 tasks"),
        ({"sparsity": -1.0}, "sparsity must not be negative"),
        ({"dense_lr": 0.0}, "dense_lr must be positive, got 0"),
        ({"model": "vgg9_bntt"}, "model: expected small, cacl_net or a VGG in its artificial form, got vgg9_bntt"),
        ({"model": "mlp"}, "Linear\\) holds values that every task would change"),
    ]:
        with pytest.raises(ValueError, match=message):
            continual_svd.run(replace(config, **change), out=tmp_path / "run")
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    for protocol in continual_svd.PROTOCOLS:
        with pytest.raises(ValueError, match="was given no data: name the folder with --data PATH"):
            continual_svd.run(replace(continual_svd.PAPER, protocol=protocol), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        continual_svd.preset("huge")


def test_vgg16_with_batch_normalisation_as_in_the_paper():
    """Configuration D, thirteen 3x3 convolutions, and read-outs of 512 -> 32 -> classes."""
    config = replace(continual_svd.preset("smoke"), model="vgg16", head=32)
    pixels, labels = torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5)
    images = ImageSet(pixels, labels, "abcde", "x")
    features, values = continual_svd.features_of(config, continual_tasks.Task("x", images, images, None, None))
    net = ContinualNet(factorize(features), (5,), values, config.head)
    channels = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert [layer.out_channels for layer in net.layers] == [norm.channels for norm in net.norms] == channels
    assert sum(p.numel() for p in net.heads.parameters()) == 512 * 32 + 32 + 32 * 5 + 5


def test_vgg16_forgets_nothing_and_the_control_does(tmp_path, idx_files):
    for name in ("mnist", "usps", "fashion_mnist"):
        idx_files(tmp_path / name, 16 if name == "usps" else 28)
    config = continual_svd.preset("desk", str(tmp_path))
    config = replace(config, model="vgg16", head=32, width=0.05, batch_size=6, epochs=1, device="cpu")
    found = continual_svd.run(config, out=tmp_path / "run")
    assert found["svd/largest_logit_change"].value == 0 and found["decayed/largest_logit_change"].value > 0
    channels = 2 * 3 + 2 * 6 + 3 * 13 + 6 * 26
    dense = found["individual/parameters/convolutions"].value  # weights; gain, bias, mean and variance
    outputs = [3, 3, 6, 6, 13, 13, 13] + [26] * 6
    weights = sum(9 * i * o for i, o in zip([3, *outputs], outputs, strict=False))
    assert dense == 3 * (weights + 4 * channels)
    factors = sum(found[f"svd/rank/3/{k + 1}"].value * (9 * i + o + 1)
                  for k, (i, o) in enumerate(zip([3, *outputs], outputs, strict=False)))  # fmt: skip
    assert found["svd/parameters/convolutions"].value == factors + 2 * channels * (1 + 3)


def test_presets_follow_the_protocols(tmp_path, idx_files):
    paper = continual_svd.preset("paper")
    assert (paper.tasks, paper.epochs, paper.lr_drops, paper.sparsity, paper.orthogonality, paper.energy) == (
        20,
        200,
        (0.6, 0.9),
        0.1,
        1.0,
        3e-5,
    )
    idx_files(tmp_path / "mnist", 28)
    five = continual_svd.preset("paper", str(tmp_path))
    assert (five.protocol, five.growth, five.crop_padding, five.flip) == ("sets", "full", 0, False)
    assert continual_svd.preset("desk", str(tmp_path)).sets == ("mnist", "usps", "fashion_mnist")
    (tmp_path / "miniImageNet").mkdir()
    assert continual_svd.preset("paper", str(tmp_path / "miniImageNet")).protocol == "mini_imagenet"
    assert continual_svd.preset("desk", "digits").tasks == 5


@pytest.mark.parametrize("config, images", [
    (continual_svd.PAPER, 2_500), (continual_svd.DESK, continual_svd.DESK.train_images),
    (continual_svd.DESK_SETS, continual_svd.DESK_SETS.train_images), (continual_svd.DESK_DIGITS, 285),
])  # fmt: skip
def test_a_task_of_a_preset_is_long_enough_to_leave_its_random_start(config, images):
    """Adam moves a value by at most lr a step. Of sigma's start, N(0, 1), a task must be able to cover its size; tasks
    that could move 0.2 froze their starts, and the network was at chance from the sixth of twenty on."""
    ends = [0, *(round(share * config.epochs) for share in config.lr_drops), config.epochs]
    epochs = sum((b - a) * 0.1**k for k, (a, b) in enumerate(zip(ends, ends[1:], strict=False)))
    assert epochs * (images // config.batch_size) * config.lr >= 1


@pytest.mark.parametrize(
    "protocol, sizes, value", [("split", (5, 2500, 500), 86.58), ("mini_imagenet", (5, 2500, 500), 70.10)]
)
def test_published_figures_stand_only_beside_the_published_experiment(protocol, sizes, value):
    config = {"split": continual_svd.PAPER, "mini_imagenet": continual_svd.MINI_IMAGENET}[protocol]

    def task(classes, train, test):
        sets = [
            ImageSet(
                torch.zeros(n, 1, 1, 1, dtype=torch.uint8),
                torch.zeros(n, dtype=torch.int64),
                "abcdefghij"[:classes],
                "x",
            )
            for n in (train, test)
        ]
        return continual_tasks.Task("x", *sets, None, None)

    assert continual_svd.published(config, [task(*sizes)] * 20)[0] == value
    for other in (replace(config, epochs=199), replace(config, width=0.5), replace(config, sparsity=0.4)):
        assert continual_svd.published(other, [task(*sizes)] * 20)[0] is None
    assert continual_svd.published(config, [task(5, 60, 15)] * 20) == (
        None,
        "not the published experiment: other data set",
    )


@pytest.mark.slow
def test_more_pressure_keeps_fewer_numbers(tmp_path):
    """The sign that the specification measured, in long training of one task: numbers kept fall with lambda_s."""
    train, test = digits8("train"), digits8("test")
    tasks = continual_tasks.split_by_class(train, test, 5, None, None)[:1]
    for seed in (1, 2, 3):
        used = []
        for sparsity in (0.0, 2.0):
            config = replace(continual_svd.preset("smoke"), epochs=60, lr=1e-3, sparsity=sparsity)
            place = lambda t, s=sparsity: (tmp_path / f"{seed}-{s}-{t}", "auto")  # noqa: E731
            used.append(continual_svd.learn_svd(config, tasks, seed, torch.device("cpu"), place).sizes[0])
        assert used[1] < 0.9 * used[0], (seed, used)
