"""Plots of a `quanos` run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyaccel.hardware import LayerCost, MacEnergy, efficiency
from pyaccel.recipes.plots import canvas
from pyaccel.recipes.quanos_report import worst

if TYPE_CHECKING:
    from pyaccel.recipes.quanos import Config, Measurement

# Okabe and Ito's palette; networks with adversarial training are dashed.
COLOURS = {
    "float32": "#5F5F5F",
    "bits16": "#56B4E9",
    "bits8": "#000000",
    "inverse": "#0072B2",
    "proportional": "#E69F00",
    "iso_inverse": "#009E73",
    "iso_proportional": "#CC79A7",
}
MARKERS = {
    "float32": "X",
    "bits16": "s",
    "bits8": "o",
    "inverse": "D",
    "proportional": "^",
    "iso_inverse": "v",
    "iso_proportional": "P",
}
Runs = Mapping[tuple[str, int], "Measurement"]


def draw(config: Config, measured: Runs, out: Path) -> None:
    """ans.png, bits.png, energy.png and epsilon.png in `out`."""
    sensitivity(config, measured, out / "ans.png")
    if mixed(config):
        bits(config, measured, out / "bits.png")
    accuracy_over_energy(config, measured, out / "energy.png")
    accuracy_over_epsilon(config, measured, out / "epsilon.png")


def mixed(config: Config) -> list[str]:
    return [name for name in config.networks if not name.startswith(("float32", "bits")) and "+" not in name]


def _label(layer: LayerCost) -> str:
    return f"{'conv' if layer.kind == 'convolution' else 'fc'} {layer.name}"


def sensitivity(config: Config, measured: Runs, path: Path) -> None:
    """ANS of each layer at the eps that decides, a line an epoch, darker with training. The first seed."""
    name = next((n for n in mixed(config)), config.networks[0])
    run, eps = measured[name, config.seeds[0]], config.ans_eps[0]
    labels, epochs = {layer.name: _label(layer) for layer in run.layers}, run.sensitivity[eps]
    with canvas(path, 1, (max(5.5, 0.5 * len(labels) + 2), 3.8)) as (_, (axis,)):
        from matplotlib import colormaps

        known = [i for i, found in enumerate(epochs) if found]
        chosen = {known[round(i * (len(known) - 1) / 7)] for i in range(8)} | {config.assignments[-1] - 1}
        for i in sorted(chosen):
            decided = i == config.assignments[-1] - 1
            axis.plot(
                range(len(epochs[i])),
                list(epochs[i].values()),
                marker="o",
                markersize=3,
                color="#D55E00" if decided else colormaps["Blues"](0.35 + 0.65 * i / max(1, len(epochs) - 1)),
                label=f"epoch {i + 1}" + (", widths assigned" if decided else ""),
                zorder=3 if decided else 2,
            )
        axis.set_xticks(range(len(labels)), [labels[layer] for layer in epochs[0]], rotation=60, ha="right", fontsize=8)
        axis.set_title(f"{name}: adversarial noise sensitivity at {eps:g}/255")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)


def bits(config: Config, measured: Runs, path: Path) -> None:
    """Bits of each layer (mean over seeds; the first and the last may be outside the rule)."""
    names = mixed(config)
    layers = [_label(layer) for layer in measured[names[0], config.seeds[0]].layers]
    with canvas(path, 1, (max(5.5, 0.5 * len(layers) + 2), 3.6)) as (_, (axis,)):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            runs = [measured[name, seed] for seed in config.seeds]
            means = [sum(run.layers[j].weight_bits for run in runs) / len(runs) for j in range(len(layers))]
            axis.bar(
                [j - 0.4 + (i + 0.5) * width for j in range(len(layers))], means, width, color=COLOURS[name], label=name
            )
        axis.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
        axis.set_title("bits of weights and activations")
        axis.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize=8)


def accuracy_over_energy(config: Config, measured: Runs, path: Path) -> None:
    """Accuracy (%) over modelled energy, 16 bits = 1: filled clean, open under the strongest attack; mean over seeds.

    Networks with adversarial training have the widths, and the place, of those without: black edges tell them apart."""
    energy, eps = MacEnergy(alpha=config.alpha), max(config.pgd_eps)
    with canvas(path, 1, (7.2, 4.0)) as (_, (axis,)):
        for name in config.networks:
            kind, _, defence = name.partition("+")
            if kind == "float32":
                continue
            runs = [measured[name, seed] for seed in config.seeds]
            spent = sum(1 / efficiency(run.layers, energy) for run in runs) / len(runs)
            clean = 100 * sum(run.attacked["clean"] for run in runs) / len(runs)
            attacked = 100 * sum(worst(run, eps) for run in runs) / len(runs)
            colour, marker = COLOURS.get(kind, "#5F5F5F"), MARKERS.get(kind, "h")
            axis.plot(
                [spent, spent], [clean, attacked], "--" if defence else "-", color=colour, linewidth=0.8, zorder=1
            )
            style = dict(color=colour, linestyle="none", markersize=7, markeredgecolor="black" if defence else colour)
            axis.plot(spent, clean, marker, label=name, **style)
            axis.plot(spent, attacked, marker, markerfacecolor="white", **style)
        axis.set_xlim(0, 1.05)
        axis.set_xlabel("energy of multiply-accumulates, 16 bits = 1 (model: subword parallel)")
        axis.set_title(f"test accuracy (%): filled clean, open at {eps:g}/255")
        axis.set_ylim(0, 100)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def accuracy_over_epsilon(config: Config, measured: Runs, path: Path) -> None:
    """Accuracy (%) over the strength of FGSM and, beside it, PGD; mean over seeds."""
    with canvas(path, 2, (9.2, 3.8)) as (_, axes):
        for axis, attack, strengths in ((axes[0], "fgsm", config.fgsm_eps), (axes[1], "pgd", config.pgd_eps)):
            for name in config.networks:
                kind, _, defence = name.partition("+")
                runs = [measured[name, seed] for seed in config.seeds]
                keys = ["clean"] + [f"{attack}_{eps:g}" for eps in strengths]
                means = [100 * sum(run.attacked[key] for run in runs) / len(runs) for key in keys]
                axis.plot(
                    [0, *strengths],
                    means,
                    "--" if defence else "-",
                    color=COLOURS.get(kind, "#5F5F5F"),
                    marker=MARKERS.get(kind, "h"),
                    markersize=4,
                    label=name,
                )
            axis.set_title(f"{attack.upper()}: test accuracy (%)")
            axis.set_xlabel("eps in 1/255 of the pixel range")
            axis.set_ylim(0, 100)
        axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
