"""Adversarial robustness of networks on analog crossbars, arXiv 2008.11298: what resistive wires do to attacks.

A network is trained in software, mapped to chips of several tile sizes, and attacked by FGSM and PGD with the gradient
of the software (SH) and of the chip (HH), beside the software itself (SW). Controls ask whether what looks like
robustness is a gradient that does not fit: a Gaussian perturbation as large as the chip's, another chip, images without
gradient. Defences that cost as little are measured alike, alone and on chips; a study of calibrations looks for the
one that explains the only accuracies that are known of such chips.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

from torch import nn

from pyaccel.data import Batch
from pyaccel.hardware import CrossbarConfig
from pyaccel.hardware.crossbar import CALIBRATIONS, PADDINGS, ROW_ORDERS, SCHEMES
from pyaccel.recipes import crossbar_plots, plots
from pyaccel.recipes.classifier import FREE as FREE_OF_ALL
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Images,
    check_choices,
    check_fields,
    choose_preset,
    chosen,
    cross_entropy,
    device_of,
    is_cifar10,
    open_data,
    plain_batches,
    say,
)
from pyaccel.recipes.crossbar_measure import Cells, Measured, fingerprint, measure, study
from pyaccel.recipes.crossbar_networks import NETWORKS, build, normalises, train_network, wrapper
from pyaccel.recipes.crossbar_report import describe, results
from pyaccel.recipes.environment import environment
from pyaccel.recipes.folder import open_run
from pyaccel.recipes.planning import Network
from pyaccel.recipes.report import Report, write
from pyaccel.training.transfer import to_device

__all__ = ["Config", "describe", "preset", "run"]

# Fields that change no training and no figure measured before: each figure is kept under all that it depends on.
FREE = (*FREE_OF_ALL, "networks", "tiles", "r_min", "calibrations", "chips", "fgsm_eps", "pgd_eps", "defence_tile",
        "study_tiles")  # fmt: skip


@dataclass(frozen=True)
class Config(ClassifierConfig):
    """Everything a run depends on.

    Args:
        norm: "batch" or "none"; None: as the network is described (vgg8_crossbar: none).
        networks: "plain", and the defences "low_bit" (weights of `defence_bits` bits, trained with them), "pixel" (the
            plain network behind an input of `defence_bits` bits), "adversarial" (trained on PGD).
        defence_bits: of "low_bit" and "pixel".
        adversarial_eps: radius of the attack in adversarial training, in 1/255.
        adversarial_step: its step, in 1/255.
        adversarial_steps: its number of steps.
        tiles: sizes of square crossbars that the plain network is attacked on.
        r_min: ON resistances, ohm.
        on_off: OFF resistance over ON resistance.
        r_driver: ohm.
        r_wire_row: ohm a cell.
        r_wire_col: ohm a cell.
        r_sense: ohm.
        variation: sigma / mu of the devices.
        scheme: of the mapping, "differential" or "offset".
        row_order: rows of a convolution on tiles, "channel" or "position".
        padding: cells that fill a tile, "g_min" or "absent".
        calibrations: how gain is given back on the attacked chips, of "none", "layer_gain", "column_gain",
            "bn_reestimate".
        chips: draws of the device variation.
        defence_tile: tile of the chips that the defences are combined with.
        study_tiles: tiles of the study of calibrations, on chips without variation, all four calibrations.
        attack_images: test images that are attacked, and whose accuracy without attack is compared; None: all.
        study_images: test images of the study; None: all.
        reestimate_images: training images for "bn_reestimate".
        fgsm_eps: radii of FGSM, of pixels in [0, 1].
        pgd_eps: radii of PGD, in 1/255.
        pgd_step: step of PGD, in 1/255.
        pgd_steps: its number of steps, after a random start.
    """

    norm: str | None = None
    networks: tuple[str, ...] = NETWORKS
    defence_bits: int = 4
    adversarial_eps: float = 8.0
    adversarial_step: float = 2.0
    adversarial_steps: int = 7
    tiles: tuple[int, ...] = (16, 32, 64)
    r_min: tuple[float, ...] = (20e3,)
    on_off: float = 10.0
    r_driver: float = 1e3
    r_wire_row: float = 5.0
    r_wire_col: float = 10.0
    r_sense: float = 1e3
    variation: float = 0.1
    scheme: str = "differential"
    row_order: str = "channel"
    padding: str = "g_min"
    calibrations: tuple[str, ...] = ("layer_gain",)
    chips: int = 5
    defence_tile: int = 64
    study_tiles: tuple[int, ...] = (16, 32, 64, 128)
    attack_images: int | None = None
    study_images: int | None = None
    reestimate_images: int = 10_000
    fgsm_eps: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    pgd_eps: tuple[float, ...] = (2, 4, 8, 16, 32)
    pgd_step: float = 2.0
    pgd_steps: int = 10


PAPER = Config(model="vgg16_crossbar")
DESK = replace(
    PAPER, preset="desk", model="vgg8_crossbar", width=0.125, norm="batch", train_images=10_000, watch_images=1_000,
    epochs=5, batch_size=64, adversarial_step=4.0, adversarial_steps=3, r_min=(20e3, 100e3), chips=3, attack_images=256,
    study_images=2_000, reestimate_images=2_000, fgsm_eps=(0.02, 0.05, 0.1), pgd_eps=(2, 8), pgd_steps=7,
)  # fmt: skip
DESK_DIGITS = replace(
    DESK, train_images=None, mean=None, std=None, crop_padding=0, flip=False, epochs=3, r_min=(20e3,),
    fgsm_eps=(0.05, 0.1, 0.2), pgd_eps=(8, 32), pgd_step=8.0, adversarial_eps=16.0, adversarial_step=12.0,
    adversarial_steps=2,
)  # fmt: skip
SMOKE = replace(
    DESK_DIGITS, preset="smoke", data="digits8", epochs=4, batch_size=32, tiles=(16, 64), chips=2, seeds=(0, 1),
    study_tiles=(64,), attack_images=128, study_images=None, watch_images=None, reestimate_images=512,
    fgsm_eps=(0.1, 0.2), pgd_eps=(16,), pgd_step=4.0, pgd_steps=5,
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "desk": DESK, "paper": PAPER}


def preset(name: str, data: str | None = None) -> Config:
    """The configuration of a preset. desk: another one for the packaged digits than for CIFAR-10."""
    return choose_preset(PRESETS, name, data, desk_digits=DESK_DIGITS)


def networks(config: Config, images: Images) -> dict[str, Network]:
    """The plain network, for `pyaccel plan`; the defences train it with other losses."""
    return {"plain": Network(lambda: build(config, images, config.seeds[0]), cross_entropy())}


def run(config: Config, *, out: str | os.PathLike, resume: str = "auto") -> Report:
    """Train what `config` asks for, measure it on chips, and write the report. A run that was killed continues: with
    training, and with the figures that are not yet in the folder.

    Errors: ValueError, FileNotFoundError for a configuration or data that cannot be run, before anything is written.
    """
    check(config)
    train, test = open_data(config, "crossbar")
    has_norms(config, build(config, train, 0))
    out = open_run(out, asdict(config), resume=resume, free=FREE)
    device = device_of(config)
    shown = clean_batches(config, chosen(test, config.attack_images))
    measured: dict[tuple[str, int], Measured] = {}
    for seed in config.seeds:
        for network in config.networks:
            trained = train_network(config, network, train, test, seed=seed, out=out, resume=resume, free=FREE)
            cells = Cells(out / "figures" / f"seed-{seed}" / network, fingerprint(trained))
            wrap = wrapper(config, network)
            again = [b.images for b in clean_batches(config, chosen(train, config.reestimate_images))]
            say(f"{network}, seed {seed}: attacks in software and on chips")
            setups = chips_of(config, network)
            measured[network, seed] = measure(config, trained, wrap, setups, shown, again, cells)
            if network == "plain":
                measured[network, seed].study = study(
                    trained, wrap, study_chips(config, trained),
                    clean_batches(config, chosen(test, config.study_images)), again, cells,
                )  # fmt: skip
    published = config.preset == "paper" and config.model == PAPER.model and is_cifar10(train, test)
    report = Report(
        "crossbar", config.preset, asdict(config), environment(device), results(config, measured, published)
    )
    if plots.available():
        crossbar_plots.draw(report, out)
    else:
        say('matplotlib is not installed, so the report has no plots; pip install "pyaccel[plot]"')
    write(report, describe(report), out)
    return report


def check(config: Config) -> None:
    """ValueError for fields that no later check would name."""
    check_fields(
        config,
        at_least_one=("chips", "adversarial_steps", "pgd_steps", "attack_images", "study_images", "reestimate_images",
                      "defence_tile"),
        positive=("on_off", "adversarial_eps", "adversarial_step", "pgd_step"),
    )  # fmt: skip
    check_choices("networks", config.networks, NETWORKS)
    check_choices("calibrations", config.calibrations, CALIBRATIONS)
    for name, known in (("scheme", SCHEMES), ("row_order", ROW_ORDERS), ("padding", PADDINGS)):
        check_choices(name, (getattr(config, name),), known)
    for name in ("tiles", "r_min", "fgsm_eps", "pgd_eps", "study_tiles"):
        check_choices(name, getattr(config, name))
        if not all(value > 0 for value in getattr(config, name)):
            raise ValueError(f"{name} must be positive, got {list(getattr(config, name))}")
    if not 2 <= config.defence_bits <= 8:
        raise ValueError(f"defence_bits must be in 2..8, got {config.defence_bits}")
    for r_min in config.r_min:
        chip(config, config.defence_tile, r_min, config.calibrations[0])


def has_norms(config: Config, network: nn.Module) -> None:
    """ValueError where a calibration measures batch statistics anew that the network does not have."""
    if "bn_reestimate" in config.calibrations and not normalises(network):
        raise ValueError(
            f'calibrations: "bn_reestimate" needs batch normalisation, which {config.model} is built without; use '
            "--norm batch, or leave this calibration out"
        )


# ---- chips


def chip(config: Config, tile: int, r_min: float, calibration: str, variation: float | None = None) -> CrossbarConfig:
    """The crossbars of one column of the report."""
    return CrossbarConfig(
        rows=tile, columns=tile, r_min=r_min, r_max=config.on_off * r_min, r_driver=config.r_driver,
        r_wire_row=config.r_wire_row, r_wire_col=config.r_wire_col, r_sense=config.r_sense, scheme=config.scheme,
        row_order=config.row_order, padding=config.padding, calibration=calibration,
        variation=config.variation if variation is None else variation,
    )  # fmt: skip


def chips_of(config: Config, network: str) -> dict[str, CrossbarConfig]:
    """The chips a network is attacked on, by name: size / ON resistance / calibration."""
    tiles = config.tiles if network == "plain" else (config.defence_tile,)
    r_min = config.r_min if network == "plain" else config.r_min[:1]
    return {
        chip_name(tile, r, calibration): chip(config, tile, r, calibration)
        for calibration in config.calibrations
        for r in r_min
        for tile in tiles
    }


def study_chips(config: Config, network: nn.Module) -> dict[str, CrossbarConfig]:
    """The chips without variation, of the first ON resistance, with every calibration that the network allows."""
    known = [c for c in CALIBRATIONS if c != "bn_reestimate" or normalises(network)]
    r = config.r_min[0]
    return {chip_name(t, r, c): chip(config, t, r, c, variation=0.0) for t in config.study_tiles for c in known}


def chip_name(tile: int, r_min: float, calibration: str) -> str:
    return f"{tile}x{tile}/{r_min / 1e3:g}k/{calibration}"


def clean_batches(config: Config, images: Images) -> list[Batch]:
    """Every image once, pixels in [0, 1], on the device."""
    return [to_device(b, device_of(config)) for b in plain_batches(config, images, normalise=False).epoch(0)]
