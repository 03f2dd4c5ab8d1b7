"""What the `crossbar` recipe measures of one trained network: attacks in software and on chips, controls, calibrations.

Every figure is a file of the run folder, under the name of all that it depends on, so that a run that was killed goes
on with the next figure.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import attacks
from pyaccel.data import Batch
from pyaccel.hardware import CrossbarConfig
from pyaccel.hardware.mapping import gain
from pyaccel.nn.analog import stream_of
from pyaccel.surgery import analog_layers, reestimate_batchnorm, to_crossbars
from pyaccel.training import distributed
from pyaccel.training.durable import replace_text

if TYPE_CHECKING:
    from pyaccel.recipes.crossbar import Config

Wrap = Callable[[nn.Module], nn.Module]
T = TypeVar("T")


@dataclass
class Measured:
    """Figures of one trained network, accuracies 0..1. `chips`: one value a chip, by setup and figure.

    Figures of `software`: "clean", "no_gradient", and one an attack; of a chip: "clean", "no_gradient", "slope",
    "residue", "gaussian" (its clean control), and MODE/ATTACK with the modes of `MODES`.
    """

    software: dict[str, float] = field(default_factory=dict)
    chips: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    study: dict[str, dict[str, float]] = field(default_factory=dict)


MODES = {
    "SH": "attack made on the software, on the chip",
    "HH": "made on the chip, on the same chip",
    "HX": "made on the chip, on another chip",
    "SG": "made on the software, on the Gaussian control",
    "GG": "made on the Gaussian control, on itself",
}


class Cells:
    """Figures already measured, one file each. `weights`: fingerprint of the network that they belong to; figures of
    other weights are measured anew."""

    def __init__(self, folder: Path, weights: str):
        self.folder, self.weights = folder, weights

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure of this name: from its file, else `measure()`, which is then kept."""
        file = self.folder / f"{name}.json"
        if file.exists():
            try:
                kept = json.loads(file.read_text(encoding="utf-8"))
                if kept["weights"] == self.weights:
                    return kept["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: not a figure as it was written ({error}); remove this file") from error
        value = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps({"weights": self.weights, "value": value}) + "\n")
        return value


def fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Attack:
    """`eps`: radius in units of pixels in [0, 1]; `name` has PGD's in 1/255."""

    name: str
    eps: float
    step: float | None = None  # None: FGSM
    steps: int = 1


def attacks_of(config: Config) -> list[Attack]:
    fgsm = [Attack(f"fgsm-{eps:g}", eps) for eps in config.fgsm_eps]
    return fgsm + [Attack(f"pgd-{eps:g}", eps / 255, config.pgd_step / 255, config.pgd_steps) for eps in config.pgd_eps]


def craft(model: nn.Module, attack: Attack, batches: Sequence[Batch]) -> list[Tensor]:
    """Attacked images; PGD starts at the same points whatever the model."""
    if attack.step is None:
        return [attacks.fgsm(model, b.images, b.labels, attack.eps) for b in batches]
    return [
        attacks.pgd(model, b.images, b.labels, attack.eps, attack.step, attack.steps, seed=number)
        for number, b in enumerate(batches)
    ]


def accuracy_on(model: nn.Module, images: Iterable[Tensor], batches: Iterable[Batch]) -> float:
    right = total = 0
    with torch.inference_mode():
        for x, batch in zip(images, batches, strict=True):
            right += int((model(x).argmax(1) == batch.labels).sum())
            total += len(batch.labels)
    return right / total


def without_gradient(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of images whose loss has a gradient of exactly zero: no attack by gradients can move them."""
    dead = total = 0
    for batch in batches:
        leaf = batch.images.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), batch.labels, reduction="sum"), leaf)
        dead += int((grad.flatten(1) == 0).all(1).sum())
        total += len(batch.labels)
    return dead / total


def on_chip(
    network: nn.Module, wrap: Wrap, crossbars: CrossbarConfig, number: int, images: Sequence[Tensor]
) -> nn.Module:
    """The network on chip `number`, wrapped; `images`: for batch statistics where the calibration measures them."""
    mapped = to_crossbars(network, crossbars, chip=number)
    whole = wrap(mapped)
    if crossbars.calibration == "bn_reestimate":
        reestimate_batchnorm(whole, images)
    return whole


def gains(mapped: nn.Module) -> dict[str, tuple[float, float]]:
    """Slope and residue of every layer: the least-squares gain of the effective on the wanted weights, and the rms of
    what is left over the rms of the scaled weights (specification, section 5)."""
    found = {}
    for name, layer in analog_layers(mapped).items():
        with torch.no_grad():
            wanted, effective = layer.weight.double(), layer.effective_weight().double()
            slope = gain(effective.flatten()[:, None], wanted.flatten()[:, None], False)
            left = (effective - slope * wanted).square().mean().sqrt() / (slope * wanted).square().mean().sqrt()
        found[name] = (float(slope), float(left))
    return found


def mean_gain(mapped: nn.Module) -> tuple[float, float]:
    """Slope and residue, mean over layers."""
    slopes, residues = zip(*gains(mapped).values(), strict=True)
    return sum(slopes) / len(slopes), sum(residues) / len(residues)


def gaussian(
    network: nn.Module, wrap: Wrap, mapped: nn.Module, number: int, images: Sequence[Tensor] | None
) -> nn.Module:
    """The control of a chip: in each layer the weights times the chip's slope, plus Gaussian noise as large as the
    chip's residue: as far from the software, without the structure of wires. `images`: as in `on_chip`, or None."""
    inner = copy.deepcopy(network)
    layers = dict(inner.named_modules())
    names = {layer.qualified_name: found for layer, found in zip(
        analog_layers(mapped).values(), gains(mapped).values(), strict=True)}  # fmt: skip
    with torch.no_grad():
        for name, (slope, residue) in names.items():
            weight = layers[name].weight
            generator = torch.Generator().manual_seed(stream_of(name, f"gaussian{number}"))
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise * (residue * weight.square().mean().sqrt())).mul_(slope)
    whole = wrap(inner)
    if images is not None:
        reestimate_batchnorm(whole, images)
    return whole


def measure(
    config: Config,
    network: nn.Module,
    wrap: Wrap,
    setups: Mapping[str, CrossbarConfig],
    batches: Sequence[Batch],
    images: Sequence[Tensor],
    cells: Cells,
) -> Measured:
    """All attacks on a trained network and on its chips. batches: clean images in [0, 1]; images: for calibrations."""
    software = wrap(copy.deepcopy(network))
    clean = [b.images for b in batches]
    attack_list = attacks_of(config)
    made = functools.cache(lambda attack: craft(software, attack, batches))

    def of_software() -> dict[str, float]:
        jobs = {"clean": lambda: accuracy_on(software, clean, batches),
                "no_gradient": lambda: without_gradient(software, batches)}  # fmt: skip
        jobs |= {a.name: lambda a=a: accuracy_on(software, made(a), batches) for a in attack_list}
        return {name: cells.get(f"software/{name}", job) for name, job in jobs.items()}

    mapped = {
        setup: functools.lru_cache(2)(functools.partial(on_chip, network, wrap, crossbars, images=images))
        for setup, crossbars in setups.items()
    }

    def of_chip(unit: tuple[str, int]) -> dict[str, float]:
        """All figures of one chip; nothing is built whose figures are all kept."""
        setup, number = unit
        anew = images if setups[setup].calibration == "bn_reestimate" else None
        hardware = functools.partial(mapped[setup], number)
        control = functools.cache(lambda: gaussian(network, wrap, hardware(), number, anew))

        def keep(name: str, job: Callable[[], Any]) -> Any:
            return cells.get(f"{setup}/chip-{number}/{name}", job)

        slope, residue = keep("gain", lambda: mean_gain(hardware()))
        figures = {
            "slope": slope,
            "residue": residue,
            "clean": keep("clean", lambda: accuracy_on(hardware(), clean, batches)),
            "no_gradient": keep("no_gradient", lambda: without_gradient(hardware(), batches)),
            "gaussian": keep("gaussian", lambda: accuracy_on(control(), clean, batches)),
        }
        for attack in attack_list:
            own = functools.cache(lambda attack=attack: craft(hardware(), attack, batches))
            jobs = {
                "SH": lambda attack=attack: accuracy_on(hardware(), made(attack), batches),
                "HH": lambda own=own: accuracy_on(hardware(), own(), batches),
                "HX": lambda own=own: accuracy_on(mapped[setup](number + 1), own(), batches),
                "SG": lambda attack=attack: accuracy_on(control(), made(attack), batches),
                "GG": lambda attack=attack: accuracy_on(control(), craft(control(), attack, batches), batches),
            }
            figures |= {f"{mode}/{attack.name}": keep(f"{mode}/{attack.name}", job) for mode, job in jobs.items()}
        return figures

    found = Measured(_shared(["software"], lambda _: of_software())["software"])
    rows = _shared([(setup, number) for setup in setups for number in range(config.chips)], of_chip)
    for (setup, _), figures in rows.items():
        for name, value in figures.items():
            found.chips.setdefault(setup, {}).setdefault(name, []).append(value)
    return found


def _shared(units: Sequence[T], measure: Callable[[T], dict[str, float]]) -> dict[T, dict[str, float]]:
    """The figures of every unit of work: several processes share the units, then read what the others have kept."""
    mine = {unit: measure(unit) for unit in units[distributed.rank() :: distributed.world()]}
    distributed.barrier()
    return {unit: mine[unit] if unit in mine else measure(unit) for unit in units}


def study(
    network: nn.Module,
    wrap: Wrap,
    setups: Mapping[str, CrossbarConfig],
    batches: Sequence[Batch],
    images: Sequence[Tensor],
    cells: Cells,
) -> dict[str, dict[str, float]]:
    """Accuracy without attack on chips of every calibration, without variation; and in software, as "software"."""
    pixels = [b.images for b in batches]

    def of(setup: str) -> dict[str, float]:
        if setup == "software":
            return {"accuracy": accuracy_on(wrap(copy.deepcopy(network)), pixels, batches)}
        whole = on_chip(network, wrap, setups[setup], 0, images)
        slope, residue = mean_gain(whole)
        return {"accuracy": accuracy_on(whole, pixels, batches), "slope": slope, "residue": residue}

    return _shared(["software", *setups], lambda setup: cells.get(f"study/{setup}", lambda: of(setup)))
