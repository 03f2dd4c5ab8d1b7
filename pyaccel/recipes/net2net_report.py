"""From what was measured to the figures of the `net2net` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyaccel.hardware import training_compute
from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.net2net import Config, Stage
    from pyaccel.recipes.net2net_measure import Detection, Measurement

UNKNOWN = "the paper's tables and settings were not at hand: only its abstract"
MACHINE = "times are of this machine"
LABELS = {
    "cumulative": "cumulative", "pruned": "cumulative, pruned between stages",
    "scratch": "from scratch, as many epochs",
    "scratch_equal": "from scratch, as many products",
}  # fmt: skip
SCORES = {
    "js": "Jensen-Shannon, all networks", "vote": "vote of all networks", "maxprob": "1 - max p, last network",
    "equal_maxprob": "1 - max p, scratch of as many products, attacked itself",
}  # fmt: skip


def results(
    config: Config,
    stages: Mapping[tuple[str, int], Sequence[Stage]],
    measured: Mapping[tuple[str, int], Measurement],
    detected: Mapping[int, Detection],
    images: int,
) -> list[Result]:
    """Every figure of a run, over its seeds. `images`: of the whole training set."""
    found: list[Result] = []

    def add(name, values, unit, source=UNKNOWN):
        found.append(summarise(name, values, unit, published_source=source))

    full = {seed: _final_macs(config, stages, seed) for seed in config.seeds}
    for network in config.networks:
        runs = [measured[network, seed] for seed in config.seeds]
        chains = [stages[network, seed] for seed in config.seeds]
        whole = [training_compute([(images * config.epochs, full[seed])]) for seed in config.seeds]
        spent = [training_compute([(s.images * s.epochs, s.macs) for s in chain]) for chain in chains]
        add(f"{network}/accuracy", [100 * run.accuracy for run in runs], "%")
        add(
            f"{network}/gap", [100 * (run.train_accuracy - run.accuracy) for run in runs], "points, training minus test"
        )
        add(f"{network}/compute", [s / w for s, w in zip(spent, whole, strict=True)], "of scratch")
        inference = [run.macs / full[seed] for run, seed in zip(runs, config.seeds, strict=True)]
        add(f"{network}/macs", inference, "of the unpruned final network")
        add(f"{network}/parameters", [run.parameters for run in runs], "parameters")
        add(f"{network}/training_time", [sum(s.seconds for s in chain) for chain in chains], "s", MACHINE)
        for level in config.noise:
            add(f"{network}/noise/{level:g}", [100 * run.noise[level] for run in runs], "%")
        for attack in runs[0].attacked:
            add(f"{network}/attack/{attack}", [100 * run.attacked[attack] for run in runs], "%")
        for number in range(len(chains[0])):
            _stage(add, f"{network}/stage_{number + 1}", [chain[number] for chain in chains], number)
    for key in next(iter(detected.values())).auc if detected else ():
        name = f"detection/{key[0]}/{key[1]}"
        add(f"{name}/auc", [detected[seed].auc[key] for seed in config.seeds], "1")
        add(f"{name}/rate", [100 * detected[seed].rate[key] for seed in config.seeds], "%")
    if detected:
        runs = [detected[seed] for seed in config.seeds]
        for score in runs[0].false_alarms:
            add(f"detection/clean/{score}/rate", [100 * run.false_alarms[score] for run in runs], "%")
            add(f"detection/noise/{score}/rate", [100 * run.noise_alarms[score] for run in runs], "%")
        for attack in runs[0].success:
            add(f"detection/{attack}/accuracy", [100 * run.success[attack] for run in runs], "%")
        for number in range(len(runs[0].each_accuracy)):
            add(f"detection/network_{number + 1}/accuracy", [100 * run.each_accuracy[number] for run in runs], "%")
        extra = [
            sum(s.macs for s in stages["cumulative", seed]) / stages["cumulative", seed][-1].macs - 1
            for seed in config.seeds
        ]
        add("detection/extra_macs", extra, "of the last network")
    return found


def _final_macs(config: Config, stages, seed: int) -> int:
    """Products of the unpruned final network: the largest there is."""
    return max(stages[network, seed][-1].macs for network in config.networks)


def _stage(add, name: str, runs: Sequence[Stage], number: int) -> None:
    add(f"{name}/accuracy", [100 * stage.after for stage in runs], "%")
    add(f"{name}/images", [stage.images for stage in runs], "images")
    add(f"{name}/epochs", [stage.epochs for stage in runs], "epochs")
    add(f"{name}/macs", [stage.macs for stage in runs], "MAC per image, convolutions")
    if number:
        add(f"{name}/before", [100 * stage.before for stage in runs], "%")
        add(f"{name}/grown", [100 * stage.grown for stage in runs], "%")


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    networks = report.config["networks"]
    chains = [network for network in networks if network in ("cumulative", "pruned")]
    found = [_summary(report, networks)]
    found += [_growth(report, network) for network in chains]
    found.append(_noise(report, networks))
    if "cumulative" in networks:
        found.append(_detection(report))
    return [*found, _method(report)]


def _summary(report: Report, networks) -> Section:
    rows = [("network", "test accuracy, %", "gap, points", "training compute", "inference MACs", "training, s")]
    for network in networks:
        rows.append((
            LABELS[network], report[f"{network}/accuracy"].text(), report[f"{network}/gap"].text(),
            report[f"{network}/compute"].text(3), report[f"{network}/macs"].text(3),
            report[f"{network}/training_time"].text(0),
        ))  # fmt: skip
    text = [
        "Training compute: products of the convolutions, forward and backward, of the final network trained from "
        f"scratch on all images for {report.config['epochs']} epochs. Inference MACs: of the unpruned final network; "
        "reduced by 1 minus that. Gap: accuracy on training images minus test. As many products: the comparison that "
        "the number of epochs hides, since stages on few images see few.",
    ]
    if report[f"{networks[0]}/accuracy"].n == 1:
        text.append("One seed: no spread is known, and differences of a point mean little.")
    return Section(
        "Accuracy and compute",
        text,
        rows,
        [("networks.png", "Test accuracy over training compute; accuracy under noise.")],
    )


def _growth(report: Report, network: str) -> Section:
    rows = [("stage", "images", "epochs", "MACs", "before growth, %", "right after, %", "at its end, %")]
    for number in range(1, len(report.config["fractions"]) + 1):
        name = f"{network}/stage_{number}"
        before = ("", "") if number == 1 else (report[f"{name}/before"].text(), report[f"{name}/grown"].text())
        rows.append((str(number), *(f"{report[f'{name}/{key}'].value:,.0f}" for key in ("images", "epochs", "macs")),
                     *before,
                     report[f"{name}/accuracy"].text()))  # fmt: skip
    text = "Before growth and right after it must be equal: growth does not change what a network computes."
    if network == "pruned":
        text += " Before growth is after pruning, which does change it."
    return Section(f"Stages: {LABELS[network]}", [text], rows)


def _noise(report: Report, networks) -> Section:
    levels = report.config["noise"]
    rows = [("network", *(f"noise {level:g}, %" for level in levels), "FGSM, %", "PGD, %")]
    for network in networks:
        cells = [report[f"{network}/noise/{level:g}"].text() for level in levels]
        rows.append((LABELS[network], *cells, *(report[f"{network}/attack/{a}"].text() for a in ("fgsm", "pgd"))))
    config = report.config
    text = (
        "Accuracy with Gaussian noise added to pixels in 0..1 (all test images), and under attacks with full "
        f"knowledge of the network itself ({config['attack_images']} images; largest change "
        f"{config['attack_eps']:.4g}, PGD {config['attack_steps']} steps). Nothing here is random, so there is no "
        "gradient to average; an accuracy under PGD above the one under FGSM would show a masked gradient."
    )
    return Section("Noise and attacks", [text], rows)


def _detection(report: Report) -> Section:
    rows = [
        (
            "score",
            *(f"{attack}: {what}" for attack in ("FGSM", "PGD", "adaptive") for what in ("AUC", "found, %")),
            "clean, %",
            "noise, %",
        )
    ]
    names = {result.name for result in report.results}
    for score, label in SCORES.items():
        if f"detection/clean/{score}/rate" not in names:
            continue
        cells = []
        for attack in ("fgsm", "pgd", "adaptive"):
            name = f"detection/{attack}/{score}"
            there = f"{name}/auc" in names
            cells += [report[f"{name}/auc"].text(3), report[f"{name}/rate"].text(1)] if there else ["", ""]
        rows.append((label, *cells, *(report[f"detection/{what}/{score}/rate"].text(1) for what in ("clean", "noise"))))
    accuracies = ", ".join(
        f"{report[f'detection/{a}/accuracy'].text(1)} % under {a}" for a in ("fgsm", "pgd", "adaptive")
    )
    text = [
        "FGSM and PGD are made on the last network and shown to all; the adaptive attack knows all networks: it "
        "ascends their mean cross entropy minus their disagreement. Found: share above the threshold that flags 5 % "
        "of other clean images; clean and noise (0.1): false alarms. A score is worth something only above the last "
        "network's own 1 - max p.",
        f"Accuracy of the last network: {report['detection/clean/accuracy'].text(1)} % on these images, {accuracies}. "
        f"All networks together cost {report['detection/extra_macs'].text()} times the last one's products more.",
    ]
    return Section(
        "Detection by mutual inference",
        text,
        rows,
        [("detection.png", "Area under the ROC curve by attack and score.")],
    )


def _method(report: Report) -> Section:
    config = report.config
    chain = ", ".join(
        f"{n} ({w:g})"
        for n, w in zip([*config["earlier"], config["model"]], [*config["earlier_widths"], 1], strict=True)
    )
    return Section(
        "How it was measured",
        [
            f"Stages {chain} at width {config['width']:g}, data {config['data'] or 'PYACCEL_DATA'}"
            + (f" ({config['train_images']:,} training images)" if config["train_images"] else "")
            + f", shares of the images {', '.join(f'{f:g}' for f in config['fractions'])}, nested and class-balanced; "
            f"seeds {', '.join(map(str, config['seeds']))}. A new optimizer for each stage; later ones start at "
            f"{config['student_lr']:g} of the first learning rate. Widening splits unevenly, inserted layers are "
            "calibrated on a training batch.",
            "Stages, schedule, pruning rule and detectors are this library's definitions: the paper's were not at "
            "hand. The last epoch is reported. What the abstract claims at another scale (as accurate at half the "
            "compute, more robust to noise, better detection) is measured here, not assumed.",
        ],
    )
