"""One process of `test_training.py`: steps of a spiking VGG9 at desk width, as the recipes train it, and how long each took.

Arguments: a folder, the number of steps, whether batch statistics are those of all processes ("sync" or "own"). Rank 0
prints one line of JSON. Started by itself it uses two threads, under torchrun one a process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pyaccel import models
from pyaccel.data import CIFAR_MEAN, CIFAR_STD, Augment, Batches
from pyaccel.data.images import ImageSet
from pyaccel.memory import recycle_memory
from pyaccel.nn import convert_sync_bntt
from pyaccel.recipes.bntt import logits
from pyaccel.recipes.classifier import cross_entropy
from pyaccel.training import Trainer, distributed

BATCH, CLASSES = 64, 10
AUGMENT = Augment(4, True, CIFAR_MEAN, CIFAR_STD)


def images(count: int = 50_000) -> ImageSet:
    """As large as CIFAR-10, of noise: what a step costs does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % CLASSES, [str(i) for i in range(CLASSES)], "noise")


def network(width: float = 0.25, steps: int = 8) -> models.SpikingNetwork:
    """What the desk preset of recipe `bntt` trains."""
    torch.manual_seed(0)
    model = models.build("vgg9_bntt", classes=CLASSES, width=width, steps=steps)
    return model.to(memory_format=torch.channels_last)


class Timed:
    """Batches that note when each was asked for: the time between two is a step."""

    def __init__(self, batches: Batches):
        self.batches, self.wall, self.cpu = batches, [], []

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator:
        for batch in self.batches.epoch(number, first_batch):
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())
            yield batch


def differences(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def main(out: Path, steps: int, synchronised: bool) -> None:
    recycle_memory()
    model, losses = network(), []
    if synchronised:
        convert_sync_bntt(model)
    loss_fn = cross_entropy(logits)

    def noted(model, batch):
        loss, metrics = loss_fn(model, batch)
        losses.append(float(loss.detach()))
        return loss, metrics

    timed = Timed(Batches(images(), BATCH, shuffle=True, drop_last=True, augment=AUGMENT, rank=distributed.rank(),
                          world=distributed.world()))  # fmt: skip
    Trainer(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), loss_fn=noted, train_batches=timed, epochs=1,
            max_steps=steps, out=out, checkpoint_minutes=None).fit("never")  # fmt: skip
    everyone = distributed.from_all({"wall": differences(timed.wall), "cpu": differences(timed.cpu), "losses": losses})
    if distributed.rank() == 0:
        print(json.dumps(everyone))


if __name__ == "__main__":
    with distributed.process_group():
        torch.set_num_threads(1 if distributed.world() > 1 else 2)
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sync")
