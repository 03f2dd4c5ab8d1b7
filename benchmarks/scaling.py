"""Time, communication and cost of training spiking ResNet34 and VGG16 on ImageNet with 1 to 512 GPUs: arithmetic, no measurement.

    python benchmarks/scaling.py [--steps T] [--batch B] [--amp bf16|none] [--sync-norm] [--images-per-second resnet34=500 ...]

The throughput of one GPU comes from `--images-per-second` where it was measured, else from a roofline: every product at
`products` floating-point operations a second or its tensors at `copy` bytes a second, whichever takes longer, and every
neuron-step at 32 bytes (16 with bf16) at `copy`. `Machine` holds the assumptions; the table says which were used.

A step of n GPUs, each with B images: forward and backward; all-reduce of the gradients in float32, which runs beside the
backward pass but for its last bucket; with --sync-norm two all-reduces of statistics a layer, which nothing hides; and
the processors' agreement after each step (gloo, a ring over TCP), which the GPU does not wait for unless it takes longer
than the whole step.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyaccel import models
from pyaccel.data import Batch
from pyaccel.nn import BNTTLIF
from pyaccel.recipes.bntt import logits
from pyaccel.recipes.classifier import cross_entropy
from pyaccel.training.plan import step_memory

IMAGES, SHAPE, CLASSES = 1_281_167, (3, 224, 224), 1000
NETWORKS = ("resnet34", "vgg16")
GPUS = (1, 8, 64, 512)
BUCKET = 25 * 2**20  # of DistributedDataParallel


@dataclass(frozen=True)
class Machine:
    """Assumptions about the machines, in SI units; each is an option of the command line."""

    copy: float = 2.8e12  # bytes/s read and written by a copy on one GPU: 85 % of 3.35 TB/s, an H100's data sheet
    products: float = 350e12  # operations/s of bf16 convolutions: 35 % of the data sheet's 989e12
    products_float32: float = 150e12  # the same of float32 with TF32, data sheet 495e12
    inside: float = 300e9  # bytes/s a GPU sends in an all-reduce inside a machine of 8 (NVLink: 450e9 a direction)
    between: float = 40e9  # bytes/s a GPU sends to other machines (one 400 Gbit/s adapter each: 50e9)
    start: float = 20e-6  # seconds until a collective inside a machine starts
    hop: float = 10e-6  # seconds that each doubling of the machines adds to a collective
    tcp_hop: float = 50e-6  # seconds of a message of the agreement, between two processors
    price: float = 2.5  # per GPU and hour, in your currency
    decode: float = 300.0  # images/s that one processor core decodes and crops (benchmarks/test_training.py)
    gpu_hours: float = 50_000.0  # GPU-hours between two failures that stop a run
    restart: float = 300.0  # seconds from a failure until the run trains again
    interval: float = 600.0  # seconds between checkpoints


@dataclass(frozen=True)
class Work:
    """Of one image in one time step, forward: multiply-accumulates and elements of each product layer, and neurons.

    statistics: channels of each BNTT layer; parameters: of the network.
    """

    products: Sequence[tuple[int, int]]
    neurons: int
    statistics: Sequence[int]
    parameters: int

    @property
    def macs(self) -> int:
        return sum(macs for macs, _ in self.products)


def work_of(model: nn.Module) -> Work:
    """Counted by a pass over one image and one time step, without data or arithmetic."""
    products, neurons, statistics = [], [], []

    def product(module, inputs, output):
        positions = output.numel() // output.shape[2] if output.dim() == 5 else output.numel() // output.shape[-1]
        products.append((positions * module.weight.numel(), inputs[0].numel() + output.numel()))

    def neuron(module, inputs, output):
        neurons.append(output.numel())
        statistics.append(module.channels)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not model.readout:
            module.register_forward_hook(product)
        elif isinstance(module, BNTTLIF):
            module.register_forward_hook(neuron)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.eval()(torch.empty(1, *SHAPE), steps=1)
    parameters = sum(p.numel() for p in model.parameters())
    return Work(tuple(products), sum(neurons), tuple(statistics), parameters)


def image_seconds(work: Work, machine: Machine, steps: int, bf16: bool) -> tuple[float, float]:
    """Seconds that one GPU trains on one image: (products, neurons). Backward of a product is two products."""
    rate, size = (machine.products, 2) if bf16 else (machine.products_float32, 4)
    each = (max(6 * macs / rate, 3 * size * elements / machine.copy) for macs, elements in work.products)
    return steps * sum(each), steps * work.neurons * (16 if bf16 else 32) / machine.copy


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Seconds: rings inside the machines and, with an eighth of the data each, between them."""
    if gpus == 1:
        return 0.0
    local, machines = min(gpus, 8), max(1, gpus // 8)
    inside = 2 * (local - 1) / local * size / machine.inside + machine.start
    if machines == 1:
        return inside
    across = 2 * (machines - 1) / machines * size / local / machine.between
    return inside + across + 2 * math.log2(machines) * machine.hop


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds of a step: compute, what of the two kinds of all-reduce is not hidden, agreement."""

    gpus: int
    compute: float
    gradients: float
    statistics: float
    agreement: float
    batch: int

    @property
    def step(self) -> float:
        return max(self.compute + self.gradients + self.statistics, self.agreement)

    @property
    def communication(self) -> float:
        """The share of a step in which the GPU waits for others."""
        return 1 - self.compute / self.step

    @property
    def images_per_second(self) -> float:
        return self.gpus * self.batch / self.step

    def hours(self, epochs: int, machine: Machine) -> float:
        """Hours of a whole run, with the work that failures lose."""
        plain = epochs * IMAGES / self.images_per_second / 3600
        a_failure = (machine.interval / 2 + machine.restart) / 3600
        return plain * (1 + a_failure * self.gpus / machine.gpu_hours)


def row(work: Work, image: float, gpus: int, batch: int, steps: int, synchronised: bool, machine: Machine) -> Row:
    compute, size = image * batch, 4 * work.parameters
    whole, last = (all_reduce(n, gpus, machine) for n in (size, min(size, BUCKET)))
    gradients = max(last, whole - 2 / 3 * compute)  # backward is two thirds of a step
    statistics = 0.0
    if synchronised:  # three rows a step and channel forward, two backward
        statistics = sum(all_reduce(4 * rows * steps * channels, gpus, machine)
                         for channels in work.statistics for rows in (3, 2))  # fmt: skip
    return Row(gpus, compute, gradients, statistics, 2 * (gpus - 1) * machine.tcp_hop, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="time steps T")
    parser.add_argument("--batch", type=int, default=32, help="images a GPU and step")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--amp", choices=("bf16", "none"), default="bf16")
    parser.add_argument("--sync-norm", action="store_true", help="batch statistics of all processes")
    parser.add_argument("--images-per-second", nargs="+", default=[], metavar="NETWORK=RATE", help="measured on one GPU")
    for field in fields(Machine):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    options = parser.parse_args()
    machine = Machine(**{field.name: getattr(options, field.name) for field in fields(Machine)})
    measured = {name: float(rate) for name, rate in (pair.split("=") for pair in options.images_per_second)}
    bf16 = options.amp == "bf16"
    print(f"T = {options.steps}, {options.batch} images a GPU, {options.epochs} epochs, {'bf16' if bf16 else 'float32'}, "
          f"batch statistics of {'all' if options.sync_norm else 'each'} GPU{'s' if options.sync_norm else ''}")  # fmt: skip
    print("Assumed: " + ", ".join(f"{f.name} {getattr(machine, f.name):g}" for f in fields(Machine)))
    for name in NETWORKS:
        model = models.build(name, classes=CLASSES, input_shape=SHAPE, spiking=True, steps=options.steps)
        work = work_of(model)
        products, neurons = image_seconds(work, machine, options.steps, bf16)
        image = 1 / measured[name] if name in measured else products + neurons
        batch = Batch(torch.empty(options.batch, *SHAPE, device="meta"), torch.empty(options.batch, dtype=torch.int64),
                      torch.empty(options.batch, dtype=torch.int64))  # fmt: skip
        memory = step_memory(model.train(), lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
                             cross_entropy(logits), batch, amp=torch.bfloat16 if bf16 else None)  # fmt: skip
        print(f"\n{name}: {work.parameters / 1e6:.1f} million parameters, {4 * work.parameters / 1e6:.0f} MB of gradients; of an "
              f"image and time step {work.macs / 1e9:.2f} GMAC, {work.neurons / 1e6:.2f} million neurons; "
              f"{memory.peak / 2**30:.1f} GiB counted a GPU")  # fmt: skip
        statistics = sum(4 * 5 * options.steps * channels for channels in work.statistics)
        print(f"One GPU: {1 / image:.0f} images/s, {'MEASURED' if name in measured else 'ASSUMED, from the roofline: '}"
              + ("" if name in measured else f"products {1e3 * products:.2f} ms an image, neurons {1e3 * neurons:.2f} ms")
              + f". Statistics: {len(work.statistics)} layers, {2 * len(work.statistics)} all-reduces, "
              f"{statistics / 1e6:.2f} MB a step")  # fmt: skip
        print("| GPUs | global batch | images/s | efficiency, % | waiting, % | gradients, statistics, agreement, ms | hours | "
              "GPU hours | cost | cores a GPU | failures a run |\n|" + "---:|" * 11)  # fmt: skip
        for gpus in GPUS:
            r = row(work, image, gpus, options.batch, options.steps, options.sync_norm, machine)
            hours = r.hours(options.epochs, machine)
            print(f"| {gpus} | {gpus * options.batch} | {r.images_per_second:.0f} | {100 * (1 - r.communication):.1f} | "
                  f"{100 * r.communication:.1f} | {1e3 * r.gradients:.2f}, {1e3 * r.statistics:.2f}, {1e3 * r.agreement:.2f} | "
                  f"{hours:.1f} | {gpus * hours:.0f} | {gpus * hours * machine.price:.0f} | "
                  f"{r.images_per_second / gpus / machine.decode:.1f} | {gpus * hours / machine.gpu_hours:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
