"""One network for tasks that come one after another: shared factors, and a linear read-out of each task's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyaccel.nn.factorized import ENERGY, FactorizedConv2d, grown_spare
from pyaccel.nn.task_norm import TaskBatchNorm2d


def factor_parameters(ranks: Sequence[int], layers: Sequence[tuple[int, int]]) -> int:
    """sum over layers of R (I kh kw + O + 1): N, C and sigma of rank R; layers as (I kh kw, O) (2009.01956, code)."""
    return sum(r * (columns + outputs + 1) for r, (columns, outputs) in zip(ranks, layers, strict=True))


def readout(values: int, classes: int, hidden: int | None = None) -> nn.Module:
    """A linear read-out; with `hidden`, two without a nonlinearity between, as of the paper's VGG16 (32)."""
    if hidden is None:
        return nn.Linear(values, classes)
    return nn.Sequential(nn.Linear(values, hidden), nn.Linear(hidden, classes))


class ContinualNet(nn.Module):
    """`features`, images to `[B, values]`, whose convolutions are `FactorizedConv2d`, and one `heads[t]` a task.

    The procedure of 2009.01956: train task t with `task=None` (all entries, the slots move, the frozen ones do not) and
    `head(features)` of its own; `finish_task()` prunes, freezes and grows; a finished task u is asked for by
    `model(images, u)`, which reads the prefix R_u of every layer and head u. Its logits are the same bits for ever.
    Which task an image belongs to is given, also in testing.

    Args:
        features: such as `surgery.factorize(network.features)`.
        classes: of each task, in the order of learning.
        values: how many values `features` makes of an image.
        hidden: None: one linear layer reads a task out; else two, so many values between them (see `readout`).

    Batch normalisation in `features` is `TaskBatchNorm2d`: gains of the first task, statistics of each task's own.
    """

    def __init__(self, features: nn.Module, classes: Sequence[int], values: int, hidden: int | None = None):
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(readout(values, count, hidden) for count in classes)
        if not self.layers:
            raise ValueError("ContinualNet: features has no FactorizedConv2d; make them with surgery.factorize")

    @property
    def layers(self) -> list[FactorizedConv2d]:
        return [m for m in self.features.modules() if isinstance(m, FactorizedConv2d)]

    @property
    def norms(self) -> list[TaskBatchNorm2d]:
        return [m for m in self.features.modules() if isinstance(m, TaskBatchNorm2d)]

    @property
    def finished(self) -> int:
        """Tasks learned so far; the one being trained is the task of this number, counted from 0."""
        return len(self.layers[0].prefixes)

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """Of each finished task: the cumulative rank R_t of every layer."""
        return list(zip(*(layer.ranks for layer in self.layers), strict=True))

    def forward(self, images: Tensor, task: int | None = None) -> Tensor:
        """Logits of a finished task or, with None, of the one being trained (of the last one when all are finished)."""
        for layer in (*self.layers, *self.norms):
            layer.task = task
        head = min(self.finished, len(self.heads) - 1) if task is None else task
        return self.heads[head](self.features(images))

    def penalty(self, sparsity: float, orthogonality: float) -> Tensor:
        """lambda_s sum H(sigma_l) + lambda_o sum [P(N_l) + P(C_l)] over the layers (2009.01956, official code)."""
        parts = [layer.penalties() for layer in self.layers]
        return sparsity * sum(p[0] for p in parts) + orthogonality * sum(p[1] for p in parts)

    @torch.no_grad()
    def finish_task(
        self, tolerance: float = ENERGY, growth: str = "mean", generator: torch.Generator | None = None
    ) -> list[int]:
        """Prune, freeze, and make slots for the next task (none after the last one); the ranks R_t, one a layer.

        growth: see `nn.grown_spare`. The parameters that are trained next are new objects: make a new optimizer.
        RuntimeError if every task is finished.
        """
        if self.finished == len(self.heads):
            raise RuntimeError(f"finish_task: all {len(self.heads)} tasks are finished")
        last = self.finished + 1 == len(self.heads)
        for layer in self.layers:
            earlier, slots, before = layer.ranks, layer.spare, len(layer.shared_sigma)
            freed = slots - (layer.finish_task(tolerance) - before)
            layer.renew(0 if last else grown_spare(freed, earlier, layer.full_rank, growth), generator)
        for norm in self.norms:
            norm.finish_task()
        return list(self.ranks[-1])

    def factor_parameters(self, ranks: Sequence[int] | None = None) -> int:
        """Numbers that factors of these ranks hold (None: of all finished tasks); slots to come do not count."""
        ranks = (self.ranks[-1] if self.ranks else [0] * len(self.layers)) if ranks is None else ranks
        return factor_parameters(ranks, [(layer.columns, layer.out_channels) for layer in self.layers])

    def norm_parameters(self) -> int:
        """Numbers that batch normalisation holds: gain and bias, and mean and variance of each finished task."""
        return sum(2 * norm.channels * (1 + len(norm.task_mean)) for norm in self.norms)

    def trained(self) -> list[nn.Parameter]:
        """What the task at hand trains: slots, its own read-out, and in the first task gains of normalisation."""
        slots = [p for layer in self.layers for p in (layer.left, layer.sigma, layer.right)]
        gains = [p for norm in self.norms for p in (norm.weight, norm.bias) if p.requires_grad]
        return [*slots, *gains, *self.heads[self.finished].parameters()]
