"""The attacks on stored parameters that `sram_noise` measures, and accuracy against bit error rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import attacks
from pyaccel.hardware import SramConfig
from pyaccel.recipes.sram_noise_bench import WORD_BITS, Bench, Cells

Figures = dict[str, Any]


def judged(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Figures:
    """Accuracy, mean largest softmax over the misclassified images (None where there are none) and over all."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(batch_size)])
    accuracy, wrong, everything = attacks.confidence(lambda _: logits, x, y)
    return {"accuracy": accuracy, "confidence_wrong": wrong if accuracy < 1 else None, "confidence": everything}


def parameter_attacks(
    model: nn.Module, batch: tuple[Tensor, Tensor], x: Tensor, y: Tensor, cells: Cells, *,
    n8t: int, batch_size: int, voltage_p: Sequence[float], surgical_rounds: Sequence[int], budgets: Sequence[int],
    progressive_rounds: int, chips: Sequence[int],
) -> dict[str, Figures]:  # fmt: skip
    """What each attack on 8-bit weights with `n8t` safe bits does to the accuracy on (x, y), looking at `batch` alone.

    Names: "none" (quantised, not attacked), "voltage/p=...", "surgical/rounds=..." and "surgical/budget=...", each with
    its "random/..." (about as many flips, drawn from the same bits of all layers), "progressive".
    Draws are repeated over `chips`, and their figures averaged.
    """
    bank = SramConfig(WORD_BITS, n8t=n8t)
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    bits = bank.n6t * sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))

    def attack(**options) -> Figures:
        result = attacks.flip_parameters(model, batch, bank, **options)
        return judged(result.model, x, y, batch_size) | {"flips": result.total_flips}

    def drawn(**options) -> Figures:
        return averaged([attack(attacker="voltage", seed=chip, **options) for chip in chips])

    def cell(name: str, measure, **key) -> Figures:
        key = {"part": "parameters", "n8t": n8t, "attack": name, "images": len(y), "batch": len(batch[1])} | key
        return cells.get(key, measure)

    found = {"none": cell("none", lambda: attack(rounds=0))}
    for p in voltage_p:
        found[f"voltage/p={p:g}"] = cell("voltage", partial(drawn, p=p), p=p, chips=list(chips))
    surgical = [(f"rounds={n}", {"rounds": n}) for n in surgical_rounds] + [
        (f"budget={n}", {"budget": n}) for n in budgets
    ]
    for name, options in surgical:
        found[f"surgical/{name}"] = cell("surgical", partial(attack, **options), **options)
        p = min(1.0, found[f"surgical/{name}"]["flips"] / bits)
        found[f"random/{name}"] = cell("random", partial(drawn, budget=layers, p=p), p=p, chips=list(chips))
    if progressive_rounds:
        found["progressive"] = cell(
            "progressive", lambda: attack(attacker="progressive", rounds=progressive_rounds), rounds=progressive_rounds
        )
    return found


def averaged(figures: Sequence[Figures]) -> Figures:
    """Means, and the deviation of the accuracy over draws. No mean over the misclassified where a draw has none."""
    found: Figures = {}
    for name in figures[0]:
        values = [one[name] for one in figures]
        found[name] = None if None in values else statistics.fmean(values)
    found["noise_std"] = statistics.stdev([one["accuracy"] for one in figures]) if len(figures) > 1 else 0.0
    return found


def error_rates(
    bench: Bench, cells: Cells, x: Tensor, y: Tensor, *, kind: str, n8t: int, p: float, chips: Sequence[int]
) -> list[float]:
    """Accuracy with every site of a kind ("weight", "activation") failing at bit error rate p; one value a chip."""
    placement = {site: (n8t, p) for site in bench.memories if site.endswith(f"/{kind}")}

    def measure() -> list[float]:
        found = []
        for chip in chips:
            bench.place(placement, chip)
            found.append(bench.accuracy(x, y))
        return found

    key = {"part": "sweep", "kind": kind, "n8t": n8t, "p": p, "images": len(y), "chips": list(chips)}
    return cells.get(key, measure)
