"""Plots of the `snn_robustness` recipe, from its report."""

from __future__ import annotations

from pathlib import Path

from pyaccel.recipes.plots import canvas
from pyaccel.recipes.report import Report
from pyaccel.recipes.snn_robustness_report import LABELS, MISSING, NO_GRADIENT

BARS = (("clean", "clean", "#BBBBBB"), ("noise/{eps:g}", "random signs", "#56B4E9"), ("white/fgsm/{eps:g}", "FGSM",
"#E69F00"),
        ("white/pgd/{eps:g}", "PGD", "#D55E00"), ("control/worst of all", "worst of all controls",
        "#5F0F00"))  # fmt: skip
CASES = (("clean", "clean", "#5F5F5F", "s", ":"), ("white", "FGSM, white-box", "#D55E00", "D", "-"),
         ("transfer", "FGSM from the artificial network", "#0072B2", "o", "--"))  # fmt: skip


def draw(report: Report, out: Path) -> None:
    """white_box.png and, where there are sweeps, sweeps.png."""
    white_box(report, out / "white_box.png")
    if report.config["sweep_steps"] and report.config["sweep_leaks"]:
        sweeps(report, out / "sweeps.png")


def white_box(report: Report, path: Path) -> None:
    """Bars of accuracy for each network, at the largest radius."""
    networks, eps = report.config["networks"], max(report.config["eps"])
    known = {r.name: r for r in report.results}
    with canvas(path, 1, (1.5 + 1.7 * len(networks), 3.6)) as (_, (axis,)):
        for i, (key, label, colour) in enumerate(BARS):
            for place, kind in enumerate(networks):
                figure = known.get(f"{kind}/{key.format(eps=eps)}")
                if figure is not None:
                    first = place == min(p for p, k in enumerate(networks) if f"{k}/{key.format(eps=eps)}" in known)
                    axis.bar(place + 0.16 * (i - 2), figure.value, 0.15, yerr=figure.std, color=colour, capsize=2,
                             label=label if first else None)  # fmt: skip
                elif f"{kind}/{key.format(eps=eps)}/{NO_GRADIENT}" in known:  # else: as if accuracy were 0
                    _missing(axis, place + 0.16 * (i - 2), 2, label)
        axis.set_xticks(range(len(networks)), [LABELS[kind] for kind in networks])
        axis.set_ylim(0, 100)
        axis.set_title(f"accuracy (%), radius {eps:.3g}, white-box")
        axis.grid(False, axis="x")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def sweeps(report: Report, path: Path) -> None:
    """Accuracy over the steps and over the leak that SNN-BP was tuned for; no point where there was no gradient."""
    config, known = report.config, {r.name: r for r in report.results}
    with canvas(path, 2, (10.6, 3.4)) as (_, axes):
        for axis, what, values in ((axes[0], "steps", config["sweep_steps"]), (axes[1], "leak", config["sweep_leaks"])):
            for case, label, colour, marker, dashes in CASES:
                points = {v: known.get(f"sweep/{what}/{v:g}/{case}") for v in values}
                figures = {v: figure for v, figure in points.items() if figure is not None}
                spread = [figure.std or 0 for figure in figures.values()]
                axis.errorbar(list(figures), [f.value for f in figures.values()], spread, color=colour, marker=marker,
                              linestyle=dashes, capsize=2, label=label)  # fmt: skip
                for value in points.keys() - figures.keys():
                    _missing(axis, value, 40, label)
            axis.set_ylim(0, 100)
            axis.set_xticks(values, [f"{value:g}" for value in values])
        axes[0].set_xlabel("time steps T, no leak")
        axes[0].set_title(f"accuracy (%), radius {config['sweep_eps']:.3g}")
        axes[1].set_xlabel(f"leak at T = {config['sweep_at']}")
        axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _missing(axis, x: float, bottom: float, label: str) -> None:
    axis.text(x, bottom, f"{label}: {MISSING}", rotation=90, ha="center", va="bottom", fontsize=7)
