"""A look at a whole data set before a long run: what is in it, what cannot be read, how fast it is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from .images import decoding_threads
from .order import epoch_order


@dataclass(frozen=True)
class Finding:
    """What `check_images` saw of one split.

    looked_at: images that were decoded, of all `images`. faults: what is wrong, image by image, in their order.
    per_class: the smallest and the largest number of images of a class. images_per_second: of `threads` threads.
    """

    name: str
    images: int
    classes: int
    per_class: tuple[int, int]
    shape: tuple[int, ...]
    looked_at: int
    faults: Sequence[str]
    images_per_second: float
    threads: int

    def lines(self) -> list[str]:
        """For people."""
        low, high = self.per_class
        each = f"{low} each" if low == high else f"{low} to {high} each"
        text = [
            f"{self.name}: {self.images} images of {'x'.join(map(str, self.shape))}, {self.classes} classes, {each}",
            f"  read {self.looked_at}: {len(self.faults)} faults, {self.images_per_second:.0f} images/s on "
            f"{self.threads} thread{'s' * (self.threads > 1)}",
        ]
        if low == 0:
            text.append("  a class has no image here")
        return text + [f"  {fault}" for fault in self.faults[:20]] + (
            [f"  and {len(self.faults) - 20} more"] if len(self.faults) > 20 else []
        )  # fmt: skip


def check_images(images: Dataset, *, sample: int | None = None) -> Finding:
    """Read every image (or `sample` of them, chosen fairly and always the same), and count classes.

    images: an `ImageSet`, `ImageFolder` or the like, with `labels`, `classes`, `shape`, `name`.
    """
    whole = sample is None or sample >= len(images)
    ids = range(len(images)) if whole else epoch_order(len(images), 0, 0)[:sample].tolist()
    threads = decoding_threads()

    def fault(i: int) -> str | None:
        try:
            images[i]
        except (ValueError, OSError) as error:
            return str(error)
        return None

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        faults = [text for text in pool.map(fault, ids) if text is not None]
    seconds = max(time.perf_counter() - started, 1e-9)
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    return Finding(images.name, len(images), len(images.classes), (int(counts.min()), int(counts.max())),
                   tuple(images.shape), len(ids), faults, len(ids) / seconds, threads)  # fmt: skip
