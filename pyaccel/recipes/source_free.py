"""Domain adaptation without source data (SFDA, first named PrDA), arXiv 2007.01524.

A classifier is trained on labelled source images; then, with unlabelled target images and without the source's, it
adapts: low-entropy samples become prototypes, similarity to them gives pseudo-labels, a distance between sets decides
which to trust, and a second head holds on to what the source said. The report gives the accuracy after the last step
beside the source classifier's own, the ablations, and what prototypes and filter are worth before any adaptation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import models
from pyaccel.data import Augment, Batch, Batches, Window
from pyaccel.recipes import plots, source_free_plots
from pyaccel.recipes.classifier import ClassifierConfig, Images, check_choices, check_fields, chosen, device_of, say
from pyaccel.recipes.domains import SHIFTED, Domain, in_memory, open_pair
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.planning import Network
from pyaccel.recipes.report import Report, write
from pyaccel.recipes.source_free_parts import Rounds, SourceNet, diagnose, predict
from pyaccel.recipes.source_free_report import describe, results
from pyaccel.training import Trainer, TwoHeads, accuracy, distributed, learning_rate_factor, seed_everything
from pyaccel.training.source_free import VARIANTS

__all__ = ["Config", "describe", "preset", "run"]

FREE = ("pairs", "variants", "seeds", "device")
MEMORIES = ("train", "clean")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on, besides the shared fields.

    Args:
        data: the folder in which `pairs` names folders: DOMAIN/CLASS/x.jpg (Office-31 also DOMAIN/images/CLASS), or
            sets with their own layout and parts.
        train_images: of each domain, at most so many to train on or adapt to; None: all.
        lr: learning rate of the source training, by SGD (see `backbone_share`).
        epochs: of the source training.
        pairs: what to adapt, "source->target", folders in `data`; "digits8->shifted" is packaged.
        weights: a file with ImageNet weights in torchvision's layout, for the residual networks; None: from scratch.
        size: images are resized to it (of folders: the shorter side).
        crop: windows of this size are cut from them; None: no windows, but `crop_padding`.
        smoothing: of the labels in source training.
        backbone_share: learning rate of the features in source training, as a share of the heads'.
        whole_target: adapt to all images of the target and test on the same ones, as the paper does.
        steps: of the adaptation.
        adapt_lr: learning rate of its heads.
        feature_share: learning rate of its features, as a share of that.
        adapt_batch: images a batch.
        refresh: steps between two choices of prototypes.
        capacity: prototypes a class, at most.
        memory: "train", prototypes from augmented images in training mode, as in the published code; "clean", from
            plain images in evaluation mode: another estimator.
        watch_steps: steps between two looks at the accuracy (target labels: looked at, never used).
        variants: "full" and the ablations "no_filter", "no_source", "naive".
        per_class: accuracy is the mean over classes, as for VisDA-C.
        held: decode image folders once, into memory.
    """

    model: str = "resnet50"
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD
    crop_padding: int = 0
    epochs: int = 100
    batch_size: int = 32
    lr: float = 1e-2
    weight_decay: float = 1e-3
    pairs: tuple[str, ...] = (
        "amazon->webcam",
        "dslr->webcam",
        "webcam->dslr",
        "amazon->dslr",
        "dslr->amazon",
        "webcam->amazon",
    )
    weights: str | None = None
    size: int = 256
    crop: int | None = 224
    smoothing: float = 0.1
    backbone_share: float = 0.1
    whole_target: bool = True
    steps: int = 5_000
    adapt_lr: float = 1e-3
    feature_share: float = 0.1
    adapt_batch: int = 32
    refresh: int = 100
    capacity: int = 100
    memory: str = "train"
    watch_steps: int = 1_000
    variants: tuple[str, ...] = ("full",)
    per_class: bool = False
    held: bool = False


PAPER = Config()  # Office-31
HOME = ("Art", "Clipart", "Product", "Real_World")
OFFICE_HOME = replace(PAPER, pairs=tuple(f"{a}->{b}" for a in HOME for b in HOME if a != b), epochs=50)
VISDA = replace(PAPER, pairs=("train->validation",), model="resnet101", epochs=10, lr=1e-3, per_class=True)
DESK = replace(
    PAPER, preset="desk", model="small", mean=None, std=None, flip=False, size=32, crop=None, epochs=30, lr=5e-2,
    weight_decay=5e-4, backbone_share=1.0, train_images=1_500, watch_images=1_500, steps=300, adapt_lr=2e-3,
    feature_share=0.5, refresh=50, watch_steps=100, held=True, variants=("full", "no_filter", "naive"), seeds=(0, 1),
    pairs=("mnist->usps", "usps->mnist", "pacs/photo->pacs/art_painting", "pacs/cartoon->pacs/sketch"),
)  # fmt: skip
SMOKE = replace(
    DESK, preset="smoke", pairs=(SHIFTED,), size=8, epochs=10, feature_share=1.0, train_images=None, watch_images=None,
    seeds=(0, 1, 2), variants=VARIANTS,
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. paper: Office-31, Office-Home or VisDA, told apart by the folders in `data`."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    config = PRESETS[name]
    source = data or config.data or os.environ.get("PYACCEL_DATA")
    if name == "paper" and source:
        home = Path(source)
        if (home / "Clipart").is_dir():
            config = OFFICE_HOME
            if (home / "Real World").is_dir():  # as the archive names it
                config = replace(config, pairs=tuple(pair.replace("Real_World", "Real World") for pair in config.pairs))
        elif (home / "validation").is_dir():
            config = VISDA
    return replace(config, data=data or config.data)


def open_training(config: Config) -> SimpleNamespace:
    """Shape and classes of what the networks see, for `pyaccel plan`: of the first source, or as Office-31 has them."""
    channels, classes = 3, tuple(map(str, range(31)))
    if config.data or os.environ.get("PYACCEL_DATA") or config.pairs == (SHIFTED,):
        images = open_domains(config, config.pairs[0])[0].train
        channels, classes = images.shape[0], images.classes
    side = config.crop or config.size
    return SimpleNamespace(shape=(channels, side, side), classes=classes)


def networks(config: Config, images: SimpleNamespace) -> dict[str, Network]:
    """The network of the source and the adapted one, for `pyaccel plan`; choosing prototypes needs less."""
    def source() -> SourceNet:
        seed_everything(config.seeds[0])
        return source_net(config, images)

    def target() -> TwoHeads:
        return two_heads(config, source(), len(images.classes), config.variants[0])

    def learning(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
        return model(batch.images, learn=True).loss, {}

    return {
        "source": Network(source, partial(source_loss, config), partial(source_sgd, config)),
        "target": Network(target, learning, partial(target_sgd, config), config.adapt_batch),
    }


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train on each source, adapt to its target by each variant, in folders of `out` that survive a kill, and report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    device = device_of(config)
    domains = {pair: open_domains(config, pair) for pair in config.pairs}
    source_net(config, domains[config.pairs[0]][0].train)  # what does not fit is refused before anything is written
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured = {}
    for pair in config.pairs:
        for seed in config.seeds:
            part = f"{pair.replace('->', '-to-').replace('/', '_')}/seed-{seed}"
            measured[pair, seed] = adapt(
                config, *domains[pair], pair, seed, device, out / part,
                lambda name, part=part: resume_from(out, f"{part}/{name}", resume),
            )  # fmt: skip
    report = Report("source_free", config.preset, asdict(config), environment(device), results(config, measured))
    if plots.available():
        source_free_plots.draw(measured, config.variants, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    whole = ("size", "crop", "steps", "adapt_batch", "refresh", "capacity", "watch_steps")
    check_fields(config, at_least_one=whole, positive=("adapt_lr", "feature_share", "backbone_share"))
    check_choices("pairs", config.pairs)
    check_choices("variants", config.variants, VARIANTS)
    check_choices("memory", [config.memory], MEMORIES)
    if config.pairs != (SHIFTED,) and not (config.data or os.environ.get("PYACCEL_DATA")):
        raise ValueError(
            f"the preset {config.preset} of source_free adapts {', '.join(config.pairs)} and was given no data: name "
            f"the "
            "folder that holds these folders with --data PATH or the environment variable PYACCEL_DATA; or choose the "
            f"packaged digits: --preset smoke, pairs {SHIFTED}"
        )


def open_domains(config: Config, pair: str) -> tuple[Domain, Domain]:
    source = config.data or os.environ.get("PYACCEL_DATA")
    found = []
    for domain in open_pair(Path(source) if source else None, pair, config.size, whole_target=config.whole_target):
        train = chosen(domain.train, config.train_images)
        domain = Domain(domain.name, train, train if domain.test is domain.train else domain.test)
        found.append(in_memory(domain) if config.held else domain)
    return tuple(found)


def source_net(config: Config, images: Images) -> SourceNet:
    """The network before any training, ImageNet weights in its features where the configuration names a file."""
    side = config.crop or config.size
    shape, classes = (images.shape[0], side, side), len(images.classes)
    if config.model == "small":
        a, b, c = (max(1, round(n * config.width)) for n in (16, 32, 64))
        pool = nn.MaxPool2d(2) if side > 8 else nn.Identity()
        parts = [
            nn.Conv2d(shape[0], a, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(a, b, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        ]  # fmt: skip
        for layer in (parts[0], parts[3], parts[6]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return SourceNet(nn.Sequential(*parts), 4 * c, classes)
    network = models.build(config.model, classes=classes, input_shape=shape, width=config.width)
    if config.weights:
        models.load_torchvision(network, config.weights, readout=False)
    return SourceNet(network.features, network.readout.in_features, classes)


def augment_of(config: Config, *, training: bool) -> Augment:
    if config.crop is not None:
        return Window(
            size=config.crop, random=training, flip=training and config.flip, mean=config.mean, std=config.std
        )
    return Augment(config.crop_padding if training else 0, training and config.flip, config.mean, config.std)


@dataclass
class Adapted:
    """One pair and seed. Accuracies 0..1, by variant: `final`, after the last step; `watched`, (step, accuracy).

    kept: share of pseudo-labels that the filter kept in the last round. diagnostics: see `diagnose`.
    """

    source_test: float
    source_only: float
    final: dict[str, float]
    watched: dict[str, list[tuple[int, float]]]
    kept: dict[str, float]
    diagnostics: dict[str, float]
    seconds: float


def adapt(
    config: Config, source: Domain, target: Domain, pair: str, seed: int, device: torch.device, out: Path,
    resume: Callable[[str], str],
) -> Adapted:  # fmt: skip
    """Train on the source, then adapt to the target by each variant, from the same source classifier."""
    seed_everything(seed)
    net = source_net(config, source.train).to(device)
    rows = train_source(config, net, source, pair, seed, device, out / "source", resume("source"))
    seconds = sum(row["seconds"] for row in rows)
    found = Adapted(
        score(config, net, source.test, device), score(config, net, target.test, device), {}, {}, {},
        diagnose(net, test_batches(config, target.train), target.train.labels, config.capacity, device), 0.0,
    )  # fmt: skip
    for variant in config.variants:
        model, rows = train_target(config, net, target, pair, variant, seed, device, out / variant, resume(variant))
        found.final[variant] = score(config, model, target.test, device)
        found.watched[variant] = [(row["step"], row["eval_accuracy"]) for row in rows]
        found.kept[variant] = rows[-1]["train_kept"]
        seconds += sum(row["seconds"] for row in rows)
    found.seconds = seconds
    return found


def train_source(
    config: Config, net: SourceNet, source: Domain, pair: str, seed: int, device: torch.device, out: Path, resume: str
) -> list[dict]:
    """Smoothed cross entropy, SGD with momentum (2007.01524 releases no source training: this follows SHOT's)."""
    optimizer = source_sgd(config, net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: learning_rate_factor(epoch, config.epochs))

    batches = training_batches(config, source, config.batch_size, seed)
    return fit(
        config,
        net,
        optimizer,
        partial(source_loss, config),
        batches,
        config.epochs,
        source,
        f"{pair}, source",
        seed,
        device,
        out,
        resume,
        scheduler,
    )


def source_sgd(config: Config, net: SourceNet) -> torch.optim.Optimizer:
    groups = [{"params": list(net.features.parameters()), "lr": config.lr * config.backbone_share},
              {"params": list(net.head.parameters())}]  # fmt: skip
    return torch.optim.SGD(
        groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
    )


def source_loss(config: Config, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    found = model(batch.images)
    right = (found.argmax(1) == batch.labels).float().mean()
    return F.cross_entropy(found, batch.labels, label_smoothing=config.smoothing), {"accuracy": right}


def two_heads(config: Config, net: SourceNet, classes: int, variant: str) -> TwoHeads:
    return TwoHeads(
        net.features, net.head, classes=classes, values=net.values, steps=config.steps, variant=variant,
        capacity=config.capacity,
    )  # fmt: skip


def target_sgd(config: Config, model: TwoHeads) -> torch.optim.Optimizer:
    return model.optimizer(config.adapt_lr, config.adapt_lr * config.feature_share)


def train_target(
    config: Config,
    net: SourceNet,
    target: Domain,
    pair: str,
    variant: str,
    seed: int,
    device: torch.device,
    out: Path,
    resume: str,
) -> tuple[TwoHeads, list[dict]]:
    """The adaptation; no label of the target is used."""
    seed_everything(seed)
    model = two_heads(config, net, len(target.train.classes), variant).to(device)
    optimizer = target_sgd(config, model)
    batches = training_batches(config, target, config.adapt_batch, seed)
    clean = config.memory == "clean"
    # Every process chooses the same prototypes, from all images.
    shuffled = training_batches(config, target, config.adapt_batch, seed, spread=False)
    all_images = test_batches(config, target.train) if clean else shuffled

    def loss(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if model.step % config.refresh == 0 and variant != "naive":
            # Its own orders and crops: numbered far above the epochs of training.
            model.refresh(all_images.epoch(0 if clean else 2**20 + model.step // config.refresh), clean=clean)
        model.set_learning_rates(optimizer)
        found = wrapped(batch.images, learn=True)
        return found.loss, {"source": found.source, "target": found.target, "alpha": found.alpha, "kept": found.kept}

    rounds = max(1, math.ceil(config.steps / config.watch_steps))
    last = Rounds(batches, math.ceil(config.steps / rounds))
    rows = fit(config, model, optimizer, loss, last, rounds, target, f"{pair}, {variant}", seed, device, out, resume)
    return model, rows


def fit(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, loss, batches, epochs: int, domain: Domain,
    name: str, seed: int, device: torch.device, out: Path, resume: str, scheduler=None,
) -> list[dict]:  # fmt: skip
    """One training by `Trainer`; the rows of its metrics."""
    watched = test_batches(config, chosen(domain.test, config.watch_images), spread=True)

    def progress(trainer: Trainer, row: dict) -> None:
        say(f"{name}, seed {seed}: {row['epoch']}/{epochs}  step {row['step']}  loss {row['train_loss']:.4f}  "
            f"accuracy {row['eval_accuracy']:.2%}  {row['seconds']:.1f} s")  # fmt: skip

    trainer = Trainer(
        model, optimizer, loss_fn=loss, train_batches=batches, epochs=epochs, out=out, scheduler=scheduler,
        amp=config.amp,
        evaluate=lambda model: accuracy(model, watched, device=device), on_epoch_end=progress, seed=seed, device=device,
        best_metric="-loss",
        config={k: v for k, v in asdict(config).items() if k not in FREE} | {"name": name, "seed": seed},
    )  # fmt: skip
    return trainer.fit(resume).rows


def training_batches(config: Config, domain: Domain, size: int, seed: int, *, spread: bool = True) -> Batches:
    """Shuffled and augmented; spread: each process gets its slice of every batch, else each gets them all."""
    world = distributed.world() if spread else 1
    size = min(size, len(domain.train) // world * world)
    return Batches(
        domain.train, size, seed=seed, shuffle=True, drop_last=True, augment=augment_of(config, training=True),
        rank=distributed.rank() if spread else 0, world=world,
    )  # fmt: skip


def test_batches(config: Config, images: Images, *, spread: bool = False) -> Batches:
    return Batches(
        images, config.batch_size, shuffle=False, drop_last=False, augment=augment_of(config, training=False),
        rank=distributed.rank() if spread else 0, world=distributed.world() if spread else 1,
    )  # fmt: skip


def score(config: Config, model: nn.Module, images: Images, device: torch.device) -> float:
    """Accuracy on every image, or the mean over classes of it."""
    predicted = predict(model, test_batches(config, images), device)[0].argmax(1)
    right = (predicted == images.labels).double()
    if not config.per_class:
        return float(right.mean())
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    return float(
        (torch.zeros(len(counts), dtype=torch.float64).index_add_(0, images.labels, right) / counts)[counts > 0].mean()
    )
