"""Inherent adversarial robustness of spiking networks, arXiv 2003.10399: do few time steps and a leak really help?

An artificial network, its conversion (SNN-Conv: no leak, many steps), a tuned spiking network (SNN-BP: leak, few steps)
and, where asked for, one trained with BNTT are attacked by FGSM and PGD with gradients crafted from each: white-box,
and black-box from networks of another seed. Sweeps tune SNN-BP for other numbers of steps and leaks. Every figure
stands beside its controls: noise of equal size, other surrogates, expectation over the encoder's noise, transfer from
the artificial network, and the worst case of all of them, image by image.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pyaccel import models
from pyaccel.recipes import plots
from pyaccel.recipes.classifier import (
    Images,
    check_choices,
    choose_preset,
    chosen,
    cross_entropy,
    device_of,
    open_data,
    say,
    sgd,
    train_classifier,
)  # fmt: skip
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.hybrid_training import (
    MLP,
    HybridConfig,
    build_ann,
    check_hybrid,
    convert,
    drops,
    planned,
    read_or_make,
    scaled,
    spiking_logits,
    train_ann,
    tune,
)  # fmt: skip
from pyaccel.recipes.planning import Network
from pyaccel.recipes.report import Report, write
from pyaccel.recipes.snn_robustness_measure import Bench, agreement, controls, share, sweeps
from pyaccel.recipes.snn_robustness_report import describe, results
from pyaccel.training import seed_everything

__all__ = ["Config", "describe", "preset", "run"]

NETWORKS = ("ann", "conv", "bp", "bntt")
SURROGATES = ("atan", "rectangle", "sigmoid", "fast_sigmoid")
OTHER = 1_000  # black-box sources are trained from seed + OTHER
FREE = ("seeds", "device")


@dataclass(frozen=True)
class Config(HybridConfig):
    """Everything a run depends on.

    Args:
        networks: targets, of "ann", "conv", "bp", "bntt".
        sources: whose gradients black-box attacks take, of the same; trained from another seed.
        steps: time steps of SNN-BP.
        conv_steps: of SNN-Conv, which has no leak and thresholds at scale 1.
        bntt_steps: of the BNTT network, trained from scratch with `lr` for `epochs`.
        eps: radii, pixels in 0..1.
        step: of PGD, pixels in 0..1.
        pgd_steps: steps of PGD.
        attack_images: test images that are attacked.
        surrogates: of the control, in place of the one that SNN-BP was tuned with.
        draws: of the encoder's noise, averaged for each step in the control.
        sweep_steps: numbers of steps that SNN-BP is tuned for, without leak, for the sweep; none: no sweep.
        sweep_leaks: leaks that SNN-BP is tuned with, at `sweep_at` steps; none: no sweep.
        sweep_at: see there.
        sweep_eps: radius of the sweeps (FGSM).
        agree_steps: after how many steps SNN-Conv's gradient is compared with the artificial network's.
        images_at_once: images of a spiking network attacked together; None: the batch. Only memory depends on it.
        steps_at_once: steps that gradients hold in memory; None: all. Only memory depends on it.
    """

    model: str = "vgg5_robust"
    leak: float = 0.99
    networks: tuple[str, ...] = ("ann", "conv", "bp")
    sources: tuple[str, ...] = ("ann", "conv", "bp")
    steps: int = 175
    conv_steps: int = 2000
    bntt_steps: int = 25
    eps: tuple[float, ...] = (8 / 255,)
    step: float = 2 / 255
    pgd_steps: int = 7
    attack_images: int | None = None
    surrogates: tuple[str, ...] = SURROGATES
    draws: int = 5
    sweep_steps: tuple[int, ...] = (25, 50, 100, 175)
    sweep_leaks: tuple[float, ...] = (1.0, 0.99, 0.95, 0.9)
    sweep_at: int = 100
    sweep_eps: float = 8 / 255
    agree_steps: tuple[int, ...] = (25, 100, 500, 2000)
    images_at_once: int | None = None
    steps_at_once: int | None = 175


PAPER = Config()
# Leaks of DESK: with 0.7, the last three of five layers are silent, and the tuning finds no gradient.
DESK = replace(
    PAPER, preset="desk", train_images=4_000, watch_images=300, test_images=200, width=0.125, dropout=(0.0, 0.1),
    epochs=6, lr=3e-2, balance_images=64, balance_steps=150, tune_epochs=4, tune_lr=1e-3, tune_weight_decay=0.0,
    tune_batch_size=32, tune_images=1_500, steps=20, conv_steps=100, bntt_steps=8, eps=(4 / 255,), step=1 / 255,
    attack_images=100, surrogates=("atan", "rectangle"), draws=3, sweep_steps=(10, 20, 40), sweep_leaks=(1.0, 0.99, 0.9),
    sweep_at=20, sweep_eps=4 / 255, agree_steps=(10, 30, 100),
)  # fmt: skip
DESK_DIGITS = replace(
    DESK, train_images=None, mean=None, std=None, crop_padding=0, flip=False, epochs=8, tune_epochs=3,
    tune_images=None, eps=(0.1,), step=0.025, sweep_eps=0.1,
)  # fmt: skip
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", model="mlp", width=1.0, epochs=12, batch_size=32, lr=5e-2,
    watch_images=None, test_images=None, balance_images=256, balance_steps=100, steps=10, conv_steps=60, tune_epochs=4,
    eps=(0.125,), step=0.03, attack_images=120, networks=NETWORKS, sweep_steps=(5, 20), sweep_leaks=(1.0, 0.7),
    sweep_at=10, sweep_eps=0.125, agree_steps=(10, 60), seeds=(0, 1),
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


def networks(config: Config, images: Images) -> dict[str, Network]:
    """What this recipe trains, for `pyaccel plan`."""
    found = planned(config, images, surrogate="linear", steps=config.steps, leak=config.leak, mean_readout=True)
    if "bntt" in config.networks:
        build = partial(bntt_network, config, images, config.seeds[0])
        found["bntt"] = Network(build, cross_entropy(spiking_logits))
    return found


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train, attack and sweep what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_data(config, "snn_robustness")
    build_ann(config, train, 0)
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured = {seed: read_or_make(out / f"attacks/seed-{seed}.json", lambda s=seed: measure(config, train, test, s,
    out, resume))
                for seed in config.seeds}  # fmt: skip
    report = Report(
        "snn_robustness", config.preset, asdict(config), environment(device_of(config)), results(config, measured)
    )
    if plots.available():
        from pyaccel.recipes.snn_robustness_plots import draw

        draw(report, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_hybrid(config)
    check_choices("networks", config.networks, NETWORKS)
    check_choices("sources", config.sources, NETWORKS[:3])
    check_choices("eps", config.eps)
    if config.surrogates:
        check_choices("surrogates", config.surrogates, SURROGATES)
    for name in ("steps", "conv_steps", "bntt_steps", "pgd_steps", "sweep_at"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.draws < 2:
        raise ValueError(f"draws must be at least 2: one draw is the attack itself, got {config.draws}")
    if not all(e > 0 for e in (*config.eps, config.step, config.sweep_eps)):
        raise ValueError(
            f"eps, step and sweep_eps must be positive, got {config.eps}, {config.step}, {config.sweep_eps}"
        )
    if "bp" not in config.networks and (config.sweep_steps or config.sweep_leaks):
        raise ValueError("sweeps tune SNN-BP: take 'bp' into networks, or leave sweep_steps and sweep_leaks empty")


@dataclass
class Trained:
    """The networks of one seed, made when first asked for."""

    config: Config
    train: Images
    test: Images
    seed: int
    out: Path
    resume: str

    def __post_init__(self):
        self.made: dict[str, nn.Module] = {}
        self.folder = f"seed-{self.seed}"

    def __getitem__(self, kind: str) -> nn.Module:
        if kind not in self.made:
            self.made[kind] = getattr(self, kind)().to(device_of(self.config)).eval()
        return self.made[kind]

    def ann(self) -> nn.Module:
        return train_ann(
            self.config, self.train, self.test, self.seed, self.out, f"ann/{self.folder}", self.resume, FREE
        )[0]

    def conv(self) -> nn.Module:
        return self.converted(self.config.conv_steps, 1.0)

    def bp(self) -> nn.Module:
        return self.tuned(self.config.steps, self.config.leak)

    def converted(self, steps: int, leak: float):
        file = self.out / f"thresholds/{self.folder}.json"
        return convert(
            self.config,
            self["ann"],
            self.train,
            self.seed,
            file,
            surrogate="linear",
            steps=steps,
            leak=leak,
            mean_readout=True,
        )

    def tuned(self, steps: int, leak: float) -> nn.Module:
        part = f"bp-T{steps}-leak{leak:g}/{self.folder}"
        if part not in self.made:  # sweeps come to the same point twice
            snn = scaled(self.converted(steps, leak), self.config.scale)
            if self.config.tune_epochs:
                tune(self.config, snn, self.train, self.test, self.seed, self.out, part, self.resume, FREE)
            self.made[part] = snn
        return self.made[part]

    def bntt(self) -> nn.Module:
        config = self.config
        model = bntt_network(config, self.train, self.seed).to(device_of(config))
        optimizer, part = sgd(config, model), f"bntt/{self.folder}"
        train_classifier(
            model, self.train, self.test, config, seed=self.seed, out=self.out / part,
            resume=resume_from(self.out, part, self.resume), name=part, free=FREE, of=spiking_logits,
            optimizer=optimizer, scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, drops(config.epochs), 0.1),
        )  # fmt: skip
        return model


def bntt_network(config: Config, images: Images, seed: int) -> nn.Module:
    seed_everything(seed)
    options = dict(input_shape=images.shape, classes=len(images.classes), steps=config.bntt_steps, leak=0.95, norm="bntt",
                   neuron="bntt", gain=config.gain, mean_readout=True, dropout=(0.0, 0.0), seed=seed)  # fmt: skip
    if config.model == "mlp":
        model: nn.Module = models.SpikingVgg(MLP.scaled(config.width), **options)
    else:
        model = models.build(config.model, spiking=True, width=config.width, **options)
    return model.to(memory_format=torch.channels_last)


def measure(config: Config, train: Images, test: Images, seed: int, out: Path, resume: str) -> dict[str, float | None]:
    """Every figure of one seed by name: accuracies 0..1, cosines and agreements; None where an attack found no
    gradient."""
    own, other = (Trained(config, train, test, s, out, resume) for s in (seed, seed + OTHER))
    bench = Bench(config, chosen(chosen(test, config.test_images), config.attack_images))
    clean_images, found = bench.made(None), {}
    for kind in config.networks:
        found[f"{kind}/clean"] = share(bench.right(own[kind], clean_images))
    for eps in config.eps:
        noisy = bench.made(bench.noise(eps))
        for kind in config.networks:
            found[f"{kind}/noise/{eps:g}"] = share(bench.right(own[kind], noisy))
            for name, attack in (("fgsm", bench.fgsm), ("pgd", bench.pgd)):
                say(f"seed {seed}: {name} of {eps:g} on {kind}")
                found[f"{kind}/white/{name}/{eps:g}"] = share(
                    bench.right(own[kind], bench.made(attack(own[kind], eps)))
                )
        for source in config.sources:
            for name, attack in (("fgsm", bench.fgsm), ("pgd", bench.pgd)):
                images = bench.made(attack(other[source], eps))
                for kind in config.networks:
                    found[f"{kind}/black/{source}/{name}/{eps:g}"] = share(bench.right(own[kind], images))
    for kind in (k for k in ("bp", "bntt") if k in config.networks):
        found |= controls(config, bench, own, kind, max(config.eps))
    found |= sweeps(config, bench, own)
    found |= agreement(config, bench, own, clean_images)
    return found
