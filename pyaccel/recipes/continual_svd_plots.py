"""Plots of `continual_svd`: accuracy over tasks, accuracy matrices, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from pyaccel.recipes.plots import canvas

if TYPE_CHECKING:
    from pyaccel.recipes.continual_svd import Learned

STYLES = {
    "svd": ("factorised, frozen", "#0072B2", "-"),
    "individual": ("one network a task", "#5F5F5F", ":"),
    "sequential": ("one dense network, trained on", "#E69F00", "--"),
    "decayed": ("control: decay on frozen factors", "#D55E00", "-."),
}
LAYER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#5F5F5F")


def draw(learned: Mapping[tuple[str, int], Learned], methods: Sequence[str], seed: int, out: Path) -> None:
    """accuracy.png, matrix_METHOD.png, ranks.png in `out`."""
    accuracy_over_tasks(learned, methods, out / "accuracy.png")
    for method in methods:
        if method != "individual":
            matrix(learned[method, seed].accuracy, STYLES[method][0], out / f"matrix_{method}.png")
    if "svd" in methods:
        ranks(learned["svd", seed].ranks, out / "ranks.png")


def accuracy_over_tasks(learned: Mapping[tuple[str, int], Learned], methods: Sequence[str], path: Path) -> None:
    """Mean accuracy (%) on the tasks so far, after each task; the mean over seeds."""
    with canvas(path, 1, (6.4, 3.6)) as (_, (axis,)):
        for method in methods:
            label, colour, dashes = STYLES[method]
            runs = [[100 * fmean(row) for row in run.accuracy] for (m, _), run in learned.items() if m == method]
            mean = [fmean(values) for values in zip(*runs, strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, dashes, color=colour, label=label, marker="o", markersize=3.5)
        axis.set_title("mean accuracy on the tasks so far (%)")
        axis.set_xlabel("tasks learned")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="best")


def matrix(accuracy: list[list[float]], label: str, path: Path) -> None:
    """Accuracy (%) on task u (columns) after task t (rows)."""
    tasks = len(accuracy)
    values = np.full((tasks, tasks), np.nan)
    for t, row in enumerate(accuracy):
        values[t, : t + 1] = 100 * np.array(row)
    side = 2.4 + 0.33 * tasks
    with canvas(path, 1, (side + 0.8, side)) as (figure, (axis,)):
        picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=100)
        for t, u in zip(*np.nonzero(~np.isnan(values)), strict=True):
            axis.text(u, t, f"{values[t, u]:.0f}", ha="center", va="center", fontsize=7,
                      color="black" if values[t, u] > 65 else "white")  # fmt: skip
        axis.set_xticks(range(tasks), range(1, tasks + 1))
        axis.set_yticks(range(tasks), range(1, tasks + 1))
        axis.set_xlabel("accuracy on task")
        axis.set_ylabel("after task")
        axis.set_title(label)
        axis.grid(False)
        axis.tick_params(length=0, labelsize=8)
        figure.colorbar(picture, ax=axis, label="accuracy (%)", pad=0.02, shrink=0.8)


def ranks(table: Sequence[Sequence[int]], path: Path) -> None:
    """Cumulative rank of every layer after each task."""
    with canvas(path, 1, (6.4, 3.6)) as (_, (axis,)):
        for layer, values in enumerate(zip(*table, strict=True)):
            colour = LAYER_COLOURS[layer % len(LAYER_COLOURS)]
            axis.plot(
                range(1, len(values) + 1), values, color=colour, marker="o", markersize=3, label=f"layer {layer + 1}"
            )
        axis.set_title("cumulative rank")
        axis.set_xlabel("tasks learned")
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left")
