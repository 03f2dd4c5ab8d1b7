"""Attacks on inputs with gradients crafted from a spiking network (2003.10399), at a fraction of autograd's memory.

The input of a spiking network is a spike train that a random encoder drew, so autograd through it finds nothing. The
paper's gradient takes the encoder for the identity (its expectation: E[s] = gain * x for abs(gain * x) <= 1)::

    dL/dx = gain * sum_t conv_transpose(dL/dI_1[t], W_1) = gain * conv_transpose(sum_t dL/dI_1[t], W_1)

I_1[t]: the current of the first layer. So one input-gradient convolution suffices where autograd makes T of them, and
no gradient of a weight is computed or prepared. FGSM and PGD are those of `pyaccel.attacks`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import attacks
from pyaccel.models import SpikingLayer, SpikingNetwork
from pyaccel.models.spiking import BalancedLIF
from pyaccel.nn import STDBLIF, PoissonEncoder
from pyaccel.nn.state import Stateful
from pyaccel.surgery.converted import ConvertedNetwork
from pyaccel.surgery.streaming import chunks, first_step, streaming

Network = SpikingNetwork | ConvertedNetwork
Loss = Callable[[Tensor, Tensor], Tensor]
DRAWS = 1 << 31  # streams from here on belong to attacks: evaluation draws from stream 0, training from 1 on


@dataclass
class SpikingTarget:
    """A spiking network as an attacker sees it: images with pixels in [0, 1] in, logits (mean over time) out.

    Every call, and every gradient, draws new Poisson noise: the attacker knows the network, not the draw that it will
    be judged by (`network(images)` in evaluation draws from a stream of its own).

    Args:
        network: in evaluation mode, with a Poisson encoder; BNTT networks too.
        mean, std: of the normalisation before the encoder, one value a channel; None: none.
        steps: T of a pass; None: the network's.
        images_at_once: images whose states lie in memory together; None: the whole batch. Changes no result.
        steps_at_once: steps whose states lie in memory together; None: all T. With fewer, memory does not grow with T,
            and each gradient costs one more forward pass (states are kept at the borders, the rest is computed again).
        draw: number of the next draw; it counts on.
    """

    network: Network
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    steps: int | None = None
    images_at_once: int | None = None
    steps_at_once: int | None = None
    draw: int = 0

    def __post_init__(self):
        if not isinstance(getattr(self.network, "encoder", None), PoissonEncoder):
            raise TypeError(
                f"SpikingTarget: expected a spiking network behind a Poisson encoder, got {type(self.network).__name__}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("SpikingTarget: give mean and std, or neither")
        for name in ("steps", "images_at_once", "steps_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"SpikingTarget: {name} must be at least 1, got {value}")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[B, classes]` of one new draw, the mean of the read-out over time."""
        self._check_mode()
        with self._drawing():
            parts = [self._sums(part, ids, 0, self._steps) for part, ids in self._parts(self._normalised(x))]
        return torch.cat(parts) / self._steps

    def loss_and_gradient(self, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> tuple[Tensor, Tensor]:
        """The loss of one new draw, a mean over the batch, and its gradient with respect to `x` (see the module)."""
        self._check_mode()
        total, gradients = x.new_zeros(()), []
        with self._drawing(), _frozen(self.network), torch.enable_grad():
            for part, ids in self._parts(self._normalised(x.detach())):
                share = len(part) / len(x)
                value, gradient = self._part_gradient(
                    part, ids, lambda logits, ids=ids, s=share: s * loss(logits, y[ids])
                )
                total = total + value
                gradients.append(gradient)
        gradient = torch.cat(gradients) if gradients else torch.zeros_like(x)
        return total, gradient / self._channelwise(self.std, x) if self.std is not None else gradient

    # ---- parts of it

    def _check_mode(self) -> None:
        if self.network.training:
            raise ValueError("SpikingTarget: the network is in training mode; call network.eval() first")

    @property
    def _steps(self) -> int:
        return self.network.steps if self.steps is None else self.steps

    def _channelwise(self, values: Sequence[float], x: Tensor) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self.mean is None else (x - self._channelwise(self.mean, x)) / self._channelwise(self.std, x)

    def _parts(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and their positions in the batch, which their noise is drawn for."""
        ids = torch.arange(len(x), device=x.device)
        size = len(x) if self.images_at_once is None else self.images_at_once
        return zip(x.split(size), ids.split(size), strict=True) if len(x) else iter(())

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """The encoder's stream is that of the next draw inside, and its own again after it."""
        key = self.network.encoder.key
        own = key[1].clone()
        key[1] = (DRAWS + self.draw) & 0xFFFFFFFF
        self.draw += 1
        try:
            yield
        finally:
            key[1] = own

    def _sums(self, x: Tensor, ids: Tensor, first: int, count: int) -> Tensor:
        """The read-out added up over steps first .. first + count - 1."""
        with first_step(self.network.encoder, first):
            logits = self.network(x, ids, count)
        return logits * count if self.network.mean_readout else logits

    def _part_gradient(self, x: Tensor, ids: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        steps, at_once = self._steps, self.steps_at_once or self._steps
        if at_once >= steps:
            with _Source(self.network, x) as source:
                value = loss(self._sums(source.images, ids, 0, steps) / steps)
                summed = source.gradient([value], [torch.ones_like(value)], [])[0]
            return value.detach(), source.to_images(summed)
        return self._gradient_in_chunks(x, ids, loss, list(chunks(steps, at_once)))

    def _gradient_in_chunks(self, x, ids, loss, pieces) -> tuple[Tensor, Tensor]:
        """Forward once for the states at the borders and the loss, then piece by piece backwards, computed again."""
        with streaming(self.network):
            total, borders = 0.0, []
            with torch.no_grad():
                for first, count in pieces:
                    borders.append(_states(self.network))
                    total = total + self._sums(x, ids, first, count)
            total = total.requires_grad_()
            value = loss(total / self._steps)
            (of_sums,) = torch.autograd.grad(value, total)
            summed, later = 0.0, None
            for (first, count), border in zip(reversed(pieces), reversed(borders), strict=True):
                leaves = _set_states(self.network, first, border)
                with _Source(self.network, x) as source:
                    sums = self._sums(source.images, ids, first, count)
                    ends = [] if later is None else [m for m in _membranes(self.network) if m is not None]
                    found, later = source.gradient([sums, *ends], [of_sums, *(later or [])], leaves)
                summed = summed + found
        return value.detach(), source.to_images(summed)


class _Source:
    """Where the gradient is taken: at the current of the first layer, summed over time; at the images themselves where
    several layers read the encoder's spikes (autograd's way through the encoder then, straight through as well)."""

    def __init__(self, network: Network, x: Tensor):
        self.synapse, self.gain, self.x = first_synapse(network), network.encoder.gain, x
        self.images = x if self.synapse is not None else x.clone().requires_grad_()
        self.leaf: Tensor | None = None if self.synapse is not None else self.images

    def __enter__(self) -> _Source:
        self.hook = None if self.synapse is None else self.synapse.register_forward_hook(self._cut)
        return self

    def __exit__(self, *_) -> None:
        if self.hook is not None:
            self.hook.remove()

    def _cut(self, module: nn.Module, arguments: tuple, current: Tensor) -> Tensor:
        self.leaf = current.detach().requires_grad_()
        return self.leaf

    def gradient(self, outputs, of_outputs, leaves) -> tuple[Tensor, list[Tensor]]:
        """Gradient at the source, summed over time, and at `leaves`."""
        pairs = [(o, g) for o, g in zip(outputs, of_outputs, strict=True) if o.requires_grad]
        if not pairs:  # nothing reached the output
            return torch.zeros_like(self.leaf if self.synapse is None else self.leaf[0]), [
                torch.zeros_like(m) for m in leaves
            ]
        inputs = [self.leaf, *leaves]
        found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        found = [torch.zeros_like(i) if f is None else f for i, f in zip(inputs, found, strict=True)]
        if self.synapse is None:
            return found[0], found[1:]
        total = torch.zeros_like(found[0][0])
        for step in found[0].unbind(0):  # sum(0) strides through memory: it takes several times as long
            total += step
        return total, found[1:]

    def to_images(self, summed: Tensor) -> Tensor:
        if self.synapse is None:
            return summed
        layer, weight = self.synapse, self.synapse.weight.detach()
        if isinstance(layer, nn.Linear):
            return self.gain * (summed @ weight).view_as(self.x)
        return self.gain * nn.grad.conv2d_input(
            self.x.shape, weight, summed, layer.stride, layer.padding, layer.dilation, layer.groups
        )


def first_synapse(network: Network) -> nn.Module | None:
    """The layer that reads the encoder's spikes, if only one does."""
    if isinstance(network, ConvertedNetwork):
        return network.first_synapse
    first = next(iter([*network.features, *network.classifier]), None)
    return first.synapse if isinstance(first, SpikingLayer) else None


@contextmanager
def _frozen(network: Network) -> Iterator[None]:
    """Parameters want no gradient inside: layers then keep none of the spikes that they read. And nothing is computed
    again by activation checkpointing, which saves what this module does not keep."""
    with ExitStack() as stack:
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for name, nothing in (("recompute_layers", False), ("recompute_steps", None)):
            if hasattr(network, name):
                stack.callback(setattr, network, name, getattr(network, name))
                setattr(network, name, nothing)
        yield


def _neurons(network: nn.Module) -> list[Stateful]:
    return [m for m in network.modules() if isinstance(m, Stateful)]


def _states(network: nn.Module) -> list[tuple[Tensor | None, ...]]:
    return [n.carried_state() for n in _neurons(network)]


def _membranes(network: nn.Module) -> list[Tensor | None]:
    return [n.membrane for n in _neurons(network)]


def _set_states(network: nn.Module, first: int, states: list[tuple[Tensor | None, ...]]) -> list[Tensor]:
    """Start step `first` from these states; returns their membranes, which gradients may now be asked of."""
    leaves = []
    for neuron, (membrane, *rest) in zip(_neurons(network), states, strict=True):
        neuron.reset_state()
        if membrane is not None:
            leaves.append(membrane.detach().requires_grad_())
            neuron.carry(first, leaves[-1], *rest)
    return leaves


class _Crafted(torch.autograd.Function):
    """The loss of a target, whose gradient the target computes itself."""

    @staticmethod
    def forward(ctx, x, y, target, loss):
        value, gradient = target.loss_and_gradient(x, y, loss)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None


def pgd(
    target: SpikingTarget,
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float,
    steps: int,
    *,
    samples: int = 1,
    random_start: bool = True,
    seed: int = 0,
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """`attacks.pgd` with gradients crafted from a spiking network, `samples` Poisson draws averaged for each step.

    The published attack takes one draw a step, eps 8/255, step 2/255, 7 steps, and a loss on the mean of the read-out
    over time. `samples` > 1 is the expectation over the noise: the control for gradients that noise masks.
    """

    def crafted(images: Tensor, classes: Tensor) -> Tensor:
        return _Crafted.apply(images, classes, target, loss)

    gradient = "noisy" if samples == 1 else "averaged"
    return attacks.pgd(
        lambda images: images, x, y, eps, step, steps, samples=samples, gradient=gradient, loss=crafted,
        random_start=random_start, seed=seed,
    )  # fmt: skip


def fgsm(
    target: SpikingTarget, x: Tensor, y: Tensor, eps: float, *, samples: int = 1, loss: Loss = F.cross_entropy
) -> Tensor:
    """x' = clip(x + eps * sign(dL/dx), 0, 1) with a gradient crafted from a spiking network; arguments as in `pgd`."""
    return pgd(target, x, y, eps, eps, 1, samples=samples, random_start=False, loss=loss)


def with_surrogate(
    network: Network, surrogate: str, *, scale: float | None = None, width: float | None = None
) -> Network:
    """A copy of a spiking network with the same spikes, whose gradients take another surrogate (see `ops.lif`).

    A control: an attack that fails with the surrogate of training may succeed with another one. Neurons with the
    spike-time surrogate become delayed ones.
    """
    made = copy.deepcopy(network)
    for name, module in list(made.named_modules()):
        if isinstance(module, STDBLIF):
            parent, _, child = name.rpartition(".")
            neuron = BalancedLIF(module.leak, float(module.threshold), delay=True)
            module = neuron.to(module.threshold.device).train(module.training)
            setattr(made.get_submodule(parent), child, module)
        if isinstance(getattr(module, "neuron", None), dict):
            module.neuron.update(surrogate=surrogate, surrogate_scale=scale, surrogate_width=width)
    return made
