"""Folders of event recordings, and what `Batches` makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyaccel.data import Augment, Batches, EventFolder, bin_events, open_events, read_nmnist


def write(path, rng, n=40, side=34):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = rng.integers(0, 256, (n, 5), dtype=np.uint8)
    raw[:, :2] %= side
    raw[:, 2] = raw[:, 2] & 0x80
    raw.tofile(path)


@pytest.fixture
def nmnist(tmp_path):
    """The layout of N-MNIST: three classes, 4 and 2 recordings of each."""
    rng = np.random.default_rng(0)
    for split, count in (("Train", 4), ("Test", 2)):
        for c in range(3):
            for i in range(count):
                write(tmp_path / "nmnist" / split / str(c) / f"{i:05}.bin", rng)
    return tmp_path / "nmnist"


def test_nmnist_layout(nmnist):
    train, test = (open_events(nmnist, split, steps=5) for split in ("train", "test"))
    assert (len(train), len(test), train.name, test.name) == (12, 6, "nmnist/train", "nmnist/test")
    assert train.classes == ("0", "1", "2") and train.shape == (2, 34, 34)
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    frames, label = train[5]
    assert frames.dtype is torch.uint8 and frames.shape == (5, 2, 34, 34) and label == 1
    assert torch.equal(frames.int(), bin_events(read_nmnist(nmnist / "Train/1/00001.bin"), 5))
    assert len(train.events(0)) == 40
    frames, labels = train.batch([5, 0])
    assert frames.shape == (2, 5, 2, 34, 34) and labels.tolist() == [1, 0] and torch.equal(frames[0], train[5][0])
    part = train.subset([11, 3])
    assert len(part) == 2 and part.labels.tolist() == [2, 0] and torch.equal(part[0][0], train[11][0])
    assert train.batch([])[0].shape == (0, 5, 2, 34, 34)
    with pytest.raises(ValueError, match="no split 'val'; this data set has: train, test"):
        open_events(nmnist, "val", steps=5)


def test_batches_keep_counts_and_crop_all_steps_alike(nmnist):
    train = open_events(nmnist, "train", steps=5, by="count")
    plain = next(Batches(train, 12, shuffle=False, drop_last=False).epoch(0))
    assert plain.images.dtype is torch.float32 and plain.images.shape == (12, 5, 2, 34, 34)
    assert plain.images.sum() == 12 * 40 and plain.images.max() >= 1
    batches = Batches(train, 12, seed=3, shuffle=False, drop_last=False, augment=Augment(crop_padding=6, flip=True))
    moved = next(batches.epoch(0)).images
    assert not torch.equal(moved, plain.images)
    merged = Batches(MergedSteps(train), 12, seed=3, shuffle=False, drop_last=False, augment=Augment(6, True))
    assert torch.equal(moved.flatten(1, 2), next(merged.epoch(0)).images * 255)


class MergedSteps(torch.utils.data.Dataset):
    """The same frames as images of steps * 2 channels: what is cropped alike by definition."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, i):
        frames, label = self.folder[i]
        return frames.flatten(0, 1), label


def test_many_events_in_one_pixel_are_stored_as_255(tmp_path):
    file = tmp_path / "a.bin"
    np.tile(np.array([[1, 2, 0x80, 0, 0]], np.uint8), (300, 1)).tofile(file)
    folder = EventFolder([file], torch.tensor([0]), "a", "hot", steps=2)
    assert folder[0][0][0, 1, 2, 1] == 255 and folder[0][0].int().sum() == 255


def test_cifar10_dvs_layout_has_no_split_of_its_own(tmp_path):
    """Names are in the order of their numbers, as the published ones are: 2 before 10."""
    for name in ("airplane", "bird"):
        for i in range(20):
            path = tmp_path / name / f"cifar10_{name}_{i}.aedat"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"#!AER-DAT2.0\r\n" + bytes([0, 0, i, 2 * i, 0, 0, 0, i]))
    train, test, everything = (open_events(tmp_path, split, steps=2) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (36, 4, 40)
    assert [f.rsplit("_", 1)[1] for f in test.files] == ["18.aedat", "19.aedat"] * 2
    assert not set(train.files) & set(test.files)
    assert train.name.endswith("/train (tenths of each class)") and everything.name == tmp_path.name
    assert train.shape == (2, 128, 128) and train.classes == ("airplane", "bird")
    assert train.events(3).y.tolist() == [3] and train.events(3).x.tolist() == [124]


def test_mistakes_are_named(nmnist, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        open_events(tmp_path / "nowhere", "train", steps=2)
    (nmnist / "Test" / "7").mkdir()
    with pytest.raises(ValueError, match="class '7' is not among those of"):
        open_events(nmnist, "test", steps=2)
    (nmnist / "Train" / "7").mkdir()
    with pytest.raises(ValueError, match=r"Train/7: expected recordings \(.bin .* found nothing"):
        open_events(nmnist, "train", steps=2)
    (nmnist / "Train" / "7" / "a.dat").touch()
    with pytest.raises(ValueError, match="recordings of one kind, found .bin .dat"):
        open_events(nmnist, "train", steps=2)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="expected class folders with recordings"):
        open_events(tmp_path / "none", "train", steps=2)
    with pytest.raises(ValueError, match="no files, so the size of the sensor is unknown"):
        EventFolder([], torch.zeros(0, dtype=torch.int64), "a", "none", steps=2)
    with pytest.raises(ValueError, match="at least one step"):
        EventFolder([], torch.zeros(0, dtype=torch.int64), "a", "none", steps=0)


def test_a_damaged_recording_is_named_where_the_batch_is_made(nmnist):
    file = nmnist / "Train" / "1" / "00002.bin"
    file.write_bytes(file.read_bytes()[:-1])
    folder = open_events(nmnist, "train", steps=2)
    with pytest.raises(ValueError, match=r"Train/1/00002\.bin: truncated at byte 195"):
        list(Batches(folder, 4, shuffle=False, drop_last=False).epoch(0))
