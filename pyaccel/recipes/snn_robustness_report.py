"""From what was measured to the figures of the `snn_robustness` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.snn_robustness import Config

NO_GRADIENT = "no_gradient"  # a result NAME/no_gradient stands for the figure NAME of an attack that found none
MISSING = "no gradient"
WHY_MISSING = (
    "No gradient: the gradient of a whole batch was exactly zero, and no figure is given; accuracy under an attack that "
    "did nothing would look like robustness. Where the clean accuracy of the network is that of chance, it is a dead "
    "network, layers of it silent (few steps, much leak): its accuracy under other attacks is chance too, and no sign of "
    "robustness."
)
LABELS = {"ann": "artificial", "conv": "SNN-Conv", "bp": "SNN-BP", "bntt": "BNTT"}
NONE = "no figure of the paper for this was read in a source; what is remembered of its tables is not printed"


def results(config: Config, measured: Mapping[int, Mapping[str, float | None]]) -> list[Result]:
    """Every figure of a run, over its seeds; accuracies in %. In place of an attack without a gradient in some seed:
    the share of such seeds, since the accuracy of the others alone would be of chosen seeds."""
    found: list[Result] = []
    runs = [measured[seed] for seed in config.seeds]

    def add(name, values, unit):
        found.append(summarise(name, list(values), unit, published_source=NONE))

    for name in runs[0]:
        if not all(name in run for run in runs):
            continue
        if any(run[name] is None for run in runs):
            add(f"{name}/{NO_GRADIENT}", (run[name] is None for run in runs), "1")
            continue
        if name.startswith("agreement/"):
            add(name, (run[name] for run in runs), "1")
            continue
        add(name, (100 * run[name] for run in runs), "%")
        kind, *rest = name.split("/")
        if rest and rest[0] in ("white", "black"):
            add(f"{name}/loss", (100 * (run[f"{kind}/clean"] - run[name]) for run in runs), "points")
    for eps in config.eps:
        for name in ("fgsm", "pgd"):
            keys = [f"{kind}/white/{name}/{eps:g}" for kind in ("bp", "ann")]
            if {"ann", "bp"} <= set(config.networks) and all(run[key] is not None for run in runs for key in keys):
                add(
                    f"bp_minus_ann/white/{name}/{eps:g}",
                    (100 * (run[keys[0]] - run[keys[1]]) for run in runs),
                    "points",
                )
    return found


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    sections = [_white(report), _black(report), _controls(report), _sweep(report), _agreement(report), _method(report)]
    return [_explained(section) for section in sections if section is not None]


def _names(report: Report) -> set[str]:
    return {result.name for result in report.results}


def _text(report: Report, name: str, digits: int = 1) -> str:
    if f"{name}/{NO_GRADIENT}" in _names(report):
        missing = report[f"{name}/{NO_GRADIENT}"]
        return MISSING if missing.n == 1 else f"{MISSING} ({round(missing.value * missing.n)} of {missing.n} seeds)"
    return report[name].text(digits) if name in _names(report) else ""


def _explained(section: Section) -> Section:
    """The section, and why cells have no figure where some have none."""
    if not any(cell.startswith(MISSING) for row in section.table for cell in row):
        return section
    return replace(section, text=[*section.text, WHY_MISSING])


def _white(report: Report) -> Section:
    config = report.config
    rows = [("network", "eps", "clean, %", "random signs, %", "FGSM, %", "PGD, %", "lost by PGD, points")]
    for eps in config["eps"]:
        for kind in config["networks"]:
            keys = (f"{kind}/clean", f"{kind}/noise/{eps:g}", f"{kind}/white/fgsm/{eps:g}", f"{kind}/white/pgd/{eps:g}",
                    f"{kind}/white/pgd/{eps:g}/loss")  # fmt: skip
            rows.append((LABELS[kind], f"{eps:.3g}", *(_text(report, key) for key in keys)))
    text = []
    for eps in config["eps"]:
        for name in ("fgsm", "pgd"):
            key = f"bp_minus_ann/white/{name}/{eps:g}"
            if key in _names(report):
                gap = report[key]
                spread = "" if gap.std is None else f" ± {gap.std:.1f}"
                text.append(
                    f"SNN-BP minus artificial, {name.upper()} of {eps:.3g}: {gap.value:+.1f}{spread} points "
                    f"({gap.n} {'seed' if gap.n == 1 else 'seeds'})."
                )
    text.append(
        "Each attacked with gradients crafted from itself; a spiking network is then judged by noise that the attack "
        "did "
        "not see. Random signs: noise of the same size, which an attack must beat by far."
    )
    if report.results[0].n == 1:
        text.append("One seed: no spread is known, and differences of a few points mean little.")
    return Section("White-box", text, rows, [("white_box.png", "Accuracy under attack, with the controls of SNN-BP.")])


def _black(report: Report) -> Section:
    config = report.config
    sources = config["sources"]
    rows = [("target", "attack", "eps", *(f"source {LABELS[s]}, %" for s in sources))]
    for eps in config["eps"]:
        for name in ("fgsm", "pgd"):
            for kind in config["networks"]:
                keys = (f"{kind}/black/{source}/{name}/{eps:g}" for source in sources)
                rows.append((LABELS[kind], name.upper(), f"{eps:.3g}", *(_text(report, key) for key in keys)))
    text = ["Images crafted on a network that was trained from another seed; every source against every target."]
    return Section("Black-box", text, rows)


def _controls(report: Report) -> Section | None:
    kinds = [kind for kind in ("bp", "bntt") if any(name.startswith(f"{kind}/control/") for name in _names(report))]
    if not kinds:
        return None
    prefix = f"{kinds[0]}/control/"
    names = (r.name.removesuffix(f"/{NO_GRADIENT}") for r in report.results)
    ways = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    rows = [("PGD by", *(f"{LABELS[kind]}, %" for kind in kinds))]
    rows += [(way, *(_text(report, f"{kind}/control/{way}") for kind in kinds)) for way in ways]
    text = [
        f"Is it masking? The same network attacked by other ways, radius {max(report.config['eps']):.3g}. Other "
        f"surrogates, and the mean "
        "gradient of several draws of the encoder's noise, find what one surrogate and one draw may hide; gradients "
        "of the "
        "artificial network know nothing of spikes at all. **The last row counts an image as right only if it "
        "withstands every attack "
        "of the table: it is the figure to quote.**"
    ]
    return Section("Controls", text, rows)


def _sweep(report: Report) -> Section | None:
    config = report.config
    rows = [("SNN-BP", "clean, %", "FGSM, white-box, %", "FGSM from the artificial network, %")]
    points = [(f"T = {t}, leak 1", f"steps/{t}") for t in config["sweep_steps"]]
    points += [(f"T = {config['sweep_at']}, leak {leak:g}", f"leak/{leak:g}") for leak in config["sweep_leaks"]]
    if not points:
        return None
    rows += [
        (label, *(_text(report, f"sweep/{name}/{case}") for case in ("clean", "white", "transfer")))
        for label, name in points
    ]
    text = [
        f"Tuned anew at each point; radius {config['sweep_eps']:.3g}. The paper's claim: fewer steps and more leak, "
        f"more robust."
    ]
    return Section("Time steps and leak", text, rows, [("sweeps.png", "Accuracy of SNN-BP over time steps and leak.")])


def _agreement(report: Report) -> Section | None:
    steps = [t for t in report.config["agree_steps"] if _text(report, f"agreement/{t}/cosine")]
    if not steps:
        return None
    rows = [("steps", "cosine", "equal signs", "cosine of two draws")]
    rows += [
        (str(t), *(_text(report, f"agreement/{t}/{what}", 3) for what in ("cosine", "sign", "draws"))) for t in steps
    ]
    text = ["Gradients of SNN-Conv beside those of the artificial network with the same weights; medians over images."]
    return Section("Gradients", text, rows)


def _method(report: Report) -> Section:
    config = report.config
    return Section(
        "How it was measured",
        [
            f"Network {config['model']}, width {config['width']:g}, data {config['data'] or 'PYACCEL_DATA'} "
            f"({config['train_images'] or 'all'} training images); {config['attack_images'] or 'all'} test images "
            f"attacked. SNN-Conv: T = "
            f"{config['conv_steps']}, no leak, thresholds at scale 1. SNN-BP: T = {config['steps']}, leak "
            f"{config['leak']:g}, scale "
            f"{config['scale']:g}, tuned for {config['tune_epochs']} epochs with the linear surrogate. Seeds "
            f"{', '.join(map(str, config['seeds']))}.",
            f"PGD: {config['pgd_steps']} steps of {config['step']:.3g} from a random start, one draw of the encoder's "
            f"noise a step; losses on the "
            "read-out's mean over time. All networks in evaluation mode (the published code leaves its source in "
            "training mode).",
        ],
    )
