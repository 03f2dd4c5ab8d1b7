"""What `sram_noise` reports on: accuracy of the placements on test images, against attackers A, B and C."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from pyaccel.recipes.classifier import say
from pyaccel.recipes.sram_noise_bench import Bench, Cells, Placement, Setting
from pyaccel.recipes.sram_noise_parameters import Figures
from pyaccel.recipes.sram_noise_search import Measured, Screened

if TYPE_CHECKING:
    from pyaccel.recipes.sram_noise import Config

LEVELS = ("A", "B", "C")


@dataclass
class Study:
    """What was measured of one network and seed. Accuracies are shares of the test images, 0..1.

    attacked: by (placement, attack, level, eps), one value a chip; placement "none" is the baseline.
    """

    float_accuracy: float
    base: Measured
    screened: list[Screened]
    placements: dict[str, dict[str, Setting]]
    clean: dict[str, list[float]] = field(default_factory=dict)
    attacked: dict[tuple[str, str, str, float], list[float]] = field(default_factory=dict)
    parameters: dict[int, dict[str, Figures]] = field(default_factory=dict)
    sweep: dict[tuple[str, int, float], list[float]] = field(default_factory=dict)


def evaluate(
    config: Config, bench: Bench, cells: Cells, found: Study, x: Tensor, y: Tensor, chips: Sequence[int]
) -> None:
    """Clean and adversarial accuracy of the baseline and of every placement, chip by chip, into `found`.

    A: the gradient of one draw of the noisy model. B: of the model without failures. C: the mean over `samples` draws.
    Attacked images are then classified with a draw that the attacker did not see; failing weights are the same chip.
    """
    for name, placement in {"none": {}, **found.placements}.items():
        if name != "none" and not placement:  # the baseline under another name
            found.clean[name] = found.clean["none"]
            found.attacked.update({(name, *key[1:]): v for key, v in found.attacked.items() if key[0] == "none"})
            continue
        for chip in chips if placement else chips[:1]:
            bench.place(placement, chip)
            key = {"part": "test", "placement": sorted(placement.items()), "chip": chip, "images": len(y)}
            clean = cells.get(key | {"attack": "none"}, partial(bench.accuracy, x, y))
            found.clean.setdefault(name, []).append(clean)
            for level in LEVELS:
                gradient, samples = gradient_of(level, placement, config.samples)
                how = key | {"gradient": gradient, "samples": samples}
                for eps, value in zip(
                    config.epsilons,
                    cells.get(
                        how | {"attack": "fgsm", "eps": config.epsilons},
                        partial(bench.fgsm, x, y, config.epsilons, gradient, samples),
                    ),
                    strict=True,
                ):
                    found.attacked.setdefault((name, "fgsm", level, eps), []).append(value)
                for eps in config.pgd_epsilons if name in ("none", "chosen") else ():
                    few = len(y[: config.pgd_images])
                    value = cells.get(
                        how | {"attack": "pgd", "eps": eps, "steps": config.pgd_steps, "images": few},
                        partial(bench.pgd, x[:few], y[:few], eps, config.pgd_steps, gradient, samples),
                    )
                    found.attacked.setdefault((name, "pgd", level, eps), []).append(value)
        mean = statistics.fmean(found.attacked[name, "fgsm", "C", config.screening_eps])
        say(f"  noise in {name}: clean {statistics.fmean(found.clean[name]):.1%}, against attacker C {mean:.1%}")


def gradient_of(level: str, placement: Placement, samples: int) -> tuple[str, int]:
    """What attacker `level` differentiates, and how many draws of it. Nothing is drawn anew where only weights fail, so
    the mean over draws is the one draw; and without failures all three attackers are one."""
    if level == "B" and placement:
        return "clean", 1
    if level == "C" and any(site.endswith("/activation") for site in placement):
        return "averaged", samples
    return "noisy", 1
