"""Plots of the `crossbar` recipe, from its report: attacks, the robustness map, calibrations."""

from __future__ import annotations

import os
from pathlib import Path

from pyaccel.recipes.crossbar_report import attack_label, attack_names, setups
from pyaccel.recipes.plots import canvas
from pyaccel.recipes.report import Report

STYLES = {  # mode: label, colour, marker, dashes
    "SW": ("SW: software", "#5F5F5F", "s", ":"),
    "SH": ("SH: software's attack on the chip", "#0072B2", "o", "-"),
    "SG": ("SG: the same on the Gaussian control", "#56B4E9", "v", "--"),
    "HH": ("HH: the chip's own attack", "#D55E00", "D", "-"),
    "GG": ("GG: the Gaussian control's own", "#E69F00", "^", "--"),
    "HX": ("HX: another chip's attack", "#009E73", "P", "-."),
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def draw(report: Report, out: Path) -> None:
    """All plots that the report has figures for."""
    if "plain" in report.config["networks"]:
        attacks(report, out / "attacks.png")
        robustness_map(report, out / "map.png")
        calibrations(report, out / "calibrations.png")


def attacks(report: Report, path: str | os.PathLike) -> None:
    """Accuracy under attack over the radius, of the plain network on the largest tile of the first kind of chip."""
    first = setups(report, "plain")[0].split("/", 1)[1]
    setup = max((s for s in setups(report, "plain") if s.endswith(f"/{first}")), key=lambda s: int(s.split("x")[0]))
    with canvas(path, 2, (9.2, 3.6)) as (figure, axes):
        for axis, kind, unit in ((axes[0], "fgsm", "radius (pixels in 0..1)"), (axes[1], "pgd", "radius (1/255)")):
            names = [name for name in attack_names(report) if name.startswith(kind)]
            radii = [float(name.split("-", 1)[1]) for name in names]
            for mode, (label, colour, marker, dashes) in STYLES.items():
                owner = "software" if mode == "SW" else setup
                found = [report[f"plain/{owner}/{mode}/{name}/accuracy"] for name in names]
                values, spread = [f.value for f in found], [f.std or 0 for f in found]
                axis.errorbar(radii, values, spread, linestyle=dashes, color=colour, marker=marker, markersize=4,
                              label=label, capsize=2)  # fmt: skip
            axis.set_xticks(radii)
            axis.set_xlabel(unit)
            axis.set_ylim(bottom=0)
            axis.set_title(f"accuracy under {kind.upper()} (%), {setup}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def robustness_map(report: Report, path: str | os.PathLike) -> None:
    """Accuracy lost without attack (x) against adversarial loss (y): one point a chip, mode and attack."""
    names = setups(report, "plain")
    kinds = [kind for kind in ("fgsm", "pgd") if any(a.startswith(kind) for a in attack_names(report))]
    with canvas(path, len(kinds), (4.8 * len(kinds), 4.2)) as (figure, axes):
        for axis, kind in zip(axes, kinds, strict=True):
            attacked = [a for a in attack_names(report) if a.startswith(kind)]
            for number, attack in enumerate(attacked):
                size = 18 + 22 * number
                for mode in ("SH", "HH"):
                    for colour, name in enumerate(names):
                        x, y = (
                            report[f"plain/{name}/clean_loss"].value,
                            report[f"plain/{name}/{mode}/{attack}/loss"].value,
                        )
                        label = f"{name}, {mode}" if attack == attacked[-1] else None
                        axis.scatter(x, y, s=size, color=COLOURS[colour % len(COLOURS)], marker=STYLES[mode][2],
                                     alpha=0.75, label=label)  # fmt: skip
                label = "software, SW" if attack == attacked[-1] else None
                y = report[f"plain/software/SW/{attack}/loss"].value
                axis.scatter(0, y, s=size, color=STYLES["SW"][1], marker="s", label=label)
            axis.axvline(0, color="#BBBBBB", linewidth=0.8)
            axis.set_ylim(0, 1.08 * axis.dataLim.y1)
            axis.set_xlabel("accuracy lost to the software, without attack (points)")
            radii = ", ".join(attack_label(a).split(" ", 1)[1] for a in attacked)
            axis.set_title(f"adversarial loss (points), {kind.upper()}\nsmall to large: {radii}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7.5)


def calibrations(report: Report, path: str | os.PathLike) -> None:
    """Accuracy without attack by tile, one line a calibration."""
    found = [r for r in report.results if r.name.startswith("study/") and r.name.endswith("/accuracy")]
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for result in found[1:]:
        _, tile, _, calibration, _ = result.name.split("/")
        lines.setdefault(calibration, []).append((int(tile.split("x")[0]), result.value, result.std or 0))
    with canvas(path, 1, (6.0, 3.6)) as (_, (axis,)):
        axis.axhline(found[0].value, color="#5F5F5F", linestyle=":", label="software")
        for number, (calibration, points) in enumerate(lines.items()):
            sizes, values, spread = zip(*sorted(points), strict=True)
            marker, dashes = "osD^"[number % 4], ("-", "--", "-.", ":")[number % 4]
            axis.errorbar(range(len(sizes)), values, spread, color=COLOURS[number], marker=marker, markersize=4,
                          linestyle=dashes, label=calibration, capsize=2)  # fmt: skip
        axis.set_xticks(range(len(sizes)), [f"{s}x{s}" for s in sizes])
        axis.set_xlabel("tile")
        axis.set_ylim(bottom=0)
        axis.set_title("accuracy without attack (%), chips without variation")
        axis.legend(fontsize=8)
