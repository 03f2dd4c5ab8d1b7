from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pyaccel.data import ImageFolder, ImageSet, digits8, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 1], np.uint8)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)


def write_cifar(folder, names, label_bytes):
    records = np.concatenate([LABELS[:, None]] * label_bytes + [PIXELS.transpose(0, 3, 1, 2).reshape(4, -1)], 1)
    for name in names:
        (folder / name).write_bytes(records.tobytes())


def write_idx(folder, idx_bytes):
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(PIXELS[..., 0]))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))


def write_npz(path):
    np.savez(path, train_images=PIXELS, train_labels=LABELS)


def test_each_layout_is_detected(tmp_path, idx_bytes, image_tree):
    idx, ten, hundred, folder = (tmp_path / name for name in ("idx", "ten", "hundred", "folder"))
    for home in (idx, ten, hundred):
        home.mkdir()
    write_idx(idx, idx_bytes)
    write_cifar(ten, [f"data_batch_{i}.bin" for i in range(1, 6)], 1)
    write_cifar(hundred, ["train.bin"], 2)
    image_tree(folder, {"train/a/1.png": (8, 9), "val/a/1.png": (8, 9)})
    write_npz(tmp_path / "set.npz")

    assert np.array_equal(open_images(idx, "train").images[:, 0].numpy(), PIXELS[..., 0])
    assert open_images(str(ten), "train").shape == (3, 32, 32) and len(open_images(ten, "train")) == 20
    assert len(open_images(hundred, "train").classes) == 100
    assert np.array_equal(open_images(tmp_path / "set.npz", "train").images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    lazy = open_images(folder, "train")
    assert isinstance(lazy, ImageFolder) and lazy.shape == (3, 8, 9)
    assert open_images(folder, "test", size=4).shape == (3, 4, 4)
    assert all(isinstance(open_images(path, "train", size=32), ImageSet) for path in (idx, ten, hundred))


def test_packaged_sets_by_name(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    assert torch.equal(open_images("digits8", "test").images, digits8("test").images)
    assert open_images("digits8", "train", size=8).name == "digits8/train"
    with pytest.raises(ValueError, match="digits8: expected images of 28 rows of 28 pixels, got 8 of 8; only image"):
        open_images("digits8", "train", size=28)
    # A folder of that name needs a path that says so.
    (tmp_path / "digits8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_images("digits8", "test").name == "digits8/test"
    for path in ("./digits8", Path("digits8")):
        with pytest.raises(ValueError, match="digits8: no known layout"):
            open_images(path, "test")


def test_the_environment_speaks_only_where_no_source_is_given(monkeypatch, tmp_path):
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz")
    monkeypatch.setenv("PYACCEL_DATA", str(tmp_path / "a.npz"))
    assert open_images(None, "train").name == "a/train"
    assert open_images(tmp_path / "b.npz", "train").name == "b/train"
    monkeypatch.setenv("PYACCEL_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        open_images(None, "train")


@pytest.mark.parametrize("value", [None, ""])
def test_no_source_is_an_error_that_says_how_to_give_one(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("PYACCEL_DATA", value)
    advice = r'Give the path .+ PYACCEL_DATA .+ "digits" .+ "digits8" .+ pip install "pyaccel\[demo\]"'
    with pytest.raises(ValueError, match=rf"no data set was named\. {advice}"):
        open_images(None, "train")


def test_a_missing_path_says_how_to_give_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere: no such file or folder\. Give .+ PYACCEL_DATA .+ "digits"'):
        open_images(tmp_path / "nowhere", "train")


def test_an_unknown_layout_lists_what_was_looked_for_and_found(tmp_path):
    for number in range(12):
        (tmp_path / f"file{number:02}.txt").write_text("")
    with pytest.raises(ValueError) as error:
        open_images(tmp_path, "train")
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: no known layout. Looked for:\n")
    for name in ("train-images-idx3-ubyte", ".gz", "data_batch_1.bin", "test_batch.bin", "pickle", "train.bin",
                 "CLASS/x.jpg", "train/, val/, test/", ".npz"):
        assert name in text
    assert text.endswith("Found: " + ", ".join(f"file{number:02}.txt" for number in range(10)) + " and 2 more")


@pytest.mark.parametrize("names", [["x.png"], ["other/a/x.png"], ["Train/5/x.bin"]])
def test_not_an_image_folder(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"no known layout(.|\n)+Found: {names[0].split('/')[0]}"):
        open_images(tmp_path, "train")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "set.tar").write_text("")
    with pytest.raises(ValueError, match=r"set\.tar: expected a folder or a \.npz file"):
        open_images(tmp_path / "set.tar", "train")


def test_two_layouts_in_one_folder(tmp_path, idx_bytes, image_tree):
    write_idx(tmp_path, idx_bytes)
    image_tree(tmp_path, {"a/1.png": (8, 8)})
    with pytest.raises(ValueError, match=r"more than one layout here \(IDX, image folder\); move one of them"):
        open_images(tmp_path, "train")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_linked_class_folders(tmp_path, image_tree):
    image_tree(tmp_path, {"store/a/1.png": (8, 8)})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "store")
    assert len(open_images(tmp_path / "set", "train")) == 1
