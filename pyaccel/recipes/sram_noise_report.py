"""From what was measured to the figures of the `sram_noise` report, and from those figures to its text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyaccel.hardware import SramConfig
from pyaccel.recipes.report import Report, Result, Section, summarise
from pyaccel.recipes.sram_noise_measure import LEVELS

if TYPE_CHECKING:
    from pyaccel.recipes.sram_noise import Config
    from pyaccel.recipes.sram_noise_measure import Study

NOT_AT_HAND = "the paper's abstract gives ranges, without eps, layers or split; its tables were not at hand"
PLACEMENTS = {
    "chosen": "chosen sites", "all": "all sites", "weights": "all weights", "activations": "all outputs",
}  # fmt: skip
LEAST = "least"  # what the strongest of the three attackers leaves


def results(config: Config, studies: Mapping[tuple[str, int], Study], test_images: int) -> list[Result]:
    """Every figure of a run, over its seeds; a seed's figure is the mean over its chips."""
    found: list[Result] = []

    def add(name, values, unit):
        found.append(summarise(name, values, unit, published_source=NOT_AT_HAND))

    for name in config.networks:
        runs = [studies[name, seed] for seed in config.seeds]
        add(f"{name}/test_images", [test_images] * len(runs), "images")
        add(f"{name}/unquantised/clean", [100 * run.float_accuracy for run in runs], "%")
        for placement in ("none", *PLACEMENTS):
            clean = [100 * statistics.fmean(run.clean[placement]) for run in runs]
            add(f"{name}/{placement}/clean", clean, "%")
            add(f"{name}/{placement}/clean_noise_std", [100 * _spread(run.clean[placement]) for run in runs], "points")
            for attack, eps in dict.fromkeys((a, e) for p, a, _, e in runs[0].attacked if p == placement):
                means = {
                    level: [100 * statistics.fmean(run.attacked[placement, attack, level, eps]) for run in runs]
                    for level in LEVELS
                }
                means[LEAST] = [min(values) for values in zip(*means.values(), strict=True)]
                base = [100 * statistics.fmean(run.attacked["none", attack, "A", eps]) for run in runs]
                for level, values in means.items():
                    key = f"{name}/{placement}/{attack}/{level}/{eps:.4f}"
                    add(f"{key}/accuracy", values, "%")
                    add(f"{key}/loss", [c - v for c, v in zip(clean, values, strict=True)], "points")
                    if placement != "none":
                        add(f"{key}/gain", [v - b for v, b in zip(values, base, strict=True)], "points")
                    if level != LEAST:
                        spread = [100 * _spread(run.attacked[placement, attack, level, eps]) for run in runs]
                        add(f"{key}/noise_std", spread, "points")
        for i, cell in enumerate(runs[0].screened):
            key = f"{name}/screen/{cell.site}/n8t={cell.setting[0]}/p={cell.setting[1]:g}"
            own = [(run.base, run.screened[i].measured) for run in runs]
            add(f"{key}/gain", [100 * (m.attacked_mean - base.attacked_mean) for base, m in own], "points")
            add(f"{key}/cost", [100 * (base.clean_mean - m.clean_mean) for base, m in own], "points")
            add(f"{key}/mu", [m.mu for _, m in own], "1")
            add(f"{key}/chosen", [run.placements["chosen"].get(cell.site) == cell.setting for run in runs], "share")
        # A neighbour that the screening did not try may have been chosen.
        tried = {(cell.site, cell.setting) for cell in runs[0].screened}
        for site, setting in sorted({item for run in runs for item in run.placements["chosen"].items()} - tried):
            share = [run.placements["chosen"].get(site) == setting for run in runs]
            add(f"{name}/screen/{site}/n8t={setting[0]}/p={setting[1]:g}/chosen", share, "share")
        add(f"{name}/chosen_sites", [len(run.placements["chosen"]) for run in runs], "sites")
        for n8t, attacks in runs[0].parameters.items():
            for attack in attacks:
                figures = [run.parameters[n8t][attack] for run in runs]
                before = [run.parameters[n8t]["none"]["accuracy"] for run in runs]
                key = f"{name}/parameters/n8t={n8t}/{attack}"
                add(f"{key}/flips", [f["flips"] for f in figures], "bits")
                add(f"{key}/accuracy", [100 * f["accuracy"] for f in figures], "%")
                add(f"{key}/drop", [100 * (b - f["accuracy"]) for b, f in zip(before, figures, strict=True)], "points")
                add(f"{key}/confidence", [100 * f["confidence"] for f in figures], "%")
                if all(f["confidence_wrong"] is not None for f in figures):
                    add(f"{key}/confidence_wrong", [100 * f["confidence_wrong"] for f in figures], "%")
        for kind, n8t, p in runs[0].sweep:
            values = [100 * statistics.fmean(run.sweep[kind, n8t, p]) for run in runs]
            add(f"{name}/sweep/{kind}/n8t={n8t}/p={p:g}/accuracy", values, "%")
    return found


def _spread(values) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    networks = report.config["networks"]
    return [
        _survival(report),
        *(_epsilons(report, name) for name in networks),
        *(_selection(report, name) for name in networks),
        _ablations(report),
        *(_parameters(report, name) for name in networks),
        _sweep(report),
        _method(report),
    ]


def verdict(report: Report, name: str) -> str:
    """Whether the gain of the chosen sites, if there is one, survives averaging over noise."""
    key = f"{name}/chosen/fgsm/{{}}/{report.config['screening_eps']:.4f}/gain"
    a, c, least = (report[key.format(level)] for level in ("A", "C", LEAST))
    said = (
        f"{a.text()} points against attacker A, {c.text()} against C, {least.text()} against the strongest of A, B, C"
    )
    if report[f"{name}/chosen_sites"].value == 0:
        return f"**{name}: no site qualified on the selection images**, so there is no gain that could survive."
    if a.n == 1:
        return f"**{name}: one seed, no verdict.** Gain: {said}."
    if a.value <= _margin(a):
        return f"**{name}: no gain on test images to begin with** ({said}): what selection saw was chance or its chips."
    if c.value <= _margin(c):
        return f"**{name}: the gain does not survive averaging over noise** ({said}): it is a masked gradient."
    most = "" if least.value > _margin(least) else " An attacker who may choose between the three leaves nothing of it."
    if c.value < a.value - _margin(a) - _margin(c):
        return (
            f"**{name}: part of the gain survives averaging over noise** ({said}); the rest is a masked gradient.{most}"
        )
    return f"**{name}: the gain survives averaging over noise** ({said}).{most}"


def _margin(result: Result) -> float:
    return 2 * (result.std or 0.0) / math.sqrt(result.n)


def _survival(report: Report) -> Section:
    eps = f"{report.config['screening_eps']:.4f}"
    rows = [
        (
            "network",
            "clean, no noise",
            "clean, noise",
            "FGSM, no noise",
            "A",
            "B",
            "C",
            "gain A",
            "gain C",
            "least gain",
        )
    ]
    for name in report.config["networks"]:
        key = f"{name}/chosen/fgsm/{{}}/{eps}/{{}}"
        rows.append((
            name, report[f"{name}/none/clean"].text(), report[f"{name}/chosen/clean"].text(),
            report[f"{name}/none/fgsm/A/{eps}/accuracy"].text(),
            *(report[key.format(level, "accuracy")].text() for level in LEVELS),
            *(report[key.format(level, "gain")].text() for level in ("A", "C", LEAST)),
        ))  # fmt: skip
    images = int(report[f"{report.config['networks'][0]}/test_images"].value)
    text = [verdict(report, name) for name in report.config["networks"]]
    text.append(
        f"Test accuracy in %, gains in points, noise in the chosen sites, FGSM at eps {eps}, {images:,} test images. "
        "A: gradient of one draw of the noise; B: of the network without noise; C: mean over "
        f"{report.config['samples']} draws. A gain counts where it exceeds two standard errors over seeds. Of the test "
        f"images themselves, two standard errors of one accuracy are up to {100 / math.sqrt(images):.1f} points."
    )
    return Section("Does the gain survive averaging over noise?", text, rows)


def _epsilons(report: Report, name: str) -> Section:
    rows = [("attack, eps", "no noise", "A", "B", "C", "gain A", "gain B", "gain C", "AL no noise", "AL noise, C")]
    for attack, field in (("fgsm", "epsilons"), ("pgd", "pgd_epsilons")):
        for eps in report.config[field]:
            key = f"{name}/chosen/{attack}/{{}}/{eps:.4f}/{{}}"
            none = f"{name}/none/{attack}/A/{eps:.4f}"
            rows.append((
                f"{attack.upper()} {eps:.4f}", report[f"{none}/accuracy"].text(),
                *(report[key.format(level, "accuracy")].text() for level in LEVELS),
                *(report[key.format(level, "gain")].text() for level in LEVELS),
                report[f"{none}/loss"].text(), report[key.format("C", "loss")].text(),
            ))  # fmt: skip
    spread = report[f"{name}/chosen/fgsm/A/{report.config['screening_eps']:.4f}/noise_std"]
    few = report.config["pgd_images"]
    text = [
        f"Clean accuracy: {report[f'{name}/unquantised/clean'].text()} % in floating point, "
        f"{report[f'{name}/none/clean'].text()} % in 8-bit words without failures, "
        f"{report[f'{name}/chosen/clean'].text()} % with noise in the chosen sites. AL = clean accuracy - accuracy "
        "under attack, of the same network and noise; it also falls when clean accuracy falls. "
        f"Deviation over the {report.config['test_repeats']} chips of a seed at attacker A: {spread.value:.2f} points."
        + (f" PGD: {report.config['pgd_steps']} steps on {few:,} of the images." if few else "")
    ]
    caption = (
        "Accuracy and gain against epsilon: lines FGSM, open circles PGD. No noise, and noise in the chosen sites."
    )
    plots = [("epsilon.png", caption)] if name == report.config["networks"][-1] else []
    return Section(f"{name}: accuracy against epsilon", text, rows, plots)


def cells(report: Report, name: str) -> list[tuple[str, int, float]]:
    """(site, n8t, p) of everything that was screened or chosen, in the order of the report."""
    found = []
    for result in report.results:
        if result.name.startswith(f"{name}/screen/") and result.name.endswith("/chosen"):
            site, n8t, p, _ = result.name.removeprefix(f"{name}/screen/").rsplit("/", 3)
            found.append((site, int(n8t.removeprefix("n8t=")), float(p.removeprefix("p="))))
    return found


def _selection(report: Report, name: str) -> Section:
    rows = [
        ("site", "8T bits", "p", "chosen by seeds", "gain A, points", "clean cost, points", "mu measured", "mu uniform")
    ]
    for site, n8t, p in cells(report, name):
        key = f"{name}/screen/{site}/n8t={n8t}/p={p:g}"
        share = report[f"{key}/chosen"]
        if share.value > 0:
            try:
                own = [report[f"{key}/{what}"] for what in ("gain", "cost", "mu")]
                alone = (own[0].text(), own[1].text(), f"{own[2].value:.2e}")
            except KeyError:
                alone = ("not tried alone",) * 3
            uniform = SramConfig(8, n8t=n8t, p6=p).mu
            rows.append(
                (site, str(n8t), f"{p:g}", f"{round(share.value * share.n)} of {share.n}", *alone, f"{uniform:.2e}")
            )
    c = report.config
    text = [
        f"On {c['selection_images']:,} images kept from training, {c['repeats']} chips, FGSM at eps "
        f"{c['screening_eps']:.4f}, attacker A; gain and cost of the site alone. Kept: cost at most {c['tolerance']:g} "
        "points and gain above two standard errors over chips; then added greedily. mu = mean |q' - q| / 255; measured "
        "on the network's own codes, and for uniform codes in closed form (the definition is this library's)."
    ]
    if len(rows) == 1:
        text.insert(0, "**No site qualified for any seed.**")
        rows = []
    caption = "Gain of every site and setting alone (points, mean over seeds, selection images); ×: costs too much."
    plots = [("gains.png", caption)] if name == c["networks"][-1] else []
    return Section(f"{name}: chosen sites", text, rows, plots)


def _ablations(report: Report) -> Section:
    eps = f"{report.config['screening_eps']:.4f}"
    rows = [("network, noise in", "clean, %", "A, %", "B, %", "C, %", "gain A", "gain C", "least gain")]
    for name in report.config["networks"]:
        none = report[f"{name}/none/fgsm/A/{eps}/accuracy"].text()
        rows.append((f"{name}, nothing", report[f"{name}/none/clean"].text(), none, none, none, "", "", ""))
        for placement, label in PLACEMENTS.items():
            key = f"{name}/{placement}/fgsm/{{}}/{eps}/{{}}"
            rows.append((
                f"{name}, {label}", report[f"{name}/{placement}/clean"].text(),
                *(report[key.format(level, "accuracy")].text() for level in LEVELS),
                *(report[key.format(level, "gain")].text() for level in ("A", "C", LEAST)),
            ))  # fmt: skip
    text = [
        f"FGSM at eps {eps}. All sites: each with its best setting within the tolerance alone (or the one that costs "
        "least), whether it gains or not. Where only weights fail nothing is drawn anew, and C is A."
    ]
    return Section("Ablations", text, rows)


def _parameters(report: Report, name: str) -> Section:
    rows = [("8T bits, attack", "flips", "accuracy, %", "drop, points", "confidence, wrong, %", "confidence, all, %")]
    for result in report.results:
        if result.name.startswith(f"{name}/parameters/") and result.name.endswith("/flips"):
            key = result.name.removesuffix("/flips")
            label = key.removeprefix(f"{name}/parameters/n8t=").replace("/", ", ", 1)
            wrong = f"{key}/confidence_wrong"
            rows.append((
                label, f"{result.value:,.0f}", report[f"{key}/accuracy"].text(), report[f"{key}/drop"].text(),
                report[wrong].text() if any(r.name == wrong for r in report.results) else "none wrong",
                report[f"{key}/confidence"].text(),
            ))  # fmt: skip
    text = [
        "Weights in 8-bit two's complement words, their low bits in 6T cells. none: quantised, not attacked. voltage: "
        "random flips at p in the half of the layers that the attacker reckons most harmful. surgical: he chooses the "
        "flips, in 6T bits alone (rounds: gradients; budget: flips allowed). random: as many flips as surgical, "
        "anywhere in the same bits. progressive: bit search, one bit a round. Confidence: mean largest softmax over "
        "misclassified and all images. The attackers are ours: the paper's algorithm was not at hand."
    ]
    return Section(f"{name}: attack on parameters", text, rows)


def _sweep(report: Report) -> Section:
    c = report.config
    rows = [("p", *(f"{name}, {label}, n8t={n}" for name, label, n in _lines(c)))]
    for p in c["sweep_p"]:
        keys = [f"{name}/sweep/{kind}/n8t={n}/p={p:g}/accuracy" for name in c["networks"]
                for kind in ("weight", "activation") for n in c["bank_n8t"]]  # fmt: skip
        rows.append((f"{p:g}", *(report[key].text() for key in keys)))
    caption = "Clean accuracy against the bit error rate of 6T cells; broken lines: half of the layers (voltage)."
    text = [
        "Clean test accuracy in %, every weight or every output failing; one seed of the noise is one chip at every p."
    ]
    return Section("Accuracy against bit error rate", text, rows, [("bit_errors.png", caption)])


def _lines(config) -> list[tuple[str, str, int]]:
    return [
        (name, label, n) for name in config["networks"] for label in ("weights", "outputs") for n in config["bank_n8t"]
    ]


def _method(report: Report) -> Section:
    c = report.config
    source = "loaded" if c["weights"] else f"trained for {c['epochs']} epochs"
    return Section(
        "How it was measured",
        [
            f"Networks {', '.join(c['networks'])}, width {c['width']:g}, {source}, data {c['data'] or 'PYACCEL_DATA'}, "
            f"seeds {', '.join(map(str, c['seeds']))}; never retrained with noise. {c['selection_images']:,} training "
            "images were kept from training to select on; the test images and chips had no part in that.",
            "All sites of every network compared lie in 8-bit words; only which of them fail differs. Weights: one "
            "mask a chip. Outputs: a new draw at every pass; attacked images are classified with a draw the attacker "
            "did not see. Gradients run straight through quantiser and flips. FGSM and PGD in pixel units, clipped to "
            "[0, 1]; PGD from a random start, gradient at the current point.",
            "Bit rules, code ranges, sites, selection and attackers on parameters are this library's: of the paper "
            "only the abstract could be read.",
        ],
    )
