from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from pyaccel.data import read_cifar, read_folder, read_idx, read_npz

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)
PICTURES = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path, idx_bytes):
    """A folder with six training images of 5x4 pixels and three test images."""
    for prefix, count in (("train", 6), ("t10k", 3)):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(PIXELS[:count]))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:count]))
    return tmp_path


def cifar10(folder, labels=LABELS, names=True):
    """Six training images over five files (2, 1, 1, 1, 1) and the same six as test images."""
    records = np.concatenate([labels[:, None], PICTURES.reshape(6, -1)], 1).astype(np.uint8)
    for number, rows in enumerate(np.array_split(records, 5), 1):
        (folder / f"data_batch_{number}.bin").write_bytes(rows.tobytes())
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    if names:
        (folder / "batches.meta.txt").write_text("\n".join(f"name{i}" for i in range(10)) + "\n\n")
    return folder


def cifar100(folder):
    coarse, fine = LABELS, LABELS * 10
    records = np.concatenate([coarse[:, None], fine[:, None], PICTURES.reshape(6, -1)], 1).astype(np.uint8)
    (folder / "train.bin").write_bytes(records.tobytes())
    (folder / "test.bin").write_bytes(records[:2].tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)) + "\n")
    return folder


# IDX ------------------------------------------------------------------------------------------------------------------

def test_idx_plain_and_gz(mnist):
    plain = read_idx(mnist, "train")
    assert plain.images.dtype == torch.uint8 and np.array_equal(plain.images[:, 0].numpy(), PIXELS)
    assert plain.labels.tolist() == LABELS.tolist() and plain.classes == tuple("0123456789")
    assert plain.name == f"{mnist.name}/train" and len(read_idx(mnist, "test")) == 3
    for file in list(mnist.iterdir()):
        (mnist / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    packed = read_idx(mnist, "train")
    assert torch.equal(packed.images, plain.images) and torch.equal(packed.labels, plain.labels)


def test_idx_with_other_classes(mnist):
    assert read_idx(mnist, "train", classes=[f"letter {i}" for i in range(26)]).classes[25] == "letter 25"
    with pytest.raises(ValueError, match=rf"{LABEL_FILE}: label 3 of image 0 is outside 0\.\.1 \(4 such labels\)"):
        read_idx(mnist, "train", classes=("a", "b"))


IMAGES, LABEL_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(("file", "arguments", "text"), [
    (IMAGES, {"magic": 0x801}, f"{IMAGES}: not an IDX file of 3 dimensions: expected magic 2051, got 2049"),
    (IMAGES, {"magic": 0x01000803}, f"{IMAGES}: not an IDX file of 3 dimensions: expected magic 2051, got 16779267"),
    (IMAGES, {"magic": 0xD03}, rf"{IMAGES}: expected IDX type 0x08 \(unsigned byte\), got 0x0D"),
    (IMAGES, {"shape": (7, 5, 4)}, f"{IMAGES}: truncated: its header 7x5x4 promises 140 bytes of data, got 120"),
    (IMAGES, {"shape": (2**32 - 1,) * 3}, f"{IMAGES}: truncated: its header 4294967295x"),
    (IMAGES, {"shape": (5, 5, 4)}, f"{IMAGES}: too long: its header 5x5x4 promises 100 bytes of data, got 120"),
    (LABEL_FILE, {"magic": 0x803}, f"{LABEL_FILE}: not an IDX file of 1 dimension: expected magic 2049, got 2051"),
    (LABEL_FILE, {"shape": (5,)}, f"{LABEL_FILE}: too long: its header 5 promises 5 bytes of data, got 6"),
])
def test_idx_wrong_header(mnist, idx_bytes, file, arguments, text):
    (mnist / file).write_bytes(idx_bytes(PIXELS if file == IMAGES else LABELS, **arguments))
    with pytest.raises(ValueError, match=text):
        read_idx(mnist, "train")


def test_idx_wrong_labels(mnist, idx_bytes):
    (mnist / LABEL_FILE).write_bytes(idx_bytes(LABELS[:4]))
    with pytest.raises(ValueError, match=f"{LABEL_FILE}: expected one label for each of the 6 images, got 4 labels"):
        read_idx(mnist, "train")
    (mnist / LABEL_FILE).write_bytes(idx_bytes(np.array([0, 1, 10, 3, 255, 5])))
    with pytest.raises(ValueError, match=rf"{LABEL_FILE}: label 10 of image 2 is outside 0\.\.9 \(2 such labels\)"):
        read_idx(mnist, "train")


def test_idx_truncated(mnist):
    file = mnist / IMAGES
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{IMAGES}: truncated: its header 6x5x4 promises 120 bytes of data, got 119"):
        read_idx(mnist, "train")
    file.write_bytes(data[:7])
    with pytest.raises(ValueError, match=f"{IMAGES}: truncated: the IDX header takes 16 bytes, the file has 7"):
        read_idx(mnist, "train")


@pytest.mark.parametrize("damage", [
    lambda data: data[:-30], lambda data: b"plain text", lambda data: data[:20] + bytes(30)])
def test_idx_damaged_gz(mnist, damage):
    file = mnist / IMAGES
    (mnist / f"{IMAGES}.gz").write_bytes(damage(gzip.compress(file.read_bytes())))
    file.unlink()
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz: truncated or damaged gzip file \(.+\); fetch it again"):
        read_idx(mnist, "train")


def test_idx_missing(mnist):
    (mnist / LABEL_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{LABEL_FILE}: no such file, nor with .gz; found t10k-images-idx3-"):
        read_idx(mnist, "train")
    with pytest.raises(FileNotFoundError, match=f"nowhere/{IMAGES}: no such file, nor with .gz; found nothing"):
        read_idx(mnist / "nowhere", "train")
    with pytest.raises(ValueError, match=f"{mnist.name}: no split 'val'; this data set has: train, test"):
        read_idx(mnist, "val")


# CIFAR ----------------------------------------------------------------------------------------------------------------

def test_cifar10(tmp_path):
    cifar10(tmp_path)
    for split in ("train", "test"):
        data = read_cifar(tmp_path, split)
        assert np.array_equal(data.images.numpy(), PICTURES) and data.labels.tolist() == LABELS.tolist()
        assert data.classes == tuple(f"name{i}" for i in range(10)) and data.name == f"{tmp_path.name}/{split}"


def test_cifar100_has_the_fine_labels(tmp_path):
    data = read_cifar(cifar100(tmp_path), "train")
    assert np.array_equal(data.images.numpy(), PICTURES) and data.labels.tolist() == [30, 10, 40, 10, 50, 90]
    assert data.classes == tuple(f"fine{i}" for i in range(100)) and len(read_cifar(tmp_path, "test")) == 2


def test_cifar_names_are_numbers_without_their_file(tmp_path):
    assert read_cifar(cifar10(tmp_path, names=False), "test").classes == tuple("0123456789")
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"batches\.meta\.txt: expected 10 class names, got 2"):
        read_cifar(tmp_path, "test")


@pytest.mark.parametrize(("data", "text"), [
    (b"", r"expected whole records of 3073 bytes, got 0 bytes \(0 records and 0 bytes\)"),
    (bytes(3072), r"expected whole records of 3073 bytes, got 3072 bytes \(0 records and 3072 bytes\)"),
    (bytes(2 * 3073 + 5), r"expected whole records of 3073 bytes, got 6151 bytes \(2 records and 5 bytes\)"),
])
def test_cifar_truncated(tmp_path, data, text):
    (cifar10(tmp_path) / "data_batch_4.bin").write_bytes(data)
    with pytest.raises(ValueError, match=rf"data_batch_4\.bin: truncated or not CIFAR: {text}"):
        read_cifar(tmp_path, "train")
    assert len(read_cifar(tmp_path, "test")) == 6


def test_cifar_wrong_labels_name_the_file(tmp_path):
    cifar10(tmp_path, labels=np.array([0, 1, 2, 3, 77, 5]))
    with pytest.raises(ValueError, match=r"data_batch_4\.bin: label 77 of image 0 is outside 0\.\.9"):
        read_cifar(tmp_path, "train")
    with pytest.raises(ValueError, match=r"test_batch\.bin: label 77 of image 4 is outside 0\.\.9"):
        read_cifar(tmp_path, "test")


def test_cifar100_wrong_fine_label_names_the_file(tmp_path):
    data = bytearray((cifar100(tmp_path) / "test.bin").read_bytes())
    data[3074 + 1] = 100
    (tmp_path / "test.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"test\.bin: label 100 of image 1 is outside 0\.\.99"):
        read_cifar(tmp_path, "test")


def test_cifar_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not neither; found nothing"):
        read_cifar(tmp_path, "train")
    (cifar10(tmp_path) / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin: no such file; found batches\.meta\.txt, data_"):
        read_cifar(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'all'; this data set has: train, test"):
        read_cifar(tmp_path, "all")
    cifar100(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the files of CIFAR-10 .+ not both; found batches\.meta\.txt, "):
        read_cifar(tmp_path, "train")


# npz ------------------------------------------------------------------------------------------------------------------

def test_npz_with_splits(tmp_path):
    file = tmp_path / "set.npz"
    np.savez_compressed(file, train_images=PIXELS, train_labels=LABELS, val_images=PIXELS[:1], val_labels=LABELS[:1],
                        test_images=PIXELS[:2], test_labels=LABELS[:2], extra=LABELS)
    data = read_npz(file, "train")
    assert np.array_equal(data.images[:, 0].numpy(), PIXELS) and data.labels.tolist() == LABELS.tolist()
    assert data.name == "set/train" and len(read_npz(file, "val")) == 1
    # The test labels reach 3 only: the classes are those of the whole file.
    assert read_npz(file, "test").classes == data.classes == tuple("0123456789")
    with pytest.raises(ValueError, match=r"set\.npz: no split 'all'; this data set has: train, val, test"):
        read_npz(file, "all")


@pytest.mark.parametrize(("shape", "channels_first"), [
    ((6, 3, 32, 32), lambda x: x), ((6, 32, 32, 3), lambda x: x.transpose(0, 3, 1, 2)),
    ((6, 1, 8, 9), lambda x: x), ((6, 8, 9, 1), lambda x: x.transpose(0, 3, 1, 2)),
    ((6, 3, 5), lambda x: x[:, None]), ((6, 8, 3), lambda x: x[:, None])], ids=range(6))
def test_npz_orders_of_axes(tmp_path, shape, channels_first):
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=LABELS.astype(np.int16), classes=[f"c{i}" for i in range(10)])
    data = read_npz(tmp_path / "set.npz", "all")
    assert np.array_equal(data.images.numpy(), channels_first(pixels)) and data.images.is_contiguous()
    assert data.classes == tuple(f"c{i}" for i in range(10))


@pytest.mark.parametrize(("arrays", "text"), [
    ({"images": np.zeros((6, 3, 9, 3), np.uint8)}, r"images must be .+ shape \(6, 3, 9, 3\) reads both as"),
    ({"images": np.zeros((6, 4, 9, 4), np.uint8)}, r"images must be .+ with C 1 or 3: shape \(6, 4, 9, 4\) fits none"),
    ({"images": np.zeros((6, 9), np.uint8)}, r"images must be .+ shape \(6, 9\) fits none"),
    ({"images": PIXELS / 255}, "images must be uint8, got float64"),
    ({"labels": LABELS / 1}, "labels must be integers, got float64"),
    ({"labels": LABELS[:4]}, "labels: expected one label for each of the 6 images, got 4 labels"),
    ({"labels": LABELS[:, None]}, r"labels: expected one label for each of the 6 images, got labels of shape \(6, 1\)"),
    ({"labels": LABELS.astype(np.int8) - 4}, r"labels: label -1 of image 0 is outside 0\.\.5 \(3 such labels\)"),
    ({"classes": ["a", "b"]}, r"labels: label 3 of image 0 is outside 0\.\.1"),
    ({"labels": np.array([None] * 6)}, r"not a sound \.npz file of plain arrays \(Object arrays cannot be loaded"),
])
def test_npz_refuses(tmp_path, arrays, text):
    np.savez(tmp_path / "set.npz", **{"images": PIXELS, "labels": LABELS, **arrays})
    with pytest.raises(ValueError, match=rf"set\.npz: {text}"):
        read_npz(tmp_path / "set.npz", "all")


def test_npz_wrong_keys(tmp_path):
    file = tmp_path / "set.npz"
    np.savez(file, x_train=PIXELS, y_train=LABELS)
    with pytest.raises(ValueError, match=r"set\.npz: expected the keys images, labels or .+; got x_train, y_train"):
        read_npz(file, "train")
    np.savez(file, train_images=PIXELS)
    with pytest.raises(ValueError, match=r"set\.npz: expected the key train_labels, got train_images"):
        read_npz(file, "train")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"\x80\x04K\x01.",
    lambda data: data[:200] + bytes(60) + data[260:]], ids=["half", "empty", "pickle", "bits"])
def test_npz_damaged(tmp_path, damage, compressed):
    file = tmp_path / "set.npz"
    (np.savez_compressed if compressed else np.savez)(file, images=PIXELS, labels=LABELS)
    assert len(read_npz(file, "all")) == 6
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"set\.npz: not a sound \.npz file of plain arrays"):
        read_npz(file, "all")


def test_npz_that_is_an_npy_or_missing(tmp_path):
    with open(tmp_path / "set.npz", "wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(ValueError, match=r"set\.npz: not a sound \.npz file of plain arrays"):
        read_npz(tmp_path / "set.npz", "all")
    with pytest.raises(FileNotFoundError, match=r"other\.npz: no such file"):
        read_npz(tmp_path / "other.npz", "all")


# folders --------------------------------------------------------------------------------------------------------------

def test_folder_of_classes(tmp_path, image_tree):
    image_tree(tmp_path, {"dog/2.png": (4, 4), "dog/10.png": (4, 4), "cat/x.JPG": (4, 4), ".trash/y.png": (4, 4),
                          "cat/._x.jpg.png": (4, 4)})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = read_folder(tmp_path, "all")
    assert data.classes == ("cat", "dog") and data.name == f"{tmp_path.name}/all"
    assert [file.split("/")[-2:] for file in data.files] == [["cat", "x.JPG"], ["dog", "10.png"], ["dog", "2.png"]]
    assert data.labels.tolist() == [0, 1, 1]
    assert data.batch([1, 2])[0][:, 0, 0, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="no split 'train'; this data set has: all"):
        read_folder(tmp_path, "train")


def test_folder_with_splits(tmp_path, image_tree):
    image_tree(tmp_path, {name: (4, 4) for name in ("train/a/1.png", "train/b/1.png", "val/b/1.png", "meta/x.png")})
    train, val = read_folder(tmp_path, "train"), read_folder(tmp_path, "val", size=3)
    assert len(train) == 2 and len(val) == 1 and val.shape == (3, 3, 3)
    assert val.classes == train.classes == ("a", "b") and val.labels.tolist() == [1]
    stand_in = read_folder(tmp_path, "test")
    assert stand_in.files == val.files and stand_in.name == f"{tmp_path.name}/val"
    image_tree(tmp_path, {"test/a/1.png": (4, 4)})
    assert read_folder(tmp_path, "test").name == f"{tmp_path.name}/test"
    with pytest.raises(ValueError, match="no split 'all'; this data set has: train, val, test"):
        read_folder(tmp_path, "all")


def test_an_unlabelled_test_folder_is_no_split(tmp_path, image_tree):
    image_tree(tmp_path, {"train/a/1.png": (4, 4), "val/a/1.png": (4, 4), "test/0001.png": (4, 4)})
    assert read_folder(tmp_path, "test").name == f"{tmp_path.name}/val"


def test_a_class_may_be_called_train(tmp_path, image_tree):
    image_tree(tmp_path, {"train/1.png": (4, 4), "tram/1.png": (4, 4)})
    assert read_folder(tmp_path, "all").classes == ("train", "tram")


def test_folder_refuses(tmp_path, image_tree):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere", "all")
    with pytest.raises(ValueError, match="expected class folders with images, found nothing"):
        read_folder(tmp_path, "all")
    image_tree(tmp_path, {"train/a/1.png": (4, 4), "val/c/1.png": (4, 4)})
    with pytest.raises(ValueError, match=r"val/c: class 'c' is not among the 1 classes of .*/train"):
        read_folder(tmp_path, "val")
    (tmp_path / "train" / "b" / "inner").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train/b: expected images \(\.bmp .+\) in this class folder, found inner"):
        read_folder(tmp_path, "train")
