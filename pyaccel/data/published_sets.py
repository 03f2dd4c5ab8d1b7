"""Readers of three published sets with layouts of their own: miniImageNet, SVHN, notMNIST."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from .decode import decode
from .images import ImageFolder, ImageSet, check_labels
from .readers import FOLDER_SPLITS, IMAGE_SUFFIXES, TEN, Source, check_split, image_files, listing, subfolders

MINI_IMAGENET_SEED = 1234  # of the split that 2009.01956 and the code it compares with share
SVHN_FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}
NOTMNIST_FOLDERS = {"train": ("Train", "notMNIST_large"), "test": ("Test", "notMNIST_small")}
LETTERS = tuple("ABCDEFGHIJ")


def read_mini_imagenet(folder: Source, split: str, *, size: int = 84, train_per_class: int = 500) -> ImageFolder:
    """miniImageNet as a classification set, decoded lazily: of each class, 500 images "train" and the others "test".

    folder: `CLASS/x.jpg`, or the few-shot layout `train/`, `val/`, `test/` with different classes in each, which are
    put together. The split: files sorted by name, shuffled class by class (classes sorted by name) with numpy's
    generator seeded 1234, as in the code of Adversarial Continual Learning, whose order of files is that of its own
    pickle: the rule is the published one, which images fall on which side may differ.
    FileNotFoundError; ValueError for no classes, a class with no image left to test, or a class in two of the folders.
    """
    folder = Path(folder)
    check_split(split, ("train", "test"), folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    homes = [folder / name for name in FOLDER_SPLITS if subfolders(folder / name)] or [folder]
    places: dict[str, Path] = {}
    for home in homes:
        for name in subfolders(home):
            if name in places:
                raise ValueError(
                    f"{home / name}: class {name!r} is also in {places[name].parent}: this is no few-shot "
                    "layout; read it with read_folder"
                )
            places[name] = home / name
    if not places:
        raise ValueError(f"{folder}: expected class folders with images, found {listing(folder)}")
    generator = np.random.RandomState(MINI_IMAGENET_SEED)
    classes, files, labels = sorted(places), [], []
    for label, name in enumerate(classes):
        found = image_files(places[name])
        if len(found) <= train_per_class:
            raise ValueError(
                f"{places[name]}: expected more than {train_per_class} images ({' '.join(IMAGE_SUFFIXES)}), "
                f"the first {train_per_class} of a shuffle being for training, found {len(found)}"
            )
        generator.shuffle(found)
        part = found[:train_per_class] if split == "train" else found[train_per_class:]
        files += part
        labels += [label] * len(part)
    return ImageFolder(
        files, torch.tensor(labels, dtype=torch.int64), classes, f"{folder.resolve().name}/{split}", size
    )


def read_svhn(folder: Source, split: str) -> ImageSet:
    """SVHN's cropped digits, uint8 [N, 3, 32, 32]: `train_32x32.mat`, `test_32x32.mat`, `extra_32x32.mat`.

    Label 10 of the files is the digit 0. Needs SciPy. FileNotFoundError; ValueError for a file that is not SVHN's.
    """
    folder = Path(folder)
    check_split(split, SVHN_FILES, folder)
    file = folder / SVHN_FILES[split]
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; found {listing(folder)}")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError('reading SVHN needs SciPy: pip install "pyaccel[demo]"') from error
    try:
        content = loadmat(file, variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1)
    except Exception as error:  # SciPy raises ValueError, TypeError, NotImplementedError, zlib.error and more.
        raise ValueError(f"{file}: not a sound MATLAB file with X and y ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f"{file}: X must be uint8 [32, 32, 3, N], got {images.dtype} {list(images.shape)}")
    labels = labels.astype(np.int64)
    labels[labels == 10] = 0
    labels = torch.from_numpy(labels)
    check_labels(labels, images.shape[3], 10, file)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return ImageSet(pixels, labels, TEN, f"{folder.resolve().name}/{split}")


def read_notmnist(folder: Source, split: str) -> ImageSet:
    """notMNIST, letters A to J as grey images, uint8 [N, 1, 28, 28]: `Train/A/x.png` ..., or `notMNIST_large/A/...`.

    "test" is `Test/` or `notMNIST_small/`. The published set has a few broken files: they are left out, with one
    warning that names them. FileNotFoundError; ValueError for a missing letter or no image.
    """
    folder = Path(folder)
    check_split(split, NOTMNIST_FOLDERS, folder)
    homes = [folder / name for name in NOTMNIST_FOLDERS[split] if (folder / name).is_dir()]
    if not homes:
        raise FileNotFoundError(
            f"{folder}: expected one of the folders {', '.join(NOTMNIST_FOLDERS[split])}, found {listing(folder)}"
        )
    images, labels, broken = [], [], []
    for label, letter in enumerate(LETTERS):
        if not (homes[0] / letter).is_dir():
            raise ValueError(f"{homes[0]}: expected the folders A to J, {letter} is missing; found {listing(homes[0])}")
        for file in image_files(homes[0] / letter):
            try:
                image = decode(file)[:1]
            except ValueError:
                broken.append(file)
                continue
            images.append(image)
            labels.append(label)
    if not images:
        raise ValueError(f"{homes[0]}: no image could be decoded")
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        warnings.warn(f"{homes[0]}: left out {len(broken)} broken files: {', '.join(broken[:3])}{more}", stacklevel=2)
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{homes[0]}: images of several sizes: {sorted({tuple(i.shape) for i in images})}")
    return ImageSet(torch.stack(images), torch.tensor(labels), LETTERS, f"{folder.resolve().name}/{split}")
