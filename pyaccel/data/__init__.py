"""Images, their order and their batches: readers of the standard layouts, two packaged sets, crop/flip/normalise."""

from __future__ import annotations

from .augment import CIFAR_MEAN, CIFAR_STD, Augment
from .batches import Batch, Batches
from .images import ImageFolder, ImageSet
from .order import epoch_order
from .packaged import digits, digits8
from .published_sets import read_mini_imagenet, read_notmnist, read_svhn
from .readers import read_cifar, read_folder, read_idx, read_npz
from .source import open_images

__all__ = [
    "CIFAR_MEAN", "CIFAR_STD", "Augment", "Batch", "Batches", "ImageFolder", "ImageSet", "digits", "digits8",
    "epoch_order", "open_images", "read_cifar", "read_folder", "read_idx", "read_mini_imagenet", "read_notmnist",
    "read_npz", "read_svhn",
]
