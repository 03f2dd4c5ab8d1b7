"""Readers of image data sets on disk, one a layout. Every error names the file that caused it."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from .images import ImageFolder, ImageSet, check_labels

IDX_PREFIX = {"train": "train", "test": "t10k"}
CIFAR10_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
CIFAR100_FILES = {"train": ("train.bin",), "test": ("test.bin",)}
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FOLDER_SPLITS = ("train", "val", "test")
TEN = tuple("0123456789")

Source = str | os.PathLike


def read_idx(folder: Source, split: str, classes: Sequence[str] = TEN) -> ImageSet:
    """MNIST's IDX files: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or `t10k-...` for split "test".

    Plain or with .gz. The format does not tell the number of classes: give `classes` where they are not ten.
    FileNotFoundError for a missing file; ValueError for a wrong magic or type, a truncated file, wrong labels.
    """
    folder = Path(folder)
    check_split(split, IDX_PREFIX, folder)
    images, _ = _read_idx(folder, f"{IDX_PREFIX[split]}-images-idx3-ubyte", dims=3)
    labels, file = _read_idx(folder, f"{IDX_PREFIX[split]}-labels-idx1-ubyte", dims=1)
    return _image_set(images[:, None], labels, classes, _name(folder, split), file)


def read_cifar(folder: Source, split: str) -> ImageSet:
    """The binary version of CIFAR-10 or CIFAR-100 (fine labels), told apart by their files.

    CIFAR-10: `data_batch_1.bin` to `_5.bin`, `test_batch.bin`, names in `batches.meta.txt`.
    CIFAR-100: `train.bin`, `test.bin`, names in `fine_label_names.txt`. Without that text file names are numbers.
    FileNotFoundError for a missing file; ValueError for a file that is not whole records, or for wrong labels.
    """
    folder = Path(folder)
    ten, hundred = (any((folder / file).exists() for part in files.values() for file in part)
                    for files in (CIFAR10_FILES, CIFAR100_FILES))
    if ten == hundred:
        raise FileNotFoundError(f"{folder}: expected the files of CIFAR-10 (data_batch_1.bin ... test_batch.bin) or "
                                f"those of CIFAR-100 (train.bin, test.bin), not {'both' if ten else 'neither'}; "
                                f"found {listing(folder)}")
    files, count, meta = (
        (CIFAR10_FILES, 10, "batches.meta.txt") if ten else (CIFAR100_FILES, 100, "fine_label_names.txt"))
    check_split(split, files, folder)
    label_bytes = 1 if ten else 2  # CIFAR-100 records hold the coarse label, then the fine one.
    classes = _class_names(folder / meta, count)
    parts = []
    for file in (folder / name for name in files[split]):
        records = _read_records(file, label_bytes + 3 * 32 * 32)
        check_labels(torch.from_numpy(records[:, label_bytes - 1].astype(np.int64)), len(records), count, file)
        parts.append(records)
    records = np.concatenate(parts)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return _image_set(images, records[:, label_bytes - 1], classes, _name(folder, split), folder)


def read_npz(file: Source, split: str) -> ImageSet:
    """A .npz file with keys `train_images`, `train_labels` (also val_, test_), or `images`, `labels` for split "all".

    Images: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3; a shape that reads both ways is refused.
    Labels: integers [N]. Class names: key `classes` (strings) if present, else 0 up to the largest label of the file.
    FileNotFoundError; ValueError for a damaged file, pickled content, missing keys, wrong shapes, types or labels.
    """
    file = Path(file)
    arrays = NpzFile(file)
    splits = {key.removesuffix("_images") if key != "images" else "all": key for key in arrays.keys
              if key == "images" or key.endswith("_images")}
    if not splits:
        raise ValueError(f"{file}: expected the keys images, labels or train_images, train_labels, test_images, "
                         f"test_labels; got {', '.join(arrays.keys) or 'none'}")
    check_split(split, splits, file)
    label_key = splits[split].removesuffix("images") + "labels"
    images, labels = _channels_first(arrays[splits[split]], f"{file}: {splits[split]}"), arrays[label_key]
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{file}: {label_key} must be integers, got {labels.dtype}")
    if "classes" in arrays.keys:
        classes = [str(name) for name in arrays["classes"].tolist()]
    else:  # All splits count, so that train and test agree on the classes.
        every = [arrays[key] for key in arrays.keys if key == "labels" or key.endswith("_labels")]
        classes = [str(i) for i in range(max((int(part.max()) + 1 for part in every if part.size), default=0))]
    return _image_set(images, labels, classes, _name(file, split), f"{file}: {label_key}")


def read_folder(folder: Source, split: str, size: int | None = None, resize: int | None = None) -> ImageFolder:
    """An image folder, decoded lazily: `CLASS/x.jpg` (split "all"), or those class folders inside train/, val/, test/.

    Classes are the sorted folder names, those of train/ where it exists. Where there is no test/ with class folders
    (ImageNet publishes none), split "test" is val/, as the name of the result shows. size, resize: as of `ImageFolder`.
    FileNotFoundError; ValueError for a missing split, an empty class folder, a class that train/ does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    parts = {name: folder / name for name in FOLDER_SPLITS if subfolders(folder / name)} or {"all": folder}
    if split == "test" and "test" not in parts and "val" in parts:
        split = "val"
    check_split(split, parts, folder)
    home = parts.get("train", parts[split])
    classes = subfolders(home)
    if not classes:
        raise ValueError(f"{folder}: expected class folders with images, found {listing(folder)}")
    number = {name: i for i, name in enumerate(classes)}
    files, labels = [], []
    for name in subfolders(parts[split]):
        place = parts[split] / name
        if name not in number:
            raise ValueError(f"{place}: class {name!r} is not among the {len(classes)} classes of {home}")
        found = image_files(place)
        if not found:
            raise ValueError(f"{place}: expected images ({' '.join(IMAGE_SUFFIXES)}) in this class folder, "
                             f"found {listing(place)}")
        files += found
        labels += [number[name]] * len(found)
    return ImageFolder(files, torch.tensor(labels, dtype=torch.int64), classes, _name(folder, split), size, resize)


def check_split(split: str, known: Iterable[str], where: object) -> None:
    """Raise ValueError unless `split` is one of `known`."""
    if split not in known:
        raise ValueError(f"{where}: no split {split!r}; this data set has: {', '.join(known)}")


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder` that are not hidden; empty where it is no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[str]:
    """Sorted paths of the image files directly in `folder`, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries
                      if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."))


def listing(folder: Path, most: int = 10) -> str:
    """The first names in a folder, for error texts."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"


def _image_set(images: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str, where: object) -> ImageSet:
    labels = torch.from_numpy(labels.astype(np.int64))
    check_labels(labels, len(images), len(classes), where)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), labels, classes, name)


def _name(path: Path, split: str) -> str:
    path = path.resolve()
    return f"{path.name if path.is_dir() else path.stem}/{split}"


def _read_idx(folder: Path, name: str, dims: int) -> tuple[np.ndarray, Path]:
    file = folder / name
    if not file.exists():
        file = folder / f"{name}.gz"
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder / name}: no such file, nor with .gz; found {listing(folder)}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: truncated or damaged gzip file ({error}); fetch it again") from error
    if len(data) < 4 + 4 * dims:
        raise ValueError(f"{file}: truncated: the IDX header takes {4 + 4 * dims} bytes, the file has {len(data)}")
    if data[:2] != b"\0\0" or data[3] != dims:
        raise ValueError(f"{file}: not an IDX file of {dims} dimension{'s' * (dims > 1)}: "
                         f"expected magic {0x800 + dims}, got {int.from_bytes(data[:4], 'big')}")
    if data[2] != 8:
        raise ValueError(f"{file}: expected IDX type 0x08 (unsigned byte), got 0x{data[2]:02X}")
    shape = tuple(int(side) for side in np.frombuffer(data, ">u4", dims, offset=4))
    expected, got = math.prod(shape), len(data) - 4 - 4 * dims
    if got != expected:
        problem = "truncated" if got < expected else "too long"
        raise ValueError(f"{file}: {problem}: its header {'x'.join(map(str, shape))} promises {expected} bytes of "
                         f"data, got {got}")
    return np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * dims).reshape(shape), file


def _read_records(file: Path, record: int) -> np.ndarray:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; found {listing(file.parent)}")
    size = file.stat().st_size
    if size == 0 or size % record:
        raise ValueError(f"{file}: truncated or not CIFAR: expected whole records of {record} bytes, got {size} bytes "
                         f"({size // record} records and {size % record} bytes)")
    return np.fromfile(file, np.uint8).reshape(-1, record)


def _class_names(file: Path, count: int) -> list[str]:
    if not file.exists():
        return [str(i) for i in range(count)]
    names = file.read_text(encoding="utf-8").split()
    if len(names) != count:
        raise ValueError(f"{file}: expected {count} class names, got {len(names)}")
    return names


class NpzFile:
    """The arrays of a .npz file, each read when asked for, never unpickled."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.keys = self._load(lambda arrays: list(arrays.keys()))
        except FileNotFoundError:
            raise FileNotFoundError(f"{file}: no such file") from None

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.keys:
            raise ValueError(f"{self.file}: expected the key {key}, got {', '.join(self.keys)}")
        return self._load(lambda arrays: arrays[key])

    def _load(self, take):
        try:
            # Opened here because np.load leaves a damaged file open.
            with open(self.file, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return take(arrays)
        except FileNotFoundError:
            raise
        except (ValueError, TypeError, EOFError, OSError, BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.file}: not a sound .npz file of plain arrays ({error})") from error


def _channels_first(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise ValueError(f"{where} must be uint8, got {images.dtype}")
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        problem = "reads both as [N, C, H, W] and as [N, H, W, C]" if first else "fits none"
        raise ValueError(f"{where} must be [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3: "
                         f"shape {images.shape} {problem}")
    return images if first else images.transpose(0, 3, 1, 2)
