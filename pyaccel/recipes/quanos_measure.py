"""What the `quanos` recipe measures of a trained network, and the file that it leaves for deployment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyaccel import hardware
from pyaccel.nn import packed_state
from pyaccel.recipes.classifier import Images, chosen, device_of, plain_batches
from pyaccel.recipes.quanos_ans import weight_layers
from pyaccel.recipes.quanos_attacks import accuracy_on, craft, fgsm, noise, pgd, unclipped
from pyaccel.training import distributed
from pyaccel.training.evaluate import accuracy

if TYPE_CHECKING:
    from pyaccel.recipes.quanos import Config

PIXEL = 1 / 255


@dataclass(frozen=True)
class Trained:
    """A trained network, its widths (None: full precision), and the metrics of each epoch, ANS among them."""

    name: str
    model: nn.Module
    bits: dict[str, int] | None
    rows: list[dict]


def ans_in(row: Mapping[str, float], eps: float) -> dict[str, float]:
    """The ANS of each layer that a row of metrics holds."""
    prefix = f"ans_{eps:g}/"
    return {name.removeprefix(prefix): float(value) for name, value in row.items() if name.startswith(prefix)}


def whole(config: Config, images: Images) -> tuple[Tensor, Tensor]:
    """All images, in [0, 1], and their labels, on the device."""
    parts = [(batch.images, batch.labels) for batch in plain_batches(config, images).epoch(0)]
    return tuple(torch.cat(column).to(device_of(config)) for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class Measurement:
    """What the report needs of one trained network; accuracies 0..1."""

    accuracy: float  # on every test image
    attacked: dict[
        str, float
    ]  # on the attacked images: "clean", "fgsm_8", "pgd_8", "unclipped_8", "transfer_8", "noise_8"
    layers: list[hardware.LayerCost]
    bits: dict[str, int] | None
    sensitivity: dict[float, list[dict[str, float]]] = field(repr=False)  # by eps, after each epoch
    packed_bytes: int  # of the packed weights in safetensors
    seconds: float  # of training, the first epochs included


class Victims:
    """The test images of a seed that are attacked, and the full-precision network's adversarial versions of them."""

    def __init__(self, config: Config, test: Images, seed: int):
        self.config, self.test, self.seed = config, test, seed
        images, labels = whole(config, chosen(test, config.attack_images))
        self.batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
        self.transfer: dict[float, list[Tensor]] = {}

    def measure(self, trained: Trained) -> Measurement:
        config, model = self.config, trained.model
        found = {"clean": accuracy_on(model, [x for x, _ in self.batches], self.batches)}
        for eps in config.fgsm_eps:
            found[f"fgsm_{eps:g}"] = self._after(fgsm(eps * PIXEL), model)
        for eps in config.pgd_eps:
            attack = pgd(eps * PIXEL, config.pgd_steps, self.seed)
            white_box = craft(attack, model, self.batches)
            found[f"pgd_{eps:g}"] = accuracy_on(model, white_box, self.batches)
            if trained.name == "float32":
                self.transfer[eps] = white_box
            else:
                with unclipped(model):
                    moved = craft(attack, model, self.batches)
                found[f"unclipped_{eps:g}"] = accuracy_on(model, moved, self.batches)
                found[f"transfer_{eps:g}"] = accuracy_on(model, self.transfer[eps], self.batches)
            found[f"noise_{eps:g}"] = self._after(noise(eps * PIXEL, self.seed), model)
        every = accuracy(model, plain_batches(config, self.test, spread=True), device=device_of(config))["accuracy"]
        return Measurement(
            every,
            found,
            hardware.layer_costs(model, self.batches[0][0][:1]),
            trained.bits,
            {eps: [ans_in(row, eps) for row in trained.rows] for eps in config.ans_eps},
            sum(t.numel() * t.element_size() for name, t in packed_state(model).items() if is_weight(name, trained)),
            sum(row["seconds"] for row in trained.rows),
        )

    def _after(self, attack, model: nn.Module) -> float:
        return accuracy_on(model, craft(attack, model, self.batches), self.batches)


def is_weight(name: str, trained: Trained) -> bool:
    """Whether an entry of `packed_state` holds a layer's weight."""
    layer, _, kind = name.rpartition(".")
    return layer in weight_layers(trained.model) and kind in ("weight", "weight_words")


def deploy(trained: Trained, folder: Path) -> None:
    """`packed.safetensors`: the network with its weights packed; its widths in the file's metadata, under "bits"."""
    from safetensors.torch import save_file

    if distributed.rank() != 0:
        return
    state = {name: value.contiguous().cpu() for name, value in packed_state(trained.model).items()}
    temporary = folder / "packed.safetensors.tmp"
    save_file(state, temporary, metadata={"bits": json.dumps(trained.bits), "network": trained.name})
    os.replace(temporary, folder / "packed.safetensors")
