"""From what was learned to the figures of the `continual_svd` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.continual_svd import Config, Learned

LABELS = {
    "svd": "factorised, frozen (the paper's)",
    "individual": "one dense network a task",
    "sequential": "one dense network, trained on",
    "decayed": "control: decay reaches the frozen factors",
}
MEGABYTE = 1e6  # 4 bytes a number, as the published sizes
NOT_AT_HAND = "the paper's figure for this quantity was not at hand"


def forgetting(accuracy: list[list[float]]) -> float:
    """Mean over all tasks but the last of: accuracy at the end of the task minus accuracy at the end of all."""
    last = accuracy[-1]
    return fmean(accuracy[u][u] - last[u] for u in range(len(last) - 1)) if len(last) > 1 else 0.0


def results(
    config: Config, learned: Mapping[tuple[str, int], Learned], published: tuple[float | None, str]
) -> list[Result]:
    """Every figure of a run, over its seeds; `published`: the released model's accuracy, or None, and why."""
    found: list[Result] = []

    def add(name, values, unit, value=None, source=NOT_AT_HAND):
        found.append(summarise(name, values, unit, published=value, published_source=source))

    for method in config.methods:
        runs = [learned[method, seed] for seed in config.seeds]
        add(f"{method}/accuracy", [100 * fmean(run.accuracy[-1]) for run in runs], "%",
            *(published if method == "svd" else (None, NOT_AT_HAND)))  # fmt: skip
        add(f"{method}/forgetting", [100 * forgetting(run.accuracy) for run in runs], "points")
        add(f"{method}/largest_logit_change", [run.drift for run in runs], "1")
        for t in range(len(runs[0].tasks)):
            add(f"{method}/mean_after/{t + 1}", [100 * fmean(run.accuracy[t]) for run in runs], "%")
            for u in range(t + 1):
                add(f"{method}/after/{t + 1}/{u + 1}", [100 * run.accuracy[t][u] for run in runs], "%")
        sizes = [[s[i] for s in (run.sizes for run in runs)] for i in range(3)]
        for name, values in zip(("convolutions", "readouts", "prefixes"), sizes, strict=True):
            add(f"{method}/parameters/{name}", values, "1")
        add(f"{method}/size", [4 * (run.sizes[0] + run.sizes[1]) / MEGABYTE for run in runs], "MB")
        for t, _ in enumerate(runs[0].ranks):
            for layer in range(len(runs[0].ranks[t])):
                add(f"{method}/rank/{t + 1}/{layer + 1}", [run.ranks[t][layer] for run in runs], "1")
        for t, _ in enumerate(runs[0].frozen):
            add(f"{method}/frozen_penalty/{t + 1}", [run.frozen[t] for run in runs], "1")
        if runs[0].macs:
            add(f"{method}/macs/merged", [run.macs[0] for run in runs], "multiply-accumulates per image")
            add(f"{method}/macs/two_convolutions", [run.macs[1] for run in runs], "multiply-accumulates per image")
        add(f"{method}/training_time", [run.seconds for run in runs], "s", source="times are of this machine")
    if {"svd", "individual"} <= set(config.methods):
        ratio = [sum(learned["individual", s].sizes[:2]) / sum(learned["svd", s].sizes[:2]) for s in config.seeds]
        add("individual_over_svd/size", ratio, "1")
        gap = [
            100 * (fmean(learned["svd", s].accuracy[-1]) - fmean(learned["individual", s].accuracy[-1]))
            for s in config.seeds
        ]
        add("svd_minus_individual/accuracy", gap, "points")
    return found


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    methods = list(report.config["methods"])
    matrices = [_matrix(report, method) for method in methods if method != "individual"]
    return [_accuracy(report, methods), *([_ranks(report)] if "svd" in methods else []), *matrices, _method(report)]


def _tasks(report: Report, method: str) -> int:
    return sum(r.name.startswith(f"{method}/mean_after/") for r in report.results)


def _accuracy(report: Report, methods: list[str]) -> Section:
    rows = [
        (
            "method",
            "mean accuracy, %",
            "forgetting, points",
            "largest logit change",
            "size, MB",
            "training, s",
            "published, %",
        )
    ]
    for method in methods:
        accuracy = report[f"{method}/accuracy"]
        rows.append((LABELS[method], accuracy.text(), report[f"{method}/forgetting"].text(),
                     f"{report[f'{method}/largest_logit_change'].value:.3g}", report[f"{method}/size"].text(4),
                     f"{report[f'{method}/training_time'].value:.0f}",
                     "" if accuracy.published is None else f"{accuracy.published:.2f}"))  # fmt: skip
    text = [
        "Mean over all tasks at the end, the task of each image being given. Forgetting: accuracy at the end of a task "
        "minus accuracy at the end of all, mean over tasks. Logit change: of any test image between the same two "
        "moments; 0 means equal to the last bit."
    ]
    if "individual_over_svd/size" in {r.name for r in report.results}:
        text.append(
            f"One network a task takes {report['individual_over_svd/size'].text()} times the numbers; accuracy against "
            f"it: {report['svd_minus_individual/accuracy'].text()} points."
        )
    if "svd" in methods:
        text.append(f"Published: {report['svd/accuracy'].published_source}.")
    if report[f"{methods[0]}/accuracy"].n == 1:
        text.append("One seed: no spread is known, and differences of a point mean little.")
    return Section("Accuracy, forgetting, size", text, rows, [("accuracy.png", "Mean accuracy on the tasks so far.")])


def _ranks(report: Report) -> Section:
    layers = sum(r.name.startswith("svd/rank/1/") for r in report.results)
    rows = [("after task", *(f"layer {i + 1}" for i in range(layers)), "penalty of what is frozen")]
    for t in range(1, _tasks(report, "svd") + 1):
        ranks = (report[f"svd/rank/{t}/{i + 1}"].text(1) for i in range(layers))
        rows.append((str(t), *ranks, report[f"svd/frozen_penalty/{t}"].text(2)))
    parts = {name: report[f"svd/parameters/{name}"].value for name in ("convolutions", "readouts", "prefixes")}
    merged, two = (report[f"svd/macs/{form}"].value for form in ("merged", "two_convolutions"))
    text = [
        f"Cumulative ranks R_t. At the end the factors hold {parts['convolutions']:,.0f} numbers, the read-outs "
        f"{parts['readouts']:,.0f}; one integer a layer and task ({parts['prefixes']:,.0f}) is not counted in the "
        f"size, "
        "as in the published figures; neither are spare slots.",
        f"The last task costs {merged:,.0f} multiply-accumulates an image from merged weights and {two:,.0f} as two "
        "convolutions: merged weights are what to serve from wherever ranks have outgrown the full rank.",
        "Penalty of what is frozen: sum over layers of P(N) + P(C), a constant in the loss of the next task. It grows "
        "a little once ranks outgrow the layers; where a few tasks make it several, they were too short, or pruned "
        "too little: factors were frozen that still hold their random start.",
    ]
    return Section("Ranks", text, rows, [("ranks.png", "Cumulative rank of every layer (first seed).")])


def _matrix(report: Report, method: str) -> Section:
    tasks = _tasks(report, method)
    rows = [("after task", *(str(u) for u in range(1, tasks + 1)))]
    for t in range(1, tasks + 1):
        cells = (f"{report[f'{method}/after/{t}/{u}'].value:.1f}" if u <= t else "" for u in range(1, tasks + 1))
        rows.append((str(t), *cells))
    plots = [(f"matrix_{method}.png", "Accuracy (%) on each task (columns) after each task (rows), first seed.")]
    return Section(f"Accuracy on each task after each task, %: {LABELS[method]}", [], rows, plots)


def _method(report: Report) -> Section:
    c = report.config
    what = {
        "split": f"{c['tasks']} tasks of contiguous classes",
        "mini_imagenet": f"miniImageNet, {c['tasks']} tasks",
        "sets": f"one task a data set: {', '.join(c['sets'])}",
    }[c["protocol"]]
    return Section(
        "How it was measured",
        [
            f"Network {c['model']}, width {c['width']:g}; {what}; data {c['data'] or 'PYACCEL_DATA'}; {c['epochs']} "
            f"epochs a task, Adam {c['lr']:g} (dense networks {c['dense_lr'] or c['lr']:g}), batch {c['batch_size']}, "
            f"lambda_s {c['sparsity']:g}, lambda_o {c['orthogonality']:g}, e {c['energy']:g}, growth {c['growth']}; "
            f"seeds {', '.join(map(str, c['seeds']))}, "
            "each with its own order of the tasks; tables are means over seeds, by place in the order.",
            "The last epoch of each task is reported, on every test image once. The published code looks at the test "
            "set "
            "after each epoch too and selects nothing on it. Dense networks have no biases in their convolutions; the "
            "published baseline has (0.16 % of its numbers).",
        ],
    )
