"""miniImageNet, SVHN, notMNIST: what their readers make, and how they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyaccel.data import read_mini_imagenet, read_notmnist, read_svhn


@pytest.fixture
def mini(tmp_path, image_tree):
    return image_tree(tmp_path / "mini", {f"n{c}/{i:02d}.png": (20, 30) for c in range(3) for i in range(9)})


def test_mini_imagenet_parts_are_disjoint_fixed_and_by_class(mini):
    train, test = (read_mini_imagenet(mini, split, size=8, train_per_class=6) for split in ("train", "test"))
    assert (len(train), len(test), train.shape) == (18, 9, (3, 8, 8)) and train.classes == test.classes == (
        "n0",
        "n1",
        "n2",
    )
    assert not set(train.files) & set(test.files) and len(set(train.files) | set(test.files)) == 27
    assert train.labels.bincount().tolist() == [6] * 3 and test.labels.bincount().tolist() == [3] * 3
    assert train.files == read_mini_imagenet(mini, "train", size=8, train_per_class=6).files
    # The published rule: one generator, seeded once, over the classes in turn.
    generator = np.random.RandomState(1234)
    for c in range(3):
        order = np.arange(9)
        generator.shuffle(order)
        assert [f[-6:-4] for f in train.files[6 * c : 6 * c + 6]] == [f"{i:02d}" for i in order[:6]]
    assert [f[-6:-4] for f in train.files[:6]] != [f"{i:02d}" for i in range(6)]
    images, labels = train.batch([0, 17])
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [0, 2]


def test_mini_imagenet_in_the_few_shot_layout_and_refusals(tmp_path, image_tree, mini):
    few = image_tree(
        tmp_path / "few",
        {f"{home}/{home}{c}/{i}.png": (9, 9) for home in ("train", "val", "test") for c in range(2) for i in range(4)},
    )
    found = read_mini_imagenet(few, "train", train_per_class=3)
    assert len(found.classes) == 6 and len(found) == 18 and found.shape == (3, 84, 84)
    with pytest.raises(ValueError, match=r"n0: expected more than 500 images .*found 9"):
        read_mini_imagenet(mini, "train")
    with pytest.raises(ValueError, match="no split 'val'; this data set has: train, test"):
        read_mini_imagenet(mini, "val")
    both = image_tree(tmp_path / "both", {"train/a/1.png": (9, 9), "val/a/1.png": (9, 9)})
    with pytest.raises(ValueError, match="class 'a' is also in .*no few-shot layout"):
        read_mini_imagenet(both, "train", train_per_class=0)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_mini_imagenet(tmp_path / "absent", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected class folders with images, found nothing"):
        read_mini_imagenet(tmp_path / "empty", "train")


def test_svhn(tmp_path):
    io = pytest.importorskip("scipy.io")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    io.savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [10]], np.uint8)})
    found = read_svhn(tmp_path, "train")
    assert found.labels.tolist() == [1, 0, 9, 0] and found.shape == (3, 32, 32) and len(found.classes) == 10
    assert np.array_equal(found.images[2].numpy(), pixels[:, :, :, 2].transpose(2, 0, 1))
    with pytest.raises(FileNotFoundError, match=r"test_32x32.mat: no such file; found train_32x32.mat"):
        read_svhn(tmp_path, "test")
    (tmp_path / "test_32x32.mat").write_bytes((tmp_path / "train_32x32.mat").read_bytes()[:500])
    with pytest.raises(ValueError, match="not a sound MATLAB file with X and y"):
        read_svhn(tmp_path, "test")
    io.savemat(tmp_path / "test_32x32.mat", {"X": pixels[:16], "y": np.ones((4, 1), np.uint8)})
    with pytest.raises(ValueError, match=r"X must be uint8 \[32, 32, 3, N\], got uint8 \[16, 32, 3, 4\]"):
        read_svhn(tmp_path, "test")
    io.savemat(tmp_path / "extra_32x32.mat", {"X": pixels, "y": np.full((4, 1), 11, np.uint8)})
    with pytest.raises(ValueError, match="label 11 of image 0 is outside 0..9"):
        read_svhn(tmp_path, "extra")


def test_notmnist_leaves_out_broken_files_with_one_warning(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for part in ("Train", "notMNIST_small"):
        for number, letter in enumerate("ABCDEFGHIJ"):
            (tmp_path / part / letter).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (28, 28), 10 * number + i).save(tmp_path / part / letter / f"{i}.png")
    for name in ("x", "y"):
        (tmp_path / "Train/C" / f"{name}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out 2 broken files: .*C/x\.png, .*C/y\.png$"):
        found = read_notmnist(tmp_path, "train")
    assert found.shape == (1, 28, 28) and found.labels.tolist() == [i // 2 for i in range(20)]
    assert torch.equal(found.images[5].unique(), torch.tensor([21], dtype=torch.uint8)) and found.classes == tuple(
        "ABCDEFGHIJ"
    )
    assert len(read_notmnist(tmp_path, "test")) == 20
    (tmp_path / "Train/D").rename(tmp_path / "Train/K")
    with pytest.raises(ValueError, match="expected the folders A to J, D is missing"):
        read_notmnist(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="expected one of the folders Train, notMNIST_large"):
        read_notmnist(tmp_path / "Train", "train")
