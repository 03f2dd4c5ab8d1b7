"""`bntt` on event recordings, and its presets for them and for Tiny-ImageNet."""

from __future__ import annotations

import numpy as np
import pytest

from pyaccel.cli import main
from pyaccel.recipes import bntt, report


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """N-MNIST's layout, three classes told apart by the column in which most events are."""
    home, rng = tmp_path_factory.mktemp("events") / "nmnist", np.random.default_rng(0)
    for split, count in (("Train", 16), ("Test", 8)):
        for label in range(3):
            (home / split / str(label)).mkdir(parents=True)
            for i in range(count):
                raw = np.zeros((400, 5), np.uint8)
                raw[:, 0] = np.where(rng.random(400) < 0.7, 5 + 10 * label, rng.integers(0, 34, 400))
                raw[:, 1] = rng.integers(0, 34, 400)
                raw[:, 2] = rng.integers(0, 2, 400) << 7
                raw[:, 3] = np.sort(rng.integers(0, 256, 400))
                raw.tofile(home / split / str(label) / f"{i:05}.bin")
    return home


def test_a_network_learns_recordings_and_the_report_says_what_it_read(recordings, tmp_path):
    pytest.importorskip("jsonargparse")
    arguments = ["run", "bntt", "--preset", "events", "--data", str(recordings), "--steps", "4", "--width", "0.1",
                 "--epochs", "4", "--batch_size", "12", "--norms", "[bntt]", "--seeds", "[0,1]",
                 "--out", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    found = report.read(tmp_path)
    assert found["bntt/accuracy"].value > 80  # chance is 33
    assert found["bntt/accuracy"].n == 2 and {r.published for r in found.results} == {None}
    text = (tmp_path / "report.md").read_text()
    assert "cut into 4 frames by time, which the network reads as they are" in text and "The encoder draws" not in text
    assert {"raster.png", "gains.png", "accuracy.png", "training.png"} <= {file.name for file in tmp_path.iterdir()}
    before = found["bntt/accuracy_after_step_1"].value
    assert main(arguments) == 0  # nothing is trained again, and nothing is drawn
    assert report.read(tmp_path)["bntt/accuracy_after_step_1"].value == before


def test_recordings_need_a_folder_and_one_sensor(recordings, tmp_path, monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    with pytest.raises(ValueError, match="recordings of an event camera and was given none: download N-MNIST"):
        bntt.run(bntt.preset("events"), out=tmp_path / "run")
    with pytest.raises(ValueError, match="events: expected some of time, count, got rate"):
        bntt.run(bntt.Config(events="rate"), out=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        bntt.run(bntt.preset("events", str(tmp_path / "nowhere")), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_presets_name_their_data(tmp_path, monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    with pytest.raises(ValueError, match="tiny_imagenet of bntt trains on Tiny-ImageNet and was given no data"):
        bntt.run(bntt.preset("tiny_imagenet"), out=tmp_path / "run")
    with pytest.raises(ValueError, match="known are smoke, desk, paper, events, tiny_imagenet, tiny_imagenet_desk"):
        bntt.preset("dvs")
    assert {name: config.preset for name, config in bntt.PRESETS.items()} == {name: name for name in bntt.PRESETS}


def test_tiny_imagenet_from_an_image_folder(tmp_path):
    pytest.importorskip("jsonargparse")
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("n01443537", "n01629819"):
            (tmp_path / "tiny" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "tiny" / split / name / f"{i}.JPEG")
    assert main(["run", "bntt", "--preset", "tiny_imagenet_desk", "--data", str(tmp_path / "tiny"), "--width", "0.05",
                 "--steps", "2", "--epochs", "1", "--batch_size", "4", "--norms", "[bntt]", "--out",
                 str(tmp_path / "run")]) == 0  # fmt: skip
    found = report.read(tmp_path / "run")
    assert found.config["model"] == "vgg11_bntt" and len([r for r in found.results if "/rate/" in r.name]) == 9
