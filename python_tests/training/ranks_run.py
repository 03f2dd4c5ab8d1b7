"""A training run for torchrun; tests start it. Arguments: the folder, then options of `tiny_run.trainer`, as JSON.

"die": [step, rank, signal] sends this process a signal in the middle of a step, once in the life of the folder.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pyaccel.data import Batches
from pyaccel.data.images import ImageSet
from pyaccel.training import Trainer, accuracy, distributed


def images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, (pixels.float().mean((1, 2, 3)) > 127).long(), "01", "noise")


def build(dropout: float) -> nn.Module:
    torch.manual_seed(3 + distributed.rank())  # ranks that start apart must be brought together
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 32), nn.ReLU(),
                         nn.Linear(32, 2)).double()  # fmt: skip


def loss_fn(model, batch):
    logits = model(batch.images.double())
    return F.cross_entropy(logits, batch.labels), {"accuracy": (logits.argmax(1) == batch.labels).double().mean()}


def run(out: Path, *, accumulate: int = 1, dropout: float = 0.0, steps: int | None = None, die=None, epochs: int = 2):
    ranks = dict(rank=distributed.rank(), world=distributed.world())
    model = build(dropout)
    watched = Batches(images(7), 4, shuffle=False, drop_last=False, **ranks)

    def dying_loss(model, batch):
        if die and [trainer.step + 1, trainer.rank] == die[:2] and not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), die[2])
        return loss_fn(model, batch)

    trainer = Trainer(
        model, torch.optim.Adam(model.parameters(), 1e-2), loss_fn=dying_loss, epochs=epochs, out=out, max_steps=steps,
        train_batches=Batches(images(48), 8, seed=5, shuffle=True, drop_last=True, **ranks), accumulate=accumulate,
        evaluate=lambda model: accuracy(model, watched, forward=lambda m, b: m(b.images.double())),
        checkpoint_steps=2, log_steps=3, config={"dropout": dropout}, seed=7,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.fit()
    told = [str(w.message) for w in caught if "processes" in str(w.message)]
    everyone = distributed.from_all({"rows": history.rows, "warned": told, "weights": float(
        sum(p.detach().abs().sum() for p in model.parameters()))})  # fmt: skip
    if distributed.rank() == 0:
        (out / "seen.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with distributed.process_group():
        run(folder, **json.loads(sys.argv[2]))
