"""The sequences of tasks of 2009.01956: one data set cut by classes, or several data sets, in the published order."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F

from pyaccel.data import open_images, read_mini_imagenet, read_notmnist, read_svhn
from pyaccel.data.images import ImageFolder, ImageSet
from pyaccel.recipes.classifier import Images

SIDE = 32  # of the images of several data sets: smaller ones are padded with black on all sides
# Mean and deviation of each channel of the padded images, as in the published code; usps: of this library.
STATISTICS = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "notmnist": ((0.4254,) * 3, (0.4501,) * 3),
    "mnist": ((0.1,) * 3, (0.2752,) * 3),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "fashion_mnist": ((0.2190,) * 3, (0.3318,) * 3),
    "usps": ((0.0635,) * 3, (0.2213,) * 3),
}
READERS = {"svhn": read_svhn, "notmnist": read_notmnist}
FIVE_SETS = ("cifar10", "notmnist", "mnist", "svhn", "fashion_mnist")  # numbered 1..5 in the published code


@dataclass(frozen=True)
class Task:
    """One task: labels 0..len(classes)-1, and the statistics that its images are normalised with."""

    name: str
    train: Images
    test: Images
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @property
    def classes(self) -> int:
        return len(self.train.classes)


def order(count: int, seed: int) -> list[int]:
    """The order in which tasks 0..count-1 are learned: Python's shuffle of their numbers, seeded (official code)."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def split_by_class(train: Images, test: Images, tasks: int, mean, std) -> list[Task]:
    """Task k (from 0) has the classes kn .. kn + n - 1, n = classes / tasks, relabelled from 0."""
    count, rest = divmod(len(train.classes), tasks)
    if rest or count < 2:
        raise ValueError(
            f"tasks: {len(train.classes)} classes cannot be cut into {tasks} tasks of equally many, at least 2"
        )
    made = []
    for k in range(tasks):
        first = k * count
        parts = [_classes(images, first, count) for images in (train, test)]
        made.append(Task(f"classes {first}-{first + count - 1}", *parts, mean, std))
    return made


def mini_imagenet(folder: str | os.PathLike, tasks: int, mean, std) -> list[Task]:
    return split_by_class(read_mini_imagenet(folder, "train"), read_mini_imagenet(folder, "test"), tasks, mean, std)


def several_sets(home: str | os.PathLike, names: Sequence[str]) -> list[Task]:
    """One task a data set: the folders `names` in `home`, each in its own layout, padded to 32x32, three channels."""
    unknown = [name for name in names if name not in STATISTICS]
    if unknown:
        raise ValueError(f"sets: expected some of {', '.join(STATISTICS)}, got {', '.join(unknown)}")
    made = []
    for name in names:
        place = Path(home) / name
        if not place.is_dir():
            raise FileNotFoundError(
                f"{place}: no such folder; this protocol reads one folder a data set, {', '.join(names)}, in {home}; "
                "choose others with sets"
            )
        train, test = (_square(READERS.get(name, open_images)(place, part)) for part in ("train", "test"))
        made.append(Task(name, train, test, *STATISTICS[name]))
    return made


def in_memory(images: Images) -> ImageSet:
    """The images decoded once: for one task of an image folder, which is read in every epoch."""
    if isinstance(images, ImageSet):
        return images
    return ImageSet(*images.batch(range(len(images))), images.classes, images.name)


def _classes(images: Images, first: int, count: int) -> Images:
    part = images.subset((images.labels >= first) & (images.labels < first + count))
    names = images.classes[first : first + count]
    if isinstance(part, ImageFolder):
        part.labels, part.classes = part.labels - first, names
        return part
    return ImageSet(part.images, part.labels - first, names, part.name)


def _square(images: Images) -> ImageSet:
    if isinstance(images, ImageFolder):
        images = in_memory(images)
    height, width = images.shape[1:]
    if max(height, width) > SIDE:
        raise ValueError(f"{images.name}: images of {height}x{width}; this protocol takes up to {SIDE}x{SIDE}")
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    pixels = F.pad(images.images, (left, SIDE - width - left, top, SIDE - height - top))
    return ImageSet(pixels.expand(-1, 3, -1, -1).contiguous(), images.labels, images.classes, images.name)
