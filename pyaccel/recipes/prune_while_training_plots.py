"""Plots of the `prune_while_training` recipe: accuracy against what was pruned and spent; widths over epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyaccel.recipes.plots import canvas
from pyaccel.recipes.prune_while_training_report import LABELS, kinds
from pyaccel.recipes.report import Report

if TYPE_CHECKING:
    from pyaccel.recipes.prune_while_training import Measurement

NAMES = {"filters": "filters", "macs": "products"}
STYLES = {  # kind: colour, marker, dashes
    "l1": ("#0072B2", "o", "-"), "activation": ("#009E73", "^", "--"), "random": ("#5F5F5F", "s", ":"),
    "one_shot": ("#D55E00", "D", "-."), "scratch": ("#E69F00", "v", "--"),
}  # fmt: skip


def draw(report: Report, measured: Mapping[tuple[str, float, int], Measurement], out: Path) -> None:
    accuracy(report, out / "accuracy.png")
    widths(report, measured, out / "widths.png")


def accuracy(report: Report, path: str | os.PathLike) -> None:
    """Test accuracy over the share of filters pruned and over training compute; bars: spread of the seeds."""
    rates, dense = report.config["rates"], report["dense/accuracy"]
    with canvas(path, 2, (9.2, 3.8)) as (figure, axes):
        for kind in kinds(report.config):
            colour, marker, dashes = STYLES[kind]
            found = [report[f"{kind}/{rate:g}/accuracy"] for rate in rates]
            spent = [report[f"{kind}/{rate:g}/compute_macs"].value for rate in rates]
            for axis, x in ((axes[0], [100 * rate for rate in rates]), (axes[1], spent)):
                axis.errorbar(x, [f.value for f in found], [f.std or 0 for f in found], linestyle=dashes, color=colour,
                              marker=marker, markersize=5, capsize=2, label=LABELS[kind])  # fmt: skip
        for axis in axes:
            axis.axhline(dense.value, color="black", linewidth=1.0, zorder=1, label="dense")
        axes[0].set_xlabel("filters pruned (%)")
        axes[1].set_xlabel("training compute, of dense (products)")
        axes[0].set_title("test accuracy (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)


def widths(report: Report, measured: Mapping[tuple[str, float, int], Measurement], path: str | os.PathLike) -> None:
    """Filters and products that each epoch trained with, of its dense value: the first criterion and seed."""
    seed, criterion = report.config["seeds"][0], report.config["criteria"][0]
    dense = measured["dense", 0.0, seed].epochs[0][1]
    colours = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
    with canvas(path, 1, (6.4, 3.6)) as (_, (axis,)):
        for number, rate in enumerate(report.config["rates"]):
            epochs = measured[criterion, rate, seed].epochs
            for count, dashes in (("filters", "--"), ("macs", "-")):
                values = [100 * figures[count] / dense[count] for _, figures in epochs]
                axis.step(range(1, len(values) + 1), values, dashes, where="mid", color=colours[number % len(colours)],
                          label=f"{100 * rate:g} % pruned: {NAMES[count]}")  # fmt: skip
        axis.set_ylim(0, 105)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title("what an epoch trains with (% of dense)")
        axis.legend(fontsize=8)
