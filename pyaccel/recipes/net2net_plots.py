"""Plots of the `net2net` recipe, from its report."""

from __future__ import annotations

import os
from pathlib import Path

from pyaccel.recipes.net2net_report import LABELS, SCORES
from pyaccel.recipes.plots import canvas
from pyaccel.recipes.report import Report

STYLES = {  # network: colour, marker, dashes
    "cumulative": ("#0072B2", "o", "-"), "pruned": ("#009E73", "^", "--"), "scratch": ("#5F5F5F", "s", ":"),
    "scratch_equal": ("#E69F00", "D", "-."),
}  # fmt: skip
COLOURS = ("#0072B2", "#56B4E9", "#5F5F5F", "#E69F00")


def draw(report: Report, out: Path) -> None:
    networks(report, out / "networks.png")
    if "cumulative" in report.config["networks"]:
        detection(report, out / "detection.png")


def networks(report: Report, path: str | os.PathLike) -> None:
    """Test accuracy over training compute, and over the noise."""
    levels = report.config["noise"]
    with canvas(path, 2, (9.2, 3.8)) as (figure, axes):
        for network in report.config["networks"]:
            colour, marker, dashes = STYLES[network]
            accuracy, compute = report[f"{network}/accuracy"], report[f"{network}/compute"]
            axes[0].errorbar([compute.value], [accuracy.value], [accuracy.std or 0], color=colour, marker=marker,
                             linestyle="none",
                             markersize=8, capsize=3, label=LABELS[network])  # fmt: skip
            found = [report[f"{network}/noise/{level:g}"] for level in levels]
            axes[1].errorbar(levels, [f.value for f in found], [f.std or 0 for f in found], linestyle=dashes,
                             color=colour,
                             marker=marker, markersize=5, capsize=2)  # fmt: skip
        axes[0].set_xlim(left=0)
        axes[0].set_xlabel("training compute (of scratch, products)")
        axes[0].set_title("test accuracy (%)")
        axes[1].set_xlabel("standard deviation of the noise (pixels in 0..1)")
        axes[1].set_title("test accuracy under noise (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5)


def detection(report: Report, path: str | os.PathLike) -> None:
    """Area under the ROC curve, a group of bars an attack."""
    names = {result.name for result in report.results}
    attacks = ("fgsm", "pgd", "adaptive")
    with canvas(path, 1, (7.4, 3.8)) as (figure, (axis,)):
        for place, (score, label) in enumerate(SCORES.items()):
            there = [
                (x, report[f"detection/{a}/{score}/auc"])
                for x, a in enumerate(attacks)
                if f"detection/{a}/{score}/auc" in names
            ]
            if there:
                axis.bar([x + 0.2 * (place - 1.5) for x, _ in there], [r.value for _, r in there], 0.18,
                         color=COLOURS[place],
                         yerr=[r.std or 0 for _, r in there], capsize=2, label=label)  # fmt: skip
        axis.axhline(0.5, color="black", linewidth=1, linestyle=":")
        axis.set_xticks(range(len(attacks)), ["FGSM on the last", "PGD on the last", "adaptive, on all"])
        axis.set_ylim(0, 1)
        axis.grid(axis="x", visible=False)
        axis.set_title("area under the ROC curve (dotted: chance)")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5)
