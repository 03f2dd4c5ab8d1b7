"""What the recipes on converted networks share (2005.01807): train an artificial network under the conversion's
constraints, measure thresholds, convert, and tune the spiking network with few time steps."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import models, surgery
from pyaccel.data import Batch
from pyaccel.models.form import HYBRID
from pyaccel.models.vgg import Vgg, VggNet
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Images,
    check_fields,
    chosen,
    cross_entropy,
    device_of,
    plain_batches,
    sgd,
    train_classifier,
)  # fmt: skip
from pyaccel.recipes.folder import resume_from
from pyaccel.recipes.planning import Network
from pyaccel.surgery.converted import ConvertedNetwork
from pyaccel.surgery.thresholds import set_threshold
from pyaccel.training import History, distributed, seed_everything

SURROGATES = {"stdb": dict(neuron="stdb"), "linear": dict(neuron="delayed")}
# Of the specifications' statistical checks on 8x8 digits; too small a task for a VGG.
MLP = Vgg((), (100, 100), "two hidden layers of 100, for 8x8 digits", replace(HYBRID, hybrid_start=False))
HALF = (0.5, 0.5, 0.5)
AT_ONCE = 1_600  # images times steps whose currents the search for thresholds holds


@dataclass(frozen=True)
class HybridConfig(ClassifierConfig):
    """The fields of both recipes.

    Args:
        model: a network of `pyaccel.models` that converts (`..._hybrid`, `vgg5_robust`, `resnet12`, `resnet20`,
            `resnet34_cifar`), or "mlp" (hidden layers of 100 and 100).
        epochs: of the artificial network.
        lr: of its SGD; divided by 10 after 60, 80 and 90 % of the epochs.
        dropout: after convolutions and after hidden fully connected layers; None: the description's. In the spiking
            network one mask is held over time.
        gain: of the encoder.
        balance_images: training images that the thresholds are measured on.
        balance_steps: time steps of that search.
        percentile: of the currents, in place of their maximum; None: the maximum.
        balance_stem: balance the first three layers alone, and leave the threshold of the others at 1, as the paper's
            residual networks; None: for residual networks.
        scale: multiplies the measured thresholds where T is small.
        leak: what remains of a membrane after one step in the tuned networks.
        tune_epochs: epochs of the tuning; 0: none.
        tune_lr: of its Adam (amsgrad), divided by 5 after 60, 80 and 90 % of the epochs.
        tune_weight_decay: of that Adam. Where few neurons spike, most gradients are 0 and Adam makes steps of full
            length of the decay alone: with few time steps it silences the network.
        tune_batch_size: images a batch of the tuning; None: `batch_size`.
        tune_images: tune on so many of the training images; None: all.
        test_images: test images of the final figures; None: all.
    """

    model: str = "vgg16_hybrid"
    mean: tuple[float, ...] | None = HALF
    std: tuple[float, ...] | None = HALF
    epochs: int = 300
    batch_size: int = 64
    lr: float = 1e-2
    dropout: tuple[float, float] | None = None
    gain: float = 1.0
    balance_images: int = 512
    balance_steps: int = 1000
    percentile: float | None = None
    balance_stem: bool | None = None
    scale: float = 0.7
    leak: float = 1.0
    tune_epochs: int = 20
    tune_lr: float = 1e-4
    tune_weight_decay: float = 5e-4
    tune_batch_size: int | None = None
    tune_images: int | None = None
    test_images: int | None = None


def check_hybrid(config: HybridConfig) -> None:
    """ValueError for fields that no later check would name."""
    names = ("balance_images", "balance_steps", "tune_batch_size", "tune_images", "test_images")
    check_fields(config, at_least_one=names, positive=("scale", "tune_lr", "gain"))
    if config.tune_epochs < 0:
        raise ValueError(f"tune_epochs must not be negative, got {config.tune_epochs}")
    if config.percentile is not None and not 0 < config.percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {config.percentile}")


def build_ann(config: HybridConfig, images: Images, seed: int) -> nn.Module:
    """The artificial network, its weights drawn from `seed` alone. ValueError if it has no spiking form."""
    seed_everything(seed)
    options = dict(input_shape=images.shape, classes=len(images.classes), dropout=config.dropout)
    if config.model == "mlp":
        model: nn.Module = VggNet(MLP.scaled(config.width), **options)
    else:
        model = models.build(config.model, spiking=False, width=config.width, **options)
    surgery.to_spiking(model, steps=1)
    return model.to(memory_format=torch.channels_last)


def drops(epochs: int) -> list[int]:
    """Finished epochs at which learning rates drop."""
    return [max(1, epochs * percent // 100) for percent in (60, 80, 90)]


def train_ann(
    config: HybridConfig, train: Images, test: Images, seed: int, out: Path, part: str, resume: str, free
) -> tuple[nn.Module, History]:
    """The artificial network of a seed, trained."""
    model = build_ann(config, train, seed).to(device_of(config))
    optimizer = sgd(config, model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops(config.epochs), 0.1)
    history = train_classifier(
        model, train, test, config, seed=seed, out=out / part, resume=resume_from(out, part, resume), name=part,
        free=free,
        optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    return model.eval(), history


def unbalanced(
    config: HybridConfig, ann: nn.Module, seed: int, *, surrogate: str, steps: int, leak: float, mean_readout: bool
) -> ConvertedNetwork:
    """The spiking network of `ann` with all thresholds at 1."""
    snn = surgery.to_spiking(
        ann, steps=steps, leak=leak, gain=config.gain, seed=seed, mean_readout=mean_readout, **SURROGATES[surrogate]
    )
    return snn.to(memory_format=torch.channels_last)


def convert(
    config: HybridConfig, ann: nn.Module, train: Images, seed: int, file: Path, *, surrogate: str, steps: int,
    leak: float,
    mean_readout: bool,
) -> ConvertedNetwork:  # fmt: skip
    """The spiking network of `ann` with thresholds at scale 1: measured, and kept in `file` for the next time."""
    snn = unbalanced(config, ann, seed, surrogate=surrogate, steps=steps, leak=leak, mean_readout=mean_readout).eval()

    def measured() -> dict[str, float]:
        images = plain_batches(replace(config, batch_size=config.balance_images), chosen(train, config.balance_images))
        stem = config.model.startswith("resnet") if config.balance_stem is None else config.balance_stem
        balanced = surgery.balance_thresholds(
            snn, list(images.epoch(0)), percentile=config.percentile, steps=config.balance_steps,
            layers=list(snn.neurons)[:3] if stem else None, chunk=max(1, AT_ONCE // config.balance_images),
        )  # fmt: skip
        return surgery.thresholds(balanced)

    with torch.no_grad():
        for name, value in read_or_make(file, measured).items():
            set_threshold(snn, snn.neurons[name], value)
    return snn


def scaled(snn: ConvertedNetwork, scale: float) -> ConvertedNetwork:
    """A copy with thresholds multiplied by `scale`."""
    made = copy.deepcopy(snn)
    with torch.no_grad():
        for neuron in made.neurons.values():
            set_threshold(made, neuron, scale * float(neuron.threshold))
    return made


def spiking_logits(model: nn.Module, batch: Batch) -> Tensor:
    # With sample ids the encoder draws for an image, not for its place in a batch.
    return model(batch.images.contiguous(memory_format=torch.channels_last), batch.sample_ids)


def tuner(config: HybridConfig, snn: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(snn.parameters(), config.tune_lr, weight_decay=config.tune_weight_decay, amsgrad=True)


def planned(config: HybridConfig, images: Images, **conversion: Any) -> dict[str, Network]:
    """The artificial network and a tuned one, for `pyaccel plan`. conversion: as `unbalanced` takes it."""
    def ann() -> nn.Module:
        return build_ann(config, images, config.seeds[0])

    def tuned() -> nn.Module:
        return unbalanced(config, ann(), config.seeds[0], **conversion)

    found = {"artificial": Network(ann, cross_entropy())}
    if config.tune_epochs:
        size = config.tune_batch_size or config.batch_size
        found["tuned"] = Network(tuned, cross_entropy(spiking_logits), lambda model: tuner(config, model), size)
    return found


def tune(
    config: HybridConfig,
    snn: ConvertedNetwork,
    train: Images,
    test: Images,
    seed: int,
    out: Path,
    part: str,
    resume: str,
    free,
) -> History:
    """Train the weights of a converted network in place, by backpropagation through its time steps."""
    snn.to(device_of(config))
    optimizer = tuner(config, snn)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops(config.tune_epochs), 0.2)
    own = replace(config, batch_size=config.tune_batch_size or config.batch_size)
    history = train_classifier(
        snn, chosen(train, config.tune_images), test, own, seed=seed, out=out / part, resume=resume_from(out, part,
        resume),
        name=part, free=free, of=spiking_logits, optimizer=optimizer, scheduler=scheduler, epochs=config.tune_epochs,
    )  # fmt: skip
    snn.eval()
    return history


def accuracy_at(config: HybridConfig, snn: ConvertedNetwork, test: Images, at: tuple[int, ...]) -> list[float]:
    """Accuracy, 0..1, on the test images after each of `at` steps, at memory that does not depend on them."""
    device = device_of(config)
    snn.to(device)
    right, total = torch.zeros(len(at), dtype=torch.int64, device=device), 0
    for batch in plain_batches(config, test).epoch(0):
        images = batch.images.to(device).contiguous(memory_format=torch.channels_last)
        found = surgery.stream_logits(snn, images, at=at, sample_ids=batch.sample_ids.to(device))
        right += (found.argmax(2) == batch.labels.to(device)).sum(1)
        total += len(batch.labels)
    return (right.double() / total).tolist()


def read_or_make(file: Path, make: Callable[[], Any]) -> Any:
    """What `file` holds, or what `make` gives, which is then kept in it. All processes make it together; what the first
    one makes is written, and is what all of them get."""
    if distributed.from_first(file.exists()):
        return json.loads(file.read_text(encoding="utf-8"))
    made = json.loads(json.dumps(make()))
    if distributed.rank() == 0:
        write_json(file, made)
    return distributed.from_first(made)


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, file)
