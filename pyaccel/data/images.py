"""Labelled images: held in memory, or decoded from files when asked for. Both hand out batches of uint8."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .decode import Box, decode

Indices = Sequence[int] | np.ndarray | Tensor


class ImageSet(Dataset):
    """Images in memory. Item i: (image uint8 [C, H, W], label int).

    images: uint8 [N, C, H, W]; labels: int64 [N], each in 0..len(classes)-1; name: what reports call the set.
    TypeError for another dtype, ValueError for another shape, unequal counts or a label out of range.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], name: str):
        if images.dtype is not torch.uint8:
            raise TypeError(f"{name}: images must be uint8, got {images.dtype}")
        if images.dim() != 4:
            raise ValueError(f"{name}: images must be [N, C, H, W], got shape {tuple(images.shape)}")
        check_labels(labels, len(images), len(classes), name)
        self.images, self.labels, self.classes, self.name = images, labels, tuple(classes), name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Copies of the images (uint8 [B, C, H, W]) and labels (int64 [B]) at `indices`. IndexError if out of range."""
        index = as_index(indices, len(self))
        return self.images.index_select(0, index), self.labels.index_select(0, index)

    def subset(self, indices: Indices) -> ImageSet:
        """The set's images at `indices` (integers, or a mask of N booleans), in that order; the classes stay."""
        return ImageSet(*self.batch(indices), self.classes, self.name)


class ImageFolder(Dataset):
    """Images decoded from files when asked for, always RGB. Item i: (image uint8 [3, H, W], label int).

    files: N paths (or what else has `read()`, see `shards`); labels: int64 [N]; size: the shorter side is resized to
    `resize` (default: size; bilinear, antialiased) and the centre size x size kept; None: nothing is resized, and every
    image must have the size of the first.
    Decoding runs on the cores this process may use, shared out among the ranks of one machine.
    Errors name the file: FileNotFoundError, ValueError (cannot be decoded, more than 8 bits, unexpected size).
    """

    def __init__(self, files: Sequence[str | os.PathLike], labels: Tensor, classes: Sequence[str], name: str,
                 size: int | None = None, resize: int | None = None):
        check_labels(labels, len(files), len(classes), name)
        if size is not None and size < 1:
            raise ValueError(f"{name}: size must be at least 1 pixel, got {size}")
        if resize is not None and (size is None or resize < size):
            raise ValueError(f"{name}: resize {resize} must be at least size, which is {size}")
        if size is None and not files:
            raise ValueError(f"{name}: no files, so the image size is unknown; give size")
        self.files = [file if hasattr(file, "read") else os.fspath(file) for file in files]
        self.labels, self.classes, self.name, self.size, self.resize = labels, tuple(classes), name, size, resize
        height, width = (size, size) if size is not None else self.decode(0).shape[1:]
        self.shape = (3, height, width)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self.decode(i)
        if image.shape != self.shape:
            raise ValueError(f"{os.fspath(self.files[i])}: expected {self.shape[1]} rows of {self.shape[2]} pixels as in the "
                             f"first image, got {image.shape[1]} of {image.shape[2]}; give size to resize and crop all")
        return image, int(self.labels[i])

    def decode(self, i: int, box: Box | None = None) -> Tensor:
        """Image i as `decode` gives it."""
        file = self.files[i]
        source = file.read() if hasattr(file, "read") else file
        return decode(source, self.size, resize=self.resize, box=box, name=os.fspath(file))

    def batch(self, indices: Indices, boxes: Sequence[Box] | None = None) -> tuple[Tensor, Tensor]:
        """The images (uint8 [B, 3, H, W]) and labels (int64 [B]) at `indices`; of each only its box, with `boxes`."""
        index = as_index(indices, len(self))
        labels = self.labels.index_select(0, index)
        images = torch.empty(len(index), *self.shape, dtype=torch.uint8)

        def fill(row: int, i: int) -> None:
            images[row] = self[i][0] if boxes is None else self.decode(i, boxes[row])

        with ThreadPoolExecutor(decoding_threads()) as pool:
            for _ in pool.map(fill, range(len(index)), index.tolist()):
                pass  # Iterating is what raises the error of a worker.
        return images, labels

    def subset(self, indices: Indices) -> ImageFolder:
        """The folder's images at `indices` (integers, or a mask of N booleans), in that order; nothing is decoded."""
        index, part = as_index(indices, len(self)), copy.copy(self)
        part.files, part.labels = [self.files[i] for i in index.tolist()], self.labels.index_select(0, index)
        return part


def check_labels(labels: Tensor, images: int, classes: int, where: object) -> None:
    """Raise unless `labels` is int64 [images] with values 0..classes-1; the text starts with `where`."""
    if labels.dtype is not torch.int64:
        raise TypeError(f"{where}: labels must be int64, got {labels.dtype}")
    if labels.shape != (images,):
        got = f"{len(labels)} labels" if labels.dim() == 1 else f"labels of shape {tuple(labels.shape)}"
        raise ValueError(f"{where}: expected one label for each of the {images} images, got {got}")
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        first = int(outside[0])
        raise ValueError(f"{where}: label {int(labels[first])} of image {first} is outside 0..{classes - 1} "
                         f"({len(outside)} such labels)")


def as_index(indices: Indices, n: int) -> Tensor:
    """Integers, or the positions where a mask of n booleans is True, as int64 [B]. TypeError, ValueError."""
    index = torch.as_tensor(indices)
    if index.dtype is torch.bool:
        if index.shape != (n,):
            raise ValueError(f"a mask must have one value for each of the {n} images, got shape {tuple(index.shape)}")
        return index.nonzero().flatten()
    if index.is_floating_point() and index.numel():  # An empty list arrives as float32.
        raise TypeError(f"indices must be integers or a mask of booleans, got {index.dtype}")
    return index.to(torch.int64)


def decoding_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
