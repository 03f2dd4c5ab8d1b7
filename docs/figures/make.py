"""Draws the figures of the documentation from the library itself: `python docs/figures/make.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from pyaccel.reference.neuron import SURROGATES, surrogate_slope

FOLDER = Path(__file__).parent
COLORS = {
    "triangle": "#0072B2",
    "rectangle": "#E69F00",
    "atan": "#009E73",
    "sigmoid": "#CC79A7",
    "fast_sigmoid": "#000000",
}
STYLES = {"triangle": "-", "rectangle": "--", "atan": "-.", "sigmoid": ":", "fast_sigmoid": "-"}


def surrogates() -> None:
    """phi(a) of every surrogate at its default scale and width."""
    a = torch.linspace(-1.6, 1.6, 3201, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, (scale, width) in SURROGATES.items():
        phi = surrogate_slope(a + 1, one, name, scale, width)
        label = f"{name} ({scale:g}, {width:g})"
        axes.plot(
            a, phi, STYLES[name], color=COLORS[name], linewidth=1.8 if name != "fast_sigmoid" else 1.2, label=label
        )
    axes.set(xlabel="a = u / threshold − 1", ylabel="φ(a)", xlim=(-1.6, 1.6), ylim=(0, 1.08))
    axes.legend(title="surrogate (scale, width)", frameon=False, loc="upper right", fontsize=9, title_fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "surrogates.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    surrogates()
