"""A long training run of a spiking network; `test_soak.py` starts it and watches. Arguments: a folder, the seconds.

It trains until the time is over, with checkpoints, evaluations and logs as a recipe has them, only more often.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from pyaccel import models
from pyaccel.data import Augment, Batches
from pyaccel.data.images import ImageSet
from pyaccel.memory import recycle_memory
from pyaccel.recipes.bntt import logits
from pyaccel.recipes.classifier import cross_entropy
from pyaccel.training import Trainer, accuracy


def images(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    pixels = torch.randint(0, 128, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    for i, label in enumerate(labels.tolist()):  # a bright quarter tells the class
        pixels[i, :, 8 * (label // 2):, 8 * (label % 2):][:, :8, :8] += 100
    return ImageSet(pixels, labels, "0123", "quarters")


def main(out: Path, seconds: float) -> None:
    recycle_memory()
    end = time.monotonic() + seconds
    torch.manual_seed(0)
    model = models.build("vgg5", classes=4, input_shape=(3, 16, 16), width=0.25, spiking=True, steps=6)
    watched = Batches(images(64, 2), 32, shuffle=False, drop_last=False)

    def over(trainer: Trainer, row: dict) -> None:
        if time.monotonic() >= end:
            trainer.epochs = trainer.epoch

    Trainer(
        model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), loss_fn=cross_entropy(logits), epochs=10**6,
        train_batches=Batches(images(512, 1), 32, shuffle=True, drop_last=True, augment=Augment(2, False)), out=out,
        evaluate=lambda model: accuracy(model, watched, forward=logits), on_epoch_end=over, checkpoint_steps=50,
        log_steps=10,
    ).fit()  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), float(sys.argv[2]))
