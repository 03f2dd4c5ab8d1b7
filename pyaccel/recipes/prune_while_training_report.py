"""From what was measured to the figures of the `prune_while_training` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyaccel.hardware import training_compute
from pyaccel.recipes.pruning_plan import COUNTS, planned_saving
from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.prune_while_training import Config, Measurement

UNKNOWN = "the paper's tables and its schedule were not at hand: only its abstract"
MACHINE = "times are of this machine"
LABELS = {
    "dense": "dense", "l1": "while training, L1", "activation": "while training, mean activation",
    "random": "while training, random", "one_shot": "one shot (L1) and retraining",
    "scratch": "final widths from scratch",
}  # fmt: skip


def kinds(config: Mapping[str, Any]) -> list[str]:
    """Every kind of network besides the dense one."""
    return [*config["criteria"], *config["comparators"]]


def results(
    config: Config, measured: Mapping[tuple[str, float, int], Measurement], shape: tuple[int, int, int]
) -> list[Result]:
    """Every figure of a run, over its seeds; losses and ratios are of networks of the same seed."""
    found: list[Result] = []

    def add(name, values, unit, source=UNKNOWN):
        found.append(summarise(name, values, unit, published_source=source))

    dense = [measured["dense", 0.0, seed] for seed in config.seeds]
    add("dense/accuracy", [100 * run.accuracy for run in dense], "%")
    add("dense/macs", [run.final.macs for run in dense], "MAC per image, convolutions")
    add("dense/accesses", [run.final.accesses for run in dense], "elements per image, convolutions")
    add("dense/training_time", [run.seconds for run in dense], "s", MACHINE)
    for rate in config.rates:
        for kind in [*config.criteria, *config.comparators]:
            runs = [measured[kind, rate, seed] for seed in config.seeds]
            name = f"{kind}/{rate:g}"
            both = list(zip(runs, dense, strict=True))
            add(f"{name}/accuracy", [100 * run.accuracy for run in runs], "%")
            add(f"{name}/loss", [100 * (base.accuracy - run.accuracy) for run, base in both], "points")
            add(f"{name}/macs", [run.final.macs / base.final.macs for run, base in both], "of dense")
            add(f"{name}/weights", [run.final.weights / base.final.weights for run, base in both], "of dense")
            add(f"{name}/accesses", [run.final.accesses / base.final.accesses for run, base in both], "of dense")
            add(f"{name}/training_time", [run.seconds for run in runs], "s", MACHINE)
            for count in COUNTS:
                spent = [total(run, count) + (total(base, count) if kind == "one_shot" else 0) for run, base in both]
                add(
                    f"{name}/compute_{count}",
                    [s / total(base, count) for s, (_, base) in zip(spent, both, strict=True)],
                    "of dense",
                )
                if kind in config.criteria:
                    retraining = [base_with_retraining(run, base, count, config.retrain_epochs) for run, base in both]
                    saved = [100 * (1 - s / r) for s, r in zip(spent, retraining, strict=True)]
                    add(f"{name}/saved_{count}", saved, "%", UNKNOWN + "; 41 % there, for another schedule")
        for count, share in planned_saving(
            config.model, shape, epochs=config.epochs, rate=rate, retrain=config.retrain_epochs
        ).items():
            add(f"planned/{rate:g}/{count}", [100 * share], "%", "a calculation, not a measurement")
    return found


def total(run: Measurement, count: str) -> float:
    """Training compute under one count: forward and backward, all epochs."""
    return training_compute([(images, figures[count]) for images, figures in run.epochs])


def base_with_retraining(run: Measurement, dense: Measurement, count: str, epochs: int) -> float:
    """C_base: the dense training, then `epochs` of retraining at the final size of `run`."""
    images, figures = run.epochs[-1]
    return total(dense, count) + training_compute([(epochs * images, figures[count])])


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    return [_accuracy(report), _savings(report), _plan(report), _method(report)]


def _accuracy(report: Report) -> Section:
    config = report.config
    header = (
        "network",
        "filters pruned",
        "test accuracy, %",
        "loss, points",
        "MACs",
        "weights",
        "training compute",
        "training, s",
    )
    dense = report["dense/accuracy"]
    rows = [header, ("dense", "0 %", dense.text(), "", "1", "1", "1", report["dense/training_time"].text(0))]
    for rate in config["rates"]:
        for kind in kinds(config):
            name = f"{kind}/{rate:g}"
            rows.append((
                LABELS[kind], f"{100 * rate:g} %", report[f"{name}/accuracy"].text(), report[f"{name}/loss"].text(),
                f"{report[f'{name}/macs'].value:.4f}", f"{report[f'{name}/weights'].value:.4f}",
                f"{report[f'{name}/compute_macs'].value:.3f}", report[f"{name}/training_time"].text(0),
            ))  # fmt: skip
    text = [
        "MACs, weights and training compute (forward and backward, products) count the convolutions, against the "
        "dense network; the compute of one-shot pruning includes the dense training before it, its time does not. "
        "Loss: dense minus pruned, networks of the same seed.",
    ]
    if dense.n == 1:
        text.append("One seed: no spread is known, and differences of a point mean little.")
    return Section(
        "Accuracy",
        text,
        rows,
        [("accuracy.png", "Test accuracy over the share of filters pruned, and over training compute.")],
    )


def _savings(report: Report) -> Section:
    rows = [("while training", "filters pruned", "MACs saved, %", "accesses saved, %", "filter count saved, %")]
    for rate in report.config["rates"]:
        for criterion in report.config["criteria"]:
            saved = [report[f"{criterion}/{rate:g}/saved_{count}"].text(1) for count in COUNTS]
            rows.append((LABELS[criterion], f"{100 * rate:g} %", *saved))
    return Section(
        "Training saved",
        [
            f"1 - C / C_base; C_base: dense training and {report.config['retrain_epochs']} epochs of retraining at "
            "the final size. MACs and accesses (inputs and weights) are physical counts, in which a layer costs the "
            "product of its kept inputs and outputs; the last column takes cost as proportional to the number of "
            "filters, which it is not: it is here because it is one reading of the paper's single figure of 41 %, "
            "whose schedule is unknown.",
        ],
        rows,
        [("widths.png", "Filters and products of the convolutions after each epoch (first seed).")],
    )


def _plan(report: Report) -> Section:
    config = report.config
    rows = [("filters pruned", "MACs saved, %", "accesses saved, %", "filter count saved, %")]
    rows += [(f"{100 * r:g} %", *(report[f"planned/{r:g}/{c}"].text(1) for c in COUNTS)) for r in config["rates"]]
    text = (
        f"By calculation, for {config['model']} at full width on these images: {config['epochs']} epochs, of which "
        f"epoch t keeps 1 - p t / {config['epochs']} of the filters, against dense training and "
        f"{config['retrain_epochs']} of retraining."
    )
    return Section("A ramp over the whole run", [text], rows)


def _method(report: Report) -> Section:
    config = report.config
    last = int(0.8 * config["epochs"]) if config["last_epoch"] is None else config["last_epoch"]
    return Section(
        "How it was measured",
        [
            f"Network {config['model']}, width {config['width']:g}, data {config['data'] or 'PYACCEL_DATA'}"
            + (f" ({config['train_images']:,} training images)" if config["train_images"] else "")
            + f", {config['epochs']} epochs, seeds {', '.join(map(str, config['seeds']))}; mode {config['mode']}. All "
            "kinds of a seed start from the same weights (from scratch: of the final widths) and see the same "
            "batches.",
            f"Filters go at the end of epochs {config['first_epoch']} to {last} (from 0), every {config['interval']}, "
            "the removed share rising linearly; the same share of every convolution, ranked within it. Schedule and "
            "criteria are this library's definitions: the paper's were not at hand. The last epoch is reported, on "
            "every test image once.",
        ],
    )
