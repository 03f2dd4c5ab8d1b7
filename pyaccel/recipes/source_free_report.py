"""From what was measured to the figures of the `source_free` report, and from those figures to its text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.source_free import Adapted, Config

LABELS = {
    "full": "adapted (the paper's)",
    "no_filter": "without the filter",
    "no_source": "without the source's labels",
    "naive": "own argmax, no prototypes, no filter",
}
# Office-31, ResNet-50, of the official README; the paper's own tables were not at hand.
OFFICIAL = {
    "amazon->webcam": 91.06, "dslr->webcam": 97.35, "webcam->dslr": 98.99, "amazon->dslr": 91.96, "dslr->amazon": 71.60,
    "webcam->amazon": 68.62,
}  # fmt: skip
READ = "official code's README; theirs: the best of five looks at the target's labels, ours: the last step"
QUARTILES = tuple(f"quartile_{i}" for i in range(1, 5))


def results(config: Config, measured: Mapping[tuple[str, int], Adapted]) -> list[Result]:
    """Every figure of a run, over its seeds."""
    found: list[Result] = []
    standard = (
        config.preset == "paper"
        and config.model == "resnet50"
        and config.weights
        and config.steps == 5_000
        and config.crop == 224
    )

    def add(name, values, unit, value=None, source="no figure for this was at hand"):
        if all(map(math.isfinite, values)):
            found.append(summarise(name, values, unit, published=value, published_source=source))

    for pair in config.pairs:
        runs = [measured[pair, seed] for seed in config.seeds]
        add(f"{pair}/source_test", [100 * run.source_test for run in runs], "%")
        add(f"{pair}/source_only", [100 * run.source_only for run in runs], "%")
        for variant in config.variants:
            value = OFFICIAL.get(pair) if standard and variant == "full" else None
            why = READ if value else "not the published experiment: other preset, network, data or steps"
            add(f"{pair}/{variant}/accuracy", [100 * run.final[variant] for run in runs], "%", value, why)
            add(f"{pair}/{variant}/gain", [100 * (run.final[variant] - run.source_only) for run in runs], "points")
            best = [100 * max(a for _, a in run.watched[variant]) for run in runs]
            add(f"{pair}/{variant}/best_on_target_labels", best, "%")
            add(f"{pair}/{variant}/kept", [run.kept[variant] for run in runs], "1")
            for i, (step, _) in enumerate(runs[0].watched[variant]):
                add(f"{pair}/{variant}/after/{step}", [100 * run.watched[variant][i][1] for run in runs], "%")
        for name in runs[0].diagnostics:
            unit = "1" if name in ("kept", "eta") else "prototypes" if name in ("fewest", "most") else "%"
            add(f"{pair}/before/{name}", [(100 if unit == "%" else 1) * run.diagnostics[name] for run in runs], unit)
        add(f"{pair}/training_time", [run.seconds for run in runs], "s", source="times are of this machine")
    if len(config.pairs) > 1:
        for variant in config.variants:
            means = [fmean(100 * measured[pair, seed].final[variant] for pair in config.pairs) for seed in config.seeds]
            add(f"mean/{variant}/accuracy", means, "%")
        add(
            "mean/source_only",
            [fmean(100 * measured[pair, s].source_only for pair in config.pairs) for s in config.seeds],
            "%",
        )
    return found


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    return [_accuracy(report), _before(report), _on_the_way(report), _method(report)]


def _names(report: Report) -> set[str]:
    return {result.name for result in report.results}


def _accuracy(report: Report) -> Section:
    config, rows = report.config, [("pair, classifier", "target accuracy, %", "gain, points", "kept", "published, %")]
    for pair in config["pairs"]:
        rows.append((f"{pair}: source only", report[f"{pair}/source_only"].text(), "", "", ""))
        for variant in config["variants"]:
            result = report[f"{pair}/{variant}/accuracy"]
            published = "" if result.published is None else f"{result.published:.2f}"
            rows.append((f"{pair}: {LABELS[variant]}", result.text(), report[f"{pair}/{variant}/gain"].text(),
                         report[f"{pair}/{variant}/kept"].text(), published))  # fmt: skip
    text = [
        f"After the last of {config['steps']:,} steps, {report[config['pairs'][0] + '/source_only'].n} seed(s): "
        f"nothing "
        "is selected on target labels (the published code keeps the best of its looks at them; that figure is in "
        "report.json as best_on_target_labels). Gain: over the source classifier of the same seed. Kept: share of "
        "pseudo-labels that the filter keeps in the last round.",
    ]
    if "mean/source_only" in _names(report):
        means = "; ".join(f"{LABELS[v]} {report[f'mean/{v}/accuracy'].text()}" for v in config["variants"])
        text.append(f"Means over the pairs: source only {report['mean/source_only'].text()}; {means}.")
    sources = {report[f"{pair}/{v}/accuracy"].published_source for pair in config["pairs"] for v in config["variants"]}
    text.append(f"Published: {'; '.join(sorted(sources))}.")
    caption = "Target accuracy during adaptation; thin: seeds; dotted: source only."
    files = ["adaptation.png", *(f"adaptation_{n}.png" for n in range(2, 1 + math.ceil(len(config["pairs"]) / 3)))]
    return Section("Target accuracy", text, rows, [(file, caption) for file in files])


def _before(report: Report) -> Section:
    columns = [*QUARTILES, "argmax", "prototypes", "kept", "accuracy_kept", "accuracy_dropped", "eta", "most"]
    heads = [
        "quartile 1",
        "2",
        "3",
        "4",
        "argmax",
        "prototypes",
        "share kept",
        "kept",
        "dropped",
        "eta",
        "most prototypes",
    ]
    rows, names = [("pair", *heads)], _names(report)
    for pair in report.config["pairs"]:
        cells = (f"{pair}/before/{c}" for c in columns)
        rows.append(
            (pair, *(report[c].text(2 if c.endswith(("kept", "eta")) else 1) if c in names else "none" for c in cells))
        )
    text = [
        "The source classifier on the target's images. Accuracy (%) in the quartiles of self-entropy, lowest first, "
        "and "
        "of all (argmax); of the labels that prototypes give; of those among them that the filter keeps and drops.",
    ]
    return Section(
        "What the method builds on, before adaptation",
        text,
        rows,
        [("entropy.png", "Accuracy in the quartiles of self-entropy.")],
    )


def _on_the_way(report: Report) -> Section:
    pair = report.config["pairs"][0]
    prefix = f"{pair}/{report.config['variants'][0]}/after/"
    steps = [r.name.removeprefix(prefix) for r in report.results if r.name.startswith(prefix)]
    rows = [("pair, classifier", *(f"step {s}" for s in steps))]
    for pair in report.config["pairs"]:
        for variant in report.config["variants"]:
            rows.append((f"{pair}: {LABELS[variant]}", *(report[f"{pair}/{variant}/after/{s}"].text(1) for s in steps)))
    watch = report.config["watch_images"]
    note = f"On {watch:,} target images." if watch else "On all target images."
    return Section("During adaptation, target accuracy, %", [note], rows)


def _method(report: Report) -> Section:
    c = report.config
    weights = f"ImageNet weights from {c['weights']}" if c["weights"] else "from scratch"
    chosen = "as the published code: augmented images, training mode" if c["memory"] == "train" else "from plain images"
    target = "the whole target" if c["whole_target"] else "its training part and tested on the other"
    return Section(
        "How it was measured",
        [
            f"Network {c['model']}, {weights}; images of {c['crop'] or c['size']} pixels; data "
            f"{c['data'] or 'packaged'}; "
            f"source: {c['epochs']} epochs, SGD {c['lr']:g}; adaptation: {c['steps']:,} steps of {c['adapt_batch']}, "
            f"SGD "
            f"{c['adapt_lr']:g} for the heads, {c['adapt_lr'] * c['feature_share']:g} for the features, prototypes "
            f"chosen "
            f"every {c['refresh']} steps ({chosen}); adapted to {target}; seeds {', '.join(map(str, c['seeds']))}.",
            "The paper releases no source training: this one follows SHOT's recipe, so compare gains over the source "
            "classifier, not accuracies. Classes never predicted get their own most probable sample, which the "
            "published "
            "code means and misses; prototypes are averaged once each, not over repeats.",
        ],
    )
