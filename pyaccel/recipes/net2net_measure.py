"""What the `net2net` recipe measures of trained networks: gap, noise, attacks, and detection by several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyaccel import attacks
from pyaccel.hardware import cost
from pyaccel.recipes.classifier import Images, Normalised, chosen, device_of, logits, plain_batches
from pyaccel.recipes.net2net_detection import SCORES, Together, auc, evading, flagged, threshold, unsureness
from pyaccel.training import accuracy

if TYPE_CHECKING:
    from pyaccel.recipes.net2net import Config

GAP_IMAGES = 2000  # of the training images, for their accuracy without augmentation
ATTACKS = ("fgsm", "pgd")


@dataclass(frozen=True)
class Measurement:
    """Of one final network: accuracies 0..1, of every test image (noise: of all; attacks: of the attacked ones)."""

    accuracy: float
    train_accuracy: float
    noise: dict[float, float]
    attacked: dict[str, float]  # white-box, on this very network; "clean": the same images unharmed
    macs: int
    parameters: int


@dataclass(frozen=True)
class Detection:
    """auc and rate at 5 % false positives by (attack, score); scores "js", "vote", "maxprob", "equal_maxprob"."""

    auc: dict[tuple[str, str], float]
    rate: dict[tuple[str, str], float]
    false_alarms: dict[str, float]  # by score: clean images beside those that set the threshold
    noise_alarms: dict[str, float]  # images under Gaussian noise of 0.1
    success: dict[str, float]  # accuracy of the last network under each attack
    each_accuracy: list[float]  # of every network on the clean images


def measure(model: nn.Module, train: Images, test: Images, config: Config, seed: int) -> Measurement:
    device = device_of(config)
    model = model.to(device).eval()
    known = accuracy(model, plain_batches(config, chosen(train, GAP_IMAGES)), device=device, forward=logits)["accuracy"]
    pixels = Normalised(model, config.mean, config.std).to(device).eval()
    levels = {level: _under_noise(pixels, test, config, level, seed) for level in config.noise}
    x, y = images_of(test, config, part=0)
    x, y = x.to(device), y.to(device)
    attacked = {"clean": _right(pixels(x), y)}
    for attack in ATTACKS:
        attacked[attack] = _right(pixels(attacked_images(pixels, x, y, attack, config, seed)), y)
    found = accuracy(model, plain_batches(config, test), device=device, forward=logits)["accuracy"]
    figures = cost(model, test.shape)
    return Measurement(found, known, levels, attacked, figures.convolutions().macs, figures.parameters)


def images_of(test: Images, config: Config, *, part: int) -> tuple[Tensor, Tensor]:
    """Images to attack (part 0) and as many others (part 1; fewer if there are no more), pixels in 0..1."""
    count = min(config.attack_images, len(test) // 2)
    images, labels = test.batch(torch.arange(len(test))[_order(len(test))][part * count : (part + 1) * count])
    return images.float() / 255, labels


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def attacked_images(
    model: nn.Module, x: Tensor, y: Tensor, attack: str, config: Config, seed: int, loss=None
) -> Tensor:
    options = {} if loss is None else {"loss": loss}
    made = []
    for start in range(0, len(x), config.batch_size):
        part, labels = x[start : start + config.batch_size], y[start : start + config.batch_size]
        if attack == "fgsm":
            made.append(attacks.fgsm(model, part, labels, config.attack_eps, **options))
        else:
            made.append(
                attacks.pgd(
                    model,
                    part,
                    labels,
                    config.attack_eps,
                    config.attack_step,
                    config.attack_steps,
                    seed=seed + start,
                    **options,
                )
            )
    return torch.cat(made)


@torch.no_grad()
def measure_detection(
    chain: Sequence[nn.Module], control: nn.Module | None, test: Images, config: Config, seed: int
) -> Detection:
    """Attacks on the last network, seen by all: thresholds on other clean images. "adaptive" attacks all at once."""
    device = device_of(config)
    networks = [Normalised(model, config.mean, config.std).to(device).eval() for model in chain]
    together = Together(networks).eval()
    (x, y), (other, _) = (tuple(t.to(device) for t in images_of(test, config, part=part)) for part in (0, 1))
    said = {"clean": together(x), "other": together(other), "noise": together(_noisy(x, 0.1, seed))}
    for attack in ATTACKS:
        said[attack] = together(attacked_images(networks[-1], x, y, attack, config, seed))
    said["adaptive"] = together(attacked_images(together, x, y, "pgd", config, seed, evading))
    scores = {(name, score): of(found) for name, found in said.items() for score, of in SCORES.items()}
    if control is not None:  # the last network replaced by one that cost as much in all, under attacks of its own
        alone = Normalised(control, config.mean, config.std).to(device).eval()
        inputs = {"clean": x, "other": other, "noise": _noisy(x, 0.1, seed)}
        inputs |= {attack: attacked_images(alone, x, y, attack, config, seed) for attack in ATTACKS}
        scores |= {(name, "equal_maxprob"): unsureness(alone(image)[None]) for name, image in inputs.items()}
    limits = {score: threshold(values) for (name, score), values in scores.items() if name == "other"}
    targets = [(n, s) for n, s in scores if n in (*ATTACKS, "adaptive")]
    return Detection(
        auc={key: auc(scores["clean", key[1]], scores[key]) for key in targets},
        rate={key: flagged(scores[key], limits[key[1]]) for key in targets},
        false_alarms={score: flagged(scores["clean", score], limit) for score, limit in limits.items()},
        noise_alarms={score: flagged(scores["noise", score], limit) for score, limit in limits.items()},
        success={name: _right(said[name][-1], y) for name in ("clean", *ATTACKS, "adaptive")},
        each_accuracy=[_right(each, y) for each in said["clean"]],
    )


def _right(found: Tensor, labels: Tensor) -> float:
    return float((found.argmax(-1) == labels).double().mean())


def _noisy(x: Tensor, level: float, seed: int) -> Tensor:
    """x + N(0, level^2), clipped to 0..1 as images are."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + level * noise.to(x.device)).clamp(0, 1)


@torch.no_grad()
def _under_noise(model: nn.Module, test: Images, config: Config, level: float, seed: int) -> float:
    right = total = 0
    for number, batch in enumerate(plain_batches(config, test, normalise=False).epoch(0)):
        images = batch.images.to(device_of(config))
        images = _noisy(images, level, 100_000 * seed + number) if level else images
        right += int((model(images).argmax(1).cpu() == batch.labels).sum())
        total += len(batch.labels)
    return right / total
