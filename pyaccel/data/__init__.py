"""Images and event recordings, their order and their batches: readers of the standard layouts, packaged sets, crops."""

from __future__ import annotations

from .augment import CIFAR_MEAN, CIFAR_STD, Augment
from .batches import Batch, Batches
from .events import Events, bin_events
from .events_files import read_aedat, read_dat, read_events, read_events_npz, read_nmnist
from .events_folder import EventFolder, open_events
from .events_mat import read_stmnist
from .images import ImageFolder, ImageSet
from .order import epoch_order
from .packaged import digits, digits8
from .published_sets import read_mini_imagenet, read_notmnist, read_svhn
from .readers import read_cifar, read_folder, read_idx, read_npz
from .shards import read_shards
from .source import open_images
from .window import Window

__all__ = [
    "CIFAR_MEAN", "CIFAR_STD", "Augment", "Batch", "Batches", "EventFolder", "Events", "ImageFolder", "ImageSet",
    "bin_events", "digits", "digits8", "epoch_order", "open_events", "open_images", "read_aedat", "read_cifar",
    "read_dat", "read_events", "read_events_npz", "read_folder", "read_idx", "read_mini_imagenet", "read_nmnist",
    "read_notmnist", "read_npz", "read_shards", "read_stmnist", "read_svhn", "Window",
]
