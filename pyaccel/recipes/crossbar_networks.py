"""Networks of the `crossbar` recipe: the plain one and its defences, trained, and as attackers see them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyaccel import attacks, models
from pyaccel.data import Batch
from pyaccel.recipes.classifier import Images, Loss, Normalised, device_of, logits, train_classifier
from pyaccel.recipes.folder import resume_from
from pyaccel.training import seed_everything
from pyaccel.training.evaluate import evaluating

if TYPE_CHECKING:
    from pyaccel.recipes.crossbar import Config

NETWORKS = ("plain", "low_bit", "pixel", "adversarial")


def normalises(network: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def build(config: Config, images: Images, seed: int) -> nn.Module:
    """The network; its weights are drawn from `seed` alone, so the defences start where the plain network does."""
    seed_everything(seed)
    options = {} if config.norm is None else {"norm": config.norm}
    network = models.build(
        config.model,
        spiking=False,
        width=config.width,
        input_shape=images.shape,
        classes=len(images.classes),
        **options,
    )
    return network.to(memory_format=torch.channels_last)


class LowBits(nn.Module):
    """A weight on 2^bits - 1 levels, symmetric around zero: step max|W| / (2^(bits - 1) - 1); straight-through."""

    def __init__(self, bits: int):
        super().__init__()
        self.top = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        step = weight.detach().abs().amax() / self.top
        levels = torch.round(weight.detach() / torch.where(step > 0, step, 1.0)).clamp(-self.top, self.top) * step
        return weight + (levels - weight.detach())


class LowBitPixels(nn.Module):
    """x on 2^bits levels of [0, 1]; its gradient passes as if nothing were rounded (BPDA)."""

    def __init__(self, bits: int):
        super().__init__()
        self.top = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.round(x.detach() * self.top) / self.top - x.detach())


def wrapper(config: Config, network: str) -> Callable[[nn.Module], nn.Module]:
    """From a network to the function of pixels in [0, 1] that is attacked: input defence and normalisation included."""

    def wrap(inner: nn.Module) -> nn.Module:
        whole: nn.Module = Normalised(inner, config.mean, config.std)
        if network == "pixel":
            whole = nn.Sequential(LowBitPixels(config.defence_bits), whole)
        return whole.to(device_of(config)).eval().requires_grad_(False)

    return wrap


def train_network(
    config: Config,
    network: str,
    train: Images,
    test: Images,
    *,
    seed: int,
    out: Path,
    resume: str,
    free: Collection[str],
) -> nn.Module:
    """The trained network, as it is deployed: plain layers, their weights quantised for "low_bit". free: fields of
    `config` that change no training."""
    kind = "plain" if network == "pixel" else network
    inner = build(config, train, seed)
    if kind == "low_bit":
        for module in list(inner.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                parametrize.register_parametrization(module, "weight", LowBits(config.defence_bits))
    # Trained on pixels in [0, 1] and normalised inside: adversarial training attacks pixels.
    whole = Normalised(inner, config.mean, config.std)
    part = f"{kind}/seed-{seed}"
    train_classifier(
        whole, train, test, replace(config, mean=None, std=None), seed=seed, name=kind, out=out / part, free=free,
        resume=resume_from(out, part, resume), loss=adversarial_loss(config) if kind == "adversarial" else None,
    )  # fmt: skip
    for module in list(inner.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return inner.eval()


def adversarial_loss(config: Config) -> Loss:
    """Cross entropy of attacked images alone (Madry et al.): PGD on the network in evaluation mode, as it is now."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # Several processes: the attack wants gradients of images alone, none of which are to be exchanged.
        alone = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        with evaluating(alone):
            images = attacks.pgd(
                alone, batch.images, batch.labels, config.adversarial_eps / 255, config.adversarial_step / 255,
                config.adversarial_steps, seed=zlib.crc32(batch.sample_ids.cpu().numpy().tobytes()),
            )  # fmt: skip
        found = logits(model, batch._replace(images=images))
        right = (found.argmax(1) == batch.labels).float().mean()
        return F.cross_entropy(found, batch.labels), {"accuracy": right}

    return loss
