"""Labelled event recordings: folders of them, decoded and binned into frames when asked for."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .events import BINNINGS, Events, bin_events
from .events_files import READERS, Sensor, read_events
from .images import Indices, as_index, check_labels, decoding_threads
from .readers import check_split, listing, subfolders

SPLITS = {"train": ("train", "Train"), "test": ("test", "Test")}
SUFFIXES = tuple(READERS)


class EventFolder(Dataset):
    """Recordings decoded from files when asked for. Item i: (frames uint8 [steps, 2, H, W], label int).

    files: N paths; labels: int64 [N]; steps, by: as in `bin_events`. Counts above 255 in one pixel and step are stored
    as 255. sensor: (height, width); None: what the first file or its format says. Errors name the file.
    `Batches` makes float32 [B, steps, 2, H, W] of it, a count n being n (`white` = 1), with the crops and flips of
    `Augment` the same for all steps of a recording.
    """

    white = 1  # what `Augment` divides by: counts stay counts

    def __init__(self, files: Sequence[str | os.PathLike], labels: Tensor, classes: Sequence[str], name: str, *,
                 steps: int, by: str = "time", sensor: Sensor = None):
        check_labels(labels, len(files), len(classes), name)
        if steps < 1 or by not in BINNINGS:
            raise ValueError(f"{name}: expected at least one step and by one of {', '.join(BINNINGS)}, got {steps}, "
                             f"{by!r}")
        if sensor is None:
            if not files:
                raise ValueError(f"{name}: no files, so the size of the sensor is unknown; give sensor")
            first = read_events(files[0])
            sensor = first.height, first.width
        self.files = [os.fspath(file) for file in files]
        self.labels, self.classes, self.name = labels, tuple(classes), name
        self.steps, self.by, self.sensor = steps, by, tuple(sensor)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(2, height, width) of every step."""
        return (2, *self.sensor)

    def __len__(self) -> int:
        return len(self.files)

    def events(self, i: int) -> Events:
        """Recording i."""
        return read_events(self.files[i], self.sensor)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return bin_events(self.events(i), self.steps, self.by).clamp_(max=255).to(torch.uint8), int(self.labels[i])

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The frames (uint8 [B, steps, 2, H, W]) and labels (int64 [B]) at `indices`."""
        index = as_index(indices, len(self))
        frames = torch.empty(len(index), self.steps, *self.shape, dtype=torch.uint8)

        def fill(row: int, i: int) -> None:
            frames[row] = self[i][0]

        with ThreadPoolExecutor(decoding_threads()) as pool:
            for _ in pool.map(fill, range(len(index)), index.tolist()):
                pass  # Iterating is what raises the error of a worker.
        return frames, self.labels.index_select(0, index)

    def subset(self, indices: Indices) -> EventFolder:
        """The recordings at `indices` (integers, or a mask of N booleans), in that order; nothing is decoded."""
        index, part = as_index(indices, len(self)), copy.copy(self)
        part.files, part.labels = [self.files[i] for i in index.tolist()], self.labels.index_select(0, index)
        return part


def open_events(path: str | os.PathLike, split: str, *, steps: int, by: str = "time",
                sensor: Sensor = None) -> EventFolder:
    """One split ("train", "test", "all") of a folder of recordings, each in the folder of its class.

    N-MNIST: `Train/CLASS/x.bin`, `Test/CLASS/x.bin`, either case. CIFAR10-DVS and others without a split:
    `CLASS/x.aedat`; no split of it is official, so "train" is the first nine tenths of each class in the order of the
    numbers in their names, "test" the rest, as the name of the result shows, and "all" is all of them.
    steps, by: of `bin_events`; sensor as in `read_events`. Recordings: .bin .bs2 .dat .aedat .mat .npz, one kind a data
    set. FileNotFoundError; ValueError for a missing split, an empty class folder, or different classes of the splits.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    homes = {name: folder / place for name, places in SPLITS.items() for place in places if subfolders(folder / place)}
    whole = folder.resolve().name
    if homes:
        check_split(split, homes, folder)
        classes = subfolders(homes.get("train", homes[split]))
        unknown = [name for name in subfolders(homes[split]) if name not in classes]
        if unknown:
            raise ValueError(f"{homes[split] / unknown[0]}: class {unknown[0]!r} is not among those of "
                             f"{homes['train']}")
        home, keep, name = homes[split], lambda files: files, f"{whole}/{split}"
    else:
        check_split(split, (*SPLITS, "all"), folder)
        classes, home = subfolders(folder), folder
        keep, name = _tenths(split), whole if split == "all" else f"{whole}/{split} (tenths of each class)"
    if not classes:
        raise ValueError(f"{folder}: expected class folders with recordings ({' '.join(SUFFIXES)}), or those in Train/ "
                         f"and Test/; found {listing(folder)}")
    files, labels = [], []
    for label, place in enumerate(home / name for name in classes):
        found = recordings(place)
        if not found:
            raise ValueError(f"{place}: expected recordings ({' '.join(SUFFIXES)}) in this class folder, found "
                             f"{listing(place)}")
        found = keep(found)
        files, labels = files + found, labels + [label] * len(found)
    kinds = sorted({Path(file).suffix.lower() for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{home}: expected recordings of one kind, found {' '.join(kinds)}")
    return EventFolder(files, torch.tensor(labels, dtype=torch.int64), classes, name, steps=steps, by=by, sensor=sensor)


def recordings(folder: Path) -> list[str]:
    """Paths of the recordings directly in `folder`, hidden ones left out, numbers in their names in order of size."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries
                 if entry.name.lower().endswith(SUFFIXES + (".aedat4",)) and not entry.name.startswith(".")]

    def by_number(name: str) -> list:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]

    return [str(folder / name) for name in sorted(names, key=by_number)]


def _tenths(split: str) -> Callable[[list[str]], list[str]]:
    """What a split keeps of the sorted files of a class."""

    def keep(files: list[str]) -> list[str]:
        first = len(files) * 9 // 10
        return {"all": files, "train": files[:first], "test": files[first:]}[split]

    return keep
