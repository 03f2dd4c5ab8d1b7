"""Images in tar files, as WebDataset writes them: few large files where a file system would choke on millions."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .images import ImageFolder, decoding_threads
from .readers import IMAGE_SUFFIXES, Source, check_split, listing

SPLITS = {"train": ("train",), "test": ("test", "val", "validation"), "val": ("val", "validation")}


class Member(NamedTuple):
    """An image inside a tar file: where its bytes are."""

    shard: str
    name: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


def shard_files(folder: Source, split: str) -> list[Path]:
    """The tar files of a split: those in the folder of its name, else those with its name in theirs; sorted."""
    folder = Path(folder)
    for word in SPLITS.get(split, (split,)):
        if found := sorted((folder / word).glob("*.tar")):
            return found
        if found := [file for file in sorted(folder.glob("*.tar")) if re.search(rf"(^|[^a-z]){word}([^a-z]|$)", file.stem)]:
            return found
    return sorted(folder.glob("*.tar")) if split == "all" else []


def read_shards(folder: Source, split: str, size: int | None = None, **options) -> ImageFolder:
    """Images of tar shards, decoded lazily: `train/*.tar` or `*train*.tar`, members `key.jpg` with their label `key.cls`.

    The label is an integer in text; class names are the lines of `classes.txt` beside the shards, else the numbers.
    The headers are read once; where the images lie is kept in the user's cache folder and checked against size and time
    of each shard. size, options: as of `ImageFolder`.
    FileNotFoundError; ValueError for a missing split, a damaged shard, an image without a label or the reverse.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    shards = shard_files(folder, split)
    if not shards:
        check_split(split, [name for name in (*SPLITS, "all") if shard_files(folder, name)], folder)
    with ThreadPoolExecutor(decoding_threads()) as pool:  # one a shard: it mostly waits for the disk
        indices = list(pool.map(_index, shards))
    members, labels = [], []
    for shard, (names, places, numbers) in zip(shards, indices, strict=True):
        members += [Member(str(shard), name, *place) for name, place in zip(names, places.tolist(), strict=True)]
        labels.append(numbers)
    found = torch.from_numpy(np.concatenate(labels))
    classes = _classes(folder, shards[0].parent, int(found.max()) + 1 if len(found) else 0)
    return ImageFolder(members, found, classes, f"{folder.resolve().name}/{split}", size, **options)


def _classes(folder: Path, home: Path, count: int) -> Sequence[str]:
    for place in (folder, home):
        if (place / "classes.txt").exists():
            return (place / "classes.txt").read_text(encoding="utf-8").splitlines()
    return [str(i) for i in range(count)]


def _index(shard: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, (offset, size) int64 [N, 2] and labels int64 [N] of the images of a shard."""
    state = shard.stat()
    digest = hashlib.sha256(f"{shard.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyaccel" / "shards"
    try:
        with np.load(home / f"{digest}.npz", allow_pickle=False) as kept:
            return kept["names"].tolist(), kept["places"], kept["labels"]
    except (OSError, ValueError, KeyError):
        pass  # not there, or damaged: it is made anew
    names, places, labels = _scan(shard)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, suffix=".npz", delete=False) as file:
            np.savez(file, names=np.array(names, dtype=np.str_), places=places, labels=labels)
        os.replace(file.name, home / f"{digest}.npz")
    except OSError:
        pass  # a cache that cannot be written saves no time next time, and harms nothing
    return names, places, labels


def _scan(shard: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, suffix = os.path.splitext(member.name)
                if not member.isfile():
                    continue
                if suffix.lower() in IMAGE_SUFFIXES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == ".cls":
                    labels[key] = int(archive.extractfile(member).read())
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{shard}: not a sound tar file of images and .cls labels ({error}); fetch it again") from error
    end = max((offset + size for _, offset, size in images.values()), default=0)
    if end > shard.stat().st_size:
        raise ValueError(f"{shard}: truncated: its last image ends at byte {end} of {shard.stat().st_size}")
    if images.keys() != labels.keys() or not images:
        odd = sorted(images.keys() ^ labels.keys())[:3]
        raise ValueError(f"{shard}: expected an image and a .cls label for every key, got {len(images)} images and "
                         f"{len(labels)} labels{'; alone is ' + ', '.join(odd) if odd else ''}; found in its folder: "
                         f"{listing(shard.parent)}")  # fmt: skip
    keys = list(images)
    places = np.array([images[key][1:] for key in keys], dtype=np.int64)
    return [images[key][0] for key in keys], places, np.array([labels[key] for key in keys], dtype=np.int64)
