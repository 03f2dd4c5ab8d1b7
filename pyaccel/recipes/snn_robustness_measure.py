"""Attacks of the `snn_robustness` recipe, and what their controls and sweeps measure of one seed's networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyaccel import attacks, spiking_attacks
from pyaccel.data import Batch
from pyaccel.recipes.classifier import Images, Normalised, device_of, plain_batches, say
from pyaccel.spiking_attacks import SpikingTarget, with_surrogate

if TYPE_CHECKING:
    from pyaccel.recipes.snn_robustness import Config, Trained

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Bench:
    """Attacked images and right answers, over the images that are attacked."""

    config: Config
    images: Images

    def target(self, network: nn.Module, **options):
        """What attacks differentiate: the network with its normalisation, fresh noise at each pass if it is spiking."""
        if not hasattr(network, "encoder"):
            return Normalised(network, self.config.mean, self.config.std).to(device_of(self.config)).eval()
        pieces = dict(images_at_once=self.config.images_at_once, steps_at_once=self.config.steps_at_once)
        return SpikingTarget(network, self.config.mean, self.config.std, **pieces | options)

    def fgsm(self, network: nn.Module, eps: float) -> Attack:
        target = self.target(network)
        module = spiking_attacks if isinstance(target, SpikingTarget) else attacks
        return lambda x, y: module.fgsm(target, x, y, eps)

    def pgd(self, network: nn.Module, eps: float, draws: int = 1) -> Attack:
        target, steps = self.target(network), (eps, self.config.step, self.config.pgd_steps)
        if isinstance(target, SpikingTarget):
            return lambda x, y: spiking_attacks.pgd(target, x, y, *steps, samples=draws)
        return lambda x, y: attacks.pgd(target, x, y, *steps)

    def noise(self, eps: float) -> Attack:
        """Random signs of the same size: what an attack must beat."""
        generator = torch.Generator().manual_seed(1)
        return lambda x, y: (
            x + eps * (2.0 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x.device)
        ).clamp(0, 1)

    def made(self, attack: Attack | None) -> list[Batch] | None:
        """Attacked images, the clean ones without an attack. None where an attack finds no gradient, as on a dead
        network: a sweep goes on without it."""
        try:
            return self._made(attack)
        except attacks.NoGradientError:
            return None

    def _made(self, attack: Attack | None) -> list[Batch]:
        device, found = device_of(self.config), []
        for batch in plain_batches(self.config, self.images, normalise=False).epoch(0):
            x, y = batch.images.to(device), batch.labels.to(device)
            found.append(Batch(x if attack is None else attack(x, y), y, batch.sample_ids.to(device)))
        return found

    @torch.no_grad()
    def right(self, network: nn.Module, batches: list[Batch] | None) -> Tensor | None:
        """Which images the network gets right, bool `[N]`; a spiking one with the noise that no attacker saw. None for
        no images."""
        if batches is None:
            return None
        target = self.target(network)
        if isinstance(target, SpikingTarget):
            answers = [network(target._normalised(b.images), b.sample_ids).argmax(1) == b.labels for b in batches]
        else:
            answers = [target(b.images).argmax(1) == b.labels for b in batches]
        return torch.cat(answers)


def share(right: Tensor | None) -> float | None:
    """Accuracy 0..1; None where nothing was attacked: the clean accuracy would pass for robustness."""
    return None if right is None else float(right.double().mean())


def controls(config: Config, bench: Bench, own: Trained, kind: str, eps: float) -> dict[str, float | None]:
    """PGD of radius `eps` on a spiking network by other ways, and an image right only if it withstands all of them."""
    say(f"seed {own.seed}: controls of {kind}")
    network = own[kind]
    ways = {"tuned surrogate": bench.pgd(network, eps), f"{config.draws} draws": bench.pgd(network, eps, config.draws)}
    ways |= {surrogate: bench.pgd(with_surrogate(network, surrogate), eps) for surrogate in config.surrogates}
    ways |= {"transfer from the artificial network": bench.pgd(own["ann"], eps), "fgsm": bench.fgsm(network, eps)}
    right = {name: bench.right(network, bench.made(attack)) for name, attack in ways.items()}
    attacked = [answers for answers in right.values() if answers is not None]
    right["worst of all"] = torch.stack(attacked).all(0) if attacked else None
    return {f"{kind}/control/{name}": share(answers) for name, answers in right.items()}


def sweeps(config: Config, bench: Bench, own: Trained) -> dict[str, float | None]:
    """FGSM on networks tuned for other steps and leaks: white-box, and transferred from the artificial network."""
    if not config.sweep_steps and not config.sweep_leaks:
        return {}
    found, eps = {}, config.sweep_eps
    clean, moved = bench.made(None), bench.made(bench.fgsm(own["ann"], eps))
    points = [(f"steps/{steps}", steps, 1.0) for steps in config.sweep_steps]
    points += [(f"leak/{leak:g}", config.sweep_at, leak) for leak in config.sweep_leaks]
    for name, steps, leak in points:
        say(f"seed {own.seed}: sweep, {name}")
        network = own.tuned(steps, leak).to(device_of(config)).eval()
        cases = {"clean": clean, "transfer": moved, "white": bench.made(bench.fgsm(network, eps))}
        found |= {f"sweep/{name}/{case}": share(bench.right(network, images)) for case, images in cases.items()}
    return found


def agreement(config: Config, bench: Bench, own: Trained, batches: list[Batch]) -> dict[str, float | None]:
    """How alike SNN-Conv's gradients and the artificial network's are, image by image (medians), after more steps; None
    where no image has a gradient."""
    if not config.agree_steps or "conv" not in config.networks:
        return {}
    target, ann, found = bench.target(own["conv"]), bench.target(own["ann"]), {}
    images, labels = batches[0].images, batches[0].labels
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(ann(leaf), labels), leaf)
    for steps in config.agree_steps:
        (first, second) = (
            replace(target, steps=steps, draw=d).loss_and_gradient(images, labels)[1].flatten(1) for d in (0, 1)
        )
        same = expected.flatten(1)
        alive = (same.abs().amax(1) > 0) & (first.abs().amax(1) > 0) & (second.abs().amax(1) > 0)
        cosine = nn.functional.cosine_similarity
        pairs = {
            "cosine": cosine(first, same),
            "sign": (first.sign() == same.sign()).double().mean(1),
            "draws": cosine(first, second),
        }
        for name, values in pairs.items():
            found[f"agreement/{steps}/{name}"] = float(values[alive].double().median()) if alive.any() else None
    return found
