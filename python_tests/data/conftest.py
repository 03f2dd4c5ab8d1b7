from __future__ import annotations

import importlib.util
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pyaccel.data import ImageSet


@pytest.fixture
def image_set():
    """Makes a set of random images whose label is the position modulo 10."""

    def make(n, channels=3, side=8):
        pixels = np.random.default_rng(n).integers(0, 256, (n, channels, side, side), dtype=np.uint8)
        return ImageSet(torch.from_numpy(pixels), torch.arange(n) % 10, "0123456789", "random")

    return make


@pytest.fixture
def idx_bytes():
    """The bytes of an IDX file of unsigned bytes, magic and shape overridable to make wrong ones."""

    def make(array, magic=None, shape=None):
        shape = array.shape if shape is None else shape
        magic = 0x800 + array.ndim if magic is None else magic
        return struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.astype(np.uint8).tobytes()

    return make


@pytest.fixture
def image_tree():
    """Writes images, {"relative/path.png": (height, width)}, each of one colour that tells its number."""

    Image = pytest.importorskip("PIL.Image")

    def make(root, sizes):
        for number, (name, (height, width)) in enumerate(sizes.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), (number, 2 * number, 255 - number)).save(path)
        return root

    return make


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """Unpacks a real data set with the script beside it, each once; skips where that folder is absent.

    thin: keep every thin-th file of a packed JPEG set, since 60,000 of them take long.
    """
    home = Path(os.environ.get("PYACCEL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    done = {}

    def unpack(name, thin=1):
        pytest.importorskip("PIL")
        script = home / "unpack.py"
        if not script.exists():
            pytest.skip(f"no real data at {home}; set PYACCEL_TEST_DATA")
        if name not in done:
            spec = importlib.util.spec_from_file_location("unpack_real_data", script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            jpegs = module.jpegs

            def thinned(packed):
                arrays, files = jpegs(packed)
                return {**arrays, "labels": arrays["labels"][::thin]}, files[::thin]

            if thin > 1:
                module.jpegs = thinned
            done[name] = tmp_path_factory.mktemp(name)
            module.known[name](done[name])
        return done[name]

    unpack.home = home
    return unpack
