"""Point-to-set similarity of 2007.01524, one pair at a time: for reading, and to test `nn.PrototypeMemory` against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def point_to_set(features: Tensor, sets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, largest and smallest cosine `[B, K]` of points `[B, D]` with each of K sets of prototypes `[n_c, D]`."""
    mean, largest, smallest = (torch.empty(len(features), len(sets), dtype=features.dtype) for _ in range(3))
    for i, point in enumerate(features):
        for c, prototypes in enumerate(sets):
            cosines = torch.stack([(point @ m) / (point.norm() * m.norm()) for m in prototypes])
            mean[i, c], largest[i, c], smallest[i, c] = cosines.mean(), cosines.max(), cosines.min()
    return mean, largest, smallest


def label_and_keep(features: Tensor, sets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pseudo-labels, and whether the best class's farthest member is nearer than the second's nearest."""
    mean, largest, smallest = point_to_set(features, sets)
    labels, keep = [], []
    for i in range(len(features)):
        first, second = mean[i].argsort(descending=True, stable=True)[:2].tolist()
        labels.append(first)
        keep.append(bool(1 - smallest[i, first] < 1 - largest[i, second]))
    return torch.tensor(labels), torch.tensor(keep)
