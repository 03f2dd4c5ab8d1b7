"""Batch normalisation through time (BNTT), arXiv 2010.01729: a spiking VGG trained from scratch in few time steps.

Three networks from the same initial weights: with BNTT (statistics and gain of every step), with one BatchNorm shared
by all steps, and without normalisation. The report compares their accuracy, also after each time step, their spikes and
the energy of their arithmetic, and asks where BNTT's gains say that the network may stop early.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import models
from pyaccel.data import CIFAR_MEAN, CIFAR_STD, Augment, Batch, Batches, epoch_order, open_images
from pyaccel.data.images import ImageFolder, ImageSet
from pyaccel.data.source import PACKAGED
from pyaccel.models.vgg import Vgg
from pyaccel.nn import BNTTLIF
from pyaccel.recipes import plots
from pyaccel.recipes.activity import Activity, LayerActivity
from pyaccel.recipes.bntt_report import describe, results
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.report import Report, write
from pyaccel.training import History, Trainer, accuracy, seed_everything

__all__ = ["Config", "describe", "exit_step", "preset", "run"]

NORMS = ("bntt", "shared", "none")
# Of the specification's statistical check on 8x8 digits; too small a task for a VGG.
MLP = Vgg((), (100, 100), "two hidden layers of 100, for 8x8 digits")
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("norms", "seeds", "exit_threshold", "exit_over", "exit_absolute", "device")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on.

    Args:
        preset: the preset that the other fields come from; named in the report.
        data: path of a data set, or a packaged set, "digits" or "digits8"; None: the environment variable PYACCEL_DATA.
        train_images: train on so many images, chosen once for all seeds; None: on all.
        watch_images: test images that the evaluation after each epoch looks at; None: all. The last one takes all.
        model: a network of `pyaccel.models`, or "mlp" (hidden layers of 100 and 100).
        width: every hidden layer this many times as wide.
        steps: time steps T.
        leak: what remains of the membrane after one step, 0..1.
        gain: of the encoder; a pixel x spikes with probability min(gain * abs(x), 1) at every step.
        mean: subtracted from pixels in [0, 1], one value a channel; None: pixels stay as they are.
        std: divides the pixels after that; None as for mean.
        crop_padding: random crops after padding by so many pixels, in training.
        flip: random horizontal flips in training.
        norms: the networks to train, of "bntt", "shared", "none".
        epochs: passes over the training images.
        batch_size: images a batch.
        lr: learning rate of SGD; divided by 10 after the epochs numbered 5/10, 7/10 and 9/10 of `epochs`, from 0.
        momentum: of SGD.
        weight_decay: of SGD, on every parameter, BNTT's gains included.
        amp: None for float32, "bf16", or "fp16" (CUDA) for the matrix products of training.
        seeds: one network of each kind for each.
        exit_threshold: tau of the early exit.
        exit_over: what tau is compared with in a layer, "mean" or "max" over its channels.
        exit_absolute: compare absolute values of the gains.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
    """

    preset: str = "paper"
    data: str | None = None
    train_images: int | None = None
    watch_images: int | None = None
    model: str = "vgg9_bntt"
    width: float = 1.0
    steps: int = 25
    leak: float = 0.95
    gain: float = 0.5
    mean: tuple[float, ...] | None = CIFAR_MEAN
    std: tuple[float, ...] | None = CIFAR_STD
    crop_padding: int = 4
    flip: bool = True
    norms: tuple[str, ...] = NORMS
    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    amp: str | None = None
    seeds: tuple[int, ...] = (0,)
    exit_threshold: float = 0.1
    exit_over: str = "mean"
    exit_absolute: bool = False
    device: str = "auto"


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
# What makes a run the published CIFAR-10 experiment, besides its data set: as in PAPER.
PUBLISHED = {
    "preset": ("preset",),
    "network": ("model", "width", "steps", "leak", "gain"),
    "training": ("train_images", "mean", "std", "crop_padding", "flip", "epochs", "batch_size", "lr", "momentum",
                 "weight_decay", "amp"),
}  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    config = PRESETS[name]
    source = data or config.data or os.environ.get("PYACCEL_DATA")
    if name == "desk" and source in PACKAGED:
        config = DESK_DIGITS
    return replace(config, data=data or config.data)


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    train, test = open_data(config)
    build(
        config, train, config.norms[0], 0
    )  # a network that does not fit the images is refused before anything is written
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured, raster = {}, None
    for seed in config.seeds:
        for norm in config.norms:
            part = f"{norm}/seed-{seed}"
            model, history = train_one(
                config, train, test, norm, seed, device, out / part, resume_from(out, part, resume)
            )
            measured[norm, seed] = measure(model, test_batches(config, test), history, config)
            if norm == "bntt" and raster is None:
                raster = raster_of(model, test_batches(config, test))
    report = Report(
        "bntt",
        config.preset,
        asdict(config),
        environment(device),
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
    for name in ("norms", "seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name}: expected at least one value and none twice, got {list(values)}")
    unknown = [norm for norm in config.norms if norm not in NORMS]
    if unknown:
        raise ValueError(f"norms: expected some of {', '.join(NORMS)}, got {', '.join(unknown)}")
    for name in ("train_images", "watch_images", "steps", "epochs", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("width", "lr", "gain"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    if config.exit_over not in ("mean", "max"):
        raise ValueError(f"exit_over must be mean or max, got {config.exit_over!r}")


def open_data(config: Config) -> tuple[ImageSet | ImageFolder, ImageSet | ImageFolder]:
    """Training and test images."""
    if config.data is None and not os.environ.get("PYACCEL_DATA"):
        raise ValueError(
            f"the preset {config.preset} of bntt trains on CIFAR-10 and was given no data: download the binary version "
            "(cifar-10-binary.tar.gz, https://www.cs.toronto.edu/~kriz/cifar.html), unpack it, and name the folder "
            "with --data PATH or the environment variable PYACCEL_DATA; or choose the packaged digits: --preset desk "
            "--data digits"
        )
    train, test = open_images(config.data, "train"), open_images(config.data, "test")
    if train.shape != test.shape or train.classes != test.classes:
        raise ValueError(f"{config.data}: training and test images differ in shape or classes")
    return chosen(train, config.train_images), test


def chosen(images: ImageSet | ImageFolder, count: int | None) -> ImageSet | ImageFolder:
    """`count` images, a fair sample also of a set that is sorted by class; always the same ones."""
    return images if count is None or count >= len(images) else images.subset(epoch_order(len(images), 0, 0)[:count])


def test_batches(config: Config, test: ImageSet | ImageFolder) -> Batches:
    augment = Augment(mean=config.mean, std=config.std)
    return Batches(test, config.batch_size, shuffle=False, drop_last=False, augment=augment)


def build(config: Config, images: ImageSet | ImageFolder, norm: str, seed: int) -> models.SpikingVgg:
    """The network, its weights drawn from `seed` alone: the three kinds start from the same ones."""
    seed_everything(seed)
    options = dict(
        input_shape=images.shape,
        classes=len(images.classes),
        steps=config.steps,
        leak=config.leak,
        norm=norm,
        gain=config.gain,
        seed=seed,
    )
    if config.model == "mlp":
        model = models.SpikingVgg(MLP.scaled(config.width), **options)
    else:
        model = models.build(config.model, spiking=True, width=config.width, **options)
    return model.to(memory_format=torch.channels_last)  # a fifth faster on the CPU, and what GPUs prefer


def train_one(
    config: Config,
    train: ImageSet | ImageFolder,
    test: ImageSet | ImageFolder,
    norm: str,
    seed: int,
    device: torch.device,
    out: Path,
    resume: str,
) -> tuple[models.SpikingVgg, History]:
    """One network, trained to the end of its last epoch, from scratch or from its checkpoint."""
    model = build(config, train, norm, seed).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones(config.epochs), 0.1)
    augment = Augment(config.crop_padding, config.flip, config.mean, config.std)
    watched = test_batches(config, chosen(test, config.watch_images))
    trainer = Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        loss_fn=loss,
        epochs=config.epochs,
        out=out,
        amp=config.amp,
        train_batches=Batches(train, config.batch_size, seed=seed, shuffle=True, drop_last=True, augment=augment),
        evaluate=lambda model: accuracy(model, watched, device=device, forward=logits),
        on_epoch_end=lambda trainer, row: say(f"{norm}, seed {seed}: {progress(row, config)}"),
        config={k: v for k, v in asdict(config).items() if k not in FREE} | {"norm": norm, "seed": seed},
        seed=seed,
        device=device,
    )
    history = trainer.fit(resume)
    return model, history


def milestones(epochs: int) -> list[int]:
    """Finished epochs at which the learning rate drops: after the epochs numbered 5/10, 7/10, 9/10 of all, from 0.

    In integers: the published code compares floats for equality, and skips a drop where the product is not whole.
    """
    return [epochs * tenths // 10 + 1 for tenths in (5, 7, 9)]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    # With sample ids the encoder draws for an image, not for its place in a batch.
    return model(batch.images.contiguous(memory_format=torch.channels_last), batch.sample_ids)


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    found = logits(model, batch)
    right = (found.argmax(1) == batch.labels).float().mean()
    return F.cross_entropy(found, batch.labels), {"accuracy": right}


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
            images = batch.images.to(device).contiguous(memory_format=torch.channels_last)
            found = model.step_logits(images, batch.sample_ids.to(device))
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
        found = model.step_logits(batch.images[:1].to(device), batch.sample_ids[:1].to(device))[:, 0].cpu()
    for handle in handles:
        handle.remove()
    return plots.Raster(batch.images[0], int(batch.labels[0]), found, spikes)


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


def departures(config: Config, train: ImageSet | ImageFolder, test: ImageSet | ImageFolder) -> list[str]:
    """In what a run is not the published CIFAR-10 experiment; empty if it is."""
    found = [
        group
        for group, names in PUBLISHED.items()
        if any(getattr(config, name) != getattr(PAPER, name) for name in names)
    ]  # fmt: skip
    return found + ([] if is_cifar10(train, test) else ["data set"])


def is_cifar10(train: ImageSet | ImageFolder, test: ImageSet | ImageFolder) -> bool:
    """Whether these are CIFAR-10's original images, by sizes and deviations of channels, which JPEG copies change."""
    if not isinstance(train, ImageSet) or (len(train), len(test), train.shape) != (50_000, 10_000, (3, 32, 32)):
        return False
    found = []
    for channel in train.images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        values = torch.arange(256, dtype=torch.float64) / 255
        found.append(float(((values - (shares * values).sum()) ** 2 * shares).sum().sqrt()))
    return all(abs(f - known) < 5e-4 for f, known in zip(found, (0.2470, 0.2435, 0.2616), strict=True))


def progress(row: dict, config: Config) -> str:
    watched = f"test accuracy {row['eval_accuracy']:.2%}" + (
        f" of {row['eval_n']} images" if config.watch_images else ""
    )
    return f"epoch {row['epoch']}/{config.epochs}  loss {row['train_loss']:.4f}  {watched}  {row['seconds']:.1f} s"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
