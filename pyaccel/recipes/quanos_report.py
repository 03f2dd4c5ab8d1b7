"""From what was measured to the figures of the `quanos` report, and from those figures to its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyaccel.hardware import MacEnergy, compression, efficiency
from pyaccel.recipes.quanos_ans import rank_correlation
from pyaccel.recipes.report import Report, Result, Section, summarise

if TYPE_CHECKING:
    from pyaccel.recipes.quanos import Config, Measurement

UNKNOWN = "the paper's tables were not at hand: only its abstract"
OURS = "this library's own definition"
MODES = {"subword_parallel": "SP", "data_gating": "DG"}


def results(config: Config, measured: Mapping[tuple[str, int], Measurement]) -> list[Result]:
    """Every figure of a run, over its seeds."""
    found: list[Result] = []

    def add(name, values, unit, source=UNKNOWN):
        found.append(summarise(name, values, unit, published_source=source))

    for network in config.networks:
        runs = [measured[network, seed] for seed in config.seeds]
        add(f"{network}/accuracy", [100 * run.accuracy for run in runs], "%")
        for attack in runs[0].attacked:
            add(f"{network}/{attack}", [100 * run.attacked[attack] for run in runs], "%")
        for eps in config.pgd_eps:
            add(f"{network}/worst_{eps:g}", [100 * worst(run, eps) for run in runs], "%")
            losses = [100 * (run.attacked["clean"] - worst(run, eps)) for run in runs]
            add(f"{network}/loss_{eps:g}", losses, "points")
        _widths(add, network, runs, config)
        for eps in config.ans_eps:
            _stability(add, network, runs, config, eps)
        add(f"{network}/training_time", [run.seconds for run in runs], "s", "times are of this machine")
    return found


def worst(run: Measurement, eps: float) -> float:
    """The least accuracy over all attacks of strength eps, transfer and unclipped gradients among them."""
    return min(v for name, v in run.attacked.items() if name.endswith(f"_{eps:g}") and not name.startswith("noise"))


def _widths(add, network, runs, config) -> None:
    for i, layer in enumerate(runs[0].layers):
        add(f"{network}/bits/{layer.name}", [run.layers[i].weight_bits for run in runs], "bits", OURS)
    for kind, size in (("weights", lambda c: c.weights), ("macs", lambda c: c.macs)):
        means = [sum(size(c) * c.weight_bits for c in run.layers) / sum(map(size, run.layers)) for run in runs]
        add(f"{network}/mean_bits_by_{kind}", means, "bits")
    for reference in (32, 16, 8):
        add(f"{network}/compression_{reference}", [compression(run.layers, reference) for run in runs], "1")
    weights = [sum(c.weights for c in run.layers) for run in runs]
    add(
        f"{network}/stored_compression_32",
        [4 * n / run.packed_bytes for n, run in zip(weights, runs, strict=True)],
        "1",
    )
    if network.startswith("float32"):
        return  # no integer unit runs it
    for mode in MODES:
        energy = MacEnergy(mode=mode, alpha=config.alpha)
        for baseline in (16, 8):
            gains = [efficiency(run.layers, energy, baseline) for run in runs]
            add(f"{network}/efficiency_{mode}_{baseline}", gains, "1", OURS)


def _stability(add, network, runs, config, eps) -> None:
    start = config.assignments[-1] - 1
    pairs = [(run.sensitivity[eps][start], run.sensitivity[eps][-1]) for run in runs]
    for layer in pairs[0][0]:
        add(f"{network}/ans_{eps:g}_at_assignment/{layer}", [first[layer] for first, _ in pairs], "1")
        add(f"{network}/ans_{eps:g}_at_end/{layer}", [last[layer] for _, last in pairs], "1")
    same = [rank_correlation([*first.values()], [last[name] for name in first]) for first, last in pairs]
    add(f"{network}/ans_{eps:g}_rank_correlation", same, "1")
    if eps != config.ans_eps[0]:
        decided = [run.sensitivity[config.ans_eps[0]][start] for run in runs]
        pairs = zip(decided, (first for first, _ in pairs), strict=True)
        across = [rank_correlation([*a.values()], [b[name] for name in a]) for a, b in pairs]
        add(f"{network}/ans_{config.ans_eps[0]:g}_against_{eps:g}_rank_correlation", across, "1")


def describe(report: Report) -> list[Section]:
    """The sections of report.md, made from the report alone."""
    networks = list(report.config["networks"])
    return [
        _accuracy(report, networks),
        _claims(report, networks),
        _attacks(report, networks),
        _masking(report, networks),
        _bits(report, networks),
        _cost(report, networks),
        _sensitivity(report, networks),
        _method(report),
    ]


def _eps(report: Report) -> str:
    """The strength whose worst case is the headline: the largest of PGD's."""
    return f"{max(report.config['pgd_eps']):g}"


def _accuracy(report: Report, networks: list[str]) -> Section:
    eps = _eps(report)
    rows = [
        (
            "network",
            "CA, %",
            f"AA {eps}/255, %",
            "AL, points",
            "mean bits",
            "x less memory (32 bits)",
            "x less energy (8 bits)",
            "seeds",
        )
    ]
    for network in networks:
        saved = "" if network.startswith("float32") else report[f"{network}/efficiency_subword_parallel_8"].text()
        rows.append(
            (
                network,
                report[f"{network}/accuracy"].text(),
                report[f"{network}/worst_{eps}"].text(),
                report[f"{network}/loss_{eps}"].text(),
                report[f"{network}/mean_bits_by_weights"].text(),
                report[f"{network}/compression_32"].text(),
                saved,
                str(report[f"{network}/accuracy"].n),
            )
        )
    text = [
        f"CA: accuracy on every test image, quantised networks on integers. AA: the least accuracy over all attacks of "
        f"{eps}/255 (FGSM, PGD, unclipped gradient, transfer) on {_count(report)}. AL: CA on the same images minus AA. "
        "Energy: subword parallel, a model.",
    ]
    if report[f"{networks[0]}/accuracy"].n == 1:
        text.append("One seed: no spread is known, and differences of a point mean little.")
    plots = [
        ("energy.png", "Accuracy against energy: filled, clean; open, under the strongest attack."),
        ("epsilon.png", "Accuracy against the strength of the attack."),
    ]
    return Section("Accuracy, robustness, cost", text, rows, plots)


def _count(report: Report) -> str:
    n = report.config["attack_images"]
    return "all test images" if n is None else f"{n} test images"


def _claims(report: Report, networks: list[str]) -> Section:
    """The abstract's claims, rule by rule: as measured, for or against."""
    eps = _eps(report)
    rows = [
        (
            "network",
            "against",
            "CA, points",
            f"AA {eps}/255, points",
            "compression 32",
            "less energy than 8 bits (SP)",
            "all four",
        )
    ]
    for network in networks:
        rule, _, defence = network.partition("+")
        if rule not in ("inverse", "proportional"):
            continue
        for other in (
            name
            for base in ("bits8", f"iso_{rule}")
            for name in [base + f"+{defence}" * bool(defence)]
            if name in networks
        ):
            clean, attacked = (
                (report[f"{network}/{what}"].value - report[f"{other}/{what}"].value)
                for what in ("accuracy", f"worst_{eps}")
            )
            smaller, saved = (
                report[f"{network}/{what}"].value for what in ("compression_32", "efficiency_subword_parallel_8")
            )
            met = clean >= -1 and attacked >= 0 and smaller > 5 and saved > 2
            rows.append(
                (
                    network,
                    other,
                    f"{clean:+.2f}",
                    f"{attacked:+.2f}",
                    f"{smaller:.2f}",
                    f"{saved:.2f}",
                    "yes" if met else "no",
                )
            )
    text = [
        "The abstract claims, on CIFAR-10 and CIFAR-100, 3 to 4 points more robustness than an 8-bit "
        "network, more than 5x "
        "compression and more than 2x energy saving at the same accuracy; and at the same compression more "
        "robustness than a "
        "homogeneous network. No table of the paper was at hand, so no figure of its own stands here. All "
        "four: accuracy within 1 "
        "point of the other network, robustness not below it, compression above 5 (against 32 bits), energy "
        "saving above 2.",
    ]
    return Section("Against the abstract's claims", text, rows if len(rows) > 1 else ())


def _attacks(report: Report, networks: list[str]) -> Section:
    names = [f"fgsm_{e:g}" for e in report.config["fgsm_eps"]] + [f"pgd_{e:g}" for e in report.config["pgd_eps"]]
    rows = [("network", "no attack", *(name.upper().replace("_", " ") for name in names))]
    rows += [(n, *(report[f"{n}/{name}"].text() for name in ("clean", *names))) for n in networks]
    text = [
        f"Accuracy in % on {_count(report)}. FGSM and PGD ({report.config['pgd_steps']} steps, random start) "
        "on each network "
        "itself, through the straight-through gradient of its quantisers; strengths in 1/255."
    ]
    return Section("Attacks", text, rows)


def _masking(report: Report, networks: list[str]) -> Section:
    rows = [("network, eps", "PGD", "unclipped gradient", "transfer from float32", "noise (true gradient)")]
    signs = []
    for network in networks:
        for eps in report.config["pgd_eps"]:
            kinds = ["pgd", "noise"] if network == "float32" else ["pgd", "unclipped", "transfer", "noise"]
            values = {kind: report[f"{network}/{kind}_{eps:g}"] for kind in kinds}
            cells = [values[k].text() if k in values else "" for k in ("pgd", "unclipped", "transfer", "noise")]
            rows.append((f"{network}, {eps:g}/255", *cells))
            signs += _signs(report, network, eps, {kind: v.value for kind, v in values.items()})
    text = [
        "A quantiser's true gradient is zero, so an attacker who takes it can only add noise: the last "
        "column is what such "
        "an attack would report as robustness. Signs of a masked gradient are a transferred, an unclipped or a "
        "single-step attack that does more harm than PGD on the network itself.",
        *(signs or ["No such sign in this run."]),
    ]
    return Section("Controls for masked gradients", text, rows)


def _signs(report: Report, network: str, eps: float, values: Mapping[str, float]) -> list[str]:
    values = dict(values)
    if eps in report.config["fgsm_eps"]:
        values["FGSM"] = report[f"{network}/fgsm_{eps:g}"].value
    stronger = [kind for kind in ("FGSM", "unclipped", "transfer") if values.get(kind, 101) < values["pgd"] - 1]
    return (
        [
            f"**{network}, {eps:g}/255: {', '.join(stronger)} does more harm than PGD (by over a point): the "
            "white-box figure "
            "is too good; AA counts the stronger attack.**"
        ]
        if stronger
        else []
    )


def _layers(report: Report, network: str) -> list[str]:
    start = f"{network}/bits/"
    return [r.name.removeprefix(start) for r in report.results if r.name.startswith(start)]


def _bits(report: Report, networks: list[str]) -> Section:
    mixed = [n for n in networks if n.startswith(("inverse", "proportional", "iso_"))]
    rows = [("layer", *mixed)]
    rows += [
        (layer, *(_mean(report[f"{n}/bits/{layer}"].text(1)) for n in mixed)) for layer in _layers(report, networks[0])
    ]
    config = report.config
    io = (
        "The rule assigns every layer."
        if config["io_bits"] is None
        else f"First and last layer have {config['io_bits']} bits, outside the rule."
    )
    text = [
        f"Weights and activations of a layer, means over seeds; k_init {config['initial_bits']}, k_min "
        f"{config['least_bits']}. {io}"
    ]
    return (
        Section("Bits by layer", text, rows, [("bits.png", "Bits by layer.")])
        if mixed
        else Section("Bits by layer", text)
    )


def _mean(text: str) -> str:
    return text.replace(" ± 0.0", "").removesuffix(".0")


def _cost(report: Report, networks: list[str]) -> Section:
    rows = [
        (
            "network",
            "mean bits by weights",
            "by MACs",
            "compression 32",
            "16",
            "8",
            "stored 32",
            "SP 16",
            "SP 8",
            "DG 16",
            "DG 8",
        )
    ]
    for n in networks:
        cells = [
            report[f"{n}/{name}"].text()
            for name in (
                "mean_bits_by_weights",
                "mean_bits_by_macs",
                "compression_32",
                "compression_16",
                "compression_8",
                "stored_compression_32",
            )
        ]
        gains = [f"efficiency_{mode}_{baseline}" for mode in MODES for baseline in (16, 8)]
        cells += [""] * 4 if n.startswith("float32") else [report[f"{n}/{gain}"].text() for gain in gains]
        rows.append((n, *cells))
    labels = "; ".join(
        f"{short}: {MacEnergy(mode=mode, alpha=report.config['alpha']).label}" for mode, short in MODES.items()
    )
    text = [
        "Compression of the weights against 32, 16 and 8 bits, by nominal widths; stored: as packed on disk, "
        "where a width lives "
        "in the next of 1, 2, 4, 8, 16 bits. Efficiency: energy of the multiply-accumulates of the same "
        "network at 16 or 8 bits "
        f"over its own. Energies are a model, not a measurement ({labels}); a width between 2, 4, 8 and 16 "
        "bits runs subword "
        "parallel at the next larger one. Memory access is not counted.",
    ]
    return Section("Compression and energy", text, rows)


def _sensitivity(report: Report, networks: list[str]) -> Section:
    eps, *others = (f"{e:g}" for e in report.config["ans_eps"])
    shown = [n for n in networks if n in ("inverse", "proportional", "bits16", "bits8")] or networks[:1]
    rows = [("layer", "at assignment", *(f"{n}, end" for n in shown))]
    for layer in _layers(report, shown[0]):
        rows.append(
            (
                layer,
                report[f"{shown[0]}/ans_{eps}_at_assignment/{layer}"].text(3),
                *(report[f"{n}/ans_{eps}_at_end/{layer}"].text(3) for n in shown),
            )
        )
    names = [f"{n} {report[f'{n}/ans_{eps}_rank_correlation'].text()}" for n in shown]
    text = [
        f"Adversarial noise sensitivity, {report.config['ans_ratio']}, FGSM {eps}/255, "
        f"{report.config['ans_images']} training "
        "images. Whether an early answer holds: rank correlation (Spearman) of the layers between assignment and end: "
        f"{'; '.join(names)}."
    ]
    for other in others:
        across = report[f"{shown[0]}/ans_{eps}_against_{other}_rank_correlation"].text()
        text.append(f"Rank correlation between {eps}/255 and {other}/255 at assignment: {across}.")
    return Section("Sensitivity", text, rows, [("ans.png", "Sensitivity by layer and epoch (first seed).")])


def _method(report: Report) -> Section:
    config = report.config
    return Section(
        "How it was measured",
        [
            f"Network {config['model']}, width {config['width']:g}, data {config['data'] or 'PYACCEL_DATA'}"
            + (f" ({config['train_images']:,} training images)" if config["train_images"] else "")
            + f", {config['epochs']} epochs, widths assigned after {config['initial_epochs']}"
            + (f", {config['rounds']} rounds" if config["rounds"] > 1 else "")
            + f", seeds {', '.join(map(str, config['seeds']))}. All networks of a seed go on from the same first "
            "epochs, in which "
            f"every layer has {config['initial_bits']} bits, with the same batches, momentum and learning rate.",
            "Rules, ANS's normalisation, eps, k_init, k_min, the width of the first and last layer and the "
            "energy model are this "
            "library's definitions: the paper's text was not at hand. Activation ranges are averages over "
            "training, frozen in "
            "evaluation, so an attack cannot move them. The last epoch is reported.",
        ],
    )
