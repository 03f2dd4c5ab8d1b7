"""Windows of larger images: uniform places, flips, one draw a sample, the middle in evaluation."""

from __future__ import annotations

import pytest
import torch

from pyaccel.data import Batches, Window


def coordinates(n, height=12, width=10):
    """Images whose first channel is the row and second the column, so that a window tells where it was cut."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return torch.stack([rows, columns]).expand(n, 2, height, width)


def test_places_are_uniform_and_flips_even():
    n = 4000
    cut = (255 * Window(size=7, random=True, flip=True)(coordinates(n), torch.arange(n), 3, 0, n)).round()
    top, left = cut[:, 0, 0, 0], cut[:, 1].amin((1, 2))
    assert torch.equal(cut[:, 0], top[:, None, None] + torch.arange(7.0)[:, None].expand(7, 7))
    assert top.unique().tolist() == list(range(6)) and left.unique().tolist() == list(range(4))
    assert (torch.bincount(top.long()) / n - 1 / 6).abs().max() < 0.025
    assert (torch.bincount(left.long()) / n - 1 / 4).abs().max() < 0.03
    mirrored = cut[:, 1, 0, 0] > cut[:, 1, 0, 1]
    assert abs(float(mirrored.float().mean()) - 0.5) < 0.03


def test_a_draw_belongs_to_its_sample_and_epoch():
    window, images = Window(size=7, random=True, flip=True), coordinates(20)
    whole = window(images, torch.arange(20), 1, 4, 20)
    part = window(images[[3, 17]], torch.tensor([3, 17]), 1, 4, 20)
    assert torch.equal(part, whole[[3, 17]])
    assert not torch.equal(window(images, torch.arange(20), 1, 5, 20), whole)
    assert not torch.equal(window(images, torch.arange(20), 2, 4, 20), whole)


def test_the_middle_and_normalisation():
    cut = 255 * Window(size=7)(coordinates(2), torch.arange(2), 0, 0, 2)
    assert cut[0, 0, 0, 0].round() == 2 and cut[0, 1, 0, 0].round() == 1 and cut.shape == (2, 2, 7, 7)
    found = Window(size=10, mean=(0.5, 0.5), std=(0.1, 0.2))(coordinates(1), torch.arange(1), 0, 0, 1)
    assert found[0, 1, 0, 9] == pytest.approx((9 / 255 - 0.5) / 0.2)
    assert Window(size=5)(coordinates(0), torch.arange(0), 0, 0, 1).shape == (0, 2, 5, 5)


def test_batches_take_it_and_small_images_are_refused(image_set):
    batch = next(
        iter(Batches(image_set(6), 3, shuffle=True, drop_last=True, augment=Window(size=5, random=True)).epoch(0))
    )
    assert batch.images.shape == (3, 3, 5, 5) and batch.images.dtype == torch.float32
    with pytest.raises(ValueError, match="images of 12x10 are smaller than the window of 11x11"):
        Window(size=11)(coordinates(1), torch.arange(1), 0, 0, 1)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        Window(size=0)
