"""Pruning filters while training, arXiv 2003.02800: filters of least worth go epoch by epoch, without retraining.

Three criteria (L1 norm, mean activation, random) over pruning rates. Beside them the dense network, one-shot pruning of
the trained network with retraining, and the final small network trained from scratch. The report compares accuracy, and
what training computes and reads from memory under two counts. Only the paper's abstract was at hand: schedule and
definitions are this library's (docs/prune_while_training.md), and no figure of a run stands for a figure of the paper.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pyaccel import models, surgery
from pyaccel.hardware import Cost, cost
from pyaccel.models.form import Form
from pyaccel.models.layer import start_artificial
from pyaccel.recipes import plots
from pyaccel.recipes.classifier import (
    ClassifierConfig, Images, check_choices, check_fields, choose_preset, cross_entropy, device_of, logits,
    open_data, plain_batches, say, sgd, train_classifier,
)  # fmt: skip
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import CHECKPOINTS, open_run, resume_from
from pyaccel.recipes.planning import Network
from pyaccel.recipes.prune_while_training_report import describe, results
from pyaccel.recipes.report import Report, write
from pyaccel.surgery.prune import CRITERIA
from pyaccel.training import Trainer, accuracy, list_checkpoints, load_checkpoint, seed_everything

__all__ = ["Config", "describe", "preset", "removed_share", "run"]

COMPARATORS = ("one_shot", "scratch")
MODES = ("shrink", "mask")
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("seeds", "device", "rates", "criteria", "comparators")


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on.

    Args:
        rates: share of the filters of every convolution to prune, 0 < p < 1, one network of each kind for each.
        criteria: of "l1", "activation", "random".
        comparators: of "one_shot" (the trained dense network pruned by L1 at once, then retrained) and "scratch" (a new
            network of the final widths, trained as long as the dense one).
        first_epoch: e0, the first epoch at whose end filters are pruned, from 0.
        last_epoch: e1, the last one; None: 8/10 of `epochs`.
        interval: prune at the end of every so many epochs, and of the last one.
        mode: "shrink": pruned filters are taken out at once, which saves time; "mask": they stay as zeros. Both follow
            the same path, up to rounding.
        coupled: filters that feed an addition: "leave" them alone, or prune them "joint"ly.
        retrain_epochs: epochs of retraining of "one_shot".
        retrain_lr: their learning rate, constant.
        lr: learning rate of SGD; divided by 10 after 5/10 and 75/100 of `epochs`.
    """

    epochs: int = 160
    rates: tuple[float, ...] = (0.2, 0.5, 0.7, 0.8, 0.9)
    criteria: tuple[str, ...] = CRITERIA
    comparators: tuple[str, ...] = COMPARATORS
    first_epoch: int = 0
    last_epoch: int | None = None
    interval: int = 1
    mode: str = "shrink"
    coupled: str = "leave"
    retrain_epochs: int = 10
    retrain_lr: float = 1e-3


PAPER = Config()
# Short runs stop pruning early: what remains needs epochs at a high learning rate to make up for it.
DESK = replace(
    PAPER, preset="desk", train_images=3_000, watch_images=1_000, width=0.25, epochs=8, last_epoch=3, rates=(0.8,),
    retrain_epochs=3, batch_size=32, lr=0.02,
)  # fmt: skip
DESK_DIGITS = replace(
    DESK, train_images=None, model="vgg5", mean=None, std=None, crop_padding=0, flip=False, epochs=6, last_epoch=2,
    retrain_epochs=2, batch_size=64, lr=0.05,
)  # fmt: skip
SMOKE = replace(DESK_DIGITS, preset="smoke", data="digits8", width=0.5, batch_size=32, rates=(0.5,), seeds=(0, 1))
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


@dataclass(frozen=True)
class Measurement:
    """One trained network. counts: for each epoch that it trained, images seen and cost of its convolutions."""

    accuracy: float  # on every test image, 0..1
    final: Cost
    epochs: list[tuple[float, dict[str, float]]]
    history: list[dict]

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_data(config, "prune_while_training")
    # A network that cannot be built, or pruned, is refused before anything is written.
    surgery.prune_filters(build(config, train, 0), 0.0, coupled=config.coupled)
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured: dict[tuple[str, float, int], Measurement] = {}
    for seed in config.seeds:

        def trained(kind: str, rate: float, model: nn.Module, seed: int = seed, **options) -> nn.Module:
            part = f"{kind}/seed-{seed}" if kind == "dense" else f"{kind}/rate-{rate:g}/seed-{seed}"
            pruner = Pruner(config, model, kind if kind in CRITERIA else "l1", rate if kind in CRITERIA else 0.0, seed)
            final, one = train_one(
                config, train, test, pruner, out, part, resume_from(out, part, resume), seed, **options
            )
            measured[kind, rate, seed] = one
            return final

        dense = trained("dense", 0.0, build(config, train, seed))
        for rate in config.rates:
            for criterion in config.criteria:
                trained(criterion, rate, build(config, train, seed))
            small = surgery.shrink(surgery.prune_filters(dense, rate, "l1", coupled=config.coupled))
            if "one_shot" in config.comparators:
                trained("one_shot", rate, small, epochs=config.retrain_epochs, lr=config.retrain_lr)
            if "scratch" in config.comparators:
                trained("scratch", rate, anew(small, seed))
    report = Report(
        "prune_while_training",
        config.preset,
        asdict(config),
        environment(device_of(config)),
        results(config, measured, train.shape),
    )
    if plots.available():
        from pyaccel.recipes.prune_while_training_plots import draw

        draw(report, measured, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_fields(config, at_least_one=("interval", "retrain_epochs"), positive=("retrain_lr",))
    check_choices("criteria", config.criteria, CRITERIA)
    if config.comparators:
        check_choices("comparators", config.comparators, COMPARATORS)
    check_choices("rates", config.rates)
    if not all(0 < rate < 1 for rate in config.rates):
        raise ValueError(
            f"rates are shares of the filters between 0 and 1, got {list(config.rates)}; dense training is always part"
        )
    if config.mode not in MODES:
        raise ValueError(f"mode must be shrink or mask, got {config.mode!r}")
    if config.coupled not in ("leave", "joint"):
        raise ValueError(f"coupled must be leave or joint, got {config.coupled!r}")
    if not 0 <= config.first_epoch <= last_epoch(config) < config.epochs:
        raise ValueError(
            f"first_epoch and last_epoch must satisfy 0 <= first <= last < epochs, got {config.first_epoch}, "
            f"{last_epoch(config)} of {config.epochs}"
        )


def build(config: Config, images: Images, seed: int) -> nn.Module:
    """The dense network, its weights drawn from `seed` alone: all kinds of a seed start from the same ones."""
    seed_everything(seed)
    model = models.build(
        config.model, classes=len(images.classes), input_shape=images.shape, width=config.width, spiking=False
    )
    return model.to(memory_format=torch.channels_last)


def networks(config: Config, images: Images) -> dict[str, Network]:
    """The dense network, for `pyaccel plan`: what is pruned needs no more."""
    return {"dense": Network(lambda: build(config, images, config.seeds[0]), cross_entropy())}


def anew(model: nn.Module, seed: int) -> nn.Module:
    """A network of the same sizes with fresh weights: what one would train who knew the final widths."""
    fresh = surgery.shrink(model)  # a copy
    seed_everything(seed)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    start_artificial(fresh, Form())
    return fresh


def last_epoch(config: Config) -> int:
    return int(0.8 * config.epochs) if config.last_epoch is None else config.last_epoch


def removed_share(epoch: int, config: Config) -> float:
    """Share of the final rate that is gone after the pruning at the end of `epoch`, from 0; schedule of section 3::

        n(e) = round(O p min(1, max(0, (e - e0 + 1) / (e1 - e0 + 1))))

    and between two prunings, `interval` epochs apart, as after the last one.
    """
    first, last = config.first_epoch, last_epoch(config)
    if epoch < first:
        return 0.0
    at = last if epoch >= last else epoch - (epoch - first) % config.interval
    return (at - first + 1) / (last - first + 1)


class Pruner:
    """Prunes at the ends of epochs, and notes what each epoch cost. `model` is the network as it is now."""

    def __init__(self, config: Config, model: nn.Module, criterion: str, rate: float, seed: int):
        self.config, self.model, self.criterion, self.rate, self.seed = config, model, criterion, rate, seed
        self.widths = {name: len(gone) for name, gone in surgery.pruned_filters(model).items()} if rate else {}
        self.watching = criterion == "activation" and rate > 0
        if self.watching:
            surgery.watch_activations(model)

    def resume(self, folder: Path) -> None:
        """Take the sizes of the newest checkpoint, if there is one: what it holds then fits the network."""
        if self.rate and list_checkpoints(folder / CHECKPOINTS):
            self.model = surgery.like_tensors(self.model, load_checkpoint(folder / CHECKPOINTS).tensors)

    def after_epoch(self, trainer: Trainer, row: dict, shape: tuple[int, int, int]) -> None:
        epoch, config = trainer.epoch - 1, self.config
        row.update(self.counts(shape))
        row["images"] = len(trainer.train_batches) * config.batch_size
        share = removed_share(epoch, config)
        if not self.rate or share == (removed_share(epoch - 1, config) if epoch else 0.0):
            return
        means = None
        if self.watching:
            means = surgery.activation_means(trainer.model)
            surgery.unwatch_activations(trainer.model)
        model, optimizer = surgery.prune_filters(
            trainer.model, self.rate * share, self.criterion, widths=self.widths, coupled=config.coupled,
            activations=means,
            seed=1000 * self.seed + epoch, optimizer=trainer.optimizer,
        )  # fmt: skip
        if config.mode == "shrink":
            model, optimizer = surgery.shrink(model, optimizer)
        if self.watching:
            surgery.watch_activations(model)
        self.model = model
        trainer.replace(model, optimizer)

    def counts(self, shape: tuple[int, int, int]) -> dict[str, float]:
        """For one image, forward, over the convolutions: products, accesses, and the number of filters alone."""
        found = self.final_cost(shape)
        return {"macs": found.macs, "accesses": found.accesses, "filters": filters(self.model)}

    def final_cost(self, shape: tuple[int, int, int]) -> Cost:
        model = surgery.shrink(self.model) if self.config.mode == "mask" and self.rate else self.model
        return cost(model, shape).convolutions()


def filters(model: nn.Module) -> int:
    """Filters of all convolutions that are not zero."""
    return sum(int(m.weight.detach().flatten(1).any(1).sum()) for m in model.modules() if isinstance(m, nn.Conv2d))


def train_one(
    config: Config, train: Images, test: Images, pruner: Pruner, out: Path, part: str, resume: str, seed: int,
    *, epochs: int | None = None, lr: float | None = None,
) -> tuple[nn.Module, Measurement]:  # fmt: skip
    """One network, trained to the end of its last epoch, from scratch or from its checkpoint."""
    pruner.resume(Path(out / part if resume in ("auto", "never") else resume))
    model = pruner.model.to(device_of(config))
    optimizer = sgd(config if lr is None else replace(config, lr=lr), model)
    if pruner.rate and config.mode == "mask":
        surgery.hold_pruned(model, optimizer)
    count = config.epochs if epochs is None else epochs
    drops = [count // 2, 3 * count // 4] if lr is None else []
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    history = train_classifier(
        model, train, test, config, seed=seed, out=out / part, resume=resume, name=part.rsplit("/", 1)[0], free=FREE,
        optimizer=optimizer, scheduler=scheduler, epochs=count,
        on_epoch_end=lambda trainer, row: pruner.after_epoch(trainer, row, train.shape),
    )  # fmt: skip
    if pruner.watching:
        surgery.unwatch_activations(pruner.model)
    found = accuracy(pruner.model, plain_batches(config, test), device=device_of(config), forward=logits)["accuracy"]
    rows = [(row["images"], {key: row[key] for key in ("macs", "accesses", "filters")}) for row in history.rows]
    return pruner.model, Measurement(found, pruner.final_cost(train.shape), rows, history.rows)
