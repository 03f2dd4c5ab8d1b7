"""Bit errors of hybrid 8T-6T memory against adversarial attacks, arXiv 2011.13392: noise in chosen layers of a trained
network, and the attack on parameters that the same memory permits.

A network is trained (or loaded) and never retrained. Sites (weights or outputs of a layer) and their memory are chosen
on images kept from training. On test images the report gives the gain against attackers who see one draw of the noise
(A), the network without noise (B), or the average over draws (C): a gain against A that C does not meet is a masked
gradient.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyaccel import models
from pyaccel.recipes import plots, sram_noise_plots
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Images,
    Normalised,
    check_choices,
    check_fields,
    choose_preset,
    chosen,
    cross_entropy,
    device_of,
    open_data,
    plain_batches,
    say,
    split,
    train_classifier,
)
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run, resume_from
from pyaccel.recipes.planning import Network
from pyaccel.recipes.report import Report, write
from pyaccel.recipes.sram_noise_bench import WORD_BITS, Bench, Cells, fingerprint
from pyaccel.recipes.sram_noise_measure import Study, evaluate
from pyaccel.recipes.sram_noise_parameters import error_rates, parameter_attacks
from pyaccel.recipes.sram_noise_report import describe, results
from pyaccel.recipes.sram_noise_search import combine, everywhere, retained, screen, selection_measure
from pyaccel.training import seed_everything
from pyaccel.training.weights import load_weights

__all__ = ["Config", "describe", "preset", "run"]

# Chips are numbered from the seed on; the selection's are other chips than those that the report is about.
CHIPS, SELECTION_CHIP, TEST_CHIP = 1 << 16, 0, 1 << 12
EVALUATED = 250  # images at a time, at least; every image has its own draws, but for PGD's random starts
# Fields that change no training: a run may continue in its folder with other values of them.
FREE = (
    "seeds", "device", "calibration_images", "test_images", "n8t", "probabilities", "screening_eps", "tolerance",
    "neighbours", "repeats", "test_repeats", "samples", "epsilons", "pgd_epsilons", "pgd_steps", "pgd_images",
    "bank_n8t", "voltage_p", "surgical_rounds", "surgical_budgets", "progressive_rounds", "attack_images", "sweep_p",
)  # fmt: skip


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on.

    Args:
        model: not used here; see `networks`.
        networks: the networks of `pyaccel.models` to study, each trained once a seed.
        weights: safetensors files of trained weights, one for each network, instead of training.
        selection_images: training images kept from training, on which sites and settings are chosen.
        calibration_images: training images from which outputs take the steps of their codes.
        test_images: test images that the report is about, chosen once; None: all.
        n8t: numbers of 8T bits to try at each site, of words of 8 bits.
        probabilities: bit error rates of 6T cells to try at each site.
        screening_eps: of the FGSM attack that selection looks at, in pixel units; one of `epsilons`.
        tolerance: clean accuracy that noise may cost in selection, points.
        neighbours: in the greedy combination, try one 8T bit more and one less as well.
        repeats: chips (seeds of the noise) in selection.
        test_repeats: chips in the report; others than those of the selection.
        samples: draws that attacker C averages over.
        epsilons: of FGSM, in pixel units.
        pgd_epsilons: of PGD, with steps of a quarter of it.
        pgd_steps: of PGD.
        pgd_images: test images that PGD attacks; None: all `test_images`.
        bank_n8t: numbers of 8T bits of the banks whose parameters are attacked.
        voltage_p: bit error rates that the voltage attacker sets.
        surgical_rounds: of the surgical attacker, one result each.
        surgical_budgets: flips that a budgeted surgical attacker is allowed, one result each.
        progressive_rounds: bits that the progressive bit search flips; 0: it is left out.
        attack_images: selection images that parameter attackers take gradients on.
        sweep_p: bit error rates of the sweep.
    """

    model: str = ""
    networks: tuple[str, ...] = ("vgg19", "resnet18")
    weights: tuple[str, ...] = ()
    selection_images: int = 1_000
    calibration_images: int = 1_000
    test_images: int | None = None
    n8t: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    probabilities: tuple[float, ...] = (1e-3, 1e-2, 5e-2, 1e-1)
    screening_eps: float = 8 / 255
    tolerance: float = 2.0
    neighbours: bool = True
    repeats: int = 5
    test_repeats: int = 5
    samples: int = 20
    epsilons: tuple[float, ...] = (2 / 255, 4 / 255, 8 / 255, 0.05, 16 / 255, 0.1, 0.15, 0.2, 0.25, 0.3)
    pgd_epsilons: tuple[float, ...] = (2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255)
    pgd_steps: int = 7
    pgd_images: int | None = 1_000
    bank_n8t: tuple[int, ...] = (1, 4)
    voltage_p: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    surgical_rounds: tuple[int, ...] = (1, 5)
    surgical_budgets: tuple[int, ...] = (100,)
    progressive_rounds: int = 20
    attack_images: int = 128
    sweep_p: tuple[float, ...] = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    seeds: tuple[int, ...] = (0, 1, 2)


PAPER = Config()
DESK = replace(
    PAPER, preset="desk", networks=("vgg5",), width=0.25, train_images=16_000, watch_images=1_000, epochs=6,
    batch_size=100, lr=0.1, selection_images=400, calibration_images=500, test_images=500, n8t=(1, 2, 3),
    probabilities=(1e-2, 1e-1), neighbours=False, test_repeats=3, samples=10,
    epsilons=(2 / 255, 4 / 255, 8 / 255, 16 / 255, 0.1, 0.2), pgd_epsilons=(8 / 255,), pgd_images=200,
    sweep_p=(1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1), seeds=(0, 1),
)  # fmt: skip
DIGITS = dict(mean=None, std=None, crop_padding=0, flip=False, train_images=None, screening_eps=0.1)
DESK_DIGITS = replace(DESK, **DIGITS, epochs=4, batch_size=64, epsilons=(0.05, 0.1, 0.2, 0.3), pgd_epsilons=(0.1,))
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", epochs=5, selection_images=200, calibration_images=200,
    width=0.125, test_images=None, n8t=(1, 4), probabilities=(1e-1,), repeats=3, test_repeats=2, samples=4,
    pgd_images=60, epsilons=(0.05, 0.1, 0.2), voltage_p=(0.1,), bank_n8t=(1,), surgical_rounds=(1,),
    surgical_budgets=(20,), progressive_rounds=3, attack_images=64, sweep_p=(1e-3, 1e-2, 1e-1), seeds=(0, 1, 2),
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train, choose and measure what `config` asks for, in folders of `out` that survive a kill, and write the report.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_data(config, "sram_noise")
    train, selection = split(train, config.selection_images)
    for number in range(len(config.networks)):
        # A network that does not fit the images, or the weights it is given, is refused before anything is written.
        load(config, number, build(config, number, train, 0))
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    studies = {}
    for number, name in enumerate(config.networks):
        for seed in config.seeds:
            part = f"{name}/seed-{seed}"
            (out / part).mkdir(parents=True, exist_ok=True)
            model = build(config, number, train, seed)
            if not load(config, number, model):
                train_classifier(model, train, test, config, seed=seed, name=name, out=out / part, free=FREE,
                                 resume=resume_from(out, part, resume))  # fmt: skip
            studies[name, seed] = study(config, name, seed, model, (train, selection, test), out / part)
    report = Report(
        "sram_noise", config.preset, asdict(config), environment(device_of(config)),
        results(config, studies, min(len(test), config.test_images or len(test))),
    )  # fmt: skip
    if plots.available():
        sram_noise_plots.draw(report, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_fields(
        config,
        at_least_one=("selection_images", "calibration_images", "test_images", "repeats", "test_repeats", "pgd_steps",
                      "pgd_images", "attack_images"),
        positive=("screening_eps",),
    )  # fmt: skip
    if config.model:
        raise ValueError(
            f"model: sram_noise studies several networks; name them in networks, got model {config.model!r}"
        )
    check_choices("networks", config.networks, models.list_models())
    bits = range(WORD_BITS)
    for name, known in (("n8t", bits), ("bank_n8t", bits), ("probabilities", None), ("epsilons", None)):
        check_choices(name, getattr(config, name), known)
    for name in ("probabilities", "voltage_p", "sweep_p"):
        if not all(0 < p <= 1 for p in getattr(config, name)):
            raise ValueError(f"{name} must be in (0, 1], got {list(getattr(config, name))}")
    if config.samples < 2:
        raise ValueError(f"samples must be at least 2: attacker C averages over draws, got {config.samples}")
    if config.screening_eps not in config.epsilons:
        raise ValueError(f"screening_eps must be one of epsilons, got {config.screening_eps:g}")
    if config.weights and len(config.weights) != len(config.networks):
        raise ValueError(
            f"weights: expected one file for each of the {len(config.networks)} networks, got {len(config.weights)}"
        )


def build(config: Config, number: int, images: Images, seed: int) -> nn.Module:
    """Network number `number`, its weights drawn from `seed` alone."""
    seed_everything(seed)
    model = models.build(
        config.networks[number],
        spiking=False,
        width=config.width,
        input_shape=images.shape,
        classes=len(images.classes),
    )
    return model.to(memory_format=torch.channels_last)


def networks(config: Config, images: Images) -> dict[str, Network]:
    """What this recipe trains, for `pyaccel plan`."""
    return {
        name: Network(lambda number=number: build(config, number, images, config.seeds[0]), cross_entropy())
        for number, name in enumerate(config.networks)
    }


def load(config: Config, number: int, model: nn.Module) -> bool:
    """Copy the trained weights that the configuration names into `model`; False where it names none."""
    if config.weights:
        load_weights(model, config.weights[number])
    return bool(config.weights)


def study(
    config: Config, name: str, seed: int, model: nn.Module, images: tuple[Images, Images, Images], out: Path
) -> Study:
    """Choose on the selection images, then measure on the test images. `images`: training, selection, test."""
    device = device_of(config)
    model = model.to(device).eval()
    train, selection, test = images
    x, y = pixels(config, selection, device)
    tx, ty = pixels(config, chosen(test, config.test_images), device)
    calibration = [
        batch.images.to(device) for batch in plain_batches(config, chosen(train, config.calibration_images)).epoch(0)
    ]
    bench = Bench(model, calibration, config.mean, config.std, max(EVALUATED, config.batch_size), device)
    cells = Cells(out / "cells.jsonl", fingerprint(bench.model))
    first = seed * CHIPS

    measure = selection_measure(
        bench, cells, x, y, eps=config.screening_eps, repeats=config.repeats, first_chip=first + SELECTION_CHIP
    )
    base, tolerance = measure({}), config.tolerance / 100
    settings = [(n8t, p) for n8t in config.n8t for p in config.probabilities]
    screened = []
    for site in bench.memories:
        screened += screen(measure, [site], settings)
        best = max(cell.measured.attacked_mean for cell in screened if cell.site == site)
        say(
            f"{name}, seed {seed}: {site}: under attack {base.attacked_mean:.1%}, at best {best:.1%} with noise"
        )
    kept = retained(screened, base, tolerance)
    ours = combine(measure, kept, base, tolerance, neighbours=config.neighbours)
    say(f"{name}, seed {seed}: chosen: {', '.join(f'{s} n8t={n} p={p:g}' for s, (n, p) in ours.items()) or 'nothing'}")
    every = everywhere(screened, base, tolerance)
    placements = {
        "chosen": ours,
        "all": every,
        "weights": {site: setting for site, setting in every.items() if site.endswith("/weight")},
        "activations": {site: setting for site, setting in every.items() if site.endswith("/activation")},
    }

    plain = Normalised(model, config.mean, config.std).to(device).eval()
    with torch.no_grad():
        guesses = torch.cat([plain(part).argmax(1) for part in tx.split(config.batch_size)])
    found = Study(float((guesses == ty).double().mean()), base, screened, placements)
    chips = range(first + TEST_CHIP, first + TEST_CHIP + config.test_repeats)
    evaluate(config, bench, cells, found, tx, ty, chips)
    for n8t in config.bank_n8t:
        say(f"{name}, seed {seed}: attacks on parameters, {n8t} bits of 8 in 8T cells")
        found.parameters[n8t] = parameter_attacks(
            plain, (x[: config.attack_images], y[: config.attack_images]), tx, ty, cells,
            n8t=n8t, batch_size=config.batch_size, voltage_p=config.voltage_p, surgical_rounds=config.surgical_rounds,
            budgets=config.surgical_budgets, progressive_rounds=config.progressive_rounds, chips=chips,
        )  # fmt: skip
        for kind in ("weight", "activation"):
            for p in config.sweep_p:
                found.sweep[kind, n8t, p] = error_rates(bench, cells, tx, ty, kind=kind, n8t=n8t, p=p, chips=chips)
    return found


def pixels(config: Config, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images in [0, 1], and their classes."""
    batches = list(plain_batches(config, images, normalise=False).epoch(0))
    x = torch.cat([batch.images for batch in batches]).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.cat([batch.labels for batch in batches]).to(device)
