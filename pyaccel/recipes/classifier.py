"""What the recipes that train image classifiers share: the fields of their configuration, their images, one training.

A recipe's `Config` inherits `ClassifierConfig` and overrides what its paper does otherwise; the functions here read
nothing else of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel.data import CIFAR_MEAN, CIFAR_STD, Augment, Batch, Batches, epoch_order, open_images
from pyaccel.data.images import ImageFolder, ImageSet
from pyaccel.data.source import PACKAGED
from pyaccel.nn import convert_sync_bntt
from pyaccel.training import History, Trainer, accuracy, distributed

Images = ImageSet | ImageFolder
Logits = Callable[[nn.Module, Batch], Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]

# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("seeds", "device")


@dataclass(frozen=True)
class ClassifierConfig:
    """The fields that every recipe with an image classifier has.

    Args:
        preset: the preset that the other fields come from; named in the report.
        data: path of a data set, or a packaged set, "digits" or "digits8"; None: the environment variable PYACCEL_DATA.
        train_images: train on so many images, chosen once for all seeds; None: on all.
        watch_images: test images that the evaluation after each epoch looks at; None: all. The last one takes all.
        model: a network of `pyaccel.models`.
        width: every hidden layer this many times as wide.
        mean: subtracted from pixels in [0, 1], one value a channel; None: pixels stay as they are.
        std: divides the pixels after that; None as for mean.
        crop_padding: random crops after padding by so many pixels, in training.
        flip: random horizontal flips in training.
        image_size: images decoded from files are resized and cropped to so many pixels a side; None: they have one size.
        resized_crop: train on random parts of the images, of 8 to 100 % of their area, resized to `image_size`; test
            images are then resized to 8/7 of it before the crop (256 for 224).
        epochs: passes over the training images.
        batch_size: images a step, over all processes.
        accumulate: cut each process's share of a batch into so many parts, one after the other, to save memory.
        sync_norm: batch statistics of the images of all processes, not of each process by itself.
        lr: learning rate of SGD; divided by 10 after the epochs numbered 5/10, 7/10 and 9/10 of `epochs`, from 0.
        momentum: of SGD.
        weight_decay: of SGD.
        amp: None for float32, "bf16", or "fp16" (CUDA) for the matrix products of training.
        seeds: everything is done once for each.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
    """

    preset: str = "paper"
    data: str | None = None
    train_images: int | None = None
    watch_images: int | None = None
    model: str = "vgg16"
    width: float = 1.0
    mean: tuple[float, ...] | None = CIFAR_MEAN
    std: tuple[float, ...] | None = CIFAR_STD
    crop_padding: int = 4
    flip: bool = True
    image_size: int | None = None
    resized_crop: bool = False
    epochs: int = 100
    batch_size: int = 128
    accumulate: int = 1
    sync_norm: bool = False
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    amp: str | None = None
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"


C = TypeVar("C", bound=ClassifierConfig)


def choose_preset(presets: Mapping[str, C], name: str, data: str | None, *, desk_digits: C | None = None) -> C:
    """The configuration `name` of `presets`, for `data`. desk_digits: what "desk" means for the packaged digits."""
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(presets)}")
    config = presets[name]
    source = data or config.data or os.environ.get("PYACCEL_DATA")
    if name == "desk" and source in PACKAGED and desk_digits is not None:
        config = desk_digits
    return replace(config, data=data or config.data)


def device_of(config: ClassifierConfig) -> torch.device:
    """The device that `config.device` names; of several processes, each has its own GPU."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if config.device == "auto" else config.device)
    if device.type == "cuda" and device.index is None and distributed.world() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_choices(name: str, values: Sequence, known: Sequence | None = None) -> None:
    """ValueError unless there is at least one value, none twice, and all are known."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name}: expected at least one value and none twice, got {list(values)}")
    unknown = [str(value) for value in values if known is not None and value not in known]
    if unknown:
        raise ValueError(f"{name}: expected some of {', '.join(map(str, known))}, got {', '.join(unknown)}")


def check_fields(config: Any, *, at_least_one: Collection[str] = (), positive: Collection[str] = ()) -> None:
    """ValueError for the shared fields that no later check would name, and for the named ones of the recipe's own."""
    check_choices("seeds", config.seeds)
    if config.resized_crop and (config.image_size is None or config.crop_padding):
        raise ValueError(
            "resized_crop needs image_size and replaces crop_padding, got image_size "
            f"{config.image_size}, crop_padding {config.crop_padding}; set --image_size 224 --crop_padding 0"
        )
    for name in ("train_images", "watch_images", "epochs", "batch_size", "accumulate", *at_least_one):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("width", "lr", *positive):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def open_data(config: ClassifierConfig, recipe: str, data_set: str = "CIFAR-10") -> tuple[Images, Images]:
    """Training images (as many as the configuration wants) and test images.

    ValueError where no data was named: it says that the preset wants `data_set` and how to get CIFAR-10 or to choose
    the packaged digits; no other data set is taken by itself.
    """
    if config.data is None and not os.environ.get("PYACCEL_DATA"):
        download = (
            "download the binary version (cifar-10-binary.tar.gz, https://www.cs.toronto.edu/~kriz/cifar.html), "
            "unpack it, and "
        )
        raise ValueError(
            f"the preset {config.preset} of {recipe} trains on {data_set} and was given no data: "
            f"{download if data_set == 'CIFAR-10' else ''}name the folder with --data PATH or the environment variable "
            "PYACCEL_DATA; or choose the packaged digits: --preset desk --data digits"
        )
    size = config.image_size
    resize = size * 8 // 7 if size and config.resized_crop else None
    train, test = (open_images(config.data, part, size=size, resize=resize) for part in ("train", "test"))
    if train.shape != test.shape or train.classes != test.classes:
        raise ValueError(f"{config.data}: training and test images differ in shape or classes")
    return chosen(train, config.train_images), test


def chosen(images: Images, count: int | None) -> Images:
    """`count` images, a fair sample also of a set that is sorted by class; always the same ones."""
    return images if count is None or count >= len(images) else images.subset(epoch_order(len(images), 0, 0)[:count])


def is_cifar10(train: Any, test: Any) -> bool:
    """Whether these are CIFAR-10's original images, by sizes and deviations of channels, which JPEG copies change."""
    if not isinstance(train, ImageSet) or (len(train), len(test), train.shape) != (50_000, 10_000, (3, 32, 32)):
        return False
    found = []
    for channel in train.images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        values = torch.arange(256, dtype=torch.float64) / 255
        found.append(float(((values - (shares * values).sum()) ** 2 * shares).sum().sqrt()))
    return all(abs(f - known) < 5e-4 for f, known in zip(found, (0.2470, 0.2435, 0.2616), strict=True))


def split(images: Images, count: int) -> tuple[Images, Images]:
    """All but `count` images, and those `count`: a fair sample to select on, which no test image is part of.

    ValueError unless both parts hold at least one image.
    """
    if not 0 < count < len(images):
        raise ValueError(f"a selection split of {count} leaves nothing of {len(images)} images to train or select on")
    order = epoch_order(len(images), 1, 0)
    return images.subset(order[count:]), images.subset(order[:count])


def plain_batches(
    config: ClassifierConfig, images: Images, *, normalise: bool = True, spread: bool = False
) -> Batches:
    """Batches for evaluation: every image once, in its order; `normalise=False` leaves pixels in [0, 1] for attacks.

    spread: each process gets its slice of every batch, as `training.accuracy` wants; else each gets them all.
    """
    augment = Augment(mean=config.mean, std=config.std) if normalise else Augment()
    ranks = dict(rank=distributed.rank(), world=distributed.world()) if spread else {}
    return Batches(images, config.batch_size, shuffle=False, drop_last=False, augment=augment, **ranks)


class Normalised(nn.Module):
    """(x - mean) / std, then `model`: the network that attacks see, with pixels in [0, 1] and gradients in them."""

    def __init__(self, model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None):
        super().__init__()
        self.model = model
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor, *arguments: Any) -> Tensor:
        if self.mean is not None:
            images = images - self.mean
        if self.std is not None:
            images = images / self.std
        return self.model(images, *arguments)


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Let every normalisation of `model` take its statistics over all processes.

    ValueError for torch's own BatchNorm on a CPU, which torch synchronises on GPUs only.
    """
    convert_sync_bntt(model)
    for name, module in list(model.named_modules()):
        for child, norm in list(module.named_children()):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                if device.type != "cuda":
                    where = f"{name}.{child}".lstrip(".")
                    raise ValueError(f"sync_norm: {where} is a {type(norm).__name__}, which torch synchronises on GPUs only; "
                                     "train on GPUs, in one process, or with --sync_norm false")  # fmt: skip
                setattr(module, child, nn.SyncBatchNorm.convert_sync_batchnorm(norm))


def milestones(epochs: int) -> list[int]:
    """Finished epochs at which the learning rate drops: after the epochs numbered 5/10, 7/10, 9/10 of all, from 0."""
    return [epochs * tenths // 10 + 1 for tenths in (5, 7, 9)]


def sgd(config: ClassifierConfig, model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.images.contiguous(memory_format=torch.channels_last))


def cross_entropy(of: Logits = logits) -> Loss:
    """A `Trainer` loss: the mean cross entropy, and the accuracy beside it."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found = of(model, batch)
        right = (found.argmax(1) == batch.labels).float().mean()
        return F.cross_entropy(found, batch.labels), {"accuracy": right}

    return loss


def train_classifier(
    model: nn.Module,
    train: Images,
    test: Images,
    config: ClassifierConfig,
    *,
    seed: int,
    out: Path,
    resume: str,
    name: str,
    free: Collection[str] = FREE,
    of: Logits = logits,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    epochs: int | None = None,
    clip_norm: float | None = None,
    on_epoch_end: Callable[[Trainer, dict], None] | None = None,
) -> History:
    """Train `model` in place to the end of its last epoch, from scratch or from its checkpoint in `out`.

    name: what progress lines call it, and part of the checkpoint's configuration. free: fields of `config` that change
    no training. of: logits of a batch. optimizer, scheduler: SGD with three drops without them. on_epoch_end: may add
    to the row of metrics, which survives a kill with the checkpoint, as in `Trainer`.
    """
    device, epochs = device_of(config), config.epochs if epochs is None else epochs
    model.to(device)
    if config.sync_norm and distributed.world() > 1:
        synchronise_norms(model, device)
    optimizer = sgd(config, model) if optimizer is None else optimizer
    scheduler = scheduler or torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones(epochs), 0.1)
    part = (0.08, 1.0) if config.resized_crop else None
    augment = Augment(config.crop_padding, config.flip, config.mean, config.std, part)
    watched = plain_batches(config, chosen(test, config.watch_images), spread=True)

    def progress(trainer: Trainer, row: dict) -> None:
        if on_epoch_end is not None:
            on_epoch_end(trainer, row)
        of_images = f" of {row['eval_n']} images" if config.watch_images else ""
        say(f"{name}, seed {seed}: epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
            f"test accuracy {row['eval_accuracy']:.2%}{of_images}  {row['seconds']:.1f} s")  # fmt: skip

    trainer = Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        loss_fn=loss or cross_entropy(of),
        epochs=epochs,
        out=out,
        amp=config.amp,
        clip_norm=clip_norm,
        accumulate=config.accumulate,
        train_batches=Batches(
            train, config.batch_size, seed=seed, shuffle=True, drop_last=True, augment=augment,
            rank=distributed.rank(), world=distributed.world(),
        ),
        evaluate=lambda model: accuracy(model, watched, device=device, forward=of),
        on_epoch_end=progress,
        config={k: v for k, v in asdict(config).items() if k not in free} | {"name": name, "seed": seed},
        seed=seed,
        device=device,
    )
    return trainer.fit(resume)


def say(text: str) -> None:
    """A line on standard error, from rank 0."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)
