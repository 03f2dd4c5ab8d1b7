"""The plot of the `hybrid_snn` recipe, from its report."""

from __future__ import annotations

from pathlib import Path

from pyaccel.recipes.hybrid_snn_report import LABELS, networks
from pyaccel.recipes.plots import canvas
from pyaccel.recipes.report import Report

STYLES = {"converted": ("#0072B2", "s", "-."), "stdb": ("#D55E00", "D", "-"), "linear": ("#009E73", "^", "-")}


def draw(report: Report, out: Path) -> None:
    """accuracy.png: test accuracy over time steps, of every network."""
    config = report.config
    with canvas(out / "accuracy.png", 1, (6.8, 3.8)) as (_, (axis,)):
        ann = report["ann/accuracy"].value
        axis.axhline(ann, color="#5F5F5F", linestyle="--", linewidth=1.2, label=f"artificial ({ann:.1f} %)")
        _line(axis, report, "converted_scale_1", config["curve"], "converted, scale 1", ("#56B4E9", "o", ":"))
        few = [t for t in config["curve"] if t <= config["steps"]]
        for kind in networks(config):
            _line(axis, report, kind, few, f"{LABELS[kind]}, scale {config['scale']:g}", STYLES[kind])
        axis.set_xscale("log")
        ticks: list[int] = []
        for t in config["curve"]:  # none so close to the one before that their labels would touch
            if not ticks or t >= 1.4 * ticks[-1]:
                ticks.append(t)
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_xlabel("time step after which the read-out is taken")
        axis.set_title("test accuracy (%)")
        axis.set_ylim(0, 101)
        axis.legend(loc="lower right", fontsize=8)


def _line(axis, report: Report, name: str, steps, label: str, style: tuple[str, str, str]) -> None:
    colour, marker, dashes = style
    figures = [report[f"{name}/accuracy_after_step_{t}"] for t in steps]
    spread = None if figures[0].std is None else [f.std for f in figures]
    axis.errorbar(steps, [f.value for f in figures], spread, color=colour, marker=marker, linestyle=dashes, label=label,
                  markersize=4, capsize=2)  # fmt: skip
