"""From what was measured to the figures of the `crossbar` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyaccel.recipes.crossbar_measure import MODES, Measured, attacks_of
from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.crossbar import Config

LABELS = {
    "plain": "plain", "low_bit": "low-bit weights", "pixel": "low-bit pixels", "adversarial": "adversarial training"
}  # fmt: skip
NOT_AT_HAND = "only the paper's abstract was at hand, without figures"
# Bhattacharjee et al., GLSVLSI 2023: VGG16, CIFAR-10, RRAM with parasitics; read in notes on its full text.
ANCHOR_SOFTWARE = 88.62
ANCHOR = {
    "64x64/20k/none": 74.37,
    "64x64/20k/bn_reestimate": 86.31,
    "128x128/20k/none": 32.9,
    "128x128/20k/bn_reestimate": 83.03,
}
ANCHOR_SOURCE = (
    "another paper of the group (GLSVLSI 2023), read in notes on its full text; whether its currents were rescaled "
    "before the figure without correction is unknown"
)
ANCHOR_TEXT = (
    "The only accuracies known of such chips are of another paper of the group (GLSVLSI 2023; VGG16, CIFAR-10, 88.62 % "
    "in software): 74.37 % on 64x64 (14.3 points lost) and 32.9 % on 128x128 (55.7 lost) without correction, 86.31 % "
    "(2.3 lost) and 83.03 % (5.6 lost) after measuring the batch statistics anew."
)


def results(config: Config, measured: Mapping[tuple[str, int], Measured], published: bool) -> list[Result]:
    """Every figure of a run: over seeds, and on chips over seeds and chips. published: whether network, images and
    preset are those of the figures that are known."""
    found: list[Result] = []

    def add(name, values, unit="%", anchor=None, source=NOT_AT_HAND):
        scale = 100 if unit in ("%", "points") else 1
        found.append(summarise(name, [scale * v for v in values], unit, published=anchor, published_source=source))

    for network in config.networks:
        runs = [measured[network, seed] for seed in config.seeds]
        clean = [run.software["clean"] for run in runs]
        add(f"{network}/software/clean", clean)
        add(f"{network}/software/no_gradient", [run.software["no_gradient"] for run in runs])
        for attack in attacks_of(config):
            accuracy = [run.software[attack.name] for run in runs]
            add(f"{network}/software/SW/{attack.name}/accuracy", accuracy)
            add(f"{network}/software/SW/{attack.name}/loss", _minus(clean, accuracy), "points")
        for setup in runs[0].chips:
            for name, values, unit in _of_setup(config, runs, setup):
                add(f"{network}/{setup}/{name}", values, unit)
        if runs[0].study:
            _study(runs, add, published)
    return found


def _of_setup(config: Config, runs: list[Measured], setup: str):
    """(name, one value a seed and chip, unit) of the chips of one kind."""

    def values(name: str) -> list[float]:
        return [value for run in runs for value in run.chips[setup][name]]

    def software(name: str) -> list[float]:
        return [run.software[name] for run in runs for _ in run.chips[setup]["clean"]]

    for name in ("clean", "gaussian", "no_gradient"):
        yield name, values(name), "%"
    for name in ("slope", "residue"):
        yield name, values(name), "1"
    yield "clean_loss", _minus(software("clean"), values("clean")), "points"
    for attack in attacks_of(config):
        for mode in MODES:
            accuracy = values(f"{mode}/{attack.name}")
            yield f"{mode}/{attack.name}/accuracy", accuracy, "%"
            yield f"{mode}/{attack.name}/minus_SW", _minus(accuracy, software(attack.name)), "points"
            if mode != "HX":
                clean = values("gaussian" if mode in ("SG", "GG") else "clean")
                yield f"{mode}/{attack.name}/loss", _minus(clean, accuracy), "points"


def _minus(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _study(runs: list[Measured], add, published: bool) -> None:
    other = "not the experiment whose figures are known (VGG16, CIFAR-10, whole training)"
    software = [run.study["software"]["accuracy"] for run in runs]
    add(
        "study/software/accuracy",
        software,
        "%",
        ANCHOR_SOFTWARE if published else None,
        ANCHOR_SOURCE if published else other,
    )
    for setup in runs[0].study:
        if setup == "software":
            continue
        accuracy = [run.study[setup]["accuracy"] for run in runs]
        anchor = ANCHOR.get(setup) if published else None
        source = other if not published else ANCHOR_SOURCE if anchor else "no such figure is known"
        add(f"study/{setup}/accuracy", accuracy, "%", anchor, source)
        add(f"study/{setup}/lost", _minus(software, accuracy), "points")
        for name in ("slope", "residue"):
            add(f"study/{setup}/{name}", [run.study[setup][name] for run in runs], "1")


# ---- text


def attack_names(report: Report) -> list[str]:
    return [f"fgsm-{e:g}" for e in report.config["fgsm_eps"]] + [f"pgd-{e:g}" for e in report.config["pgd_eps"]]


def attack_label(name: str) -> str:
    kind, _, eps = name.partition("-")
    return f"FGSM {eps}" if kind == "fgsm" else f"PGD {eps}/255"


def setups(report: Report, network: str) -> list[str]:
    """Names of the chips that a network was measured on: tile / ON resistance / calibration."""
    start, end = f"{network}/", "/clean"
    return [
        r.name[len(start) : -len(end)]
        for r in report.results
        if r.name.startswith(start) and r.name.endswith(end) and not r.name.endswith("software/clean")
    ]


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    networks = list(report.config["networks"])
    plain = "plain" in networks
    return [
        _clean(report, networks),
        *([_attacks(report), _controls(report), _map()] if plain else []),
        *([_defences(report, networks)] if networks != ["plain"] else []),
        *([_calibration(report)] if plain else []),
        _method(report),
    ]


def _clean(report: Report, networks: list[str]) -> Section:
    rows = [("network, chip", "accuracy, %", "lost to software", "Gaussian control, %", "slope", "residue",
             "no gradient, %")]  # fmt: skip
    masked = []
    for network in networks:
        software, dead = report[f"{network}/software/clean"], report[f"{network}/software/no_gradient"]
        rows.append((f"{LABELS[network]}, software", software.text(), "", "", "", "", dead.text(1)))
        for name in setups(report, network):
            values = {k: report[f"{network}/{name}/{k}"] for k in (
                "clean", "clean_loss", "gaussian", "slope", "residue", "no_gradient")}  # fmt: skip
            rows.append((f"{LABELS[network]}, {name}", values["clean"].text(), values["clean_loss"].text(),
                         values["gaussian"].text(), values["slope"].text(3), values["residue"].text(3),
                         values["no_gradient"].text(1)))  # fmt: skip
        if dead.value > 1:
            masked.append(f"{LABELS[network]} ({dead.value:.1f} %)")
    text = [
        "Slope and residue: of the effective on the wanted weights, after the calibration, mean over layers. No "
        "gradient: share of images whose loss has a gradient of exactly zero."
    ]
    if len(report.config["seeds"]) == 1:
        text.append("One seed: deviations are over chips alone.")
    if masked:
        text.append(
            f"**Some images have no gradient in software: {', '.join(masked)}. No attack by gradients moves them, so "
            "part of the accuracy under attack below is masking.**"
        )
    return Section("Without attack", text, rows)


def _attacks(report: Report) -> Section:
    rows = [("chip, attack", "clean SW", "clean chip", "AA SW", "AA SH", "AA HH", "AL SW", "AL SH", "AL HH")]
    for name in setups(report, "plain"):
        for attack in attack_names(report):
            software = f"plain/software/SW/{attack}"
            cells = [report["plain/software/clean"], report[f"plain/{name}/clean"], report[f"{software}/accuracy"]]
            cells += [report[f"plain/{name}/{mode}/{attack}/accuracy"] for mode in ("SH", "HH")]
            cells += [report[f"{software}/loss"], *(report[f"plain/{name}/{m}/{attack}/loss"] for m in ("SH", "HH"))]
            rows.append((f"{name}, {attack_label(attack)}", *(cell.text(1) for cell in cells)))
    text = [
        "SW: attack made on the software, evaluated on it. SH: made on the software, evaluated on the chip. HH: made "
        "on the chip with full knowledge of it (its exact gradient), evaluated on the same chip. AA: accuracy under "
        "attack, %; AL: accuracy without attack minus that, each of its own model, in points. AL falls where the "
        "accuracy without attack falls: read it beside AA."
    ]
    return Section(
        "Attacks on the plain network", text, rows, [("attacks.png", "Accuracy under attack, largest tile.")]
    )


def _controls(report: Report) -> Section:
    rows = [("chip, attack", "SH - SW", "Gaussian SG - SW", "HH - SW", "Gaussian GG - SW", "HX - SW")]
    text = []
    for name in setups(report, "plain"):
        for attack in attack_names(report):
            gained = [report[f"plain/{name}/{m}/{attack}/minus_SW"] for m in ("SH", "SG", "HH", "GG", "HX")]
            rows.append((f"{name}, {attack_label(attack)}", *(g.text(1) for g in gained)))
        mean = {m: _mean(report, name, m) for m in MODES}
        text.append(
            f"{name}, mean over attacks: the software's attack leaves {mean['SH']:+.1f} points more on the chip than "
            f"in software (Gaussian control {mean['SG']:+.1f}), the chip's own attack {mean['HH']:+.1f} (control "
            f"{mean['GG']:+.1f}), an attack made on another chip {mean['HX']:+.1f}."
        )
    text = [
        "Accuracy under attack minus that of the software under its own attack, in points. What SH has and HH does not "
        "comes of an attack that does not fit its target, as between any two networks that differ: a transfer effect, "
        "not robustness. What the Gaussian control shows as well (the same distance from the software in every "
        "layer) owes nothing to wires.",
        *text,
    ]
    return Section("Controls: robustness or a gradient that does not fit", text, rows)


def _mean(report: Report, setup: str, mode: str) -> float:
    values = [report[f"plain/{setup}/{mode}/{attack}/minus_SW"].value for attack in attack_names(report)]
    return sum(values) / len(values)


def _map() -> Section:
    text = ["A point is a chip, an attack and a mode; the nearer to the origin, the better: nothing lost without "
            "attack, nothing under attack."]  # fmt: skip
    return Section("Robustness map", text, plots=[("map.png", "Accuracy lost to the software, and adversarial loss.")])


def _defences(report: Report, networks: list[str]) -> Section:
    rows = [("network, attack", "software CA", "AA", "AL", "chip CA", "SH AA", "SH AL", "HH AA", "HH AL")]
    named = []
    for network in networks:
        name = _defence_setup(report, network)
        if name is None:
            continue
        named.append(name)
        for attack in attack_names(report):
            software, on = f"{network}/software/SW/{attack}", f"{network}/{name}"
            cells = [report[f"{network}/software/clean"], report[f"{software}/accuracy"], report[f"{software}/loss"],
                     report[f"{on}/clean"]]  # fmt: skip
            cells += [report[f"{on}/{m}/{attack}/{k}"] for m in ("SH", "HH") for k in ("accuracy", "loss")]
            rows.append((f"{LABELS[network]}, {attack_label(attack)}", *(c.text(1) for c in cells)))
    bits = report.config["defence_bits"]
    text = [
        f"Low-bit weights: {bits} bits, symmetric, trained with them. Low-bit pixels: the plain network behind an "
        f"input of {bits} bits, attacked straight through the rounding (BPDA). Adversarial training: PGD-"
        f"{report.config['adversarial_steps']}, radius {report.config['adversarial_eps']:g}/255, step "
        f"{report.config['adversarial_step']:g}/255, attacked images alone. Chips: {', '.join(dict.fromkeys(named))}."
    ]
    return Section("Defences, alone and on chips", text, rows)


def _defence_setup(report: Report, network: str) -> str | None:
    tile = report.config["defence_tile"]
    return next((name for name in setups(report, network) if name.startswith(f"{tile}x{tile}/")), None)


def _calibration(report: Report) -> Section:
    names = [
        r.name.removesuffix("/accuracy")
        for r in report.results
        if r.name.startswith("study/") and r.name.endswith("/accuracy")
    ]
    rows = [("chip", "accuracy, %", "lost, points", "slope", "residue", "published, %")]
    for name in names:
        accuracy = report[f"{name}/accuracy"]
        known = "" if accuracy.published is None else f"{accuracy.published:.2f}"
        if name == "study/software":
            rows.append(("software", accuracy.text(), "", "", "", known))
            continue
        rows.append((name.removeprefix("study/"), accuracy.text(), report[f"{name}/lost"].text(),
                     report[f"{name}/slope"].text(3), report[f"{name}/residue"].text(3), known))  # fmt: skip
    software = report["study/software/accuracy"]
    text = ["Accuracy without attack on chips without device variation.", ANCHOR_TEXT]
    if software.published is None:
        text.append(f"This run is {software.published_source}, so nothing stands beside its figures.")
    return Section("Calibrations", text, rows, [("calibrations.png", "Accuracy by calibration and tile.")])


def _method(report: Report) -> Section:
    c = report.config
    return Section(
        "How it was measured",
        [
            f"Network {c['model']}, width {c['width']:g}, normalisation {c['norm'] or 'as described'}, data "
            f"{c['data'] or 'PYACCEL_DATA'}, {c['epochs']} epochs, seeds {', '.join(map(str, c['seeds']))}; "
            f"{c['chips']} chips each (figures on chips: mean and deviation over seeds and chips together). Attacks "
            f"and accuracies of chips are over {c['attack_images'] or 'all'} test images, the study over "
            f"{c['study_images'] or 'all'}. PGD: {c['pgd_steps']} steps of {c['pgd_step']:g}/255 after a random start.",
            f"Chips: {c['scheme']} mapping, rows by {c['row_order']}, filled with {c['padding']} cells; terminals "
            f"{c['r_driver']:g} and {c['r_sense']:g} ohm, wires {c['r_wire_row']:g} and {c['r_wire_col']:g} ohm a "
            f"cell, OFF over ON resistance {c['on_off']:g}, device variation {c['variation']:g}; every layer on "
            "crossbars, biases and normalisation digital, no converters. Mapping, calibrations and the ON "
            "resistance are this library's choices where the paper was not at hand: see docs/crossbar.md.",
        ],
    )
