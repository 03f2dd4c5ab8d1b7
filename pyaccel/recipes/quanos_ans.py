"""Adversarial noise sensitivity of a network's layers, and the bit widths it gives them (quanos, sections 1 and 2).

Only the abstract of arXiv 2004.11233 was at hand: the normalisation, the two bit rules and their constants are this
library's reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyaccel import attacks
from pyaccel.training.evaluate import evaluating

RULES = ("inverse", "proportional")
RATIOS = ("image", "batch", "unnormalised")
NON_LINEAR = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardtanh,
)
DEAD = 1e-12  # an activation with a norm below it has no relative change


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolution and linear layers, quantised or not, by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def noise_sensitivity(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, ratio: str = "image", batch_size: int = 128
) -> dict[str, float]:
    """ANS of every convolution and linear layer: how far FGSM moves its activation a, relative to a::

        ANS_l = mean over images of || a_l(x_adv) - a_l(x) ||_2 / || a_l(x) ||_2

    a_l is the output of the next non-linearity module that runs after layer l, before pooling; the layer's own output
    where none follows (logits). So the second convolution of a residual block and the shortcut beside it share one
    value, that of the block's output. x_adv is FGSM on the model itself, with the true labels. Both passes in
    evaluation mode, without gradients: quantised layers run on integers, as deployed.

    Args:
        images, labels: float32 `[N, ...]` in [0, 1], the model normalises them itself; int64 `[N]`.
        eps: of FGSM, in units of the pixels.
        ratio: "image" as above (images whose a is dead, norm below 1e-12, are left out); "batch": one norm over all
            images; "unnormalised": the mean of the norms of the difference alone.

    Returns:
        {layer name: ANS}, in the order of `named_modules`; 0.0 for a layer that is dead for all images.

    Raises:
        ValueError: no images; a network of several layers in which no non-linearity module runs (functional ones
            cannot be seen); an attack without any gradient (see `attacks.pgd`).
    """
    if ratio not in RATIOS:
        raise ValueError(f"noise_sensitivity: ratio must be one of {', '.join(RATIOS)}, got {ratio!r}")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"noise_sensitivity: expected one label an image, got {len(images)} images, {len(labels)} labels"
        )
    sums: dict[str, Tensor] = {}
    with evaluating(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            adversarial = attacks.fgsm(model, x, y, eps) if eps > 0 else x
            clean, moved = activations(model, x), activations(model, adversarial)
            for name, a in clean.items():
                sums[name] = sums.get(name, 0) + _add_up(a, moved[name], ratio)
    order = [name for name in weight_layers(model) if name in sums]
    return {name: _ratio(*sums[name].tolist(), ratio) for name in order}


@torch.no_grad()
def activations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each layer's non-linearity puts out for `images` (see `noise_sensitivity`)."""
    found: dict[str, Tensor] = {}
    waiting: dict[str, Tensor] = {}  # layers whose non-linearity is still to come, with their own output
    seen = []

    def layer(name):
        return lambda module, inputs, output: waiting.__setitem__(name, output)

    def non_linearity(module, inputs, output):
        seen.append(module)
        found.update(dict.fromkeys(waiting, output))
        waiting.clear()

    hooks = [m.register_forward_hook(layer(name)) for name, m in weight_layers(model).items()]
    hooks += [m.register_forward_hook(non_linearity) for m in model.modules() if isinstance(m, NON_LINEAR)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen and len(waiting) > 1:
        raise ValueError(
            "noise_sensitivity: the network runs no non-linearity module (functional ones cannot be seen); use "
            "nn.ReLU and "
            "its like as modules"
        )
    return {**found, **waiting}


def _add_up(clean: Tensor, moved: Tensor, ratio: str) -> Tensor:
    """What a batch adds, float64: (numerator, denominator) of the quotient that `_ratio` forms at the end."""
    clean, moved = clean.flatten(1).double(), moved.flatten(1).double()
    change, size = (moved - clean).norm(dim=1), clean.norm(dim=1)
    if ratio == "batch":
        return torch.stack([change.square().sum(), size.square().sum()])
    if ratio == "unnormalised":
        return torch.stack([change.sum(), torch.tensor(float(len(change)), dtype=torch.float64, device=change.device)])
    alive = size >= DEAD
    return torch.stack([(change[alive] / size[alive]).sum(), alive.sum().double()])


def _ratio(above: float, below: float, ratio: str) -> float:
    quotient = above / below if below > 0 else 0.0
    return math.sqrt(quotient) if ratio == "batch" else quotient


def assign_bits(
    sensitivity: Mapping[str, float], rule: str, *, initial: int | Mapping[str, int] = 16, least: int = 2
) -> dict[str, int]:
    """Bit widths from sensitivities, rounded half up and clamped to least..k, k the initial width (of the layer)::

        inverse:        floor(k (1 - (ANS_l - min ANS) / (max ANS - min ANS)) + 1/2)
        proportional:   floor(k ANS_l / max ANS + 1/2)

    "inverse" scales precision down where a layer contributes most to the perturbation; it is the default here because
    it alone reaches the abstract's compression. Where all sensitivities are equal, nothing tells layers apart and every
    one keeps its initial width.
    """
    if rule not in RULES:
        raise ValueError(f"assign_bits: rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not sensitivity or not all(math.isfinite(a) and a >= 0 for a in sensitivity.values()):
        raise ValueError(f"assign_bits: expected finite sensitivities >= 0, got {dict(sensitivity)}")
    width = dict.fromkeys(sensitivity, initial) if isinstance(initial, int) else dict(initial)
    low, high = min(sensitivity.values()), max(sensitivity.values())
    if low == high:
        return {name: width[name] for name in sensitivity}

    def share(a: float) -> float:
        return 1 - (a - low) / (high - low) if rule == "inverse" else a / high

    return {
        name: min(width[name], max(least, math.floor(width[name] * share(a) + 0.5))) for name, a in sensitivity.items()
    }


def equal_memory(weights: Mapping[str, int], bits: Mapping[str, int]) -> dict[str, int]:
    """The homogeneous network of the same memory: two neighbouring widths, as near to sum n_l k_l as fits below it.

    weights: elements n_l of each layer. Every layer gets floor(mean bits by weights); the largest layers that still fit
    get one more.
    """
    total = sum(weights[name] * bits[name] for name in weights)
    base = total // sum(weights.values())
    rest = total - base * sum(weights.values())
    widths = {}
    for name in sorted(weights, key=weights.__getitem__, reverse=True):
        more = weights[name] <= rest
        rest -= weights[name] * more
        widths[name] = base + more
    return {name: widths[name] for name in weights}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean rank. 1.0 for fewer than two layers or where
    either is constant and both are; 0.0 where only one is."""
    first, second = _ranks(a), _ranks(b)
    first, second = first - first.mean(), second - second.mean()
    scale = float(first.norm() * second.norm())
    if scale == 0:
        return float(not first.any() and not second.any())
    return float(first @ second) / scale


def _ranks(values: Sequence[float]) -> Tensor:
    v = torch.as_tensor(values, dtype=torch.float64)
    return (v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2
