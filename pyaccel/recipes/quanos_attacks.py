"""What the `quanos` recipe does to a trained network: white-box attacks, and the controls that expose masked gradients.

A quantiser's true gradient is zero almost everywhere, so an attacker who takes it gets no further than random noise,
and what looks like robustness would be a masked gradient. White-box attacks here go through the straight-through
gradient of the layers; the controls are the same gradient without clipping ("unclipped": BPDA, the quantiser is the identity in
the backward pass), adversarial images of the full-precision network ("transfer"), and noise of the same size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyaccel import attacks
from pyaccel.data import Batch
from pyaccel.nn.quant import _Quantized
from pyaccel.recipes.classifier import Loss, cross_entropy
from pyaccel.training.evaluate import evaluating

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def fgsm(eps: float) -> Attack:
    return lambda model, x, y: attacks.fgsm(model, x, y, eps)


def pgd(eps: float, steps: int, seed: int = 0) -> Attack:
    """Step size eps / 4, at least what reaches the border of the ball: 2 eps / steps."""
    return lambda model, x, y: attacks.pgd(model, x, y, eps, max(eps / 4, 2 * eps / steps), steps, seed=seed)


def noise(eps: float, seed: int = 0) -> Attack:
    """Every pixel moved by +eps or -eps at random: all that an attacker with the true gradient, zero, can do."""

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return (x + eps * signs.to(x)).clamp(0, 1)

    return attack


def craft(attack: Attack, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Attacked images of each batch, in evaluation mode. A batch whose gradient is exactly zero stays as it is, with a
    warning: its accuracy is no sign of robustness."""
    made, masked = [], 0
    with evaluating(model):
        for x, y in batches:
            try:
                made.append(attack(model, x, y))
            except attacks.NoGradientError:
                masked += 1
                made.append(x)
    if masked:
        warnings.warn(
            f"the gradient of {masked} of {len(made)} batches is exactly zero: the attack did nothing to them "
            "and their accuracy is no sign of robustness",
            RuntimeWarning,
            stacklevel=2,
        )
    return made


@torch.inference_mode()
def accuracy_on(model: nn.Module, images: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Accuracy 0..1 of the deployed network (quantised layers on integers) on `images`, with the batches' labels."""
    with evaluating(model):
        right = sum(int((model(x).argmax(1) == y).sum()) for x, (_, y) in zip(images, batches, strict=True))
    return right / sum(len(y) for _, y in batches)


class _Clip(torch.autograd.Function):
    """min(x, largest), with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x, largest):
        return torch.minimum(x, largest)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@contextmanager
def unclipped(model: nn.Module) -> Iterator[nn.Module]:
    """The same network, values and all, whose activation quantisers are the identity in the backward pass."""
    hooks = [
        m.register_forward_pre_hook(lambda module, x: (_Clip.apply(x[0], module.activation_max.to(x[0].dtype)),))
        for m in model.modules()
        if isinstance(m, _Quantized)
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def adversarial_loss(kind: str, eps: float, steps: int) -> Loss:
    """A loss for training: cross entropy on batches whose first half is attacked, by FGSM or PGD on the network as it
    would be deployed (evaluation mode), with the straight-through gradient."""
    plain = cross_entropy()

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        half = len(batch.labels) // 2
        # Drawn from the global generator, which checkpoints hold: a resumed run starts from the same points.
        seed = int(torch.randint(2**31, ()))
        attack = fgsm(eps) if kind == "fgsm" else pgd(eps, steps, seed)
        (moved,) = craft(attack, model, [(batch.images[:half], batch.labels[:half])])
        return plain(model, batch._replace(images=torch.cat([moved, batch.images[half:]])))

    return loss
