"""Published methods, one module each, imported only when asked for.

A recipe module has `Config` (a dataclass; `preset` and `data` are among its fields), `preset(name, data) -> Config`,
`run(config, *, out, resume) -> Report`, and `describe(report) -> list[Section]`: what `report.md` says, the first
section being what the command line prints at the end.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from types import ModuleType

PRESETS = ("smoke", "desk", "paper")


@dataclass(frozen=True)
class Recipe:
    module: str
    paper: str
    summary: str

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


RECIPES = {
    "snn_robustness": Recipe(
        "pyaccel.recipes.snn_robustness", "arXiv 2003.10399", "attacks on spiking networks over time steps and leak, with controls for masking"
    ),
    "hybrid_snn": Recipe(
        "pyaccel.recipes.hybrid_snn", "arXiv 2005.01807", "artificial networks converted to spiking ones, then tuned for few steps"
    ),
    "net2net": Recipe(
        "pyaccel.recipes.net2net", "arXiv 2003.01204", "a network grown stage by stage on more and more images, and pruned on the way"
    ),
    "prune_while_training": Recipe(
        "pyaccel.recipes.prune_while_training", "arXiv 2003.02800", "filters pruned epoch by epoch, without retraining"
    ),
    "crossbar": Recipe(
        "pyaccel.recipes.crossbar", "arXiv 2008.11298", "adversarial robustness of networks on analog crossbars"
    ),
    "bntt": Recipe(
        "pyaccel.recipes.bntt", "arXiv 2010.01729", "spiking networks with batch normalisation through time"
    ),
    "continual_svd": Recipe(
        "pyaccel.recipes.continual_svd", "arXiv 2009.01956", "tasks one after another on shared factors, nothing forgotten"
    ),
    "quanos": Recipe(
        "pyaccel.recipes.quanos", "arXiv 2004.11233", "bit widths of each layer from its sensitivity to adversarial noise"
    ),
    "sram_noise": Recipe(
        "pyaccel.recipes.sram_noise", "arXiv 2011.13392", "bit errors of hybrid 8T-6T memory against adversarial attacks"
    ),
    "source_free": Recipe(
        "pyaccel.recipes.source_free", "arXiv 2007.01524", "domain adaptation to unlabelled images without the source's data"
    ),
}


def find(name: str) -> Recipe:
    """The recipe of this name. ValueError, with the known names and the nearest one, otherwise."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown recipe {name!r}; known are {', '.join(sorted(RECIPES))}{hint}")
