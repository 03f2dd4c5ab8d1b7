"""Accuracy over a data set: every image counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .transfer import to_device


def accuracy(model: nn.Module, batches: Iterable[Any], *, device: str | torch.device = "cpu", limit: int | None = None,
             forward: Callable[[nn.Module, Any], Tensor] | None = None) -> dict[str, float]:
    """Top-1 accuracy (correct / total, 0..1), mean cross entropy and number of images, in evaluation mode.

    batches: a `Batches` (its epoch 0) or an iterable of batches with images [B, C, H, W] and labels int64 [B].
    A `Batches` of several ranks: each evaluates its slices, which may be empty, and all get the result of the whole.
    limit: stop after so many images. forward(model, batch) -> logits [B, classes]; default: model(batch.images).
    Every module gets back the train or eval mode it had. ValueError for no images, logits of another shape, or a limit
    to what is spread over ranks.
    """
    spread = getattr(batches, "world", 1) > 1
    if spread and limit is not None:
        raise ValueError("accuracy: limit counts the images of one process, these batches are spread over ranks; "
                         "evaluate a subset of the images instead")
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    total = 0
    with evaluating(model), torch.inference_mode():
        for batch in batches.epoch(0) if hasattr(batches, "epoch") else batches:
            if len(batch.labels) == 0:
                continue
            batch = to_device(batch, device)
            logits, labels = (forward(model, batch) if forward else model(batch.images)), batch.labels
            if logits.dim() != 2 or len(logits) != len(labels):
                raise ValueError(f"accuracy: expected logits [{len(labels)}, classes], got {list(logits.shape)}")
            if limit is not None and total + len(labels) > limit:
                logits, labels = logits[:limit - total], labels[:limit - total]
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").double()
            total += len(labels)
            if total == limit:
                break
    if spread:
        correct, loss = distributed.total(correct), distributed.total(loss)
        total = int(distributed.total(torch.tensor(total)))
    if total == 0:
        raise ValueError("accuracy: there are no images to evaluate")
    return {"accuracy": correct.item() / total, "loss": loss.item() / total, "n": total}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and after it the mode that each single module had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
