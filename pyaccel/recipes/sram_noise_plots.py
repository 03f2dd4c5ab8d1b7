"""Plots of `sram_noise`, from its report alone."""

from __future__ import annotations

from pathlib import Path

from pyaccel.recipes.plots import MARK, NEGATIVE, POSITIVE, canvas
from pyaccel.recipes.report import Report
from pyaccel.recipes.sram_noise_report import cells

# Label, colour, dashes of each attacker; "none" is the network without noise.
LINES = {
    "none": ("no noise", "#5F5F5F", ":"),
    "A": ("noise, attacker A (one draw)", POSITIVE, "-"),
    "B": ("noise, attacker B (transfer)", "#E69F00", "-."),
    "C": ("noise, attacker C (mean over draws)", NEGATIVE, "--"),
}


def draw(report: Report, out: Path) -> None:
    """gains.png, epsilon.png, bit_errors.png in `out`."""
    gains(report, out / "gains.png")
    epsilon(report, out / "epsilon.png")
    bit_errors(report, out / "bit_errors.png")


def gains(report: Report, path: Path) -> None:
    """A map for each network: rows sites, columns settings."""
    networks, tolerance = report.config["networks"], report.config["tolerance"]
    settings = [(n, p) for p in report.config["probabilities"] for n in report.config["n8t"]]
    maps = {}
    for name in networks:
        tried = [c for c in cells(report, name) if (c[1], c[2]) in settings]
        maps[name] = list(dict.fromkeys(site for site, _, _ in tried))
    values = {r.name: r.value for r in report.results}
    height = 1.6 + 0.27 * max(len(sites) for sites in maps.values())
    with canvas(path, len(networks), (len(networks) * (2.6 + 0.5 * len(settings)), height)) as (figure, axes):
        for axis, name in zip(axes, networks, strict=True):
            keys = [[f"{name}/screen/{site}/n8t={n}/p={p:g}" for n, p in settings] for site in maps[name]]
            table = [[values[f"{key}/gain"] for key in row] for row in keys]
            fair = [abs(values[f"{key}/gain"]) for row in keys for key in row if values[f"{key}/cost"] <= tolerance]
            reach = max([0.1, *fair])  # what costs too much need not be told apart
            picture = axis.imshow(table, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
            for y, row in enumerate(keys):
                for x, key in enumerate(row):
                    costly = values[f"{key}/cost"] > tolerance
                    colour = "white" if abs(table[y][x]) > 0.6 * reach else "black"
                    text = "×" if costly else f"{table[y][x]:+.1f}"
                    axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
            axis.set_yticks(range(len(maps[name])), maps[name], fontsize=7)
            axis.set_xticks(range(len(settings)), [f"{n}\n{p:g}" for n, p in settings], fontsize=7)
            axis.set_xlabel("8T bits of 8, and p of the others")
            axis.set_title(f"{name}: gain (points)")
            axis.grid(False)
            axis.tick_params(length=0)
            figure.colorbar(picture, ax=axis, pad=0.02)


def epsilon(report: Report, path: Path) -> None:
    """Accuracy and gain against eps: FGSM as lines, PGD as open circles. A network without noise, and with noise in the
    chosen sites."""
    networks, config = report.config["networks"], report.config
    with canvas(path, 2 * len(networks), (8.8 * len(networks), 3.8)) as (_, axes):
        for left, right, name in zip(axes[::2], axes[1::2], networks, strict=True):
            for level, (label, colour, dashes) in LINES.items():
                placement, attacker = ("none", "A") if level == "none" else ("chosen", level)
                for attack, eps in (("fgsm", list(config["epsilons"])), ("pgd", list(config["pgd_epsilons"]))):
                    keys = [f"{name}/{placement}/{attack}/{attacker}/{value:.4f}" for value in eps]
                    accuracy = [report[f"{key}/accuracy"].value for key in keys]
                    gain = [report[f"{key}/gain"].value if level != "none" else 0.0 for key in keys]
                    if attack == "pgd":
                        look = dict(linestyle="none", marker="o", fillstyle="none", markersize=7)
                    else:
                        look = dict(linestyle=dashes, marker="o", markersize=3, label=label)
                        clean = [report[f"{name}/{which}/clean"].value for which in (placement, "none")]
                        eps, accuracy, gain = [0.0, *eps], [clean[0], *accuracy], [clean[0] - clean[1], *gain]
                    left.plot(eps, accuracy, color=colour, **look)
                    right.plot(eps, gain, color=colour, **look)
            left.set_title(f"{name}: test accuracy (%)")
            left.set_ylim(bottom=0)
            left.legend(fontsize=8)
            right.set_title("gain over no noise (points); lines FGSM, circles PGD")
            for axis in (left, right):
                axis.set_xlabel("epsilon (pixels in 0..1)")


def bit_errors(report: Report, path: Path) -> None:
    """Clean accuracy with all weights or all outputs failing, and under the voltage attacker."""
    networks, config = report.config["networks"], report.config
    kinds = {"weight": ("all weights", POSITIVE), "activation": ("all outputs", NEGATIVE)}
    with canvas(path, len(networks), (5.4 * len(networks), 3.8)) as (_, axes):
        for axis, name in zip(axes, networks, strict=True):
            for i, n8t in enumerate(config["bank_n8t"]):
                shade = {"alpha": 1 - 0.5 * i / max(1, len(config["bank_n8t"]) - 1), "markersize": 4}
                marker = "os^v"[i % 4]
                for kind, (label, colour) in kinds.items():
                    y = [report[f"{name}/sweep/{kind}/n8t={n8t}/p={p:g}/accuracy"].value for p in config["sweep_p"]]
                    axis.plot(
                        config["sweep_p"],
                        y,
                        "-",
                        marker=marker,
                        color=colour,
                        label=f"{label}, 8T bits: {n8t}",
                        **shade,
                    )
                if config["voltage_p"]:
                    key = f"{name}/parameters/n8t={n8t}/voltage/p={{:g}}/accuracy"
                    y = [report[key.format(p)].value for p in config["voltage_p"]]
                    axis.plot(
                        config["voltage_p"],
                        y,
                        "--",
                        marker=marker,
                        color=MARK,
                        label=f"voltage attacker, 8T bits: {n8t}",
                        **shade,
                    )
            axis.axhline(report[f"{name}/none/clean"].value, color="#5F5F5F", linewidth=1, linestyle=":")
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("bit error rate of 6T cells")
            axis.set_title(f"{name}: clean test accuracy (%)")
            axis.legend(fontsize=7.5, loc="lower left")
