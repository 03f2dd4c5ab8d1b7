"""Batches of an epoch: the same images in the same order for every world size, from any batch on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .images import ImageFolder
from .order import epoch_order

PREFETCH = 2  # Batches made ahead by the background thread: one ready, one in the making.


class Batch(NamedTuple):
    """images float32 [B, C, H, W], of recordings [B, T, 2, H, W]; labels int64 [B]; sample_ids int64 [B], the positions in the data set."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor


class Batches:
    """Cuts the epochs of a data set into batches, in an order that depends on (seed, epoch) alone.

    dataset: an `ImageSet`, an `ImageFolder`, an `EventFolder`, or any Dataset with a length whose items are (tensor [C, H, W], label).
    batch_size: images of one global batch, over all ranks; rank r of `world` gets the r-th of `world` slices of it, so
    the ranks together see what one process would. shuffle: in the order of `epoch_order`, else as stored.
    drop_last: leave out a last batch that is not full; kept, its slices may differ by one image or be empty.
    augment: applied to uint8 images; None only scales them to [0, 1] (a data set's `white` says what becomes 1, where
    it is not 255). Images of another dtype come as float32, otherwise unchanged, and allow no augment.
    ValueError: batch_size not a multiple of world, rank outside 0..world-1, or no full batch where drop_last wants one.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool, drop_last: bool,
                 augment: Augment | None = None, rank: int = 0, world: int = 1):
        if not 0 <= rank < world:
            raise ValueError(f"Batches: rank must be in 0..world-1, got rank {rank}, world {world}")
        if batch_size < 1 or batch_size % world:
            raise ValueError("Batches: batch_size counts all ranks and must be a positive multiple of "
                             f"world ({world}), got {batch_size}")
        if drop_last and 0 < len(dataset) < batch_size:
            raise ValueError(f"Batches: {len(dataset)} images make no full batch of {batch_size} and drop_last is set; "
                             "choose a smaller batch_size or drop_last=False")
        if augment is not None and augment.resized_crop is not None and not isinstance(dataset, ImageFolder):
            raise TypeError("Batches: resized_crop works on images decoded from files (ImageFolder), got "
                            f"{type(dataset).__name__}; use crop_padding")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last, self.augment = shuffle, drop_last, augment
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Batches an epoch, the same for every rank."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """This rank's slices of the batches of one epoch, from number `first_batch` on (for a resumed run).

        A background thread prepares two batches ahead; its errors are raised here, and it ends with the iterator.
        """
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"Batches: first_batch must be in 0..{len(self)}, got {first_batch}")
        n = len(self.dataset)
        order = epoch_order(n, self.seed, epoch) if self.shuffle else torch.arange(n)
        slices = (self._slice(order, number) for number in range(first_batch, len(self)))
        return _prefetch(lambda ids: self._make(ids, epoch), slices)

    def _slice(self, order: Tensor, number: int) -> Tensor:
        ids = order[number * self.batch_size:(number + 1) * self.batch_size]
        start, stop = (len(ids) * rank // self.world for rank in (self.rank, self.rank + 1))
        return ids[start:stop]

    def _make(self, ids: Tensor, epoch: int) -> Batch:
        boxes = self.augment.boxes(ids, self.seed, epoch, len(self.dataset)) if self.augment is not None else None
        images, labels = _fetch(self.dataset, ids) if boxes is None else self.dataset.batch(ids, boxes)
        if images.dtype is torch.uint8 or self.augment is not None:
            white = getattr(self.dataset, "white", 255)
            images = (self.augment or Augment())(images, ids, self.seed, epoch, len(self.dataset), white)
        return Batch(images.to(torch.float32), labels, ids)


def _fetch(dataset: Dataset, ids: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(dataset, "batch"):
        return dataset.batch(ids)
    items = [dataset[i] for i in ids.tolist() or [0]]  # An empty slice still needs the shape of an image.
    images = torch.stack([image for image, _ in items])
    labels = torch.tensor([int(label) for _, label in items], dtype=torch.int64)
    return images[:len(ids)], labels[:len(ids)]


def _prefetch(make: Callable[[Tensor], Batch], inputs: Iterator[Tensor]) -> Iterator[Batch]:
    """make(x) for x in inputs, in order, computed by one thread at most PREFETCH results ahead."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="pyaccel-batches")
    pending = deque()
    try:
        for item in inputs:
            pending.append(pool.submit(make, item))
            if len(pending) > PREFETCH:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
