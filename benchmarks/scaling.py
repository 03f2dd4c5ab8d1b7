"""Time, communication and cost of training spiking networks on ImageNet with 1 to 512 GPUs: arithmetic, no measurement.

    python benchmarks/scaling.py [--steps T] [--batch B] [--amp bf16|none] [--sync-norm]
        [--images-per-second resnet34=500 ...]

The throughput of one GPU comes from `--images-per-second` where it was measured, else from a roofline: every product at
`products` floating-point operations a second or its tensors at `copy` bytes a second, whichever takes longer, and every
neuron-step at 32 bytes (16 with bf16) at `copy`. `Machine` holds the assumptions; the table says which were used.

A step of n GPUs, each with B images: forward and backward; all-reduce of the gradients in float32, which runs beside
the backward pass but for its last bucket; with --sync-norm two all-reduces of statistics a layer, which nothing
hides; and the processors' agreement after each step (gloo, a ring over TCP), which the GPU does not wait for unless
it takes longer than the whole step.
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
    """One line of the table. Seconds of a step: compute, what is not hidden of both kinds of all-reduce, agreement."""

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


COLUMNS = ("GPUs", "global batch", "images/s", "waiting, %", "gradients, ms", "statistics, ms", "agreement, ms",
           "hours", "GPU hours", "cost", "cores a GPU", "failures a run")  # fmt: skip


def cells(r: Row, epochs: int, machine: Machine) -> tuple[str, ...]:
    hours = r.hours(epochs, machine)
    return (
        f"{r.gpus}", f"{r.gpus * r.batch}", f"{r.images_per_second:.0f}", f"{100 * r.communication:.1f}",
        *(f"{1e3 * seconds:.2f}" for seconds in (r.gradients, r.statistics, r.agreement)),
        f"{hours:.1f}", f"{r.gpus * hours:.0f}", f"{r.gpus * hours * machine.price:.0f}",
        f"{r.images_per_second / r.gpus / machine.decode:.1f}", f"{r.gpus * hours / machine.gpu_hours:.3f}",
    )  # fmt: skip


def counted_bytes(model: nn.Module, size: int, bf16: bool) -> int:
    """Bytes of a training step with so many images (see `training.plan`)."""
    batch = Batch(*(torch.empty(size, *shape, device="meta", dtype=dtype)
                    for shape, dtype in ((SHAPE, torch.float32), ((), torch.int64), ((), torch.int64))))  # fmt: skip
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)  # noqa: E731
    amp = torch.bfloat16 if bf16 else None
    return step_memory(model.train(), sgd, cross_entropy(logits), batch, amp=amp).peak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="time steps T")
    parser.add_argument("--batch", type=int, default=32, help="images a GPU and step")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--amp", choices=("bf16", "none"), default="bf16")
    parser.add_argument("--sync-norm", action="store_true", help="batch statistics of all processes")
    parser.add_argument("--images-per-second", nargs="+", default=[], metavar="NETWORK=RATE", help="measured, one GPU")
    for field in fields(Machine):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    machine = Machine(**{field.name: getattr(options, field.name) for field in fields(Machine)})
    measured = {name: float(rate) for name, rate in (pair.split("=") for pair in options.images_per_second)}
    if unknown := measured.keys() - set(NETWORKS):
        raise SystemExit(f"--images-per-second: expected {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    bf16, whose = options.amp == "bf16", "all GPUs" if options.sync_norm else "each GPU"
    print(f"T = {options.steps}, {options.batch} images a GPU, {options.epochs} epochs, "
          f"{'bf16' if bf16 else 'float32'}, batch statistics of {whose}")  # fmt: skip
    print("Assumed: " + ", ".join(f"{f.name} {getattr(machine, f.name):g}" for f in fields(Machine)))
    for name in NETWORKS:
        model = models.build(name, classes=CLASSES, input_shape=SHAPE, spiking=True, steps=options.steps)
        work = work_of(model)
        products, neurons = image_seconds(work, machine, options.steps, bf16)
        image, source = products + neurons, (
            f"ASSUMED, from the roofline: products {1e3 * products:.2f} ms an image, neurons {1e3 * neurons:.2f} ms"
        )
        if name in measured:
            image, source = 1 / measured[name], "MEASURED, as given"
        statistics = sum(4 * 5 * options.steps * channels for channels in work.statistics)
        gib = counted_bytes(model, options.batch, bf16) / 2**30
        millions = work.parameters / 1e6
        print(f"\n{name}: {millions:.1f} million parameters, {4 * millions:.0f} MB of gradients, "
              f"{gib:.1f} GiB counted a GPU\n"
              f"An image and time step: {work.macs / 1e9:.2f} GMAC, {work.neurons / 1e6:.2f} million neurons\n"
              f"Statistics: {len(work.statistics)} layers, {2 * len(work.statistics)} all-reduces, "
              f"{statistics / 1e6:.2f} MB a step\n"
              f"One GPU: {1 / image:.0f} images/s, {source}")  # fmt: skip
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---:|" * len(COLUMNS))
        for gpus in GPUS:
            found = row(work, image, gpus, options.batch, options.steps, options.sync_norm, machine)
            print("| " + " | ".join(cells(found, options.epochs, machine)) + " |")


if __name__ == "__main__":
    main()
