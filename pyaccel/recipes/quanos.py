"""QUANOS, arXiv 2004.11233: bit widths layer by layer from adversarial noise sensitivity (ANS), early in training.

A network starts at `initial_bits` everywhere, trains for some epochs, and is asked how far an attack moves each layer's
activations. A rule turns the answers into widths, with which training goes on. Beside it stand the full-precision
network, homogeneous ones, and a homogeneous one of the same memory, all from the same first epochs. The report gives
accuracy, accuracy under attack with the controls that expose masked gradients, compression, and modelled energy.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pyaccel import models, surgery
from pyaccel.ops.quantizers import WEIGHT_QUANTIZERS
from pyaccel.recipes import plots
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Images,
    check_choices,
    check_fields,
    choose_preset,
    chosen,
    cross_entropy,
    device_of,
    milestones,
    open_data,
    say,
    sgd,
    train_classifier,
)
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.planning import Network
from pyaccel.recipes.quanos_ans import RATIOS, RULES, assign_bits, equal_memory, noise_sensitivity, weight_layers
from pyaccel.recipes.quanos_attacks import adversarial_loss
from pyaccel.recipes.quanos_measure import PIXEL, Measurement, Trained, Victims, ans_in, deploy, whole
from pyaccel.recipes.quanos_plots import draw
from pyaccel.recipes.quanos_report import describe, results
from pyaccel.recipes.report import Report, write
from pyaccel.training import seed_everything

__all__ = ["Config", "describe", "preset", "run"]

DEFENCES = ("fgsm", "pgd")
NETWORK = re.compile(rf"(float32|bits(?:[1-9]|1[0-6])|(?:iso_)?(?:{'|'.join(RULES)}))(?:\+({'|'.join(DEFENCES)}))?")
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = ("networks", "seeds", "device", "fgsm_eps", "pgd_eps", "pgd_steps", "attack_images", "alpha")


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
        rounds: how often widths are assigned; a further round, as many epochs later, starts from the widths so far.
        quantizer: of the weights, see `nn.QuantLinear`.
        ans_images: training images, always the same, for ANS.
        ans_eps: FGSM strengths for ANS; the first one decides, the others show whether ranks depend on it.
        ans_ratio: "image", "batch" or "unnormalised", see `noise_sensitivity`.
        fgsm_eps: strengths of FGSM on trained networks.
        pgd_eps: strengths of PGD on trained networks, and of the controls.
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
        "float32",
        "bits16",
        "bits8",
        "inverse",
        "proportional",
        "iso_inverse",
        "iso_proportional",
        "bits8+pgd",
        "inverse+pgd",
        "iso_inverse+pgd",
    )
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
    PAPER,
    preset="desk",
    model="vgg11",
    width=0.1875,
    train_images=4_000,
    watch_images=500,
    epochs=5,
    batch_size=64,
    lr=0.05,
    initial_epochs=1,
    pgd_steps=7,
    attack_images=150,
    seeds=(0, 1),
    networks=("float32", "bits8", "inverse", "proportional", "iso_inverse"),
)
DESK_DIGITS = replace(DESK, model="vgg5", train_images=None, crop_padding=0, flip=False)
SMOKE = replace(
    DESK_DIGITS,
    preset="smoke",
    data="digits8",
    width=0.125,
    epochs=3,
    lr=0.1,
    fgsm_eps=(8.0, 32.0),
    pgd_eps=(32.0,),
    ans_eps=(32.0, 64.0),
    ans_images=256,
    train_eps=32.0,
    attack_images=128,
    watch_images=None,
    seeds=(0, 1, 2),
    networks=("float32", "bits8", "inverse", "proportional", "iso_inverse", "inverse+fgsm"),
)
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


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
    report = Report("quanos", config.preset, asdict(config), environment(device_of(config)), results(config, measured))
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
            raise ValueError(
                f"networks: expected float32, bitsN (1..16), [iso_]{', [iso_]'.join(RULES)}, each perhaps with "
                f"+fgsm or +pgd, got {name!r}"
            )
    if "float32" not in config.networks:
        raise ValueError("networks: float32 must be among them, its adversarial images are the transfer control")
    for name in ("ans_eps", "fgsm_eps", "pgd_eps"):
        check_choices(name, getattr(config, name))
        if min(getattr(config, name)) <= 0:
            raise ValueError(f"{name} must be positive, in 1/255, got {list(getattr(config, name))}")
    check_fields(
        config,
        at_least_one=("initial_epochs", "rounds", "ans_images", "pgd_steps", "attack_images", "train_steps"),
        positive=("train_eps",),
    )
    check_choices("quantizer", (config.quantizer,), WEIGHT_QUANTIZERS)
    check_choices("ans_ratio", (config.ans_ratio,), RATIOS)
    if config.io_bits is not None and not 1 <= config.io_bits <= 16:
        raise ValueError(f"io_bits must be in 1..16, or null for widths by the rule, got {config.io_bits}")
    if config.quantizer == "signed_zero" and 1 in (config.least_bits, config.io_bits):
        raise ValueError("signed_zero needs 2 bits: one bit would leave only zero; raise least_bits and io_bits")
    if not 1 <= config.least_bits <= config.initial_bits <= 16:
        raise ValueError(
            f"expected 1 <= least_bits <= initial_bits <= 16, got {config.least_bits} and {config.initial_bits}"
        )
    if config.assignments[-1] >= config.epochs:
        raise ValueError(
            f"{config.rounds} x initial_epochs {config.initial_epochs} leaves nothing of {config.epochs} epochs to "
            "train with the widths; give more epochs, or fewer before them"
        )
    if config.mean is not None or config.std is not None:
        raise ValueError("mean, std: the first quantised layer takes pixels in [0, 1]; leave both at None")


def build(config: Config, images: Images, seed: int, bits: Mapping[str, int] | None = None) -> nn.Module:
    """The network, its weights drawn from `seed` alone; its layers quantised where `bits` is given."""
    seed_everything(seed)
    model = models.build(
        config.model, classes=len(images.classes), input_shape=images.shape, width=config.width, spiking=False
    )
    model = model if bits is None else surgery.quantize(model, bits, quantizer=config.quantizer)
    return model.to(memory_format=torch.channels_last)


def networks(config: Config, images: Images) -> dict[str, Network]:
    """The training of one network at the initial widths, for `pyaccel plan`: the others need no more."""
    names = weight_layers(build(config, images, config.seeds[0]))
    bits = dict.fromkeys(names, config.initial_bits)
    return {"quantised": Network(lambda: build(config, images, config.seeds[0], bits), cross_entropy())}


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
            loss = (
                None
                if defence is None
                else adversarial_loss(defence, self.config.train_eps * PIXEL, self.config.train_steps)
            )
            rows = rows + self._stage(following, ongoing, network, folder, done, until, loss)
            model, optimizer = following, ongoing
        return Trained(network, model, bits, rows)

    def _bits(self, kind: str, rule: str, sensitivity: dict, so_far: dict, *, last: bool) -> dict[str, int] | None:
        if kind == "float32":
            return None
        if kind.startswith("bits"):
            return dict.fromkeys(self.layers, int(kind.removeprefix("bits")))
        fixed = (
            {} if self.config.io_bits is None else dict.fromkeys((self.layers[0], self.layers[-1]), self.config.io_bits)
        )
        ruled = {name: a for name, a in sensitivity.items() if name not in fixed}
        start = {name: so_far[name] for name in ruled}
        bits = fixed | assign_bits(ruled, rule, initial=start, least=self.config.least_bits)
        if last and kind.startswith("iso_"):
            bits = equal_memory({name: m.weight.numel() for name, m in weight_layers(self.model).items()}, bits)
        return {name: bits[name] for name in self.layers}

    def _stage(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        name: str,
        folder: str,
        done: int,
        until: int,
        loss=None,
    ) -> list[dict]:
        """Epochs `done` to `until` of the schedule. ANS goes into the rows, which outlive a kill: where widths are
        assigned and at the end, and of the first epochs and the rules' networks also after each epoch, at the eps that
        decides."""
        config, part = self.config, f"{folder}/seed-{self.seed}"
        drops = [epoch - done for epoch in milestones(config.epochs) if epoch > done]

        def note(trainer, row: dict) -> None:
            whole = done + trainer.epoch in (*config.assignments, config.epochs)
            watched = name == "initial" or name in RULES
            for eps in config.ans_eps if whole else config.ans_eps[:watched]:
                found = noise_sensitivity(
                    model, *self.probe, eps * PIXEL, ratio=config.ans_ratio, batch_size=config.batch_size
                )
                row.update((f"ans_{eps:g}/{layer}", value) for layer, value in found.items())

        history = train_classifier(
            model,
            self.train_images,
            self.test_images,
            config,
            seed=self.seed,
            name=name,
            out=self.out / part,
            free=FREE,
            resume=resume_from(self.out, part, self.resume),
            epochs=until - done,
            optimizer=optimizer,
            loss=loss,
            scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1),
            on_epoch_end=note,
        )
        return history.rows
