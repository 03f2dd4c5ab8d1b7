"""A window cut from larger images: at random in training, from the middle in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Augment
from .order import AUGMENT, philox_words


@dataclass(frozen=True)
class Window(Augment):
    """`Augment` after cutting a window: uint8 images `[B, C, H, W]` to float32 `[B, C, size, size]`.

    random: the window's place is uniform, else it is the middle, rounded down. The usual ImageNet recipe: images
    resized to 256, windows of 224. The draw of a sample depends on (seed, epoch, sample id) alone.
    ValueError for images smaller than the window.
    """

    size: int = 224
    random: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"Window: size must be at least 1 pixel, got {self.size}")

    def __call__(self, images: Tensor, sample_ids: Tensor, seed: int, epoch: int, n: int, white: int = 255) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.size:
            raise ValueError(
                f"Window: images of {height}x{width} are smaller than the window of {self.size}x{self.size}"
            )
        rooms = (height - self.size, width - self.size)
        if self.random:
            words = torch.from_numpy(philox_words(n, seed, epoch, AUGMENT).view("int64")).index_select(
                0, sample_ids.cpu()
            )
            # Bits 0-23 choose the row and 24-47 the column; bit 48, the flip, is `Augment`'s.
            top, left = (
                (words >> shift & 0xFFFFFF) * (room + 1) >> 24 for shift, room in zip((0, 24), rooms, strict=True)
            )
        else:
            top, left = (torch.full((len(images),), room // 2) for room in rooms)
        cut = images.new_empty(*images.shape[:-2], self.size, self.size)
        for i, (t, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
            cut[i] = images[i, ..., t : t + self.size, x : x + self.size]
        return super().__call__(cut, sample_ids, seed, epoch, n, white)
