"""From what a user names to a data set: a path whose layout is detected, the environment, or a packaged set."""

from __future__ import annotations

import os
from pathlib import Path

from . import packaged
from .images import ImageFolder, ImageSet
from .readers import (CIFAR10_FILES, CIFAR100_FILES, FOLDER_SPLITS, IDX_PREFIX, image_files, listing, read_cifar,
                      read_folder, read_idx, read_npz, subfolders)
from .shards import SPLITS, read_shards, shard_files

PACKAGED = {"digits": packaged.digits, "digits8": packaged.digits8}

ADVICE = ('Give the path of a data set, set the environment variable PYACCEL_DATA to one, or choose a packaged set by '
          'name: "digits" (5,000 MNIST images) or "digits8" (8x8 digits of scikit-learn), both from '
          'pip install "pyaccel[demo]"')

LOOKED_FOR = """\
  IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, also .gz
  CIFAR-10 binary version: data_batch_1.bin to data_batch_5.bin, test_batch.bin (the Python version is pickle: not read)
  CIFAR-100 binary version: train.bin, test.bin
  an image folder: CLASS/x.jpg, or train/, val/, test/ with such class folders inside
  tar shards: train/*.tar or *train*.tar, members key.jpg and key.cls
  a .npz file, given as the path itself"""


def open_images(source: str | os.PathLike | None, split: str, *, size: int | None = None,
                resize: int | None = None) -> ImageSet | ImageFolder:
    """Open one split ("train", "test", ...; "all" where the layout has none) of an image data set.

    source: a path, whose layout is detected; "digits" or "digits8", a packaged set (a folder of that name: "./digits");
    None: what the environment variable PYACCEL_DATA says, else an error, never another data set.
    size: images decoded from files are resized (shorter side to `resize`, default size) and cropped to size x size;
    every other set must already have that size.
    FileNotFoundError for a missing path; ValueError for no source, an unknown layout, split or size, or bad files.
    """
    if source is None:
        source = os.environ.get("PYACCEL_DATA")
        if not source:
            raise ValueError(f"no data set was named. {ADVICE}")
    if source in PACKAGED:
        data = PACKAGED[source](split)
    else:
        data = _open_path(Path(source), split, size, resize)
    if size is not None and data.shape[1:] != (size, size):
        height, width = data.shape[1:]
        raise ValueError(f"{source}: expected images of {size} rows of {size} pixels, got {height} of {width}; "
                         "only images decoded from files are resized")
    return data


def _open_path(path: Path, split: str, size: int | None, resize: int | None) -> ImageSet | ImageFolder:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. {ADVICE}")
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"{path}: expected a folder or a .npz file")
        return read_npz(path, split)
    found = [kind for kind, present in (("IDX", _has_idx), ("CIFAR", _has_cifar), ("image folder", _has_image_folders),
                                      ("tar shards", _has_shards))
             if present(path)]
    if not found:
        raise ValueError(f"{path}: no known layout. Looked for:\n{LOOKED_FOR}\nFound: {listing(path)}")
    if len(found) > 1:
        raise ValueError(f"{path}: more than one layout here ({', '.join(found)}); move one of them to its own folder")
    if found == ["IDX"]:
        return read_idx(path, split)
    if found == ["CIFAR"]:
        return read_cifar(path, split)
    return (read_shards if found == ["tar shards"] else read_folder)(path, split, size=size, resize=resize)


def _has_idx(folder: Path) -> bool:
    names = (f"{prefix}-{kind}-ubyte" for prefix in IDX_PREFIX.values() for kind in ("images-idx3", "labels-idx1"))
    return any((folder / f"{name}{suffix}").exists() for name in names for suffix in ("", ".gz"))


def _has_cifar(folder: Path) -> bool:
    return any((folder / name).exists() for files in (CIFAR10_FILES, CIFAR100_FILES)
               for part in files.values() for name in part)


def _has_shards(folder: Path) -> bool:
    return any(shard_files(folder, split) for split in (*SPLITS, "all"))


def _has_image_folders(folder: Path) -> bool:
    homes = (folder, *(folder / split for split in FOLDER_SPLITS))
    return any(image_files(home / name) for home in homes for name in subfolders(home))
