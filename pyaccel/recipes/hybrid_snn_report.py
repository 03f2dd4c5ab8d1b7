"""From what was measured to the figures of the `hybrid_snn` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyaccel.hardware.energy import FLOAT32_45NM, INT32_45NM
from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.hybrid_snn import Config, Measurement

ENERGIES = (FLOAT32_45NM, INT32_45NM)
LABELS = {"converted": "converted", "stdb": "hybrid, STDB", "linear": "hybrid, linear surrogate"}
NONE = (
    "no figure stands here: the paper's figures that were read, not remembered, are of long GPU runs (VGG16, 100 "
    "steps: "
    "91.13 %), and this library has not made one to compare"
)
OURS = "a figure of this run alone"


def networks(config: Mapping) -> list[str]:
    return ["converted", *(config["surrogates"] if config["tune_epochs"] else ())]


def results(config: Config, measured: Mapping[int, Measurement]) -> list[Result]:
    """Every figure of a run, over its seeds."""
    found: list[Result] = []
    runs = [measured[seed] for seed in config.seeds]
    kinds = networks({"surrogates": config.surrogates, "tune_epochs": config.tune_epochs})

    def add(name, values, unit, source=OURS):
        found.append(summarise(name, list(values), unit, published_source=source))

    add("ann/accuracy", (100 * run.ann for run in runs), "%", NONE)
    for i in range(len(runs[0].thresholds)):
        add(f"threshold/layer_{i + 1}", (run.thresholds[i] for run in runs), "1")
    for i, t in enumerate(config.curve):
        add(f"converted_scale_1/accuracy_after_step_{t}", (100 * run.full[i] for run in runs), "%", NONE)
    few = [t for t in config.curve if t <= config.steps]
    for kind in kinds:
        for i, t in enumerate(few):
            add(f"{kind}/accuracy_after_step_{t}", (100 * run.reduced[kind][i] for run in runs), "%")
        add(f"{kind}/accuracy", (100 * run.reduced[kind][-1] for run in runs), "%", NONE)
        layers = [run.activity[kind] for run in runs]
        for i, layer in enumerate(layers[0]):
            if layer.neurons:
                add(f"{kind}/rate/{layer.name}", (run[i].rate for run in layers), "spikes per neuron")
        add(f"{kind}/spikes", (sum(layer.spikes for layer in run) for run in layers), "spikes per image")
        for energy in ENERGIES:
            dense = [energy.ann([layer.macs for layer in run]) for run in layers]
            spiking = [energy.snn([x.macs for x in run], [x.incoming_rate for x in run]) for run in layers]
            add(f"{kind}/energy_{energy.name}/dense", dense, "nJ per image")
            add(f"{kind}/energy_{energy.name}/spikes", spiking, "nJ per image")
            add(
                f"{kind}/energy_{energy.name}/dense_over_spiking",
                (d / s for d, s in zip(dense, spiking, strict=True)),
                "1",
            )
        if kind != "converted":
            gaps = (100 * (run.reduced[kind][-1] - run.reduced["converted"][-1]) for run in runs)
            add(f"{kind}_minus_converted/accuracy", gaps, "points")
    for kind in ("ann", *(k for k in kinds if k != "converted")):
        add(f"{kind}/training_time", (run.seconds[kind] for run in runs), "s", "times are of this machine")
    return found


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    return [_table(report), _curve(report), _thresholds(report), _spikes(report), _energy(report), _method(report)]


def _table(report: Report) -> Section:
    config, steps = report.config, report.config["steps"]
    longest = config["curve"][-1]
    full = report[f"converted_scale_1/accuracy_after_step_{longest}"]
    rows = [("network", "time steps", "threshold scale", "test accuracy, %", "seeds", "training, s")]
    ann = report["ann/accuracy"]
    rows.append(("artificial", "", "", ann.text(), str(ann.n), f"{report['ann/training_time'].value:.0f}"))
    rows.append(("converted", str(longest), "1", full.text(), str(full.n), ""))
    text = []
    for kind in networks(config):
        figure = report[f"{kind}/accuracy"]
        seconds = "" if kind == "converted" else f"{report[f'{kind}/training_time'].value:.0f}"
        rows.append((LABELS[kind], str(steps), f"{config['scale']:g}", figure.text(), str(figure.n), seconds))
        if kind != "converted":
            gap = report[f"{kind}_minus_converted/accuracy"]
            spread = "" if gap.std is None else f" ± {gap.std:.2f}"
            text.append(f"{LABELS[kind]} minus converted, at {steps} steps: {gap.value:+.2f}{spread} points.")
    if ann.n == 1:
        text.append("One seed: no spread is known, and differences of a point mean little.")
    text.append(f"Published: {ann.published_source}.")
    return Section("Accuracy", text, rows)


def _curve(report: Report) -> Section:
    config = report.config
    kinds = networks(config)
    rows = [("after step", "converted, scale 1, %", *(f"{LABELS[k]}, scale {config['scale']:g}, %" for k in kinds))]
    for t in config["curve"]:
        row = [str(t), report[f"converted_scale_1/accuracy_after_step_{t}"].text()]
        row += [report[f"{k}/accuracy_after_step_{t}"].text() if t <= config["steps"] else "" for k in kinds]
        rows.append(tuple(row))
    caption = "Test accuracy if the read-out is taken after so many steps; the dashed line is the artificial network."
    return Section("Accuracy over time steps", ["The same networks, stopped after each number of steps."], rows,
                   [("accuracy.png", caption)])  # fmt: skip


def _thresholds(report: Report) -> Section:
    config = report.config
    values = [r for r in report.results if r.name.startswith("threshold/")]
    rows = [("layer", "threshold at scale 1"), *((r.name.split("_")[-1], r.text(3)) for r in values)]
    what = "largest current" if config["percentile"] is None else f"{config['percentile']:g} percentile of the currents"
    text = (
        f"The {what} of one step that each layer met in {config['balance_steps']} steps on {config['balance_images']} "
        f"training images."
    )
    return Section("Thresholds", [text], rows)


def _spikes(report: Report) -> Section:
    kinds = networks(report.config)
    names = [r.name.split("/", 2)[2] for r in report.results if r.name.startswith("converted/rate/")]
    rows = [("layer", *(LABELS[k] for k in kinds))]
    rows += [(name, *(report[f"{k}/rate/{name}"].text(3) for k in kinds)) for name in names]
    rows.append(("all, spikes per image", *(f"{report[f'{k}/spikes'].value:,.0f}" for k in kinds)))
    text = (
        f"Spikes per neuron over {report.config['steps']} steps, mean over test images, all at the same scale of "
        f"thresholds."
    )
    return Section("Spikes", [text], rows)


def _energy(report: Report) -> Section:
    rows = [("network, constants", "dense, nJ", "spikes, nJ", "dense / spiking")]
    for energy in ENERGIES:
        for kind in networks(report.config):
            parts = [report[f"{kind}/energy_{energy.name}/{part}"] for part in ("dense", "spikes")]
            ratio = report[f"{kind}/energy_{energy.name}/dense_over_spiking"]
            rows.append((f"{LABELS[kind]}, {energy.name}", *(f"{p.value:,.1f}" for p in parts), ratio.text()))
    text = [
        f"Of one image, {report.config['steps']} steps: arithmetic alone, without memory access. Constants, which are "
        f"this library's: "
        + "; ".join(f"{e.name}: E_MAC {e.mac:g} pJ, E_AC {e.accumulate:g} pJ ({e.source})" for e in ENERGIES) + ".",
        "Spikes: each layer's dense operations times its incoming rate, E_AC each. The paper has no such table.",
    ]  # fmt: skip
    return Section("Energy", text, rows)


def _method(report: Report) -> Section:
    config = report.config
    images = f"{config['train_images']:,}" if config["train_images"] else "all"
    return Section(
        "How it was measured",
        [
            f"Network {config['model']}, width {config['width']:g}, data {config['data'] or 'PYACCEL_DATA'} ({images} "
            f"training images, "
            f"{config['test_images'] or 'all'} test images), {config['epochs']} epochs of the artificial network, "
            f"{config['tune_epochs']} of tuning on {config['tune_images'] or 'the same'} images, seeds "
            f"{', '.join(map(str, config['seeds']))}. Artificial and spiking networks see the same normalisation.",
            "The last epoch is reported. Poisson noise is drawn by image, step and pixel, so that figures do not "
            "depend on the batch "
            "size. STDB: 0.3 exp(-0.01 (steps since the last spike)), the exact form, not the published code's, whose "
            "float32 rounds "
            "it to 0 for neurons that have been silent for 104 steps or have never fired.",
        ],
    )
