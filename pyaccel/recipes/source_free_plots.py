"""Plots of `source_free`: target accuracy during adaptation, and accuracy by self-entropy before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pyaccel.recipes.plots import canvas

if TYPE_CHECKING:
    from pyaccel.recipes.source_free import Adapted

STYLES = {
    "full": ("adapted", "#0072B2", "-"),
    "no_filter": ("without the filter", "#E69F00", "--"),
    "no_source": ("without the source's labels", "#009E73", "-."),
    "naive": ("own argmax alone", "#D55E00", ":"),
}
COLUMNS = 3


def draw(measured: Mapping[tuple[str, int], Adapted], variants: Sequence[str], out: Path) -> None:
    """adaptation.png and entropy.png in `out`."""
    pairs = list(dict.fromkeys(pair for pair, _ in measured))
    for start in range(0, len(pairs), COLUMNS):  # more pairs, more files
        number = "" if start == 0 else f"_{start // COLUMNS + 1}"
        _adaptation(measured, pairs[start : start + COLUMNS], variants, out / f"adaptation{number}.png")
    _entropy(measured, pairs, out / "entropy.png")


def _adaptation(measured: Mapping, pairs: Sequence[str], variants: Sequence[str], path: Path) -> None:
    with canvas(path, len(pairs), (3.2 * len(pairs) + 2.2, 3.2)) as (_, axes):
        for axis, pair in zip(axes, pairs, strict=True):
            runs = [run for (p, _), run in measured.items() if p == pair]
            before = 100 * fmean(run.source_only for run in runs)
            axis.axhline(before, color="#5F5F5F", linestyle=(0, (1, 2)), linewidth=1.2)
            for variant in variants:
                label, colour, dashes = STYLES[variant]
                steps = [0, *(step for step, _ in runs[0].watched[variant])]
                lines = [[100 * run.source_only, *(100 * a for _, a in run.watched[variant])] for run in runs]
                for line in lines if len(lines) > 1 else ():
                    axis.plot(steps, line, color=colour, linewidth=0.7, alpha=0.5)
                axis.plot(steps, [fmean(v) for v in zip(*lines, strict=True)], dashes, color=colour, label=label)
            axis.set_title(pair.replace("->", " → "))
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("target accuracy (%)")
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _entropy(measured: Mapping, pairs: Sequence[str], path: Path) -> None:
    with canvas(path, 1, (6.4, 3.4)) as (_, (axis,)):
        for number, pair in enumerate(pairs):
            runs = [run for (p, _), run in measured.items() if p == pair]
            values = [100 * fmean(run.diagnostics[f"quartile_{q}"] for run in runs) for q in range(1, 5)]
            axis.plot(range(1, 5), values, marker="os^Dv"[number % 5], label=pair.replace("->", " → "))
        axis.set_title("accuracy of the source classifier on the target (%)")
        axis.set_xlabel("quartile of self-entropy, lowest first")
        axis.set_xticks(range(1, 5))
        axis.set_ylim(0, 100)
        if len(pairs) <= 6:
            axis.legend(loc="lower left", fontsize=8)
