"""Selection for `sram_noise`: which sites to make noisy and how, on images that are neither trained nor reported on.

The procedure of 2011.13392 is not known beyond "select appropriate layers and their corresponding configurations"; this
one is the library's: single sites first, then the good ones together, greedily.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyaccel.recipes.sram_noise_bench import WORD_BITS, Bench, Cells, Placement, Setting


@dataclass(frozen=True)
class Measured:
    """Accuracies of one placement, 0..1, one for each chip: on clean images, and under the screening attack."""

    clean: Sequence[float]
    attacked: Sequence[float]
    mu: float = 0.0

    @property
    def clean_mean(self) -> float:
        return statistics.fmean(self.clean)

    @property
    def attacked_mean(self) -> float:
        return statistics.fmean(self.attacked)

    def within(self, base: Measured, tolerance: float) -> bool:
        """Whether clean accuracy falls by at most `tolerance`, 0..1."""
        return base.clean_mean - self.clean_mean <= tolerance

    def gains(self, base: Measured) -> bool:
        """Whether accuracy under attack rises by more than two standard errors of the mean over chips."""
        error = statistics.stdev(self.attacked) / math.sqrt(len(self.attacked)) if len(self.attacked) > 1 else 0.0
        return self.attacked_mean - base.attacked_mean > 2 * error


@dataclass(frozen=True)
class Screened:
    site: str
    setting: Setting
    measured: Measured


Measure = Callable[[Placement], Measured]


def selection_measure(
    bench: Bench, cells: Cells, x: Tensor, y: Tensor, *, eps: float, repeats: int, first_chip: int
) -> Measure:
    """Accuracy of a placement on clean images and under FGSM of attacker A (one draw of the noisy model)."""

    def measure(placement: Placement) -> Measured:
        # Nothing is drawn in the baseline: one repeat says all.
        count = repeats if placement else 1
        key = {
            "part": "selection", "placement": sorted(placement.items()), "eps": eps, "repeats": count,
            "images": len(y), "chip": first_chip,
        }  # fmt: skip
        return Measured(**cells.get(key, lambda: now(placement, count)))

    def now(placement: Placement, count: int) -> dict:
        clean, attacked, mu = [], [], 0.0
        for chip in range(first_chip, first_chip + count):
            bench.place(placement, chip)
            clean.append(bench.accuracy(x, y))
            attacked += bench.fgsm(x, y, [eps])
            if len(placement) == 1 and chip == first_chip:
                mu = bench.magnitude(*placement, x)
        return {"clean": clean, "attacked": attacked, "mu": mu}

    return measure


def screen(measure: Measure, sites: Iterable[str], settings: Sequence[Setting]) -> list[Screened]:
    """Every site with every setting, alone."""
    return [Screened(site, setting, measure({site: setting})) for site in sites for setting in settings]


def retained(screened: Sequence[Screened], base: Measured, tolerance: float) -> list[Screened]:
    """Of each site the setting with the highest accuracy under attack among those that gain within the tolerance;
    sites with the largest gain first."""
    best: dict[str, Screened] = {}
    for cell in screened:
        good = cell.measured.within(base, tolerance) and cell.measured.gains(base)
        if good and (cell.site not in best or cell.measured.attacked_mean > best[cell.site].measured.attacked_mean):
            best[cell.site] = cell
    return sorted(best.values(), key=lambda cell: cell.measured.attacked_mean, reverse=True)


def combine(
    measure: Measure, kept: Sequence[Screened], base: Measured, tolerance: float, *, neighbours: bool = False
) -> dict[str, Setting]:
    """One pass over the retained sites: each is added with its setting if that raises the accuracy under attack and
    keeps clean accuracy within the tolerance. neighbours: one 8T bit more and one less are tried as well."""
    chosen: dict[str, Setting] = {}
    best = base
    for cell in kept:
        n8t, p = cell.setting
        options = [cell.setting]
        if neighbours and chosen:
            options += [(n, p) for n in (n8t - 1, n8t + 1) if 0 <= n < WORD_BITS]
        trials = [(setting, measure({**chosen, cell.site: setting})) for setting in options]
        trials = [(setting, trial) for setting, trial in trials if trial.within(base, tolerance)]
        if trials:
            setting, trial = max(trials, key=lambda found: found[1].attacked_mean)
            if trial.attacked_mean > best.attacked_mean:
                chosen[cell.site], best = setting, trial
    return chosen


def everywhere(screened: Sequence[Screened], base: Measured, tolerance: float) -> dict[str, Setting]:
    """For the ablations: every site with its best setting within the tolerance, whether it gains or not; a site without
    one with the setting that costs the least clean accuracy."""
    found: dict[str, Setting] = {}
    for site in dict.fromkeys(cell.site for cell in screened):
        own = [cell for cell in screened if cell.site == site]
        good = [cell for cell in own if cell.measured.within(base, tolerance)]
        best = (
            max(good, key=lambda cell: cell.measured.attacked_mean)
            if good
            else max(own, key=lambda cell: cell.measured.clean_mean)
        )
        found[site] = best.setting
    return found
