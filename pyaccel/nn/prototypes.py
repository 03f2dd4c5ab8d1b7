"""An adaptive memory of class prototypes, and pseudo-labels with a filter that has no threshold (2007.01524).

H(x) = -sum_c p_c log(p_c + 1e-10) / log K          normalised self-entropy, 0..1
eta  = max_c min {H(x): argmax p = c}                so that every predicted class has a prototype
M_c  = {F(x): argmax p = c, H(x) <= eta}             the prototypes, at most `capacity` of lowest entropy
s_c(x) = mean over m in M_c of cos(F(x), m)          pseudo-label c1 = argmax s, runner-up c2
keep x where max over M_c1 of (1 - cos) < min over M_c2 of (1 - cos)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Similarities(NamedTuple):
    """Cosines of each point with the prototypes of each class: their mean, largest and smallest, `[B, K]` each."""

    mean: Tensor
    largest: Tensor
    smallest: Tensor


class Chosen(NamedTuple):
    """Rows of the samples chosen, lowest entropy first, one list a class; eta; classes never predicted."""

    rows: list[Tensor]
    threshold: Tensor
    missing: list[int]


def self_entropy(probabilities: Tensor) -> Tensor:
    """H `[N]` of probabilities `[N, K]`: 0 for a certain prediction, 1 for a uniform one (2007.01524)."""
    return -(probabilities * (probabilities + 1e-10).log()).sum(1) / math.log(probabilities.shape[1])


def choose_prototypes(probabilities: Tensor, capacity: int = 100) -> Chosen:
    """Which of N samples are prototypes, from probabilities `[N, K]`: see the equations of this module.

    A class that is never predicted gets the sample with its highest probability; the published code means that and
    picks another one. ValueError for no sample or fewer than two classes.
    """
    if probabilities.dim() != 2 or not len(probabilities) or probabilities.shape[1] < 2:
        raise ValueError(
            f"choose_prototypes: expected probabilities [N, K] of N >= 1 samples and K >= 2 classes, got "
            f"{list(probabilities.shape)}"
        )
    entropy, predicted = self_entropy(probabilities), probabilities.argmax(1)
    classes = probabilities.shape[1]
    lowest = entropy.new_full((classes,), math.inf).scatter_reduce(0, predicted, entropy, "amin")
    threshold = lowest[lowest.isfinite()].max()
    order = entropy.argsort(stable=True)
    order = order[entropy[order] <= threshold]
    rows, missing = [], []
    for c in range(classes):
        own = order[predicted[order] == c][:capacity]
        if not len(own):
            missing.append(c)
            own = probabilities[:, c].argmax().reshape(1)
        rows.append(own)
    return Chosen(rows, threshold, missing)


class PrototypeMemory(nn.Module):
    """The prototypes of K classes, D values each; buffers, so that a checkpoint carries them.

    Attributes:
        unit: prototypes of length 1, `[K, capacity, D]`; a class with fewer repeats them, which changes neither the
            largest nor the smallest cosine.
        centre: mean of the unit prototypes of a class, each once, `[K, D]`. (The published code averages over the
            repeats, which weighs some of them more.)
        counts: prototypes of each class, int64 `[K]`.
        threshold: eta of the last `update`.
    """

    def __init__(self, classes: int, values: int, capacity: int = 100):
        super().__init__()
        if classes < 2 or values < 1 or capacity < 1:
            raise ValueError(
                f"PrototypeMemory: expected at least 2 classes, 1 value and 1 prototype, got {classes}, {values}, "
                f"{capacity}"
            )
        self.capacity = capacity
        self.register_buffer("unit", torch.zeros(classes, capacity, values))
        self.register_buffer("centre", torch.zeros(classes, values))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(()))

    @torch.no_grad()
    def update(self, features: Tensor, probabilities: Tensor) -> Chosen:
        """Replace the memory by what `choose_prototypes` makes of features `[N, D]`, probabilities `[N, K]`."""
        expected = [len(features), len(self.unit)], [len(probabilities), self.unit.shape[2]]
        if [list(probabilities.shape), list(features.shape)] != list(expected):
            raise ValueError(
                f"PrototypeMemory.update: expected features [N, {self.unit.shape[2]}] and probabilities "
                f"[N, {len(self.unit)}], got {list(features.shape)} and {list(probabilities.shape)}"
            )
        chosen = choose_prototypes(probabilities.float(), self.capacity)
        for c, rows in enumerate(chosen.rows):
            unit = F.normalize(features[rows].to(self.unit.dtype), dim=1)
            self.unit[c] = unit[torch.arange(self.capacity, device=rows.device) % len(rows)]
            self.centre[c] = unit.mean(0)
            self.counts[c] = len(rows)
        self.threshold.copy_(chosen.threshold)
        return chosen

    @torch.no_grad()
    def similarities(self, features: Tensor) -> Similarities:
        """Cosines of features `[B, D]` with every class's prototypes.

        One product of B x (K capacity) values and its reductions, at the rate of the library's matrix product; the
        published form multiplies all pairs, (B capacity)^2 values a class, and reads the diagonal blocks.
        """
        points = F.normalize(features.detach().to(self.unit.dtype), dim=1)
        cosines = (points @ self.unit.flatten(0, 1).T).view(len(points), *self.unit.shape[:2])
        return Similarities(points @ self.centre.T, cosines.amax(2), cosines.amin(2))

    @torch.no_grad()
    def label(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels int64 `[B]`, and which of them to keep, bool `[B]`, of features `[B, D]`."""
        found = self.similarities(features)
        first, second = found.mean.topk(2, dim=1).indices.split(1, dim=1)
        # 1 - smallest < 1 - largest, without the rounding of the differences.
        keep = found.smallest.gather(1, first) > found.largest.gather(1, second)
        return first[:, 0], keep[:, 0]
