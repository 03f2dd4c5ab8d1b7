"""QUANOS, arXiv 2004.11233: bit widths layer by layer from adversarial noise sensitivity (ANS), early in training.

A network starts at `initial_bits` everywhere, trains for some epochs, and is asked how far an attack moves each layer's
activations. A rule turns the answers into widths, with which training goes on. Beside it stand the full-precision
network, homogeneous ones, and a homogeneous one of the same memory, all from the same first epochs. The report gives
accuracy, accuracy under attack with the controls that expose masked gradients, compression, and modelled energy.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyaccel import hardware, models, surgery
from pyaccel.data.source import PACKAGED
from pyaccel.nn import packed_state
from pyaccel.ops.quantizers import WEIGHT_QUANTIZERS
from pyaccel.recipes import plots
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Images,
    check_choices,
    check_fields,
    chosen,
    device_of,
    milestones,
    open_data,
    plain_batches,
    say,
    sgd,
    train_classifier,
)
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.quanos_ans import RATIOS, RULES, assign_bits, equal_memory, noise_sensitivity, weight_layers
from pyaccel.recipes.quanos_attacks import accuracy_on, adversarial_loss, craft, fgsm, noise, pgd, unclipped
from pyaccel.recipes.quanos_plots import draw
from pyaccel.recipes.quanos_report import describe, results
from pyaccel.recipes.report import Report, write
from pyaccel.training import distributed, seed_everything
from pyaccel.training.evaluate import accuracy

__all__ = ["Config", "describe", "preset", "run"]

DEFENCES = ("fgsm", "pgd")
NETWORK = re.compile(rf"(float32|bits(?:[1-9]|1[0-6])|(?:iso_)?(?:{'|'.join(RULES)}))(?:\+({'|'.join(DEFENCES)}))?")
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("networks", "seeds", "device", "fgsm_eps", "pgd_eps", "pgd_steps", "attack_images", "alpha")
PIXEL = 1 / 255


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on. All eps are in 1/255 of the range of a pixel.

    Args:
        networks: what to train. "float32"; "bitsN", every layer at N bits; "inverse", "proportional", widths by that
            rule; "iso_inverse", "iso_proportional", the homogeneous network of that memory. "+fgsm" or "+pgd" behind
            it: with adversarial training after the widths are fixed. "float32" must be there: transfer needs it.
        initial_bits: k_init, the width of every layer before the rule speaks, and the largest that it gives.
        least_bits: k_min.
        io_bits: width of the first and the last layer, which the rule then leaves alone; None: by the rule as others.
        initial_epochs: epochs before ANS is taken.
        rounds: how often widths are assigned; a further round, after as many epochs more, starts from the widths so far.
        quantizer: of the weights, see `nn.QuantLinear`.
        ans_images: training images, always the same, for ANS.
        ans_eps: FGSM strengths for ANS; the first one decides, the others show whether ranks depend on it.
        ans_ratio: "image", "batch" or "unnormalised", see `noise_sensitivity`.
        fgsm_eps, pgd_eps: strengths of the attacks on trained networks.
        pgd_steps: steps of PGD.
        attack_images: test images that are attacked; None: all.
        train_eps: strength in adversarial training.
        train_steps: steps of PGD in adversarial training.
        alpha: of the energy model, see `hardware.MacEnergy`.
    """

    model: str = "vgg19"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    epochs: int = 200
    networks: tuple[str, ...] = (
        "float32", "bits16", "bits8", "inverse", "proportional", "iso_inverse", "iso_proportional",
        "bits8+pgd", "inverse+pgd", "iso_inverse+pgd",
    )  # fmt: skip
    initial_bits: int = 16
    least_bits: int = 2
    io_bits: int | None = 16
    initial_epochs: int = 20
    rounds: int = 1
    quantizer: str = "symmetric"
    ans_images: int = 1_000
    ans_eps: tuple[float, ...] = (8.0, 16.0)
    ans_ratio: str = "image"
    fgsm_eps: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0)
    pgd_eps: tuple[float, ...] = (4.0, 8.0)
    pgd_steps: int = 20
    attack_images: int | None = None
    train_eps: float = 8.0
    train_steps: int = 7
    alpha: float = 0.1

    @property
    def assignments(self) -> list[int]:
        """Finished epochs after which widths are assigned."""
        return [number * self.initial_epochs for number in range(1, self.rounds + 1)]


PAPER = Config(seeds=(0, 1, 2))
DESK = replace(
    PAPER, preset="desk", model="vgg11", width=0.1875, train_images=4_000, watch_images=500, epochs=6, batch_size=64,
    initial_epochs=1, pgd_steps=7, attack_images=150, seeds=(0, 1),
    networks=("float32", "bits8", "inverse", "proportional", "iso_inverse", "bits8+fgsm", "inverse+fgsm"),
)  # fmt: skip
DESK_DIGITS = replace(DESK, model="vgg5", train_images=None, crop_padding=0, flip=False)
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", width=0.125, epochs=3, fgsm_eps=(8.0, 32.0), pgd_eps=(32.0,),
    ans_eps=(32.0, 64.0), ans_images=256, train_eps=32.0, attack_images=128, watch_images=None, seeds=(0, 1, 2),
    networks=("float32", "bits8", "inverse", "proportional", "iso_inverse", "inverse+fgsm"),
)  # fmt: skip
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
    train, test = open_data(config, "quanos")
    # A network that does not fit the images is refused before anything is written.
    build(config, train, 0)
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    measured: dict[tuple[str, int], Measurement] = {}
    for seed in config.seeds:
        start = Start(config, train, test, seed, out, resume)
        victims = Victims(config, test, seed)
        # The full-precision network first: its adversarial images are the transfer control of all others.
        for network in sorted(config.networks, key=lambda name: name != "float32"):
            trained = start.train(network)
            measured[network, seed] = victims.measure(trained)
            deploy(trained, out / network / f"seed-{seed}")
    report = Report(
        "quanos", config.preset, asdict(config), environment(device_of(config)), results(config, measured)
    )  # fmt: skip
    if plots.available():
        draw(config, measured, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_choices("networks", config.networks)
    for name in config.networks:
        if not NETWORK.fullmatch(name):
            raise ValueError(f"networks: expected float32, bitsN (1..16), [iso_]{', [iso_]'.join(RULES)}, each perhaps with "
                             f"+fgsm or +pgd, got {name!r}")  # fmt: skip
    if "float32" not in config.networks:
        raise ValueError("networks: float32 must be among them, its adversarial images are the transfer control")
    for name in ("ans_eps", "fgsm_eps", "pgd_eps"):
        check_choices(name, getattr(config, name))
        if min(getattr(config, name)) <= 0:
            raise ValueError(f"{name} must be positive, in 1/255, got {list(getattr(config, name))}")
    check_fields(config, at_least_one=("initial_epochs", "rounds", "ans_images", "pgd_steps", "attack_images", "train_steps"),
                 positive=("train_eps",))  # fmt: skip
    check_choices("quantizer", (config.quantizer,), WEIGHT_QUANTIZERS)
    check_choices("ans_ratio", (config.ans_ratio,), RATIOS)
    if config.io_bits is not None and not 1 <= config.io_bits <= 16:
        raise ValueError(f"io_bits must be in 1..16, or null for widths by the rule, got {config.io_bits}")
    if config.quantizer == "signed_zero" and 1 in (config.least_bits, config.io_bits):
        raise ValueError("signed_zero needs 2 bits: one bit would leave only zero; raise least_bits and io_bits")
    if not 1 <= config.least_bits <= config.initial_bits <= 16:
        raise ValueError(f"expected 1 <= least_bits <= initial_bits <= 16, got {config.least_bits} and {config.initial_bits}")
    if config.assignments[-1] >= config.epochs:
        raise ValueError(f"{config.rounds} x initial_epochs {config.initial_epochs} leaves nothing of {config.epochs} epochs to "
                         "train with the widths; give more epochs, or fewer before them")  # fmt: skip
    if config.mean is not None or config.std is not None:
        raise ValueError("mean, std: the first quantised layer takes pixels in [0, 1]; leave both at None")


def build(config: Config, images: Images, seed: int, bits: Mapping[str, int] | None = None) -> nn.Module:
    """The network, its weights drawn from `seed` alone; its layers quantised where `bits` is given."""
    seed_everything(seed)
    model = models.build(
        config.model, classes=len(images.classes), input_shape=images.shape, width=config.width, spiking=False
    )  # fmt: skip
    model = model if bits is None else surgery.quantize(model, bits, quantizer=config.quantizer)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Trained:
    """A trained network, its widths (None: full precision), and the metrics of each epoch, ANS among them."""

    name: str
    model: nn.Module
    bits: dict[str, int] | None
    rows: list[dict]


def ans_in(row: Mapping[str, float], eps: float) -> dict[str, float]:
    """The ANS of each layer that a row of metrics holds."""
    prefix = f"ans_{eps:g}/"
    return {name.removeprefix(prefix): float(value) for name, value in row.items() if name.startswith(prefix)}


class Start:
    """The first epochs of a seed, at `initial_bits` everywhere, and the trainings that go on from there."""

    def __init__(self, config: Config, train: Images, test: Images, seed: int, out: Path, resume: str):
        self.config, self.train_images, self.test_images, self.seed = config, train, test, seed
        self.out, self.resume = out, resume
        self.probe = whole(config, chosen(train, config.ans_images))
        self.layers = list(weight_layers(build(config, train, seed)))
        self.model = build(config, train, seed, dict.fromkeys(self.layers, config.initial_bits))
        self.optimizer = sgd(config, self.model)
        self.rows = self._stage(self.model, self.optimizer, "initial", "initial", 0, config.initial_epochs)

    def train(self, network: str) -> Trained:
        """Train one of `Config.networks` to its end, from scratch or from its checkpoints."""
        kind, defence = NETWORK.fullmatch(network).groups()
        rounds = self.config.rounds if kind in RULES or kind.startswith("iso_") else 1
        rule = kind.removeprefix("iso_")
        model, optimizer, rows = self.model, self.optimizer, self.rows
        bits = dict.fromkeys(self.layers, self.config.initial_bits)
        for number in range(1, rounds + 1):
            bits = self._bits(kind, rule, ans_in(rows[-1], self.config.ans_eps[0]), bits, last=number == rounds)
            following = build(self.config, self.train_images, self.seed, bits).to(device_of(self.config))
            known = following.state_dict().keys()
            following.load_state_dict({key: value for key, value in model.state_dict().items() if key in known})
            # Momentum and learning rate go on: the widths change, nothing else.
            ongoing = sgd(self.config, following)
            ongoing.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would write to the same buffers
            done = self.config.assignments[number - 1]
            until = self.config.epochs if number == rounds else self.config.assignments[number]
            folder = network if number == rounds else f"{network}/round-{number}"
            loss = None if defence is None else adversarial_loss(
                defence, self.config.train_eps * PIXEL, self.config.train_steps)  # fmt: skip
            rows = rows + self._stage(following, ongoing, network, folder, done, until, loss)
            model, optimizer = following, ongoing
        return Trained(network, model, bits, rows)

    def _bits(self, kind: str, rule: str, sensitivity: dict, so_far: dict, *, last: bool) -> dict[str, int] | None:
        if kind == "float32":
            return None
        if kind.startswith("bits"):
            return dict.fromkeys(self.layers, int(kind.removeprefix("bits")))
        fixed = {} if self.config.io_bits is None else dict.fromkeys((self.layers[0], self.layers[-1]), self.config.io_bits)
        ruled = {name: a for name, a in sensitivity.items() if name not in fixed}
        start = {name: so_far[name] for name in ruled}
        bits = fixed | assign_bits(ruled, rule, initial=start, least=self.config.least_bits)
        if last and kind.startswith("iso_"):
            bits = equal_memory({name: m.weight.numel() for name, m in weight_layers(self.model).items()}, bits)
        return {name: bits[name] for name in self.layers}

    def _stage(self, model: nn.Module, optimizer: torch.optim.Optimizer, name: str, folder: str, done: int, until: int,
               loss=None) -> list[dict]:  # fmt: skip
        """Epochs `done` to `until` of the schedule. ANS goes into the rows, which outlive a kill: after each epoch at the eps
        that decides, at the others where widths are assigned and at the end."""
        config, part = self.config, f"{folder}/seed-{self.seed}"
        drops = [epoch - done for epoch in milestones(config.epochs) if epoch > done]

        def note(trainer, row: dict) -> None:
            whole = done + trainer.epoch in (*config.assignments, config.epochs)
            for eps in config.ans_eps if whole else config.ans_eps[:1]:
                found = noise_sensitivity(model, *self.probe, eps * PIXEL, ratio=config.ans_ratio, batch_size=config.batch_size)
                row.update((f"ans_{eps:g}/{layer}", value) for layer, value in found.items())

        history = train_classifier(
            model, self.train_images, self.test_images, config, seed=self.seed, name=name, out=self.out / part, free=FREE,
            resume=resume_from(self.out, part, self.resume), epochs=until - done, optimizer=optimizer, loss=loss,
            scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1), on_epoch_end=note,
        )  # fmt: skip
        return history.rows


def whole(config: Config, images: Images) -> tuple[Tensor, Tensor]:
    """All images, in [0, 1], and their labels, on the device."""
    parts = [(batch.images, batch.labels) for batch in plain_batches(config, images).epoch(0)]
    return tuple(torch.cat(column).to(device_of(config)) for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class Measurement:
    """What the report needs of one trained network; accuracies 0..1."""

    accuracy: float  # on every test image
    attacked: dict[str, float]  # on the attacked images: "clean", "fgsm_8", "pgd_8", "unclipped_8", "transfer_8", "noise_8"
    layers: list[hardware.LayerCost]
    bits: dict[str, int] | None
    sensitivity: dict[float, list[dict[str, float]]] = field(repr=False)  # by eps, after each epoch
    packed_bytes: int  # of the packed weights in safetensors
    seconds: float  # of training, the first epochs included


class Victims:
    """The test images of a seed that are attacked, and the full-precision network's adversarial versions of them."""

    def __init__(self, config: Config, test: Images, seed: int):
        self.config, self.test, self.seed = config, test, seed
        images, labels = whole(config, chosen(test, config.attack_images))
        self.batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
        self.transfer: dict[float, list[Tensor]] = {}

    def measure(self, trained: Trained) -> Measurement:
        config, model = self.config, trained.model
        found = {"clean": accuracy_on(model, [x for x, _ in self.batches], self.batches)}
        for eps in config.fgsm_eps:
            found[f"fgsm_{eps:g}"] = self._after(fgsm(eps * PIXEL), model)
        for eps in config.pgd_eps:
            attack = pgd(eps * PIXEL, config.pgd_steps, self.seed)
            white_box = craft(attack, model, self.batches)
            found[f"pgd_{eps:g}"] = accuracy_on(model, white_box, self.batches)
            if trained.name == "float32":
                self.transfer[eps] = white_box
            else:
                with unclipped(model):
                    moved = craft(attack, model, self.batches)
                found[f"unclipped_{eps:g}"] = accuracy_on(model, moved, self.batches)
                found[f"transfer_{eps:g}"] = accuracy_on(model, self.transfer[eps], self.batches)
            found[f"noise_{eps:g}"] = self._after(noise(eps * PIXEL, self.seed), model)
        every = accuracy(model, plain_batches(config, self.test, spread=True), device=device_of(config))["accuracy"]
        return Measurement(
            every, found, hardware.layer_costs(model, self.batches[0][0][:1]), trained.bits,
            {eps: [ans_in(row, eps) for row in trained.rows] for eps in config.ans_eps},
            sum(t.numel() * t.element_size() for name, t in packed_state(model).items() if is_weight(name, trained)),
            sum(row["seconds"] for row in trained.rows),
        )  # fmt: skip

    def _after(self, attack, model: nn.Module) -> float:
        return accuracy_on(model, craft(attack, model, self.batches), self.batches)


def is_weight(name: str, trained: Trained) -> bool:
    """Whether an entry of `packed_state` holds a layer's weight."""
    layer, _, kind = name.rpartition(".")
    return layer in weight_layers(trained.model) and kind in ("weight", "weight_words")


def deploy(trained: Trained, folder: Path) -> None:
    """`packed.safetensors`: the network with its weights packed; its widths in the file's metadata, under "bits"."""
    from safetensors.torch import save_file

    if distributed.rank() != 0:
        return
    state = {name: value.contiguous().cpu() for name, value in packed_state(trained.model).items()}
    temporary = folder / "packed.safetensors.tmp"
    save_file(state, temporary, metadata={"bits": json.dumps(trained.bits), "network": trained.name})
    os.replace(temporary, folder / "packed.safetensors")
