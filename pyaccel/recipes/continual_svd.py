"""Continual learning by factorised convolutions (SVD), arXiv 2009.01956: tasks one after another, nothing forgotten.

Every task adds a few ranks to convolutions W = N diag|sigma| C and freezes them; a later task builds on all of them and
learns a residual. The report gives the accuracy on every task after each task, what was forgotten, the ranks, and the
size against one network a task; beside it, one network a task, one network trained on without protection, and the
control whose weight decay reaches the frozen factors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pyaccel import models
from pyaccel.data import Batch, open_images
from pyaccel.data.source import PACKAGED
from pyaccel.hardware import cost
from pyaccel.models import ContinualNet
from pyaccel.nn.factorized import ENERGY, orthogonality
from pyaccel.recipes import continual_svd_plots, plots
from pyaccel.recipes.classifier import (ClassifierConfig, Loss, check_choices, check_fields, chosen, cross_entropy,
                                        device_of, plain_batches, say, train_classifier)  # fmt: skip
from pyaccel.recipes.continual_svd_report import describe, results
from pyaccel.recipes.continual_tasks import (
    FIVE_SETS,
    Task,
    in_memory,
    mini_imagenet,
    order,
    several_sets,
    split_by_class,
)
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.planning import Network
from pyaccel.recipes.report import Report, write
from pyaccel.surgery import factorize, merge_factors
from pyaccel.training import seed_everything
from pyaccel.training.evaluate import evaluating

__all__ = ["Config", "describe", "preset", "run"]

METHODS = ("svd", "individual", "sequential", "decayed")
PROTOCOLS = ("split", "mini_imagenet", "sets")
FREE = ("methods", "seeds", "device")
CIFAR100_MEAN, CIFAR100_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # of the published code


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on, besides the shared fields.

    Args:
        lr: learning rate of Adam, which has no weight decay; divided by 10 after `lr_drops` of the epochs.
        dense_lr: of the dense networks "individual" and "sequential"; None: `lr`. What suits factors may be too much.
        momentum: not used, the method trains by Adam.
        weight_decay: not used (see `decay`).
        epochs: passes over the images of each task.
        protocol: "split", classes of one data set in `tasks` blocks; "mini_imagenet", the same of a miniImageNet
            folder; "sets", one data set a task, folders `sets` inside `data`.
        tasks: how many tasks the classes are cut into.
        sets: names of folders: cifar10, notmnist, mnist, svhn, fashion_mnist (the published five), usps.
        size: image folders are resized to it; None: as they are.
        sparsity: lambda_s, weight of the Hoyer penalty on sigma.
        orthogonality: lambda_o, weight of the orthogonality penalty on N and C.
        energy: share of the squared new singular values that pruning may drop.
        growth: "mean": spare slots for at least the mean rank so far, up to full rank; "full": full rank; "none".
        lr_drops: shares of `epochs`.
        methods: "svd", the paper's; "individual", one dense network a task; "sequential", one dense network trained on;
            "decayed", the control: svd with weight decay that reaches the frozen factors.
        decay: weight decay of the control.
        head: None: the read-out of a task is one linear layer, as published for `cacl_net`; else two without a
            nonlinearity between them and so many values, 32 in the paper's VGG16 (`model` "vgg16").
    """

    model: str = "cacl_net"
    mean: tuple[float, ...] | None = CIFAR100_MEAN
    std: tuple[float, ...] | None = CIFAR100_STD
    epochs: int = 200
    batch_size: int = 64
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    seeds: tuple[int, ...] = (1, 2, 3)
    protocol: str = "split"
    tasks: int = 20
    sets: tuple[str, ...] = FIVE_SETS
    size: int | None = None
    sparsity: float = 0.1
    orthogonality: float = 1.0
    energy: float = ENERGY
    growth: str = "mean"
    lr_drops: tuple[float, ...] = (0.6, 0.9)
    methods: tuple[str, ...] = ("svd",)
    decay: float = 1e-3
    head: int | None = None
    dense_lr: float | None = None


PAPER = Config()
MINI_IMAGENET = replace(
    PAPER, protocol="mini_imagenet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_padding=0,
    lr_drops=(0.75, 0.9),
)  # fmt: skip
FIVE = replace(PAPER, protocol="sets", crop_padding=0, flip=False, growth="full", seeds=(1,))
# A task must move its factors by more than their own size. A shorter one freezes the random start of its slots: nothing
# is pruned, every task leaves a whole random weight in the sum, and the penalties of what is frozen grow. Adam moves a
# value by at most lr a step: 7,800 steps of 1e-3 in the paper; here 740 of 5e-3 (10 tasks, twice the images), 500 of
# 5e-3 for data sets. 20 tasks of 180 steps of 2e-3 were at chance from the sixth on. Dense networks are better at 2e-3.
DESK = replace(
    PAPER, preset="desk", tasks=10, size=32, width=0.25, train_images=600, batch_size=16, epochs=20, lr=5e-3,
    dense_lr=2e-3, mean=(0.480, 0.446, 0.393), std=(0.256, 0.247, 0.261), seeds=(1,),
    methods=("svd", "individual", "sequential"),
)  # fmt: skip
DESK_SETS = replace(
    FIVE, preset="desk", width=0.25, train_images=2_000, watch_images=500, batch_size=32, epochs=8, lr=5e-3,
    dense_lr=2e-3, methods=METHODS, sets=("mnist", "usps", "fashion_mnist"),
)  # fmt: skip
DESK_DIGITS = replace(DESK, size=None, train_images=None, tasks=5, mean=None, std=None, crop_padding=0, flip=False)
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", model="small", width=1.0, batch_size=32, epochs=6, lr=5e-3,
    dense_lr=None, seeds=(1, 2, 3), methods=METHODS,
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: others for the packaged digits and for a folder of several data sets.

    A folder that holds one of the known sets by name (mnist, cifar10, ...) is read as several data sets; paper: one
    with "mini" in its name as miniImageNet.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    config = PRESETS[name]
    source = data or config.data or os.environ.get("PYACCEL_DATA")
    if name == "desk" and source in PACKAGED:
        config = DESK_DIGITS
    elif name == "paper" and source and "mini" in Path(source).name.lower():
        config = MINI_IMAGENET
    elif name != "smoke" and source and any((Path(source) / s).is_dir() for s in FIVE_SETS):
        config = DESK_SETS if name == "desk" else FIVE
    return replace(config, data=data or config.data)


def open_training(config: Config) -> SimpleNamespace:
    """Shape and classes of the first task, for `pyaccel plan`."""
    task = open_tasks(config)[0]
    return SimpleNamespace(shape=task.train.shape, classes=tuple(map(str, range(task.classes))))


def networks(config: Config, images: SimpleNamespace) -> dict[str, Network]:
    """The dense network of one task, and the factorised one at its first task, for `pyaccel plan`: later tasks need as
    much as their ranks grow by, less than a dense network."""
    task = SimpleNamespace(train=images, classes=len(images.classes))

    def dense() -> nn.Module:
        seed_everything(config.seeds[0])
        features, values = features_of(config, task)
        return DenseNet(features, [task.classes], values, config.head)

    def factorised() -> nn.Module:
        seed_everything(config.seeds[0])
        features, values = features_of(config, task)
        return ContinualNet(factorize(features), [task.classes], values, config.head)

    return {
        "dense": Network(dense, cross_entropy(), lambda model: torch.optim.Adam(model.parameters(), config.lr)),
        "svd, first task": Network(
            factorised, partial(penalised, config), lambda model: torch.optim.Adam(model.trained(), config.lr)
        ),
    }


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Learn the tasks by each method, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    device, tasks = device_of(config), open_tasks(config)
    factorize(features_of(config, tasks[0])[0])  # what does not fit is refused before anything is written
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    learned = {
        (method, seed): LEARN[method](
            config, [tasks[k] for k in order(len(tasks), seed)], seed, device,
            lambda t, part=f"{method}/seed-{seed}": (
                out / part / f"task-{t + 1}", resume_from(out, f"{part}/task-{t + 1}", resume)
            ),
        )
        for seed in config.seeds for method in config.methods
    }  # fmt: skip
    report = Report(
        "continual_svd", config.preset, asdict(config), environment(device),
        results(config, learned, published(config, tasks)),
    )  # fmt: skip
    if plots.available():
        continual_svd_plots.draw(learned, config.methods, config.seeds[0], out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    check_fields(config, at_least_one=("tasks",))
    check_choices("methods", config.methods, METHODS)
    check_choices("protocol", [config.protocol], PROTOCOLS)
    check_choices("growth", [config.growth], ("mean", "full", "none"))
    if config.dense_lr is not None and not config.dense_lr > 0:
        raise ValueError(f"dense_lr must be positive, got {config.dense_lr}")
    for name in ("sparsity", "orthogonality"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def open_tasks(config: Config) -> list[Task]:
    """The tasks in their own order. ValueError without data: no data set is taken by itself."""
    source = config.data or os.environ.get("PYACCEL_DATA")
    if not source:
        wanted = {
            "split": "a data set of 100 classes (CIFAR-100's binary version, or Tiny-ImageNet-100 as an image folder)",
            "mini_imagenet": "miniImageNet as class folders",
            "sets": f"a folder with {', '.join(config.sets)} in it",
        }
        raise ValueError(
            f"the preset {config.preset} of continual_svd learns {wanted[config.protocol]} and was given no data: "
            "name the folder with --data PATH or the environment variable PYACCEL_DATA; or choose the packaged digits: "
            "--preset desk --data digits"
        )
    if config.protocol == "sets":
        tasks = several_sets(source, config.sets)
    elif config.protocol == "mini_imagenet":
        tasks = mini_imagenet(source, config.tasks, config.mean, config.std)
    else:
        train, test = (open_images(source, part, size=config.size) for part in ("train", "test"))
        if train.shape != test.shape or train.classes != test.classes:
            raise ValueError(f"{source}: training and test images differ in shape or classes")
        tasks = split_by_class(train, test, config.tasks, config.mean, config.std)
    return [replace(task, train=chosen(task.train, config.train_images)) for task in tasks]


def features_of(config: Config, task: Task) -> tuple[nn.Module, int]:
    """The dense network without its read-out, and how many values it makes of an image."""
    shape = task.train.shape
    if config.model == "small":  # of the specification's check on 8x8 digits
        a, b, c = (max(1, round(n * config.width)) for n in (16, 32, 32))
        convolutions = [nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((shape[0], a), (a, b), (b, c))]
        parts = [part for c in convolutions for part in (c, nn.ReLU())]
        return nn.Sequential(*parts[:4], nn.MaxPool2d(2), *parts[4:], nn.AdaptiveMaxPool2d(2), nn.Flatten()), 4 * c
    network = models.build(config.model, classes=task.classes, input_shape=shape, width=config.width)
    if isinstance(network, models.VggNet):
        return nn.Sequential(*list(network)[:-1]), network[-1].in_features
    if not isinstance(network, models.CaclNet):
        raise ValueError(f"model: expected small, cacl_net or a VGG in its artificial form, got {config.model}")
    return network.features, network.readout.in_features


class DenseNet(nn.Module):
    """The same layers without factors, and a read-out of each task's own: nothing is protected."""

    def __init__(self, features: nn.Module, classes: Sequence[int], values: int, hidden: int | None = None):
        super().__init__()
        self.features, self.current = features, 0
        self.heads = nn.ModuleList(models.readout(values, count, hidden) for count in classes)

    def forward(self, images: Tensor, task: int | None = None) -> Tensor:
        return self.heads[self.current if task is None else task](self.features(images))


@dataclass
class Learned:
    """What one method made of one order of the tasks; every list in that order.

    accuracy[t][u]: 0..1, on task u after task t, u <= t. drift: the largest change of any logit on a test image between
    the end of its task and the end of all. ranks: of each task, cumulative, one a layer. sizes: numbers held by
    convolutions, by read-outs, and prefixes. macs: of the last task, served from merged weights and as two
    convolutions. frozen: the orthogonality penalty of the frozen factors after each task, a constant for later ones.
    """

    tasks: list[str]
    accuracy: list[list[float]]
    drift: float
    seconds: float
    sizes: tuple[int, int, int]
    ranks: list[tuple[int, ...]]
    macs: tuple[int, int] | None
    frozen: list[float] = field(default_factory=list)


Place = Callable[[int], tuple[Path, str]]


def learn_svd(
    config: Config, tasks: list[Task], seed: int, device: torch.device, place: Place, *, decay: float = 0.0
) -> Learned:
    """The method of the paper; `decay` > 0 is the control, in which weight decay reaches the frozen factors."""
    seed_everything(seed)
    features, values = features_of(config, tasks[0])
    net = ContinualNet(factorize(features), [task.classes for task in tasks], values, config.head).to(device)

    def prepare(t: int):
        only_head(net, t)
        groups = [{"params": net.trained()}]
        # Parameters on the memory of the buffers, with a gradient of 0: what one optimizer over whole factors does.
        frozen = (
            [nn.Parameter(b) for m in net.layers for b in (m.shared_left, m.shared_sigma, m.shared_right)]
            if decay
            else []
        )
        if frozen:
            groups.append({"params": frozen, "weight_decay": decay})

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            found, metrics = penalised(config, model, batch, net)
            return found + sum((0 * p).sum() for p in frozen), metrics

        return groups, loss

    def finish(t: int) -> None:
        net.finish_task(config.energy, config.growth, torch.Generator().manual_seed(1000 * seed + t))

    learned = sequence(config, net, tasks, seed, device, place, "decayed" if decay else "svd", prepare, finish)
    dense = cost(merge_factors(net.features, len(tasks) - 1), tasks[0].train.shape).convolutions()
    factors = sum(layer.macs // (m.columns * m.out_channels) * m.ranks[-1] * (m.columns + m.out_channels)
                  for layer, m in zip(dense.layers, net.layers, strict=True))  # fmt: skip
    learned.ranks, learned.macs = net.ranks, (dense.macs, factors)
    learned.frozen = [frozen_penalty(net, t) for t in range(len(tasks))]
    learned.sizes = (net.factor_parameters() + net.norm_parameters(), heads_of(net), len(tasks) * len(net.layers))
    return learned


def penalised(
    config: Config, model: nn.Module, batch: Batch, net: ContinualNet | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy and the penalties of the factors; net: what `model` wraps."""
    found, metrics = cross_entropy()(model, batch)
    penalty = (net or model).penalty(config.sparsity, config.orthogonality)
    return found + penalty, metrics | {"penalty": penalty.detach()}


@torch.no_grad()
def frozen_penalty(net: ContinualNet, task: int) -> float:
    """Sum over layers of P(N) + P(C) of all that is frozen after `task`."""
    factors = [layer.factors(task) for layer in net.layers]
    return sum(float(orthogonality(left) + orthogonality(right)) for left, _, right in factors)


def learn_sequential(config: Config, tasks: list[Task], seed: int, device: torch.device, place: Place) -> Learned:
    """One dense network, trained on: what is forgotten when nothing is frozen."""
    seed_everything(seed)
    features, values = features_of(config, tasks[0])
    net = DenseNet(features, [task.classes for task in tasks], values, config.head).to(device)

    def prepare(t: int):
        only_head(net, t)
        net.current = t
        return [*net.features.parameters(), *net.heads[t].parameters()], None

    return sequence(config, net, tasks, seed, device, place, "sequential", prepare, lambda t: None)


def learn_individual(config: Config, tasks: list[Task], seed: int, device: torch.device, place: Place) -> Learned:
    """One dense network a task, each from scratch."""
    reached, seconds, size = [], 0.0, [0, 0, 0]
    for t in range(len(tasks)):
        seed_everything(1000 * seed + t)
        features, values = features_of(config, tasks[t])
        net = DenseNet(features, [tasks[t].classes], values, config.head).to(device)
        one = sequence(config, net, [tasks[t]], 1000 * seed + t, device, lambda _, t=t: place(t), f"individual {t + 1}",
                       lambda _, net=net: (list(net.parameters()), None), lambda _: None)  # fmt: skip
        reached.append(one.accuracy[0][0])
        seconds, size = seconds + one.seconds, [a + b for a, b in zip(size, one.sizes, strict=True)]
    rows = [reached[: t + 1] for t in range(len(tasks))]
    return Learned([task.name for task in tasks], rows, 0.0, seconds, tuple(size), [], None)


LEARN = {
    "svd": learn_svd,
    "individual": learn_individual,
    "sequential": learn_sequential,
    "decayed": lambda config, *rest: learn_svd(config, *rest, decay=config.decay),
}


def sequence(
    config: Config, net: nn.Module, tasks: list[Task], seed: int, device: torch.device, place: Place, name: str,
    prepare: Callable[[int], tuple[list, Loss | None]], finish: Callable[[int], None],
) -> Learned:  # fmt: skip
    """Train `net` on the tasks in turn: prepare(t) gives what to optimise and how; finish(t) follows its training."""
    rows, then, seconds, tests = [], [], 0.0, []
    for t, task in enumerate(tasks):
        parameters, loss = prepare(t)
        lr = config.lr if loss else config.dense_lr or config.lr  # dense networks have no penalties
        # Decoded once: image files of the test are read after each epoch and after each later task.
        task = replace(task, train=in_memory(task.train), test=in_memory(task.test))
        tests.append(replace(task, train=task.test))  # the training images are let go
        optimizer = torch.optim.Adam(parameters, lr)
        drops = [max(1, round(share * config.epochs)) for share in config.lr_drops]
        folder, how = place(t)
        history = train_classifier(
            net, task.train, task.test, replace(config, mean=task.mean, std=task.std), seed=1000 * seed + t, out=folder,
            resume=how, name=f"{name}, task {t + 1}/{len(tasks)} ({task.name})", free=(*FREE, "train_images"),
            loss=loss,
            optimizer=optimizer, scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1),
        )  # fmt: skip
        seconds += sum(row["seconds"] for row in history.rows)
        finish(t)
        found = [logits_of(config, net, test, u, device) for u, test in enumerate(tests)]
        then.append(found[t])
        labels = [test.test.labels for test in tests]
        rows.append([float((f.argmax(1) == y).float().mean()) for f, y in zip(found, labels, strict=True)])
    drift = max(float((a - b).abs().max()) for a, b in zip(found, then, strict=True))
    statistics = (b for b in net.features.buffers() if b.is_floating_point())
    convolutions = sum(p.numel() for p in (*net.features.parameters(), *statistics))
    return Learned([task.name for task in tasks], rows, drift, seconds, (convolutions, heads_of(net), 0), [], None)


def only_head(net: nn.Module, task: int) -> None:
    """Other read-outs ask for no gradient: DistributedDataParallel waits for every parameter that does."""
    for number, head in enumerate(net.heads):
        head.requires_grad_(number == task)


def heads_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.heads.parameters())


def logits_of(config: Config, net: nn.Module, task: Task, number: int, device: torch.device) -> Tensor:
    """Logits of a task's test images, `[N, classes]`, always in the same batches: another batch may round otherwise."""
    batches = plain_batches(replace(config, mean=task.mean, std=task.std), task.test)
    with evaluating(net), torch.inference_mode():
        return torch.cat([net(batch.images.to(device), number).cpu() for batch in batches.epoch(0)])


def published(config: Config, tasks: Sequence[Task]) -> tuple[float | None, str]:
    """The released model's accuracy, where network, data, split and preset are the paper's; else why none."""
    known = {
        "split": (PAPER, 86.58, (100, 50_000, 10_000)),
        "mini_imagenet": (MINI_IMAGENET, 70.10, (100, 50_000, 10_000)),
        "sets": (FIVE, 91.56, None),
    }
    standard, accuracy, counts = known[config.protocol]
    same = ("data", "watch_images", "seeds", "methods", "device", "amp", "decay", "dense_lr", "size")
    changed = [k for k, v in asdict(standard).items() if k not in same and asdict(config).get(k) != v]
    found = tuple(sum(v) for v in zip(*((t.classes, len(t.train), len(t.test)) for t in tasks), strict=True))
    if changed or (counts and found != counts):
        return None, f"not the published experiment: other {', '.join(changed) or 'data set'}"
    return accuracy, "released model, lambda_s 0.1; read in the official README; theirs: one run"
