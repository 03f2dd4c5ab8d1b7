"""A tiny training run with everything that could spoil a resumption; tests load it, and start it as a program."""

from __future__ import annotations

import sys
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

from pyaccel.training import Trainer, accuracy

Batch = namedtuple("Batch", "images labels sample_ids")


class TinyBatches:
    """The interface of pyaccel.data.Batches over noise: the order of an epoch depends on its number alone."""

    def __init__(self, samples: int = 20, size: int = 4):
        self.images = torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        self.labels = (self.images.mean((1, 2, 3)) > 0).long() + 1
        self.size = size

    def __len__(self):
        return -(-len(self.labels) // self.size)

    def epoch(self, epoch, first_batch=0):
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch))
        for ids in order.split(self.size)[first_batch:]:
            yield Batch(self.images[ids], self.labels[ids], ids)


class StepNoise(nn.Module):
    """Noise that depends on the step alone."""

    step = None

    def set_step(self, step):
        self.step = step

    def forward(self, x):
        if not self.training:
            return x
        return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(self.step))


def build(kind="adam"):
    """Model, optimizer, scheduler: batch norm buffers, dropout, tied and channels-last weights."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), StepNoise(), nn.ReLU(), nn.Conv2d(4, 4, 3),
                          nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    model[8].weight = model[7].weight
    model = model.to(memory_format=torch.channels_last)
    if kind == "adam":
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 3e-2, momentum=0.9, weight_decay=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.3)


def loss_fn(model, batch):
    logits = model(batch.images)
    return F.cross_entropy(logits, batch.labels), {"accuracy": (logits.argmax(1) == batch.labels).float().mean(),
                                                   "one": 1.0}


def evaluate(model):
    torch.rand(3)  # An evaluation that draws must not spoil a resumption either.
    return accuracy(model, TinyBatches(8))


def trainer(out, kind="adam", **options):
    model, optimizer, scheduler = build(kind)
    options = {"loss_fn": loss_fn, "train_batches": TinyBatches(), "epochs": 3, "evaluate": evaluate, "clip_norm": 1.0,
               "checkpoint_steps": 3, "scheduler": scheduler, "log_steps": 2, "config": {"kind": kind}, **options}
    return Trainer(model, optimizer, out=out, **options)


def announced_loss(model, batch):
    """Tells the parent that a step has begun and waits for its word to go on."""
    print("step", flush=True)
    sys.stdin.readline()
    return loss_fn(model, batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(sys.argv[1], loss_fn=announced_loss).fit()
