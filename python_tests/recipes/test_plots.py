from __future__ import annotations

import sys

import pytest
import torch

from pyaccel.recipes import plots


def pixels(path):
    image = pytest.importorskip("PIL.Image").open(path)
    assert image.format == "PNG"
    return image.convert("RGB")


def colour(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def has(path, wanted):
    return any(found == colour(wanted) for _, found in pixels(path).getcolors(1 << 24))


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib")


def test_accuracy_shows_each_network_and_the_exit_only_if_there_is_one(tmp_path):
    values = {("bntt", 0): [50.0, 80.0, 85.0], ("bntt", 1): [52.0, 79.0, 84.0], ("none", 0): [40.0, 60.0, 70.0]}
    plots.accuracy_over_steps(values, {0: 2, 1: 2}, tmp_path / "a.png")
    assert has(tmp_path / "a.png", plots.STYLES["bntt"][1]) and has(tmp_path / "a.png", plots.MARK)
    assert not has(tmp_path / "a.png", plots.STYLES["shared"][1])
    plots.accuracy_over_steps(values, {}, tmp_path / "b.png")
    assert not has(tmp_path / "b.png", plots.MARK)


def test_curves_of_runs_of_unequal_length(tmp_path):
    def rows(count):
        return [{"train_loss": 1.0 / (e + 1), "eval_accuracy": 0.5 + 0.1 * e} for e in range(count)]

    plots.training_curves({("shared", 0): rows(3), ("shared", 1): rows(2)}, tmp_path / "t.png")
    assert has(tmp_path / "t.png", plots.STYLES["shared"][1])


def test_gain_map_and_raster(tmp_path):
    plots.gain_map({"features.0": torch.rand(4, 3), "classifier.0": torch.rand(4, 9) - 0.5}, 0.1, 4, tmp_path / "g.png")
    assert pixels(tmp_path / "g.png").width > 300
    spikes = {"encoder": torch.tensor([[1.0, -1.0, 0.0]] * 5), "features.0": torch.zeros(5, 40)}
    for channels in (1, 3):
        image = torch.rand(channels, 8, 8)
        plots.raster(plots.Raster(image, 1, torch.rand(5, 3), spikes), tmp_path / "r.png")
        assert has(tmp_path / "r.png", plots.POSITIVE) and has(tmp_path / "r.png", plots.NEGATIVE)


def test_the_caller_s_matplotlib_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.gain_map({"features.0": torch.rand(2, 3)}, 0.1, 2, tmp_path / "g.png")
    assert dict(matplotlib.rcParams) == before
    assert [file.name for file in tmp_path.iterdir()] == ["g.png"]


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "pyaccel\[plot\]"'):
        plots.gain_map({"features.0": torch.rand(2, 3)}, 0.1, 2, tmp_path / "g.png")
