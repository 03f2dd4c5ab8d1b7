"""Plots of a run: PNG files by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyaccel.training import distributed

# Okabe and Ito's palette, told apart by every kind of colour vision; dashes say the same once more.
STYLES = {
    "bntt": ("BNTT", "#0072B2", "-"),
    "shared": ("one BatchNorm", "#E69F00", "--"),
    "none": ("no normalisation", "#5F5F5F", ":"),
}
POSITIVE, NEGATIVE, MARK = "#0072B2", "#D55E00", "#009E73"
NEURONS = 20  # of each layer in a raster
RC = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#777777", "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
    "lines.linewidth": 1.8, "savefig.dpi": 150, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Raster:
    """One image [C, H, W] as the encoder gets it, its label, logits [T, classes], spikes [T, neurons] of each layer."""

    image: Tensor
    label: int
    logits: Tensor
    spikes: Mapping[str, Tensor]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def training_curves(histories: Mapping[tuple[str, int], Sequence[Mapping]], path: str | os.PathLike) -> None:
    """Training loss and test accuracy after each epoch; keys are (norm, seed). Thin lines: seeds, thick: their mean."""
    with canvas(path, 2, (8.4, 3.2)) as (_, axes):
        for axis, column, factor in ((axes[0], "train_loss", 1), (axes[1], "eval_accuracy", 100)):
            for norm, runs in _by_norm(histories):
                _lines(axis, norm, [[factor * row[column] for row in rows] for rows in runs])
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_title("training loss (cross entropy, nats)")
        axes[0].set_ylim(bottom=0)
        axes[1].set_title("test accuracy (%)")
        axes[1].legend(loc="lower right")


def accuracy_over_steps(
    accuracies: Mapping[tuple[str, int], Sequence[float]], exits: Mapping[int, int], path: str | os.PathLike
) -> None:
    """Test accuracy (%) after each step; keys are (norm, seed). exits: step of the early exit, by seed."""
    with canvas(path, 1, (6.4, 3.6)) as (_, (axis,)):
        for norm, runs in _by_norm(accuracies):
            _lines(axis, norm, runs)
        steps = max(map(len, accuracies.values()))
        if exits:
            step = sum(exits.values()) / len(exits)
            axis.axvline(step, color=MARK, linewidth=1.2, linestyle=(0, (6, 2)), zorder=1)
            late = ", the last: nothing saved" if step == steps else ""
            axis.text(step, 0.03, f"early exit, step {step:g}{late} ", color=MARK, rotation=90, ha="right", va="bottom",
                      transform=axis.get_xaxis_transform(), fontsize=8.5)  # fmt: skip
        axis.set_title("test accuracy (%)")
        axis.set_xlabel("time step after which the read-out is taken")
        axis.set_xlim(0.8, steps + 0.2)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="lower center")


def gain_map(gains: Mapping[str, Tensor], threshold: float, exit_step: int, path: str | os.PathLike) -> None:
    """Mean over channels of BNTT's gains [T, C], a row a layer, a column a step."""
    levels = torch.stack([g.mean(1) for g in gains.values()])
    layers, steps = levels.shape
    with canvas(path, 1, (max(5.0, 0.55 * steps + 2.2), 0.42 * layers + 1.4)) as (figure, (axis,)):
        top = max(float(levels.max()), threshold)
        picture = axis.imshow(
            levels.numpy(), cmap="viridis", vmin=min(0.0, float(levels.min())), vmax=top, aspect="auto"
        )
        if steps <= 30:
            for row, column in torch.cartesian_prod(torch.arange(layers), torch.arange(steps)).tolist():
                value = float(levels[row, column])
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                          color="black" if value > 0.65 * top else "white")  # fmt: skip
        axis.set_yticks(range(layers), [_short(name) for name in gains])
        axis.set_xticks(range(0, steps, max(1, steps // 25)), range(1, steps + 1, max(1, steps // 25)))
        axis.set_xlabel("time step")
        axis.set_title(f"mean gain γ; early exit below {threshold:g}: at step {exit_step} of {steps}")
        axis.grid(False)
        axis.tick_params(length=0)
        figure.colorbar(picture, ax=axis, label="mean gain γ (1)", pad=0.02)


def raster(raster: Raster, path: str | os.PathLike) -> None:
    """The image, spikes of up to `NEURONS` neurons a layer over time, and the read-out of each class."""
    steps, classes = raster.logits.shape
    with canvas(path, None, (9.2, 1.2 + 0.95 * len(raster.spikes))) as (figure, _):
        left, right = figure.subfigures(1, 2, width_ratios=(1, 2.6))
        top, bottom = left.subplots(2, 1, height_ratios=(1, 1.1))
        top.imshow(_displayed(raster.image).numpy(), cmap="gray", interpolation="nearest")
        top.set_title(f"image (class {raster.label})")
        top.axis("off")
        best = int(raster.logits[-1].argmax())
        for c in range(classes):
            chosen = {best: (NEGATIVE, 2.0, 2), raster.label: (POSITIVE, 2.0, 3)}.get(c, ("#BBBBBB", 1.0, 1))
            bottom.plot(
                range(1, steps + 1),
                raster.logits[:, c].tolist(),
                color=chosen[0],
                linewidth=chosen[1],
                zorder=chosen[2],
            )
        bottom.set_title("read-out of each class (logit)")
        bottom.set_xlabel("time step")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        named = {raster.label: "true"} if best == raster.label else {raster.label: "true", best: "chosen"}
        for c, word in named.items():
            bottom.annotate(f" {c} ({word})", (steps, float(raster.logits[-1, c])), fontsize=8, va="center",
                            color=POSITIVE if c == raster.label else NEGATIVE, annotation_clip=False)  # fmt: skip
        axes = right.subplots(len(raster.spikes), 1, sharex=True)
        for axis, (name, spikes) in zip(axes, raster.spikes.items(), strict=True):
            shown = _sample(spikes)
            for sign, colour in ((1, POSITIVE), (-1, NEGATIVE)):
                when, which = (shown.sign() == sign).nonzero(as_tuple=True)
                axis.hlines(which.tolist(), (when + 0.62).tolist(), (when + 1.38).tolist(), color=colour, linewidth=2)
            rate = float(spikes.count_nonzero()) / spikes.numel()
            axis.set_ylabel(_short(name), rotation=0, ha="right", va="center")
            axis.set_yticks([])
            axis.set_ylim(-1, shown.shape[1])
            axis.grid(False)
            where = dict(xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", va="center")
            axis.annotate(f"{rate:.0%}", (1.0, 0.5), **where, fontsize=8, color="#444444")
        axes[0].set_title(
            f"spikes of {NEURONS} neurons a layer (orange: negative); right: share of all that fires in a step"
        )
        axes[-1].set_xlabel("time step")
        axes[-1].set_xlim(0.5, steps + 0.5)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)


def _sample(spikes: Tensor) -> Tensor:
    """Up to `NEURONS` columns, evenly spaced among the neurons that fire at all, or among all if none does."""
    firing = spikes.count_nonzero(0).nonzero()[:, 0]
    candidates = firing if len(firing) else torch.arange(spikes.shape[1])
    places = torch.linspace(0, len(candidates) - 1, min(NEURONS, len(candidates))).round().long()
    return spikes[:, candidates[places]]


def _short(layer: str) -> str:
    return layer.replace("features.", "conv ").replace("classifier.", "fc ").replace("encoder", "input")


def _displayed(image: Tensor) -> Tensor:
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0)
    return image[:, :, 0] if image.shape[2] != 3 else image


def _by_norm(values: Mapping[tuple[str, int], Sequence]) -> Iterable[tuple[str, list[Sequence]]]:
    for norm in STYLES:
        runs = [runs for (name, _), runs in values.items() if name == norm]
        if runs:
            yield norm, runs


def _lines(axis, norm: str, runs: Sequence[Sequence[float]]) -> None:
    label, colour, dashes = STYLES[norm]
    count = max(map(len, runs))
    whole = [run for run in runs if len(run) == count]
    if len(whole) > 1:
        for run in whole:
            axis.plot(range(1, count + 1), run, color=colour, linewidth=0.7, alpha=0.5)
    mean = [sum(column) / len(whole) for column in zip(*whole, strict=True)]
    axis.plot(range(1, count + 1), mean, dashes, color=colour, label=label, marker="o", markersize=3.5)


@contextmanager
def canvas(path: str | os.PathLike, columns: int | None, size: tuple[float, float]):
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "pyaccel[plot]"') from error
    # Neither pyplot's state nor the caller's backend is touched: figures are drawn by Agg straight into the file.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0] if columns else None
        yield figure, axes
        if distributed.rank() == 0:
            temporary = f"{os.fspath(path)}.tmp"
            figure.savefig(temporary, format="png")
            os.replace(temporary, path)
