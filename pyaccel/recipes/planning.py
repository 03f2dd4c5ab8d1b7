"""`pyaccel plan`: what a training step of a recipe needs, and the largest batch that fits, before a long run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from pyaccel.data import Batch, EventFolder
from pyaccel.recipes.classifier import ClassifierConfig, Loss, device_of, open_data, sgd
from pyaccel.training.loop import AMP_TYPES
from pyaccel.training.plan import Optimize, StepMemory, measure_step, step_memory

LINE = "measured: "


@dataclass(frozen=True)
class Network:
    """A network that a recipe trains: made on the CPU by `build()`, trained with `loss`.

    optimizer: makes its optimizer; None: the configuration's SGD. batch_size: images a batch; None: the configuration's.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    optimizer: Optimize | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Line:
    """The line through two points (batch size, what it needs), never falling."""

    first: tuple[int, float]
    second: tuple[int, float]

    @property
    def slope(self) -> float:
        return max(0.0, (self.second[1] - self.first[1]) / (self.second[0] - self.first[0]))

    def at(self, size: float) -> float:
        return self.second[1] + self.slope * (size - self.second[0])

    def reaches(self, limit: float) -> int:
        """The largest size that needs no more than `limit`; 0 where none does."""
        if self.slope == 0:
            raise ValueError(f"plan: batches of {self.first[0]} and {self.second[0]} need the same; plan a larger batch")
        return max(0, int((limit - self.at(0)) // self.slope))


@dataclass(frozen=True)
class Plan:
    """A training step of one network at `batch` images a process.

    counted: bytes of the tensors alive at once, from a step without data. memory: bytes by the size of the batch, with
    what libraries and allocators take beside tensors where it was measured; else of counted tensors. time: seconds by the
    size of the batch; None where nothing was measured. limit: bytes that a batch may need.
    """

    network: str
    batch: int
    counted: StepMemory
    memory: Line
    time: Line | None
    limit: int

    @property
    def largest(self) -> int:
        """The largest batch that needs no more than `limit` bytes."""
        return self.memory.reaches(self.limit)


def training_set(config: ClassifierConfig, recipe: str, module: ModuleType) -> Any:
    """What the recipe trains on: by its `open_training(config)`, if it reads more than images, else `images_of`."""
    return module.open_training(config) if hasattr(module, "open_training") else images_of(config, recipe)


def images_of(config: ClassifierConfig, recipe: str) -> Any:
    """Shape and classes of the images: of the data that the configuration names, else of what its preset expects."""
    if config.data is not None or os.environ.get("PYACCEL_DATA"):
        return open_data(config, recipe)[0]
    size = config.image_size
    shape, classes = ((3, size, size), 1000) if size else ((3, 32, 32), 10)
    return SimpleNamespace(shape=shape, classes=tuple(map(str, range(classes))), name="no data")


def networks_of(recipe: str, module: ModuleType, config: Any, images: Any) -> Mapping[str, Network]:
    """The networks that a recipe trains, by its `networks(config, images)`. ValueError where it has none to plan."""
    if not hasattr(module, "networks"):
        raise ValueError(f"plan: the recipe {recipe} does not say which networks it trains; plan one of those that do")
    return module.networks(config, images)


def batch_of(images: Any, size: int, device: torch.device | str = "cpu") -> Batch:
    """Random images (recordings: frames of all steps), labels and sample ids of one batch."""
    shape = (images.steps, *images.shape) if isinstance(images, EventFolder) else images.shape
    labels = torch.randint(0, len(images.classes), (size,))
    batch = Batch(torch.rand(size, *shape), labels, torch.arange(size))
    return Batch(*(tensor.to(device) for tensor in batch))


def optimizer_of(config: ClassifierConfig, network: Network) -> Optimize:
    return network.optimizer or (lambda model: sgd(config, model))


def plan(recipe: str, module: ModuleType, config: Any, again: Sequence[str] | None, limit: int | None) -> list[Plan]:
    """A plan of each network. again: the arguments of `pyaccel plan` that measure, in a process of its own each; None:
    only count. limit: bytes of memory; None: what the device has."""
    images = training_set(config, recipe, module)
    parts = config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    limit = memory_of(device_of(config)) if limit is None else limit
    found = []
    for name, network in networks_of(recipe, module, config, images).items():
        size = max(1, (network.batch_size or config.batch_size) // parts)

        def counted(n: int, network=network, model=network.build()) -> StepMemory:
            return step_memory(model, optimizer_of(config, network), network.loss, batch_of(images, n),
                               amp=AMP_TYPES[config.amp])  # fmt: skip

        whole = counted(size)
        if again is None:
            half = max(2, size // 2) if size != 2 else 4
            memory, time = Line((half, counted(half).peak), (size, whole.peak)), None
        else:
            memory, time = measured_lines([*again, "--network", name], size)
        found.append(Plan(name, size, whole, memory, time, limit))
    return found


def measured_lines(arguments: Sequence[str], size: int) -> tuple[Line, Line]:
    """Bytes and seconds by the size of the batch: through this batch and half of it, or, where it does not run (too large
    for the device, say), through half and a quarter."""
    def points(*sizes: int) -> tuple[Line, Line]:
        found = [measure_apart([*arguments, "--at", str(n)]) for n in sizes]
        bytes_, seconds = ([(n, row[what]) for n, row in zip(sizes, found, strict=True)] for what in ("bytes", "seconds"))
        return Line(*bytes_), Line(*seconds)

    half = max(2, size // 2)  # batch statistics want more than one image
    if half == size:
        return points(size, 2 * size)
    try:
        return points(half, size)
    except ValueError:
        if half < 4:
            raise
        return points(half // 2, half)


def measure_apart(arguments: Sequence[str]) -> dict[str, float]:
    """`pyaccel plan` with these arguments in a process of its own: "bytes" and "seconds" of a step."""
    done = subprocess.run([sys.executable, "-m", "pyaccel", "plan", *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(LINE)]
    if done.returncode or not lines:
        raise ValueError(f"plan: a measuring process failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return json.loads(lines[-1].removeprefix(LINE))


def measure(recipe: str, module: ModuleType, config: Any, name: str, size: int) -> str:
    """Run training steps of one network at this batch size; a line with the bytes and seconds of a step."""
    images, device = training_set(config, recipe, module), device_of(config)
    network = networks_of(recipe, module, config, images)[name]
    model, batch = network.build().to(device), batch_of(images, size, device)
    bytes_, seconds = measure_step(model, optimizer_of(config, network), network.loss, batch, amp=AMP_TYPES[config.amp])
    return LINE + json.dumps({"bytes": bytes_, "seconds": seconds})


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; of the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """Rows for people, the first one the header."""
    def mib(n: int) -> str:
        return f"{n / 2**20:.0f}"

    rows = [("network", "batch", "weights, MiB", "gradients, optimizer, MiB", "activations, MiB", "tensors at once, MiB",
             "process, MiB", "step, s", "images/s", "largest batch")]  # fmt: skip
    for p in plans:
        c = p.counted
        rows.append((p.network, str(p.batch), mib(c.weights), mib(c.gradients + c.optimizer), mib(c.activations),
                     mib(c.peak), "-" if p.time is None else mib(int(p.memory.at(p.batch))),
                     "-" if p.time is None else f"{p.time.at(p.batch):.3g}",
                     "-" if p.time is None else f"{p.batch / p.time.at(p.batch):.3g}",
                     f"{p.largest} in {p.limit / 2**30:.1f} GiB"))  # fmt: skip
    return rows
