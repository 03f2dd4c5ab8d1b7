"""Tar shards, random parts of images, and the check of a whole data set."""

from __future__ import annotations

import io
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyaccel.cli import main
from pyaccel.data import Augment, Batches, ImageSet, open_images, read_shards
from pyaccel.data.check import check_images
from pyaccel.data.decode import decode, random_part

Image = pytest.importorskip("PIL.Image")


def encoded(width, height, seed=0, form="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_shard(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(2):
        members = []
        for i in range(3):
            k = 3 * number + i
            members += [(f"{k:03d}.png", encoded(9, 7, k)), (f"{k:03d}.cls", str(k % 2).encode())]
        write_shard(folder / f"set-train-{number:06d}.tar", members)
    write_shard(folder / "set-val-000000.tar", [("a/0.cls", b"1"), ("a/0.png", encoded(9, 7, 9))])
    return folder


def test_shards_are_read_in_order_with_their_labels(shards):
    train, test = open_images(shards, "train"), open_images(shards, "test")
    assert (len(train), len(test), train.shape, train.classes) == (6, 1, (3, 7, 9), ("0", "1"))
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1] and test.labels.tolist() == [1]
    for i in range(6):
        assert torch.equal(train[i][0], decode(encoded(9, 7, i)))
    images, labels = train.subset([5, 0]).batch([0, 1])
    assert torch.equal(images[0], train[5][0]) and labels.tolist() == [1, 0]


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(shards, monkeypatch):
    first = read_shards(shards, "train")
    monkeypatch.setattr("pyaccel.data.shards._scan", lambda shard: pytest.fail("scanned again"))
    assert read_shards(shards, "train").files == first.files
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    write_shard(shards / "set-train-000000.tar", [("x.png", encoded(9, 7, 7)), ("x.cls", b"0")])
    assert len(read_shards(shards, "train")) == 4


def test_names_of_classes(shards):
    (shards / "classes.txt").write_text("cat\ndog\n")
    assert read_shards(shards, "val").classes == ("cat", "dog")


def test_shards_that_are_not_sound(shards):
    file = shards / "set-train-000000.tar"
    content = file.read_bytes()
    file.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"set-train-000000\.tar: (truncated|not a sound tar)"):
        read_shards(shards, "train")
    write_shard(file, [("1.png", encoded(9, 7)), ("2.cls", b"1")])
    with pytest.raises(ValueError, match=r"an image and a \.cls label for every key, got 1 images and 1 labels; alone is 1, 2"):
        read_shards(shards, "train")
    write_shard(file, [("1.png", encoded(9, 7)), ("1.cls", b"one")])
    with pytest.raises(ValueError, match="not a sound tar file of images"):
        read_shards(shards, "train")
    with pytest.raises(ValueError, match="no split 'extra'; this data set has: train, test, val, all"):
        read_shards(shards, "extra")
    write_shard(file, [("1.png", b"no image"), ("1.cls", b"0")])
    with pytest.raises(ValueError, match=r"set-train-000000\.tar:1\.png: cannot decode"):
        read_shards(shards, "train")


# ------------------------------------------------------------------------------------------------------- random parts


def test_parts_lie_inside_and_have_the_asked_areas():
    areas, ratios = [], []
    for word in range(400):
        left, top, right, bottom = random_part(word, (0.2, 0.6))(100, 80)
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 80
        areas.append((right - left) * (bottom - top) / 8000)
        ratios.append((right - left) / (bottom - top))
    assert 0.19 < min(areas) < 0.22 and 0.57 < max(areas) < 0.62 and abs(np.mean(areas) - 0.4) < 0.02
    assert 0.73 < min(ratios) < 0.77 and 1.29 < max(ratios) < 1.36 and abs(np.mean(np.log(ratios))) < 0.03
    assert random_part(7, (0.2, 0.6))(100, 80) == random_part(7, (0.2, 0.6))(100, 80)
    assert random_part(0, (1.0, 1.0))(400, 10) == (193, 0, 206, 10)  # nothing fits: the centre, of the widest ratio


def test_a_part_is_cut_and_resized():
    content = encoded(12, 10)
    box = (2, 1, 8, 7)
    whole = Image.open(io.BytesIO(content))
    expected = np.asarray(whole.resize((5, 5), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
    assert np.array_equal(decode(content, 5, box=lambda w, h: box).numpy(), expected)


def test_large_jpegs_are_decoded_smaller_for_a_part():
    smooth = np.linspace(0, 255, 640)[None, :, None].repeat(480, 0).repeat(3, 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    box = (160, 120, 480, 440)
    expected = np.asarray(Image.fromarray(smooth).resize((40, 40), Image.Resampling.BILINEAR, box=box))
    found = decode(file.getvalue(), 40, box=lambda w, h: box).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 6


def test_batches_of_parts_depend_on_sample_and_epoch_alone(shards):
    images = open_images(shards, "train", size=4)
    augment = Augment(resized_crop=(0.3, 1.0), flip=True)

    def batches(size, epoch, first=0):
        found = list(Batches(images, size, seed=3, shuffle=True, drop_last=False, augment=augment).epoch(epoch, first))
        return torch.cat([batch.images for batch in found])

    assert torch.equal(batches(2, 1), batches(3, 1)) and torch.equal(batches(2, 1)[2:], batches(2, 1, first=1))
    assert not torch.equal(batches(2, 1), batches(2, 2))
    with pytest.raises(TypeError, match="resized_crop works on images decoded from files"):
        Batches(ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "01", "x"), 1,
                shuffle=False, drop_last=False, augment=augment)  # fmt: skip
    with pytest.raises(ValueError, match="resized_crop must be two shares"):
        Augment(resized_crop=(0.0, 1.0))


def test_evaluation_resizes_before_it_crops(shards):
    images = open_images(shards, "train", size=4, resize=6)
    whole = Image.open(io.BytesIO(encoded(9, 7, 0))).resize((7, 6), Image.Resampling.BILINEAR).crop((2, 1, 6, 5))
    assert np.array_equal(images[0][0].numpy(), np.asarray(whole).transpose(2, 0, 1))
    with pytest.raises(ValueError, match="resize 3 must be at least size, which is 4"):
        open_images(shards, "train", size=4, resize=3)


# ---------------------------------------------------------------------------------------------------------- check-data


def test_check_data_names_every_fault(shards, capsys):
    assert main(["check-data", str(shards)]) == 0
    assert "set/train: 6 images of 3x7x9, 2 classes, 3 each\n  read 6: 0 faults," in capsys.readouterr().out
    write_shard(shards / "set-train-000001.tar", [("1.png", encoded(9, 7)), ("1.cls", b"0"), ("2.png", b"no image"),
                                                  ("2.cls", b"1"), ("3.png", encoded(8, 7)), ("3.cls", b"1")])  # fmt: skip
    assert main(["check-data", str(shards), "--splits", "train"]) == 1
    out = capsys.readouterr().out
    assert "read 6: 2 faults" in out and "tar:2.png: cannot decode" in out and "tar:3.png: expected 7 rows" in out
    assert main(["check-data", os.fspath(shards / "nothing")]) == 2


def test_a_sample_is_fair_and_empty_classes_are_named():
    labels = torch.arange(40) // 20
    seen = []
    images = SimpleNamespace(labels=labels, classes=("a", "b", "c"), shape=(1, 2, 2), name="x")
    images = type("Set", (), {**vars(images), "__len__": lambda s: 40, "__getitem__": lambda s, i: seen.append(i)})()
    finding = check_images(images, sample=10)
    assert finding.looked_at == len(set(seen)) == 10 and 2 <= sum(i < 20 for i in seen) <= 8
    assert finding.per_class == (0, 20) and "  a class has no image here" in finding.lines()
