"""Hybrid conversion and spike-based training, arXiv 2005.01807: an artificial network becomes a spiking one, then
learns to do with few time steps.

An artificial network is trained under the conversion's constraints, its thresholds are measured on its own spikes, and
the converted network is read out after more and more steps. Then the converted network is tuned with few steps, with
the spike-time surrogate (STDB) and the linear one. The report compares artificial, converted and hybrid networks at
equal steps, their spikes, and the energy of their arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pyaccel.recipes import plots
from pyaccel.recipes.activity import LayerActivity
from pyaccel.recipes.classifier import (
    Images,
    check_choices,
    choose_preset,
    chosen,
    device_of,
    logits,
    open_data,
    plain_batches,
    say,
)
from pyaccel.recipes.converted_activity import activity_of
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run
from pyaccel.recipes.hybrid_snn_report import describe, results
from pyaccel.recipes.hybrid_training import (
    SURROGATES,
    HybridConfig,
    accuracy_at,
    build_ann,
    check_hybrid,
    convert,
    planned,
    scaled,
    train_ann,
    tune,
)  # fmt: skip
from pyaccel.recipes.planning import Network
from pyaccel.recipes.report import Report, write
from pyaccel.surgery.converted import ConvertedNetwork
from pyaccel.training import accuracy

__all__ = ["Config", "describe", "preset", "run"]

# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("seeds", "device", "curve", "surrogates", "test_images", "count_images")


@dataclass(frozen=True)
class Config(HybridConfig):
    """Everything a run depends on.

    Args:
        steps: time steps T of the tuned networks, and of the comparison.
        curve: after how many steps the converted network is read out.
        surrogates: of the tuning, of "stdb" and "linear": 0.3 max(0, 1 - |u/V - 1|).
        count_images: test images that spikes are counted on; None: as many as `test_images`.
    """

    steps: int = 100
    curve: tuple[int, ...] = (20, 40, 60, 80, 100, 150, 200, 500, 1000, 2500)
    surrogates: tuple[str, ...] = ("stdb", "linear")
    count_images: int | None = 1_500


PAPER = Config()
DESK = replace(
    PAPER, preset="desk", train_images=6_000, watch_images=500, test_images=500, count_images=100, model="vgg5_robust",
    width=0.25, dropout=(0.1, 0.1), epochs=8, lr=3e-2, balance_images=64, balance_steps=200, steps=15,
    curve=(6, 8, 10, 15, 20, 30, 50, 100, 200), tune_epochs=2, tune_lr=5e-4, tune_weight_decay=0.0, tune_batch_size=32,
    tune_images=2_000,
)  # fmt: skip
DESK_DIGITS = replace(
    DESK, train_images=None, mean=None, std=None, crop_padding=0, flip=False, width=0.125, tune_epochs=3,
    tune_images=None,
)  # fmt: skip
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", model="mlp", width=1.0, dropout=(0.0, 0.1), epochs=15, batch_size=32,
    lr=5e-2, watch_images=None, test_images=None, balance_images=256, balance_steps=100,
    curve=(2, 3, 5, 10, 20, 50, 150), steps=5, tune_epochs=5, seeds=(0, 1, 2),
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


@dataclass(frozen=True)
class Measurement:
    """One seed; accuracies 0..1 on the test images. Keys of spiking networks: "converted", then the surrogates."""

    ann: float
    thresholds: list[float]
    full: list[float]  # converted, scale 1, after each step of the curve
    reduced: dict[str, list[float]]  # at the reduced scale, after each step of the curve up to T
    activity: dict[str, list[LayerActivity]]  # at T
    seconds: dict[str, float]


def networks(config: Config, images: Images) -> dict[str, Network]:
    """What this recipe trains, for `pyaccel plan`; the surrogates need the same."""
    surrogate = config.surrogates[0] if config.surrogates else "stdb"
    return planned(config, images, surrogate=surrogate, steps=config.steps, leak=config.leak, mean_readout=False)


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train, convert and tune what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_data(config, "hybrid_snn")
    build_ann(config, train, 0)  # a network that does not fit the images, or does not convert, is refused first
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured = {seed: measure(config, train, test, seed, out, resume) for seed in config.seeds}
    found = results(config, measured)
    report = Report("hybrid_snn", config.preset, asdict(config), environment(device_of(config)), found)
    if plots.available():
        from pyaccel.recipes.hybrid_snn_plots import draw

        draw(report, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_hybrid(config)
    if config.steps < 1:
        raise ValueError(f"steps must be at least 1, got {config.steps}")
    if config.surrogates:
        check_choices("surrogates", config.surrogates, tuple(SURROGATES))
    if list(config.curve) != sorted(set(config.curve)) or not config.curve or config.curve[0] < 1:
        raise ValueError(f"curve must be increasing numbers of steps, from 1, got {list(config.curve)}")
    if config.steps not in config.curve:
        raise ValueError(f"curve must hold the steps of the comparison, {config.steps}, got {list(config.curve)}")


def measure(config: Config, train: Images, test: Images, seed: int, out: Path, resume: str) -> Measurement:
    """One seed, from the artificial network to the tuned ones."""
    ann, history = train_ann(config, train, test, seed, out, f"ann/seed-{seed}", resume, FREE)
    watched = chosen(test, config.test_images)
    of_ann = accuracy(ann, plain_batches(config, watched), device=device_of(config), forward=logits)["accuracy"]
    seconds = {"ann": sum(row["seconds"] for row in history.rows)}
    file = out / f"thresholds/seed-{seed}.json"

    def converted(surrogate: str, leak: float) -> ConvertedNetwork:
        return convert(
            config, ann, train, seed, file, surrogate=surrogate, steps=config.steps, leak=leak, mean_readout=False
        )

    plain = converted("linear", 1.0)
    say(f"seed {seed}: artificial {of_ann:.2%}; reading out the converted network up to step {config.curve[-1]}")
    full = accuracy_at(config, plain, watched, config.curve)
    few = tuple(t for t in config.curve if t <= config.steps)
    networks = {"converted": scaled(plain, config.scale)}
    for surrogate in config.surrogates if config.tune_epochs else ():
        networks[surrogate] = scaled(converted(surrogate, config.leak), config.scale)
        rows = tune(config, networks[surrogate], train, test, seed, out, f"{surrogate}/seed-{seed}", resume, FREE).rows
        seconds[surrogate] = sum(row["seconds"] for row in rows)
    reduced = {name: accuracy_at(config, network, watched, few) for name, network in networks.items()}
    counted = plain_batches(config, chosen(watched, config.count_images))
    activity = {}
    for name, network in networks.items():
        device = device_of(config)
        activity[name] = activity_of(
            network.eval().to(device),
            (
                (b.images.to(device).contiguous(memory_format=torch.channels_last), b.sample_ids.to(device))
                for b in counted.epoch(0)
            ),
            config.steps,
        )
    return Measurement(of_ann, [float(n.threshold) for n in plain.neurons.values()], full, reduced, activity, seconds)
