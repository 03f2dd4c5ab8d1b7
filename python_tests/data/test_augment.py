from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel.data import CIFAR_MEAN, CIFAR_STD, Augment
from pyaccel.data.order import AUGMENT, philox_words


def one_by_one(augment, images, ids, seed, epoch, n):
    """The same in numpy, an image at a time."""
    words, p = philox_words(n, seed, epoch, AUGMENT), augment.crop_padding
    result = []
    for image, i in zip(images.numpy(), ids.tolist()):
        word, (c, h, w) = int(words[i]), image.shape
        padded = np.zeros((c, h + 2 * p, w + 2 * p), np.uint8)
        padded[:, p:p + h, p:p + w] = image
        top = (word & 0xFFFFFF) * (2 * p + 1) // 2**24
        left = (word >> 24 & 0xFFFFFF) * (2 * p + 1) // 2**24
        cut = padded[:, top:top + h, left:left + w]
        if augment.flip and word >> 48 & 1:
            cut = cut[:, :, ::-1]
        pixels = cut.astype(np.float32) / np.float32(255)
        if augment.mean is not None:
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (augment.mean, augment.std))
            pixels = (pixels - mean) / std
        result.append(pixels)
    return torch.from_numpy(np.stack(result)) if result else torch.empty(images.shape)


AUGMENTS = [Augment(), Augment(4, True, CIFAR_MEAN, CIFAR_STD), Augment(crop_padding=2), Augment(flip=True),
            Augment(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0)), Augment(crop_padding=9, flip=True)]


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
@pytest.mark.parametrize("shape", [(40, 3, 8, 8), (7, 3, 5, 12), (0, 3, 8, 8), (1, 3, 1, 1)], ids=str)
def test_equals_the_same_one_by_one(image_set, augment, shape):
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    ids = torch.arange(100, 100 - shape[0], -1)
    before = images.clone()
    result = augment(images, ids, 5, 2, 200)
    assert result.dtype == torch.float32 and result.shape == shape and result.is_contiguous()
    assert torch.equal(result, one_by_one(augment, images, ids, 5, 2, 200))
    assert torch.equal(images, before)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 29), max_size=40), st.sampled_from(AUGMENTS), st.integers(0, 2**64 - 1),
       st.integers(0, 99), st.integers(30, 50))
def test_a_sample_does_not_see_its_batch(ids, augment, seed, epoch, n):
    images = torch.arange(30 * 3 * 6 * 6).remainder(251).to(torch.uint8).view(30, 3, 6, 6)
    whole = augment(images, torch.arange(30), seed, epoch, 30)
    ids = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(augment(images[ids], ids, seed, epoch, n), whole[ids])


def test_channels_last_and_strided_images(image_set):
    images, ids, augment = image_set(40).images, torch.arange(20), AUGMENTS[1]
    plain = augment(images[::2].contiguous(), ids, 0, 0, 20)
    assert torch.equal(augment(images[::2], ids, 0, 0, 20), plain)
    assert torch.equal(augment(images[::2].contiguous(memory_format=torch.channels_last), ids, 0, 0, 20), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_a_gpu_gives_the_same_bits(image_set, augment):
    images, ids = image_set(40).images, torch.arange(40)
    result = augment(images.cuda(), ids.cuda(), 5, 2, 40)
    assert result.is_cuda and torch.equal(result.cpu(), augment(images, ids, 5, 2, 40))


def test_seed_and_epoch_matter_and_the_cache_does_not(image_set):
    images, ids, augment = image_set(40).images, torch.arange(40), Augment(4, True)
    keys = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    first = [augment(images, ids, *key, 40) for key in keys]
    for a in range(9):
        for b in range(a):
            assert not torch.equal(first[a], first[b])
    again = [augment(images, ids, *key, 40) for key in reversed(keys)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again)))


def test_every_offset_and_flip_is_equally_likely():
    """The position of one bright pixel shows row offset, column offset and flip of each sample."""
    n, p = 9000, 1
    images = torch.zeros(n, 1, 3, 4, dtype=torch.uint8)
    images[:, 0, 1, 1] = 255
    place = Augment(p, True)(images, torch.arange(n), 0, 0, n).flatten(1).argmax(1)
    rows, columns = place // 4, place % 4  # Row 1 - offset + p; column likewise, or mirrored (3 - column).
    assert torch.bincount(rows).shape == (3,)
    assert (torch.bincount(rows) - n / 3).abs().max() < 5 * (n * 2 / 9) ** 0.5
    expected = torch.tensor([n / 6, n / 3, n / 3, n / 6])  # Unmirrored 0, 1, 2 and mirrored 1, 2, 3.
    assert (torch.bincount(columns) - expected).abs().max() < 5 * (n * 2 / 9) ** 0.5
    joint = torch.bincount(place, minlength=12).view(3, 4)
    assert (joint - expected / 3).abs().max() < 5 * (n / 9) ** 0.5


def test_evaluation_is_not_random(image_set):
    images, augment = image_set(10).images, Augment(mean=CIFAR_MEAN, std=CIFAR_STD)
    a, b = augment(images, torch.arange(10), 0, 0, 10), augment(images, torch.arange(10).flip(0), 7, 8, 10)
    assert torch.equal(a, b)
    assert a[0, 2, 3, 4].item() == pytest.approx((images[0, 2, 3, 4].item() / 255 - 0.4465) / 0.2010, rel=1e-6)


def test_scaling_reaches_both_ends():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    assert torch.equal(Augment()(images, torch.arange(3), 0, 0, 3).flatten(), torch.tensor([0.0, 0.2, 1.0]))


def test_constants():
    assert CIFAR_MEAN == (0.4914, 0.4822, 0.4465) and CIFAR_STD == (0.2023, 0.1994, 0.2010)


IMAGES, IDS = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: Augment(crop_padding=-1), ValueError, "crop_padding must be 0 or a positive number of pixels, got -1"),
    (lambda: Augment(mean=(0.5,)), ValueError,
     r"give mean and std for the same channels, or neither; got \(0.5,\) and None"),
    (lambda: Augment(mean=(0.5,), std=(1.0, 1.0)), ValueError, "give mean and std for the same channels, or neither"),
    (lambda: Augment(mean=(0.5,), std=(0.0,)), ValueError, r"std must be positive, got \(0.0,\)"),
    (lambda: Augment()(IMAGES / 255, IDS, 0, 0, 2), TypeError, "images must be uint8, got torch.float32"),
    (lambda: Augment()(IMAGES[0], IDS, 0, 0, 2), ValueError,
     r"expected images \[B, C, H, W\] or \[B, T, C, H, W\] and sample_ids \[B\], got \(1, 4, 4\)"),
    (lambda: Augment()(IMAGES, IDS[:1], 0, 0, 2), ValueError, r"got \(2, 1, 4, 4\) and \(1,\)"),
    (lambda: Augment(mean=CIFAR_MEAN, std=CIFAR_STD)(IMAGES, IDS, 0, 0, 2), ValueError,
     "mean and std are for 3 channels, images have 1"),
    (lambda: Augment(flip=True)(IMAGES, IDS + 1, 0, 0, 2), IndexError, "out of range"),
    (lambda: Augment(flip=True)(IMAGES, IDS - 1, 0, 0, 2), IndexError, "out of range"),
])
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
