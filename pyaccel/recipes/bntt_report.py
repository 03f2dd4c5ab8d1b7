"""From what was measured to the figures of the `bntt` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyaccel.hardware.energy import FLOAT32_45NM, INT32_45NM
from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.bntt import Config, Measurement

LABELS = {"bntt": "BNTT", "shared": "one BatchNorm", "none": "no normalisation"}
ENERGIES = (FLOAT32_45NM, INT32_45NM)
NOT_AT_HAND = "the paper's figure for this quantity was not at hand"

# Only what was read in a source; figures remembered or inferred are nobody's published figures.
ACCURACY, ACCURACY_SOURCE = 90.5, "VGG9, T=25; read in the paper's first-page figure caption"
AT_EXIT, AT_EXIT_STEP = 90.3, 20
AT_EXIT_SOURCE = "VGG9, exit at T=20; read in a reproduction's README, which quotes the paper"
HABITS = "ours: last epoch, every test image; theirs: best epoch on the test set, 9,728 of 10,000 images"


def results(config: Config, measured: Mapping[tuple[str, int], Measurement], departures: Sequence[str]) -> list[Result]:
    """Every figure of a run, over its seeds. `departures`: in what the run is not the published experiment."""
    found: list[Result] = []
    other = f"not the published experiment: other {', '.join(departures)}" if departures else ""

    def add(name, values, unit, published=None, source=NOT_AT_HAND):
        found.append(summarise(name, values, unit, published=published, published_source=source))

    for norm in config.norms:
        runs = [measured[norm, seed] for seed in config.seeds]
        final = [100 * run.accuracy_after_step[-1] for run in runs]
        if norm != "bntt":
            add(f"{norm}/accuracy", final, "%", source="no published figure for this network at this T was at hand")
        else:
            add("bntt/accuracy", final, "%", *((None, other) if other else (ACCURACY, f"{ACCURACY_SOURCE}; {HABITS}")))
            exits = [run.exit_step for run in runs]
            same = not other and set(exits) == {AT_EXIT_STEP}
            why = other or f"published for an exit at step {AT_EXIT_STEP}"
            add("bntt/exit_step", exits, "steps", source="this exit rule is the library's own definition")
            add("bntt/accuracy_at_exit", [100 * run.accuracy_after_step[run.exit_step - 1] for run in runs], "%",
                *((AT_EXIT, f"{AT_EXIT_SOURCE}; {HABITS}") if same else (None, why)))  # fmt: skip
        for t in range(config.steps):
            add(f"{norm}/accuracy_after_step_{t + 1}", [100 * run.accuracy_after_step[t] for run in runs], "%")
        for i, layer in enumerate(runs[0].layers):
            if layer.neurons:
                add(f"{norm}/rate/{layer.name}", [run.layers[i].rate for run in runs], "spikes per neuron")
            add(f"{norm}/incoming_rate/{layer.name}", [run.layers[i].incoming_rate for run in runs], "events per input")
        add(f"{norm}/spikes", [sum(layer.spikes for layer in run.layers) for run in runs], "spikes per image")
        for energy in ENERGIES:
            dense, spiking, extra = zip(*(_energies(config, norm, run, energy) for run in runs), strict=True)
            add(f"{norm}/energy_{energy.name}/dense", dense, "nJ per image")
            add(f"{norm}/energy_{energy.name}/spikes", spiking, "nJ per image")
            add(f"{norm}/energy_{energy.name}/normalisation", extra, "nJ per image")
            ratio = [d / (s + e) for d, s, e in zip(dense, spiking, extra, strict=True)]
            add(f"{norm}/energy_{energy.name}/dense_over_spiking", ratio, "1")
        add(f"{norm}/training_time", [sum(row["seconds"] for row in run.history) for run in runs], "s",
            source="times are of this machine")  # fmt: skip
    for norm in config.norms:
        if norm != "bntt" and "bntt" in config.norms:
            both = [[measured[n, seed].accuracy_after_step[-1] for seed in config.seeds] for n in ("bntt", norm)]
            add(f"bntt_minus_{norm}/accuracy", [100 * (a - b) for a, b in zip(*both, strict=True)], "points")
    return found


def _energies(config, norm, run, energy) -> tuple[float, float, float]:
    macs = [layer.macs for layer in run.layers]
    neuron_steps = 0 if norm == "none" else config.steps * sum(layer.neurons for layer in run.layers)
    spiking = energy.snn(macs, [layer.incoming_rate for layer in run.layers])
    return energy.ann(macs), spiking, energy.normalisation(neuron_steps)


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    norms = list(report.config["norms"])
    return [
        _accuracy(report, norms),
        _over_time(report, norms),
        *([_early_exit(report)] if "bntt" in norms else []),
        _rates(report, norms),
        _energy(report, norms),
        _method(report),
    ]


def _accuracy(report: Report, norms: list[str]) -> Section:
    rows = [("network", "test accuracy, %", "seeds", "spikes per image", "training, s", "published, %")]
    for norm in norms:
        accuracy = report[f"{norm}/accuracy"]
        published = "" if accuracy.published is None else f"{accuracy.published:.1f}"
        rows.append((LABELS[norm], accuracy.text(), str(accuracy.n), f"{report[f'{norm}/spikes'].value:,.0f}",
                     f"{report[f'{norm}/training_time'].value:.0f}", published))  # fmt: skip
    text = []
    for norm in norms:
        if norm != "bntt" and "bntt" in norms:
            gap = report[f"bntt_minus_{norm}/accuracy"]
            spread = "" if gap.std is None else f" ± {gap.std:.2f}"
            text.append(
                f"BNTT minus {LABELS[norm]}: {gap.value:+.2f}{spread} points over {gap.n} seed{'s'[: gap.n > 1]}."
            )
    text.append(
        "Published: " + "; ".join(f"{LABELS[n]}: {report[f'{n}/accuracy'].published_source}" for n in norms) + "."
    )
    if report[f"{norms[0]}/accuracy"].n == 1:
        text.append("One seed: no spread is known, and differences of a point mean little.")
    return Section("Accuracy", text, rows, [("training.png", "Loss and test accuracy after each epoch.")])


def _over_time(report: Report, norms: list[str]) -> Section:
    rows = [("after step", *(f"{LABELS[norm]}, %" for norm in norms))]
    for t in range(1, report.config["steps"] + 1):
        rows.append((str(t), *(report[f"{norm}/accuracy_after_step_{t}"].text() for norm in norms)))
    caption = "Test accuracy if the read-out is taken after each step; the vertical line is the early exit."
    picture = "Spikes for one test image: some neurons of each layer, and the read-out over time."
    plots = [("accuracy.png", caption)] + ([("raster.png", picture)] if "bntt" in norms else [])
    return Section("Accuracy over time steps", ["The same trained networks, stopped after each step."], rows, plots)


def _early_exit(report: Report) -> Section:
    config, step = report.config, report["bntt/exit_step"]
    level = f"{config['exit_over']} over channels of {'|gain|' if config['exit_absolute'] else 'the gain'}"
    text = [
        f"T_exit = 1 + the last step t at which some layer's {level} is at least {config['exit_threshold']:g}: "
        f"step {step.text(1)} of {config['steps']}. Test accuracy there: {report['bntt/accuracy_at_exit'].text()} %. "
        "The rule is this library's definition of the paper's idea."
    ]
    if step.value == config["steps"]:
        text.append(
            f"**The exit is at the last step: the gains have not decayed below {config['exit_threshold']:g}, so "
            "nothing is saved.** Gains decay in long training with weight decay on them; short runs keep them near 1."
        )
    return Section("Early exit", text, plots=[("gains.png", "Mean gain of each layer at each step (first seed).")])


def _rates(report: Report, norms: list[str]) -> Section:
    names = [r.name.split("/", 2)[2] for r in report.results if r.name.startswith(f"{norms[0]}/rate/")]
    rows = [("layer", *(LABELS[norm] for norm in norms))]
    rows += [(name, *(report[f"{norm}/rate/{name}"].text(3) for norm in norms)) for name in names]
    return Section(
        "Spike rates", [f"Spikes per neuron over all {report.config['steps']} steps, mean over test images."], rows
    )


def _energy(report: Report, norms: list[str]) -> Section:
    rows = [("network, constants", "dense, nJ", "spikes, nJ", "normalisation, nJ", "dense / spiking")]
    for energy in ENERGIES:
        for norm in norms:
            parts = [report[f"{norm}/energy_{energy.name}/{part}"] for part in ("dense", "spikes", "normalisation")]
            ratio = report[f"{norm}/energy_{energy.name}/dense_over_spiking"]
            rows.append((f"{LABELS[norm]}, {energy.name}", *(f"{p.value:,.1f}" for p in parts), ratio.text()))
    text = [
        "Of one image: arithmetic alone, without memory access. Constants, which are this library's: "
        + "; ".join(f"{e.name}: E_MAC {e.mac:g} pJ, E_AC {e.accumulate:g} pJ ({e.source})" for e in ENERGIES) + ".",
        "Dense: the same network without spikes, each multiply-accumulate once (its normalisation folds into "
        "the weights). Spikes: each layer's dense operations times its incoming rate, E_AC each: the first layer too, "
        "whose input is spikes; a signed or a pooled spike counts as one addition; borders count as if padding spiked "
        "on average. Normalisation: one E_MAC for each neuron and step, unfolded; for one shared BatchNorm it could be "
        "folded.",
    ]  # fmt: skip
    return Section("Energy", text, rows)


def _method(report: Report) -> Section:
    config = report.config
    if config.get("events"):
        drawn = (f"The recordings were cut into {config['steps']} frames by {config['events']}, which the network "
                 "reads as they are: nothing is drawn.")  # fmt: skip
    else:
        drawn = ("The encoder draws by image, step and pixel, so the figures do not depend on the batch size of the "
                 "evaluation.")  # fmt: skip
    return Section(
        "How it was measured",
        [
            f"Network {config['model']}, width {config['width']:g}, T = {config['steps']}, data "
            f"{config['data'] or 'PYACCEL_DATA'}"
            + (f" ({config['train_images']:,} training images)" if config["train_images"] else "")
            + f", {config['epochs']} epochs, seeds {', '.join(map(str, config['seeds']))}. The three networks of a "
            "seed start from the same weights and see the same batches.",
            "The last epoch is reported, on every test image once. (The published code scores the best epoch on the "
            f"test set and leaves out the test images that fill no batch.) {drawn}",
        ],
    )
