from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import pyaccel.data
from pyaccel.data import ImageFolder, ImageSet
from pyaccel.data.decode import decode
from pyaccel.data.images import decoding_threads


@pytest.fixture
def folder(tmp_path, image_tree):
    """Six images of 6x6 pixels in two classes."""
    image_tree(tmp_path, {f"{i}.png": (6, 6) for i in range(6)})
    files = [tmp_path / f"{i}.png" for i in range(6)]
    return ImageFolder(files, torch.tensor([0, 1, 0, 1, 0, 1]), ("a", "b"), "six")


def test_set_hands_out_items_and_batches(image_set):
    data = image_set(12)
    assert len(data) == 12 and data.shape == (3, 8, 8) and data.name == "random" and len(data.classes) == 10
    image, label = data[11]
    assert torch.equal(image, data.images[11]) and label == 1 and type(label) is int
    assert len(list(data)) == 12
    images, labels = data.batch([11, 0, 0])
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, data.images[[11, 0, 0]]) and labels.tolist() == [1, 0, 0]
    images.zero_()
    assert data.images[0].any()


@pytest.mark.parametrize("indices", [[3, 1], range(4), np.array([5, 5]), torch.tensor([2]), []], ids=str)
def test_every_kind_of_index(image_set, folder, indices):
    for data in (image_set(6), folder):
        images, labels = data.batch(indices)
        assert images.shape == (len(indices), *data.shape)
        assert labels.tolist() == [int(data.labels[i]) for i in indices]
        part = data.subset(indices)
        assert type(part) is type(data) and len(part) == len(indices) and part.classes == data.classes
        assert torch.equal(part.batch(range(len(part)))[0], images)


def test_subset_by_mask_keeps_the_class_numbers(image_set, folder):
    assert image_set(20).subset(image_set(20).labels > 7).labels.tolist() == [8, 9, 8, 9]
    odd = folder.subset(folder.labels == 1)
    assert odd.labels.tolist() == [1, 1, 1] and odd.classes == ("a", "b")
    assert [Path(file).name for file in odd.files] == ["1.png", "3.png", "5.png"]
    assert len(folder) == 6


def test_wrong_indices(image_set, folder):
    for data in (image_set(6), folder):
        with pytest.raises(IndexError):
            data.batch([6])
        with pytest.raises(IndexError):
            data.batch([-1])
        with pytest.raises(TypeError, match="indices must be integers or a mask of booleans, got torch.float32"):
            data.batch(torch.tensor([0.5]))
        with pytest.raises(ValueError, match=r"a mask must have one value for each of the 6 images, got shape \(5,\)"):
            data.subset(torch.ones(5, dtype=torch.bool))


def test_an_empty_set_is_valid():
    data = ImageSet(torch.empty(0, 1, 4, 4, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), (), "empty")
    assert len(data) == 0 and data.batch([])[0].shape == (0, 1, 4, 4)


def test_both_work_in_a_torch_loader(image_set, folder):
    for data in (image_set(6), folder):
        images, labels = next(iter(DataLoader(data, batch_size=6)))
        assert torch.equal(images, data.batch(range(6))[0]) and torch.equal(labels, data.labels)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(("images", "labels", "error", "text"), [
    (torch.zeros(2, 1, 4, 4), LABELS, TypeError, "x: images must be uint8, got torch.float32"),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), LABELS, ValueError,
     r"x: images must be \[N, C, H, W\], got shape \(2, 4, 4\)"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), LABELS.int(), TypeError, "x: labels must be int64, got torch.int32"),
    (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), LABELS, ValueError,
     "x: expected one label for each of the 3 images, got 2 labels"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), LABELS[:, None], ValueError,
     r"x: expected one label for each of the 2 images, got labels of shape \(2, 1\)"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ValueError,
     r"x: label 2 of image 1 is outside 0\.\.1 \(1 such labels\)"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([-1, -1]), ValueError,
     r"x: label -1 of image 0 is outside 0\.\.1 \(2 such labels\)"),
])
def test_a_set_refuses(images, labels, error, text):
    with pytest.raises(error, match=text):
        ImageSet(images, labels, ("a", "b"), "x")


def test_folder_decodes_what_was_written(folder):
    images, labels = folder.batch([4, 1])
    assert labels.tolist() == [0, 1] and images.is_contiguous()
    colours = torch.tensor([[4, 8, 251], [1, 2, 254]], dtype=torch.uint8)
    assert torch.equal(images, colours[:, :, None, None].expand(2, 3, 6, 6))
    assert torch.equal(folder[4][0], images[0]) and folder[4][1] == 0


def test_resize_shorter_side_then_centre_crop(tmp_path):
    from PIL import Image

    stripes = np.zeros((8, 24, 3), np.uint8)  # Left, middle and right third: red, green, blue.
    for third in range(3):
        stripes[:, 8 * third:8 * third + 8, third] = 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    wide, tall = decode(tmp_path / "wide.png", 4), decode(tmp_path / "tall.png", 4)
    assert wide.shape == (3, 4, 4) and torch.equal(tall, wide.transpose(1, 2))
    assert (wide[1, :, 1:3] == 255).all() and (wide[[0, 2], :, 1:3] == 0).all()
    assert decode(tmp_path / "wide.png").shape == (3, 8, 24)


@pytest.mark.parametrize(("height", "width", "size"), [
    (375, 500, 224), (1, 7, 3), (613, 920, 256), (333, 334, 32), (5, 5, 9)])
def test_resize_and_crop_as_pillow_does(tmp_path, height, width, size):
    from PIL import Image, ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    got = decode(tmp_path / "x.png", size)
    short = min(height, width)
    resized = Image.fromarray(pixels).resize((int(size * width / short), int(size * height / short)),
                                             Image.Resampling.BILINEAR)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = ImageOps.crop(resized, (left, top, resized.width - size - left, resized.height - size - top))
    assert got.shape == (3, size, size)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    from PIL import Image

    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(file)
    assert torch.equal(decode(file), torch.full((3, 4, 5), 255, dtype=torch.uint8))


def test_grey_is_the_same_in_three_channels(tmp_path):
    from PIL import Image

    Image.new("L", (5, 4), 77).save(tmp_path / "grey.png")
    assert torch.equal(decode(tmp_path / "grey.png"), torch.full((3, 4, 5), 77, dtype=torch.uint8))


def test_more_than_8_bits_is_refused(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: cannot decode this image \(its pixels have more than 8 bits"):
        decode(tmp_path / "deep.png")


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: b"not an image", lambda data: b"",
    lambda data: data[:60] + bytes(40) + data[100:]], ids=["half", "text", "empty", "zeros"])
def test_a_damaged_file_is_named(tmp_path, folder, damage):
    file = Path(folder.files[3])
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    from PIL import Image

    Image.fromarray(noise).save(file)
    file.write_bytes(damage(file.read_bytes()))
    assert len(folder.batch([0, 1, 2])[0]) == 3
    with pytest.raises(ValueError, match=r"3\.png: cannot decode this image \(.+\); replace or remove the file"):
        folder.batch(range(6))


def test_a_vanished_file_is_named(folder):
    Path(folder.files[3]).unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        folder.batch([3])


def test_without_size_all_images_must_have_the_size_of_the_first(tmp_path, image_tree):
    image_tree(tmp_path, {"a.png": (6, 7), "b.png": (6, 8)})
    files, labels = [tmp_path / "a.png", tmp_path / "b.png"], torch.tensor([0, 0])
    data = ImageFolder(files, labels, ("x",), "two")
    assert data.shape == (3, 6, 7)
    text = r"b\.png: expected 6 rows of 7 pixels as in the first image, got 6 of 8; give size to resize"
    with pytest.raises(ValueError, match=text):
        data.batch([0, 1])
    assert ImageFolder(files, labels, ("x",), "two", size=5).batch([0, 1])[0].shape == (2, 3, 5, 5)


def test_a_folder_refuses(folder):
    with pytest.raises(ValueError, match="six: expected one label for each of the 5 images, got 6 labels"):
        ImageFolder(folder.files[:5], folder.labels, folder.classes, "six")
    with pytest.raises(ValueError, match="six: size must be at least 1 pixel, got 0"):
        ImageFolder(folder.files, folder.labels, folder.classes, "six", size=0)
    with pytest.raises(ValueError, match="none: no files, so the image size is unknown; give size"):
        ImageFolder([], folder.labels[:0], folder.classes, "none")


def test_without_pillow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'decoding image files needs Pillow: pip install "pyaccel\[images\]"'):
        folder.batch([0])


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = decoding_threads()
    assert 1 <= alone <= 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    assert decoding_threads() == 1


def test_import_loads_no_optional_package():
    root = Path(pyaccel.data.__file__).parents[2]
    code = "import sys, pyaccel.data; print(sorted({'PIL', 'mlxtend', 'sklearn', 'scipy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
