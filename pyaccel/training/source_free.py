"""Adapting a classifier to unlabelled target images without its source data, by two heads (2007.01524).

    L = (1 - alpha) mean CE(C_s2t(z), argmax C_s(F_s(x)))  +  alpha (1/B) sum_i w_i CE(C_t(z_i), y_i),   z = F_t(x)

F_s, C_s: the source classifier, frozen. F_t, C_s2t, C_t: trained copies of it; C_t is the one to use afterwards. y and
w: pseudo-label and filter of `nn.PrototypeMemory`, whose prototypes are chosen anew every so many steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel.nn import PrototypeMemory

from .evaluate import evaluating
from .transfer import to_device

VARIANTS = ("full", "no_filter", "no_source", "naive")


def target_weight(step: int, steps: int) -> float:
    """alpha = 2 / (1 + exp(-10 step / (steps // 2))) - 1: 0 at the first step, 0.99991 in the middle."""
    return 2 / (1 + math.exp(-10 * step / max(1, steps // 2))) - 1


def learning_rate_factor(step: int, steps: int) -> float:
    """(1 + 10 min(1, step / steps))^-0.75: 1 at the first step, 0.1656 at the end."""
    return (1 + 10 * min(1.0, step / steps)) ** -0.75


class TwoHeadLoss(NamedTuple):
    """The loss of a batch, its two parts unweighted, alpha, and the share of pseudo-labels that the filter keeps."""

    loss: Tensor
    source: Tensor
    target: Tensor
    alpha: float
    kept: Tensor


class TwoHeads(nn.Module):
    """The source classifier, frozen, and its trained copies; `model(images)` gives the logits of C_t, `[B, K]`.

    `model(images, learn=True)` gives the `TwoHeadLoss` of a batch, so that DistributedDataParallel sees its forward.

    As in the published code, batch normalisations that are direct children of the features stay in evaluation mode
    while training, those inside blocks do not. `set_step(n)`, which `Trainer` calls, tells the schedule where it is.

    Args:
        features: images to `[B, D]`, as the source training left them. Not modified: copied.
        head: `[B, D]` to logits `[B, K]`; copied too.
        steps: S of the schedule.
        variant: "full"; "no_filter" (w = 1); "no_source" (alpha = 1); "naive" (pseudo-labels are C_t's own argmax,
            w = 1):
            the ablations that tell what the parts are worth.
        capacity: of the memory, prototypes a class.
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        *,
        classes: int,
        values: int,
        steps: int,
        variant: str = "full",
        capacity: int = 100,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"TwoHeads: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if steps < 1:
            raise ValueError(f"TwoHeads: steps must be at least 1, got {steps}")
        self.source_features, self.source_head = (
            copy.deepcopy(part).requires_grad_(False) for part in (features, head)
        )
        self.features, self.source_to_target, self.target_head = (
            copy.deepcopy(part) for part in (features, head, head)
        )
        self.memory = PrototypeMemory(classes, values, capacity)
        self.steps, self.variant, self.step = steps, variant, 0
        self.train()

    def set_step(self, step: int) -> None:
        self.step = step

    def train(self, mode: bool = True) -> TwoHeads:
        super().train(mode)
        self.source_features.eval()
        self.source_head.eval()
        for child in self.features.children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.eval()
        return self

    def forward(self, images: Tensor, learn: bool = False) -> Tensor | TwoHeadLoss:
        return self.loss(images) if learn else self.target_head(self.features(images))

    @torch.no_grad()
    def refresh(self, batches: Iterable[Any], *, clean: bool = False) -> None:
        """Choose the prototypes anew from one pass over target batches with `images`.

        clean: in evaluation mode; else in training mode as the published code does, which also moves the running
        statistics of batch normalisation (an extra epoch of them at each refresh).
        """
        device, found = self.memory.unit.device, []
        with evaluating(self) if clean else nullcontext():
            for batch in batches:
                values = self.features(to_device(batch, device).images)
                found.append((values.float(), self.target_head(values).float().softmax(1)))
        if not found:
            raise ValueError("TwoHeads.refresh: there are no target images")
        self.memory.update(*(torch.cat(part) for part in zip(*found, strict=True)))

    def loss(self, images: Tensor) -> TwoHeadLoss:
        """The loss of one batch `[B, C, H, W]`; no gradient reaches labels, filter or the source classifier."""
        with torch.no_grad():
            source_labels = self.source_head(self.source_features(images)).argmax(1)
        values = self.features(images)
        logits = self.target_head(values)
        if self.variant == "naive":
            labels, keep = logits.detach().argmax(1), torch.ones_like(source_labels, dtype=torch.bool)
        else:
            labels, keep = self.memory.label(values)
            keep = torch.ones_like(keep) if self.variant == "no_filter" else keep
        source = F.cross_entropy(self.source_to_target(values), source_labels)
        # Divided by the batch, not by how many are kept: few labels are a small step.
        target = (F.cross_entropy(logits, labels, reduction="none") * keep).mean()
        alpha = 1.0 if self.variant == "no_source" else target_weight(self.step, self.steps)
        return TwoHeadLoss(
            (1 - alpha) * source + alpha * target, source.detach(), target.detach(), alpha, keep.float().mean()
        )

    def optimizer(
        self, lr: float, feature_lr: float, *, momentum: float = 0.9, weight_decay: float = 5e-4
    ) -> torch.optim.SGD:
        """SGD with Nesterov momentum, `feature_lr` for F_t, `lr` for both heads; see `set_learning_rates`."""
        heads = [*self.source_to_target.parameters(), *self.target_head.parameters()]
        groups = [
            {"params": list(self.features.parameters()), "lr": feature_lr, "first": feature_lr},
            {"params": heads, "lr": lr, "first": lr},
        ]
        return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)

    def set_learning_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """The rates of this step: every group's first one times `learning_rate_factor`."""
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * learning_rate_factor(self.step, self.steps)
