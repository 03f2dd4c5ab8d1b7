"""Batch normalisation through time (BNTT), arXiv 2010.01729: a spiking VGG trained from scratch in few time steps.

Three networks from the same initial weights: with BNTT (statistics and gain of every step), with one BatchNorm shared
by all steps, and without normalisation. The report compares their accuracy, also after each time step, their spikes and
the energy of their arithmetic, and asks where BNTT's gains say that the network may stop early.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyaccel import models
from pyaccel.data import Batch, Batches, EventFolder, open_events
from pyaccel.data.events import BINNINGS
from pyaccel.nn import BNTTLIF
from pyaccel.recipes import plots
from pyaccel.recipes.activity import Activity, LayerActivity
from pyaccel.recipes.bntt_report import describe, results
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Images,
    check_choices,
    check_fields,
    choose_preset,
    chosen,
    cross_entropy,
    device_of,
    is_cifar10,
    open_data,
    plain_batches,
    say,
    train_classifier,
)
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.planning import Network, images_of
from pyaccel.recipes.report import Report, write
from pyaccel.training import History, seed_everything

__all__ = ["Config", "describe", "exit_step", "preset", "run"]

NORMS = ("bntt", "shared", "none")
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("norms", "seeds", "exit_threshold", "exit_over", "exit_absolute", "device")


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on.

    Args:
        steps: time steps T.
        leak: what remains of the membrane after one step, 0..1.
        gain: of the encoder; a pixel x spikes with probability min(gain * abs(x), 1) at every step.
        events: the data are event recordings, binned into `steps` frames by "time" or "count" (see
            `data.bin_events`), which the network reads as they are; None: images, through the encoder.
        norms: the networks to train, of "bntt", "shared", "none".
        recompute_layers: less memory for more time: layers compute their activations again in the backward pass.
        recompute_steps: or the network does, in pieces of so many time steps (not with "shared").
        exit_threshold: tau of the early exit.
        exit_over: what tau is compared with in a layer, "mean" or "max" over its channels.
        exit_absolute: compare absolute values of the gains.
    """

    model: str = "vgg9_bntt"
    steps: int = 25
    leak: float = 0.95
    gain: float = 0.5
    events: str | None = None
    norms: tuple[str, ...] = NORMS
    batch_size: int = 256
    lr: float = 0.3
    weight_decay: float = 1e-4
    recompute_layers: bool = False
    recompute_steps: int | None = None
    exit_threshold: float = 0.1
    exit_over: str = "mean"
    exit_absolute: bool = False


PAPER = Config()
DESK = replace(
    PAPER, preset="desk", train_images=12_000, watch_images=1_000, width=0.25, steps=8, epochs=5, batch_size=64, lr=0.1
)
DESK_DIGITS = replace(
    DESK, train_images=None, model="vgg5", gain=1.0, mean=None, std=None, crop_padding=0, flip=False, epochs=3
)
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", model="mlp", width=1.0, steps=10, epochs=4, lr=0.3, seeds=(0, 1, 2)
)
EVENTS = replace(
    DESK_DIGITS, preset="events", events="time", watch_images=None, steps=10, crop_padding=2, epochs=20, batch_size=32,
    seeds=(0, 1, 2),
)
# The paper's figures for this data set were not at hand: network, T, leak and schedule are this library's choice.
TINY_IMAGENET = replace(
    PAPER, preset="tiny_imagenet", model="vgg11_bntt", steps=30, leak=0.99, epochs=90, batch_size=128, crop_padding=8
)
TINY_IMAGENET_DESK = replace(
    TINY_IMAGENET, preset="tiny_imagenet_desk", train_images=2_000, watch_images=200, width=0.125, steps=5, epochs=5,
    batch_size=64, lr=0.1,
)
# What makes a run the published CIFAR-10 experiment, besides its data set: as in PAPER.
PUBLISHED = {
    "preset": ("preset",),
    "network": ("model", "width", "steps", "leak", "gain", "events"),
    "training": ("train_images", "mean", "std", "crop_padding", "flip", "epochs", "batch_size", "lr", "momentum",
                 "weight_decay", "amp"),
}  # fmt: skip
PRESETS = {config.preset: config for config in (SMOKE, DESK, PAPER, EVENTS, TINY_IMAGENET, TINY_IMAGENET_DESK)}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_recordings(config) if config.events else open_data(config, "bntt", data_set(config))
    # A network that does not fit the images is refused before anything is written.
    build(config, train, config.norms[0], 0)
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured, raster = {}, None
    for seed in config.seeds:
        for norm in config.norms:
            part = f"{norm}/seed-{seed}"
            model = build(config, train, norm, seed)
            history = train_classifier(
                model, train, test, config, seed=seed, name=norm, out=out / part, of=logits, free=FREE,
                resume=resume_from(out, part, resume),
            )  # fmt: skip
            measured[norm, seed] = measure(model, plain_batches(config, test), history, config)
            if norm == "bntt" and raster is None:
                raster = raster_of(model, plain_batches(config, test))
    report = Report(
        "bntt",
        config.preset,
        asdict(config),
        environment(device_of(config)),
        results(config, measured, departures(config, train, test)),
    )
    if plots.available():
        draw(config, measured, raster, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_choices("norms", config.norms, NORMS)
    check_fields(config, at_least_one=("steps",), positive=("gain",))
    if config.events is not None:
        check_choices("events", [config.events], BINNINGS)
    if config.exit_over not in ("mean", "max"):
        raise ValueError(f"exit_over must be mean or max, got {config.exit_over!r}")


def data_set(config: Config) -> str:
    return "Tiny-ImageNet" if config.preset.startswith("tiny_imagenet") else "CIFAR-10"


def open_recordings(config: Config) -> tuple[EventFolder, EventFolder]:
    """Training and test recordings, as `open_data` does for images."""
    source = config.data or os.environ.get("PYACCEL_DATA")
    if not source:
        raise ValueError(
            f"the preset {config.preset} of bntt trains on recordings of an event camera and was given none: download "
            "N-MNIST (https://www.garrickorchard.com/datasets/n-mnist), unpack Train.zip and Test.zip in one folder, "
            "and name it with --data PATH or the environment variable PYACCEL_DATA"
        )
    train, test = (open_events(source, split, steps=config.steps, by=config.events) for split in ("train", "test"))
    if train.shape != test.shape or train.classes != test.classes:
        raise ValueError(f"{source}: training and test recordings differ in sensor or classes")
    return chosen(train, config.train_images), test


def build(config: Config, images: Images | EventFolder, norm: str, seed: int) -> models.SpikingVgg:
    """The network, its weights drawn from `seed` alone: the three kinds start from the same ones."""
    seed_everything(seed)
    model = models.build(
        config.model,
        spiking=True,
        width=config.width,
        input_shape=images.shape,
        classes=len(images.classes),
        steps=config.steps,
        leak=config.leak,
        norm=norm,
        gain=config.gain,
        recompute_layers=config.recompute_layers,
        recompute_steps=config.recompute_steps,
        seed=seed,
        input="events" if config.events else "poisson",
    )
    return model.to(memory_format=torch.channels_last)  # a fifth faster on the CPU, and what GPUs prefer


def logits(model: nn.Module, batch: Batch) -> Tensor:
    # With sample ids the encoder draws for an image, not for its place in a batch.
    return model(readable(batch.images), batch.sample_ids)


def readable(images: Tensor) -> Tensor:
    """Images in the memory format that is fast; recordings [B, T, 2, H, W] time first."""
    if images.dim() == 5:
        return images.transpose(0, 1).contiguous()
    return images.contiguous(memory_format=torch.channels_last)


def open_training(config: Config) -> Images | EventFolder:
    """What `pyaccel plan` looks at: the training set, of recordings where the configuration reads them."""
    return open_recordings(config)[0] if config.events else images_of(config, "bntt")


def networks(config: Config, images: Images) -> dict[str, Network]:
    """What this recipe trains, for `pyaccel plan`."""
    return {
        norm: Network(lambda norm=norm: build(config, images, norm, config.seeds[0]), cross_entropy(logits))
        for norm in config.norms
    }


@dataclass(frozen=True)
class Measurement:
    """What the report needs of one trained network; accuracies 0..1 on every test image, once."""

    accuracy_after_step: list[float]
    layers: list[LayerActivity]
    gains: dict[str, Tensor]  # BNTT's weight [T, C] of each layer
    exit_step: int | None  # None without BNTT
    history: list[dict]


def measure(model: models.SpikingVgg, batches: Batches, history: History, config: Config) -> Measurement:
    """Accuracy after each step, and what the layers do, over the whole test set."""
    model.eval()
    device = model.readout.weight.device
    right, total = torch.zeros(config.steps, dtype=torch.int64, device=device), 0
    with torch.inference_mode(), Activity(model) as activity:
        for batch in batches.epoch(0):
            found = model.step_logits(readable(batch.images.to(device)), batch.sample_ids.to(device))
            right += (found.argmax(2) == batch.labels.to(device)).sum(1)
            total += len(batch.labels)
    gains = {
        name.removesuffix(".neuron"): module.weight.detach().cpu()
        for name, module in model.named_modules()
        if isinstance(module, BNTTLIF)
    }
    return Measurement(
        (right.double() / total).tolist(),
        activity.layers(),
        gains,
        exit_step(list(gains.values()), config.exit_threshold, config.exit_over, config.exit_absolute)
        if gains
        else None,
        history.rows,
    )


def exit_step(gains: Sequence[Tensor], threshold: float = 0.1, over: str = "mean", absolute: bool = False) -> int:
    """Steps to run, decided once after training: all up to the last at which some layer still has gain.

    a_l[t] is the mean (or maximum) over channels of layer l's gains at step t, gains `[T, C]`::

        T_exit = 1 + max{ t : max_l a_l[t] >= threshold }       and 1 if there is no such t

    This is this library's definition; the paper's abstract has the idea, its exact rule was not at hand.
    """
    levels = [g.abs() if absolute else g for g in gains]
    levels = torch.stack([g.mean(1) if over == "mean" else g.amax(1) for g in levels]).amax(0)
    alive = (levels >= threshold).nonzero()
    return 1 + int(alive.max()) if len(alive) else 1


def raster_of(model: models.SpikingVgg, batches: Batches) -> plots.Raster:
    """The spikes of every layer for the first test image."""
    batch = next(iter(batches.epoch(0)))
    device, spikes, handles = model.readout.weight.device, {}, []
    for name, module in [("encoder", model.encoder)] + [
        (name, layer.neuron) for name, layer in model.named_modules() if isinstance(layer, models.SpikingLayer)
    ]:  # fmt: skip
        handles.append(module.register_forward_hook(
            lambda m, a, s, name=name: spikes.__setitem__(name, s[:, 0].flatten(1).cpu())))  # fmt: skip
    model.eval()
    with torch.inference_mode():
        found = model.step_logits(readable(batch.images[:1].to(device)), batch.sample_ids[:1].to(device))[:, 0].cpu()
    for handle in handles:
        handle.remove()
    image = batch.images[0]
    if image.dim() == 4:  # a recording: where it got brighter, less where it got darker
        image = (image[:, 1] - image[:, 0]).sum(0, keepdim=True)
    return plots.Raster(image, int(batch.labels[0]), found, spikes)


def draw(config: Config, measured: dict[tuple[str, int], Measurement], raster: plots.Raster | None, out: Path) -> None:
    plots.training_curves({key: m.history for key, m in measured.items()}, out / "training.png")
    plots.accuracy_over_steps(
        {key: [100 * a for a in m.accuracy_after_step] for key, m in measured.items()},
        {seed: m.exit_step for (norm, seed), m in measured.items() if norm == "bntt"},
        out / "accuracy.png",
    )
    if raster is not None:
        first = measured["bntt", config.seeds[0]]
        plots.raster(raster, out / "raster.png")
        plots.gain_map(first.gains, config.exit_threshold, first.exit_step, out / "gains.png")


def departures(config: Config, train: Images | EventFolder, test: Images | EventFolder) -> list[str]:
    """In what a run is not the published CIFAR-10 experiment; empty if it is."""
    found = [
        group
        for group, names in PUBLISHED.items()
        if any(getattr(config, name) != getattr(PAPER, name) for name in names)
    ]  # fmt: skip
    return found + ([] if is_cifar10(train, test) else ["data set"])
