"""Attacks on inputs (FGSM, PGD) and on parameters that lie in failing memory.

An attack is run on the deployed model, failures included. `gradient` says what the attacker differentiates:
"noisy" one draw of the failing model; "clean" the same model without failures (transfer); "averaged" the mean gradient of
`samples` draws (expectation over noise). The last is the honest figure: a defence that holds against "noisy" and not
against "averaged" only masks its gradient.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyaccel import ops
from pyaccel.hardware import SramConfig
from pyaccel.nn.memory import without_failures

GRADIENTS = ("noisy", "clean", "averaged")


class NoGradientError(ValueError):
    """Every gradient that an attack would follow is exactly zero: it would do nothing, and look like robustness."""


def fgsm(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    samples: int = 1,
    gradient: str = "noisy",
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """x' = clip(x + eps * sign(grad_x loss), 0, 1): the fast gradient sign method. Arguments as in `pgd`."""
    return pgd(model, x, y, eps, eps, 1, samples=samples, gradient=gradient, loss=loss, random_start=False)


def pgd(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float,
    steps: int,
    *,
    samples: int = 1,
    gradient: str = "noisy",
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    random_start: bool = True,
    seed: int = 0,
    variant: str = "pgd",
) -> Tensor:
    """Projected gradient descent in the maximum norm: `steps` times x <- clip(project(x + step * sign(gradient)), 0, 1), with
    the gradient at the current point.

    Args:
        model: logits `[B, classes]` of images `[B, ...]`; in eval mode. Its parameters get no gradient.
        x, y: images in [0, 1] (normalise inside the model: eps is in pixel units) and their classes, int64 `[B]`.
        eps, step: radius and step, >= 0.
        gradient, samples: see the module; "averaged" takes samples >= 2, the others 1.
        random_start: begin at a point drawn uniformly from the ball (by `seed`).
        variant: "single_gradient" keeps the gradient of the clean input for every step, as some published code does; not
            an attack to report, only to compare with.

    Returns:
        Attacked images: within eps of x, within [0, 1].

    Raises:
        ValueError for wrong arguments and for a model in training mode; NoGradientError, a ValueError too, where the
        gradient of the whole batch is exactly zero: such an attack does nothing, and its accuracy would pass for robustness.
    """
    _check(model, x, y, eps, step, steps, samples, gradient, variant)
    attacked = x.detach()
    if random_start and eps > 0:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        attacked = (attacked + ((2 * noise - 1) * eps).to(x.device, x.dtype)).clamp(0, 1)
    low, high = x.detach() - eps, x.detach() + eps
    for _ in range(steps):
        at = attacked if variant == "pgd" else x.detach()
        direction = _input_gradient(model, at, y, samples, gradient, loss).sign()
        attacked = (attacked + step * direction).clamp(min=low, max=high).clamp(0, 1)
    return attacked


def _check(model, x, y, eps, step, steps, samples, gradient, variant) -> None:
    if getattr(model, "training", False):
        raise ValueError("attack: the model is in training mode; call model.eval() first")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"attack: x must be a floating tensor of images in [0, 1], got {getattr(x, 'dtype', type(x).__name__)}")
    if x.numel() and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise ValueError(
            f"attack: x must lie in [0, 1], got {float(x.min()):.3g}..{float(x.max()):.3g}; normalise inside the model"
        )
    if len(y) != len(x):
        raise ValueError(f"attack: expected one class an image, got {len(y)} for {len(x)} images")
    for name, value in (("eps", eps), ("step", step)):
        if not value >= 0:
            raise ValueError(f"attack: {name} must be >= 0, got {value}")
    if steps < 0:
        raise ValueError(f"attack: steps must be >= 0, got {steps}")
    if gradient not in GRADIENTS:
        raise ValueError(f"attack: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if (samples < 2) if gradient == "averaged" else (samples != 1):
        raise ValueError(f'attack: samples must be >= 2 with gradient="averaged" and 1 otherwise, got {samples} with {gradient!r}')
    if variant not in ("pgd", "single_gradient"):
        raise ValueError(f"attack: variant must be pgd or single_gradient, got {variant!r}")


def input_gradient(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    samples: int = 1,
    gradient: str = "noisy",
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """The sum over `samples` draws of d loss / d x, which every attack here steps along; arguments and errors as in `pgd`.

    FGSM at many eps needs it once: x' = clip(x + eps * sign(gradient), 0, 1).
    """
    _check(model, x, y, 0.0, 0.0, 1, samples, gradient, "pgd")
    return _input_gradient(model, x, y, samples, gradient, loss)


def _input_gradient(model, x: Tensor, y: Tensor, samples: int, gradient: str, loss) -> Tensor:
    quiet = gradient == "clean" and isinstance(model, nn.Module)
    total = torch.zeros_like(x)
    with without_failures(model) if quiet else contextlib.nullcontext(), torch.enable_grad():
        for _ in range(samples):
            leaf = x.detach().clone().requires_grad_()
            value = loss(model(leaf), y)
            if not value.requires_grad:
                raise ValueError("attack: the loss does not depend differentiably on x; nothing was attacked")
            (grad,) = torch.autograd.grad(value, leaf, allow_unused=True)
            if grad is not None:
                total += grad
    if x.numel() and not total.any():
        raise NoGradientError(
            "attack: the gradient of the whole batch is exactly zero, so the attack would do nothing and look like robustness; "
            "look for a saturated loss, a dead layer or an operation without gradient"
        )
    return total


# ---- attacks on parameters


@dataclass
class FlippedModel:
    """What `flip_parameters` returns: the attacked copy, and what was done to it."""

    model: nn.Module
    flips: dict[str, int]  # bits that differ, by layer
    losses: list[float] = field(default_factory=list)  # of the attack batch: before, then after each round

    @property
    def total_flips(self) -> int:
        return sum(self.flips.values())


def flip_parameters(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    banks: SramConfig | Mapping[str, SramConfig],
    *,
    attacker: str = "surgical",
    rounds: int = 1,
    budget: int | None = None,
    p: float = 0.1,
    seed: int = 0,
    top: int = 10,
) -> FlippedModel:
    """A copy of `model` whose weights, stored as two's complement words, were attacked through the failures of their banks.

    Attackers (reconstructions: the algorithm of 2011.13392 is not known):
        "voltage"   realistic: the attacker lowers the supply of `budget` banks (default: half of them), those with the largest
                    expected harm sum_w sum_{bit < n6} 4^bit g_w^2; their 6T bits then flip at random with probability p.
        "surgical"  upper bound: chooses flips, in 6T bits only. The linearised loss is largest where all low bits are ones
                    (g > 0) or zeros (g < 0): sign-gradient ascent on weights. `rounds` repeats with a new gradient;
                    `budget` keeps the flips with the largest |g| 2^bit, over all layers, in every round.
        "progressive" reference: bit search after Rakin et al. (ICCV 2019), one bit a round, here restricted to 6T bits too:
                    in every layer the best bit among the `top` weights by |g|; the layer whose trial loss is highest is kept.
                    Where no trial raises the loss, layers may flip one more bit each, up to `budget` (default 8).

    Args:
        batch: (images, classes) that the white-box attacker takes gradients on; the model must be in eval mode.
        banks: one bank for every Conv2d and Linear weight, or one by layer name (other layers are left as they are, in
            floating point). Words of 8 bits: step max|W|/127, codes -127..127; 4 and 16 bits likewise.

    Returns:
        `FlippedModel`. Compare accuracy and `confidence` before and after; the quantised model without flips is the control
        (`rounds=0`).
    """
    if attacker not in ("voltage", "surgical", "progressive"):
        raise ValueError(f"flip_parameters: attacker must be voltage, surgical or progressive, got {attacker!r}")
    if model.training:
        raise ValueError("flip_parameters: the model is in training mode; call model.eval() first")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"flip_parameters: p must be a probability in [0, 1], got {p}")
    attacked = copy.deepcopy(model)
    stored = _store(attacked, banks)
    start = [layer.codes.clone() for layer in stored]
    losses = [_gradients(attacked, stored, batch)]
    if attacker == "voltage" and rounds:
        _lower_voltage(stored, budget, p, seed)
        losses.append(_gradients(attacked, stored, batch))
    elif attacker != "voltage":
        for _ in range(rounds):
            if attacker == "surgical":
                _surgical_round(stored, budget)
                losses.append(_gradients(attacked, stored, batch))
            else:
                _progressive_round(attacked, stored, batch, top, 8 if budget is None else budget)
                losses.append(_gradients(attacked, stored, batch))
    flips = {layer.name: _hamming(layer.codes, codes, layer.bank) for layer, codes in zip(stored, start, strict=True)}
    return FlippedModel(attacked, flips, losses)


@dataclass
class _Stored:
    name: str
    weight: nn.Parameter
    bank: SramConfig
    scale: float
    codes: Tensor  # int64, two's complement values
    gradient: Tensor  # dL/dq

    def write(self, codes: Tensor) -> None:
        self.codes = codes
        with torch.no_grad():
            self.weight.copy_(codes.to(self.weight.dtype) * self.scale)

    def word(self) -> Tensor:
        return self.codes & ((1 << self.bank.word_bits) - 1)

    def value(self, word: Tensor) -> Tensor:
        sign = 1 << (self.bank.word_bits - 1)
        return (word ^ sign) - sign


def _store(model: nn.Module, banks: SramConfig | Mapping[str, SramConfig]) -> list[_Stored]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if isinstance(banks, SramConfig):
        banks = dict.fromkeys(layers, banks)
    unknown = [name for name in banks if name not in layers]
    if unknown:
        raise ValueError(f"flip_parameters: no Conv2d or Linear layer {unknown[0]!r}; there are {', '.join(layers) or 'none'}")
    if not banks:
        raise ValueError("flip_parameters: no layer to attack: the model has no Conv2d or Linear, or banks is empty")
    stored = []
    for name, bank in banks.items():
        if bank.word_bits not in (4, 8, 16):
            raise ValueError(f"flip_parameters: word_bits of {name} must be 4, 8 or 16, got {bank.word_bits}")
        weight, top = layers[name].weight, (1 << (bank.word_bits - 1)) - 1
        scale = float(weight.detach().abs().max()) / top or 1.0
        codes = torch.round(weight.detach() / scale).clamp(-top, top).to(torch.int64)
        stored.append(_Stored(name, weight, bank, scale, codes, torch.zeros_like(weight)))
        stored[-1].write(codes)
    return stored


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _gradients(model: nn.Module, stored: list[_Stored], batch: tuple[Tensor, Tensor]) -> float:
    """Loss of the batch; fills dL/dq of every layer."""
    with torch.enable_grad():
        loss = _loss(model, batch)
        grads = torch.autograd.grad(loss, [layer.weight for layer in stored])
    for layer, grad in zip(stored, grads, strict=True):
        layer.gradient = grad.detach() * layer.scale
    if not any(layer.gradient.any() for layer in stored):
        raise NoGradientError(
            "flip_parameters: every gradient is exactly zero; the attack has nothing to go by (a saturated loss?)"
        )
    return float(loss.detach())


def _lower_voltage(stored: list[_Stored], budget: int | None, p: float, seed: int) -> None:
    def harm(layer: _Stored) -> float:
        return (4.0**layer.bank.n6t - 1) / 3 * float(layer.gradient.double().square().sum())

    count = (len(stored) + 1) // 2 if budget is None else budget
    for stream in sorted(range(len(stored)), key=lambda i: harm(stored[i]), reverse=True)[:count]:
        layer = stored[stream]
        bits = [p] * layer.bank.n6t + [0.0] * layer.bank.n8t
        bits += [0.0] * (32 - len(bits))  # one word an int32: packing does not matter to a random flip
        flipped = ops.flip_bits(layer.word().to(torch.int32), bits, seed=seed, stream=stream)
        layer.write(layer.value(flipped.to(torch.int64)))


def _surgical_round(stored: list[_Stored], budget: int | None) -> None:
    wanted = []  # 6T bits of every word that would raise the linearised loss by flipping
    for layer in stored:
        low = (1 << layer.bank.n6t) - 1
        sign = (1 << (layer.bank.word_bits - 1)) & low  # counts downwards; 0 where it lies in an 8T cell
        target = torch.where(layer.gradient > 0, low ^ sign, sign)
        wanted.append(torch.where(layer.gradient != 0, (layer.word() ^ target) & low, 0))
    if budget is not None:
        wanted = _largest(stored, wanted, budget)
    for layer, mask in zip(stored, wanted, strict=True):
        layer.write(layer.value(layer.word() ^ mask))


def _largest(stored: list[_Stored], wanted: list[Tensor], budget: int) -> list[Tensor]:
    """Only the `budget` flips with the largest |g| 2^bit."""
    gains = []
    for layer, mask in zip(stored, wanted, strict=True):
        bits = torch.arange(layer.bank.word_bits, device=mask.device)
        flagged = (mask[..., None] >> bits) & 1
        gains.append((flagged * layer.gradient.abs().double()[..., None] * 2.0**bits).flatten())
    everything = torch.cat(gains)
    keep = torch.zeros_like(everything, dtype=torch.bool)
    keep[everything.topk(min(budget, len(everything))).indices] = True
    keep &= everything > 0
    masks = []
    for layer, part in zip(stored, keep.split([len(g) for g in gains]), strict=True):
        weights = 1 << torch.arange(layer.bank.word_bits, device=part.device)
        masks.append((part.view(*layer.codes.shape, -1) * weights).sum(-1))
    return masks


def _progressive_round(model: nn.Module, stored: list[_Stored], batch: tuple[Tensor, Tensor], top: int, most: int) -> None:
    with torch.no_grad():
        before = float(_loss(model, batch))
        for number in range(1, most + 1):
            best = None
            for layer in stored:
                kept, trial = layer.codes, _best_bits(layer, top, number)
                if trial is None:
                    continue
                layer.write(trial)
                loss = float(_loss(model, batch))
                layer.write(kept)
                if best is None or loss > best[0]:
                    best = loss, layer, trial
            if best is not None and best[0] > before:
                best[1].write(best[2])
                return


def _best_bits(layer: _Stored, top: int, number: int) -> Tensor | None:
    """Codes with the `number` most harmful 6T bits flipped, among the `top` weights by |g|; None where none is harmful."""
    flat, word = layer.gradient.flatten(), layer.word().flatten()
    candidates = flat.abs().topk(min(top, len(flat))).indices
    bits = torch.arange(layer.bank.n6t, device=word.device)
    value = (1 << bits).double()
    if layer.bank.n8t == 0:
        value[-1] = -value[-1]  # the sign bit counts downwards
    slope = flat[candidates].double()[:, None] * value
    is_set = ((word[candidates][:, None] >> bits) & 1).bool()
    gain = torch.where(is_set, -slope, slope).flatten()
    order = gain.argsort(descending=True)[:number]
    order = order[gain[order] > 0]
    if len(order) < number:
        return None
    for i in order.tolist():
        word[candidates[i // len(bits)]] ^= 1 << (i % len(bits))
    return layer.value(word).reshape(layer.codes.shape)


def _hamming(a: Tensor, b: Tensor, bank: SramConfig) -> int:
    changed = (a ^ b) & ((1 << bank.word_bits) - 1)
    return sum(int(((changed >> bit) & 1).sum()) for bit in range(bank.word_bits))


@torch.no_grad()
def confidence(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(accuracy, mean largest softmax over the misclassified images, the same over all). The second is NaN where nothing is
    misclassified."""
    probability, guess = model(x).softmax(-1).max(-1)
    wrong = guess != y
    return float((~wrong).double().mean()), float(probability[wrong].mean()), float(probability.mean())
