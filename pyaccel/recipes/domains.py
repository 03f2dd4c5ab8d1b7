"""Domains of adaptation: images of folders, brought to one size and number of channels; a shifted copy of digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from pyaccel.data import digits8, epoch_order, open_images, read_folder
from pyaccel.data.images import ImageFolder, ImageSet
from pyaccel.data.order import philox_words
from pyaccel.data.readers import listing, subfolders
from pyaccel.recipes.classifier import Images, split

SHIFTED = "digits8->shifted"  # the packaged pair: see `shifted_digits`
ANGLE, CONTRAST, NOISE = 0.45, 0.7, 0.1  # radians, factor, deviation of the noise for pixels in [0, 1]


@dataclass(frozen=True)
class Domain:
    """Images to train on and to test on; the same ones where the whole set is adapted to and tested on."""

    name: str
    train: Images
    test: Images


def open_pair(home: Path | None, pair: str, size: int, *, whole_target: bool) -> tuple[Domain, Domain]:
    """Source and target of `source->target`, folders in `home`, with the same classes, size and channels.

    whole_target: adapt to and test on all images of the target (as the paper); else on its own two parts.
    """
    if pair == SHIFTED:
        return shifted_digits()
    names = [name.strip() for name in pair.split("->")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"pairs: expected source->target, two folders in the data folder, got {pair!r}")
    source, target = (_parts(Path(home) / name, size) for name in names)
    channels = max(source[0].shape[0], target[0].shape[0])
    source, target = ([_same(images, size, channels) for images in parts] for parts in (source, target))
    if len(source[0].classes) != len(target[0].classes):
        raise ValueError(
            f"{pair}: {len(source[0].classes)} and {len(target[0].classes)} classes; adaptation needs the same ones"
        )
    if whole_target and len(target) == 2:
        target = [_together(*target)]
    if len(source) == 1:  # no test part of its own: nine tenths to train on
        source = list(split(source[0], max(1, len(source[0]) // 10)))
    return Domain(names[0], source[0], source[1]), Domain(names[1], target[0], target[-1])


def _parts(folder: Path, size: int) -> list[Images]:
    """The training and test part of a folder, or one part where it has no split; Office-31 keeps classes in images/."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; found {listing(folder.parent)}")
    folder = folder / "images" if subfolders(folder) == ["images"] else folder
    if subfolders(folder) and not {"train", "val", "test"} & set(subfolders(folder)):
        return [read_folder(folder, "all", size)]
    if (folder / "train").is_dir():
        return [read_folder(folder, part, size) for part in ("train", "test")]
    return [open_images(folder, part) for part in ("train", "test")]


def _same(images: Images, size: int, channels: int) -> Images:
    """Sets in memory resized to size x size (antialiased), grey repeated; folders are read that way already."""
    if isinstance(images, ImageFolder):
        return images
    pixels = images.images
    if images.shape[1:] != (size, size):
        pixels = (
            F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        )
    return ImageSet(pixels.expand(-1, channels, -1, -1).contiguous(), images.labels, images.classes, images.name)


def _together(first: Images, second: Images) -> Images:
    labels = torch.cat([first.labels, second.labels])
    name = first.name.rsplit("/", 1)[0] + "/all"
    if isinstance(first, ImageFolder):
        return ImageFolder([*first.files, *second.files], labels, first.classes, name, first.size)
    return ImageSet(torch.cat([first.images, second.images]), labels, first.classes, name)


def in_memory(domain: Domain) -> Domain:
    """Image folders decoded once; only for few or small images."""

    def held(images: Images) -> ImageSet:
        return (
            images
            if isinstance(images, ImageSet)
            else ImageSet(*images.batch(range(len(images))), images.classes, images.name)
        )

    train = held(domain.train)
    return Domain(domain.name, train, train if domain.test is domain.train else held(domain.test))


def shifted_digits() -> tuple[Domain, Domain]:
    """scikit-learn's 8x8 digits: 900 as they are, and the other 897 turned by 0.45 rad, contrast 0.7, noise 0.1.

    The deterministic shift of the specification's own small test. Noise: normal, from counters, one value a pixel.
    """
    parts = [digits8(part) for part in ("train", "test")]
    digits = _together(*parts)
    order = epoch_order(len(digits), 0, 0)
    source, target = digits.subset(order[:900]), digits.subset(order[900:])
    cosine, sine = math.cos(ANGLE), math.sin(ANGLE)
    turn = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]]).expand(len(target), 2, 3)
    grid = F.affine_grid(turn, list(target.images.shape), align_corners=False)
    pixels = CONTRAST * F.grid_sample(target.images.float() / 255, grid, align_corners=False)
    words = torch.from_numpy(philox_words(2 * pixels.numel(), 0, 0, 3).astype("float64") / 2**64).view(2, -1)
    noise = (-2 * words[0].clamp_min(1e-300).log()).sqrt() * (2 * math.pi * words[1]).cos()
    pixels = (pixels + NOISE * noise.float().view(pixels.shape)).clamp(0, 1)
    images = (255 * pixels).round().byte()
    moved = ImageSet(images, target.labels, target.classes, "digits8 shifted")
    train, test = split(source, 90)
    return Domain("digits8", train, test), Domain("shifted", moved, moved)
