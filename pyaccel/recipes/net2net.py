"""Cumulative training with Net2Net, arXiv 2003.01204: a small network, few images; both grow, the function stays.

Stage by stage the network is widened or deepened and the nested share of images grows. Beside it: the same with pruning
between the stages, the final network from scratch for as many epochs, and from scratch for as many products. The report
asks what training cost, how accuracy, generalisation gap and accuracy under noise compare, and whether the networks of
all stages together detect adversarial images. Only the paper's abstract was at hand: stages, schedule and detector are
this library's (docs/net2net.md), and no figure of a run stands for a figure of the paper.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pyaccel import models
from pyaccel.data import Augment, Batches
from pyaccel.hardware import cost, training_compute
from pyaccel.models.vgg import Vgg
from pyaccel.recipes import plots
from pyaccel.recipes.classifier import (
    ClassifierConfig, Images, check_choices, check_fields, choose_preset, cross_entropy, device_of, logits,
    open_data, plain_batches, say, sgd, train_classifier,
)  # fmt: skip
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.planning import Network
from pyaccel.recipes.net2net_growth import grown, nested, pruned_for_growth
from pyaccel.recipes.net2net_measure import Detection, Measurement, measure, measure_detection
from pyaccel.recipes.net2net_report import describe, results
from pyaccel.recipes.report import Report, write
from pyaccel.training import accuracy, seed_everything

__all__ = ["Config", "describe", "preset", "run"]

NETWORKS = ("cumulative", "pruned", "scratch", "scratch_equal")
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("seeds", "device", "networks", "noise", "attack_images", "attack_eps", "attack_step", "attack_steps")


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on.

    Args:
        model: the final network, a VGG with batch normalisation, at `width`.
        earlier: the networks of the stages before, a VGG of the same blocks each.
        earlier_widths: their widths, as shares of `width`.
        fractions: share of the training images of each stage, the last one included; nested, class-balanced.
        shares: share of `epochs` of each stage; at least one epoch each.
        student_lr: learning rate of every stage but the first, as a share of `lr`. All: divided by 10 after 5/10 and
            75/100 of the stage's epochs.
        networks: what to train, of "cumulative", "pruned" (cumulative, with pruning before each growth), "scratch" (the
            final network, all images, `epochs`) and "scratch_equal" (the same, for as many epochs as the products of
            "cumulative" pay for).
        prune_rate: share of all filters that go before each growth of "pruned", the weakest in their layers.
        expand_above: only layers that kept more than this share of their filters then grow.
        noise: standard deviations of the Gaussian noise, of the pixel range 0..1.
        attack_images: test images to attack; as many others set the detectors' thresholds.
        attack_eps: largest change of a pixel, of FGSM and PGD.
        attack_step: of PGD.
        attack_steps: of PGD.
        epochs: of "scratch"; the stages share as many.
    """

    model: str = "vgg19"
    earlier: tuple[str, ...] = ("vgg11", "vgg13", "vgg16")
    earlier_widths: tuple[float, ...] = (1.0, 1.0, 1.0)
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    shares: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    student_lr: float = 0.1
    networks: tuple[str, ...] = NETWORKS
    prune_rate: float = 0.2
    expand_above: float = 0.9
    noise: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2)
    attack_images: int = 1000
    attack_eps: float = 8 / 255
    attack_step: float = 2 / 255
    attack_steps: int = 7
    epochs: int = 120


PAPER = Config(crop_padding=8)
DESK = replace(
    PAPER, preset="desk", train_images=3_000, watch_images=1_000, width=0.25, crop_padding=4, epochs=8, batch_size=32,
    lr=0.02, student_lr=0.4, attack_images=300,
)  # fmt: skip
DESK_DIGITS = replace(
    DESK, train_images=None, model="vgg5", earlier=("vgg5", "vgg5"), earlier_widths=(0.5, 0.75),
    fractions=(0.25, 0.5, 1.0), shares=(1 / 3, 1 / 3, 1 / 3), mean=None, std=None, crop_padding=0, flip=False, epochs=9,
    batch_size=64, lr=0.05, attack_eps=0.1, attack_step=0.025, noise=(0.0, 0.1, 0.2, 0.4),
)  # fmt: skip
SMOKE = replace(
    DESK_DIGITS,
    preset="smoke",
    data="digits8",
    epochs=6,
    batch_size=32,
    attack_images=150,
    attack_steps=10,
    seeds=(0, 1),
)
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


@dataclass(frozen=True)
class Stage:
    """What one stage of a chain was and came to; accuracies on every test image, 0..1."""

    images: int
    epochs: int
    macs: int  # of its network's convolutions, for one image
    before: float  # right before growth: the network of the stage before (after pruning, if any)
    grown: float  # right after growth, before any training
    after: float
    seconds: float


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_data(config, "net2net", "Tiny-ImageNet" if config.preset == "paper" else "CIFAR-10")
    rehearse(config, train)  # stages that do not grow into each other are refused before anything is written
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    stages: dict[tuple[str, int], list[Stage]] = {}
    measured: dict[tuple[str, int], Measurement] = {}
    detected: dict[int, Detection] = {}
    for seed in config.seeds:
        finals: dict[str, nn.Module] = {}
        for network in config.networks:
            job = Job(config, train, test, seed, network, out, resume)
            if network in ("cumulative", "pruned"):
                chain, stages[network, seed] = job.cumulate()
                finals[network] = chain[-1]
                if network == "cumulative":
                    ensemble = chain
            else:
                epochs = config.epochs
                if network == "scratch_equal":
                    epochs = max(
                        1, round(epochs * relative_compute(stages["cumulative", seed], len(train), config.epochs))
                    )
                finals[network], stages[network, seed] = job.from_scratch(epochs)
            measured[network, seed] = measure(finals[network], train, test, config, seed)
        if "cumulative" in config.networks:
            detected[seed] = measure_detection(ensemble, finals.get("scratch_equal"), test, config, seed)
    report = Report(
        "net2net", config.preset, asdict(config), environment(device_of(config)),
        results(config, stages, measured, detected, len(train)),
    )  # fmt: skip
    if plots.available():
        from pyaccel.recipes.net2net_plots import draw

        draw(report, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_fields(
        config, at_least_one=("attack_images", "attack_steps"), positive=("student_lr", "attack_eps", "attack_step")
    )
    check_choices("networks", config.networks, NETWORKS)
    if list(config.networks) != [network for network in NETWORKS if network in config.networks]:
        raise ValueError(f"networks: expected the order {', '.join(NETWORKS)}, got {', '.join(config.networks)}")
    if "scratch_equal" in config.networks and "cumulative" not in config.networks:
        raise ValueError("networks: scratch_equal is given the products of cumulative; name both")
    stages = len(config.earlier) + 1
    for name, wanted in (("earlier_widths", stages - 1), ("fractions", stages), ("shares", stages)):
        values = getattr(config, name)
        if len(values) != wanted or not all(0 < value <= 1 for value in values):
            raise ValueError(
                f"{name}: expected {wanted} shares, 0 < share <= 1, for {stages} stages, got {list(values)}"
            )
    if list(config.fractions) != sorted(config.fractions) or config.fractions[-1] != 1:
        raise ValueError(f"fractions must grow to 1, got {list(config.fractions)}")
    if not 0 <= config.prune_rate < 1 or not 0 <= config.expand_above < 1:
        raise ValueError(
            f"prune_rate and expand_above must be in [0, 1), got {config.prune_rate}, {config.expand_above}"
        )
    if any(level < 0 for level in config.noise):
        raise ValueError(f"noise: standard deviations are 0 or more, got {list(config.noise)}")


def description(config: Config, stage: int) -> Vgg:
    """The network of a stage, from 0."""
    names = (*config.earlier, config.model)
    widths = (*config.earlier_widths, 1.0)
    found = models.DESCRIPTIONS.get(names[stage])
    if not isinstance(found, Vgg):
        known = ", ".join(name for name, d in models.DESCRIPTIONS.items() if isinstance(d, Vgg))
        raise ValueError(f"stages are VGG networks, got {names[stage]!r}; known are {known}")
    return found.scaled(config.width * widths[stage])


def build(config: Config, images: Images, seed: int, stage: int) -> nn.Module:
    """The network of a stage with new weights, drawn from `seed` alone."""
    seed_everything(seed)
    model = models.VggNet(
        description(config, stage), input_shape=images.shape, classes=len(images.classes), norm="batch"
    )
    return model.to(memory_format=torch.channels_last)


def networks(config: Config, images: Images) -> dict[str, Network]:
    """The network of each stage, for `pyaccel plan`."""
    return {
        f"stage {stage + 1}": Network(lambda stage=stage: build(config, images, config.seeds[0], stage), cross_entropy())
        for stage in range(len(config.fractions))
    }


def rehearse(config: Config, train: Images) -> None:
    model = build(config, train, 0, 0)
    for stage in range(1, len(config.fractions)):
        model = grown(model, description(config, stage), torch.zeros(2, *train.shape), seed=0)


def relative_compute(stages: Sequence[Stage], images: int, epochs: int, macs: int | None = None) -> float:
    """C = sum_s |D_s| E_s MAC(A_s) over |D| E MAC(A_S): the specification's section 5."""
    spent = training_compute([(stage.images * stage.epochs, stage.macs) for stage in stages])
    return spent / training_compute([(images * epochs, stages[-1].macs if macs is None else macs)])


@dataclass(frozen=True)
class Job:
    """The training of one kind of network for one seed."""

    config: Config
    train: Images
    test: Images
    seed: int
    network: str
    out: Path
    resume: str

    def cumulate(self) -> tuple[list[nn.Module], list[Stage]]:
        """The networks of all stages, and what each stage was."""
        config, chain, stages = self.config, [], []
        for number, fraction in enumerate(config.fractions):
            images = nested(self.train, fraction)
            before = grown_to = 0.0
            if number == 0:
                model = build(config, self.train, self.seed, 0)
            else:
                model, kept = chain[-1], None
                if self.network == "pruned":
                    model, kept = pruned_for_growth(model, config.prune_rate)
                before = self.score(model)
                model = grown(
                    model, description(config, number), self.calibration(images), seed=1000 * self.seed + number,
                    kept=kept,
                    above=config.expand_above,
                )  # fmt: skip
                grown_to = self.score(model)
            epochs = max(1, round(config.epochs * config.shares[number]))
            lr = config.lr * (config.student_lr if number else 1.0)
            seconds = self.fit(model, images, f"stage-{number + 1}", epochs, lr)
            chain.append(model)
            stages.append(Stage(len(images), epochs, self.macs(model), before, grown_to, self.score(model), seconds))
        return chain, stages

    def from_scratch(self, epochs: int) -> tuple[nn.Module, list[Stage]]:
        model = build(self.config, self.train, self.seed, len(self.config.fractions) - 1)
        seconds = self.fit(model, self.train, f"epochs-{epochs}", epochs, self.config.lr)
        return model, [Stage(len(self.train), epochs, self.macs(model), 0.0, 0.0, self.score(model), seconds)]

    def fit(self, model: nn.Module, images: Images, name: str, epochs: int, lr: float) -> float:
        """Train in place; the seconds that it took."""
        part = f"{self.network}/seed-{self.seed}/{name}"
        model.to(device_of(self.config))
        optimizer = sgd(replace(self.config, lr=lr), model)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [-(-epochs // 2), -(-3 * epochs // 4)], 0.1)
        history = train_classifier(
            model, images, self.test, self.config, seed=self.seed, out=self.out / part, name=f"{self.network} {name}",
            resume=resume_from(self.out, part, self.resume), free=FREE, optimizer=optimizer, scheduler=scheduler,
            epochs=epochs,
        )  # fmt: skip
        return sum(row["seconds"] for row in history.rows)

    def calibration(self, images: Images) -> torch.Tensor:
        """A batch as training sees it."""
        config = self.config
        augment = Augment(config.crop_padding, config.flip, config.mean, config.std)
        batches = Batches(
            images, min(config.batch_size, len(images)), seed=self.seed, shuffle=True, drop_last=True, augment=augment
        )
        return next(iter(batches.epoch(0))).images.to(device_of(config))

    def score(self, model: nn.Module) -> float:
        device = device_of(self.config)
        found = accuracy(model.to(device), plain_batches(self.config, self.test), device=device, forward=logits)
        return found["accuracy"]

    def macs(self, model: nn.Module) -> int:
        return cost(model, self.train.shape).convolutions().macs
