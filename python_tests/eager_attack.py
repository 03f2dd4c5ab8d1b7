"""The attack of 2003.10399 as its official code computes it: a loop over time, hooks on the first layer's membranes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fire(torch.autograd.Function):
    """1 where a > 0; its derivative 0.3 max(0, 1 - |a|)."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return (a > 0).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad * 0.3 * F.threshold(1 - a.abs(), 0, 0)


def loop(layers: list[nn.Module], thresholds: list[float], leak: float, spikes: Tensor, on_first=None) -> Tensor:
    """The mean of the read-out over the steps of `spikes` [T, B, ...]; layers: weights, poolings, flattenings in order,
    the last one the read-out. on_first: called with the first layer's membrane of every step."""
    membranes: dict[int, Tensor] = {}
    total = 0.0
    for x in spikes.unbind(0):
        number = 0
        for layer in layers[:-1]:
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                x = layer(x)
                continue
            current, threshold = F.conv2d(x, layer.weight, padding=layer.padding) if isinstance(layer,
            nn.Conv2d) else F.linear(
                x, layer.weight
            ), thresholds[number]  # fmt: skip
            u = membranes.get(number)
            u = torch.zeros_like(current) if u is None else u
            out = Fire.apply(u / threshold - 1)
            membranes[number] = leak * u + current - threshold * (u / threshold - 1 > 0).to(u.dtype)
            if number == 0 and on_first is not None:
                on_first(membranes[0])
            x, number = out, number + 1
        total = total + F.linear(x, layers[-1].weight)
    return total / len(spikes)


def hook_gradient(layers, thresholds, leak: float, spikes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over t of dL/du_1[t], loss): the hooks of the official code."""
    found: list[Tensor] = []

    def watch(membrane: Tensor) -> None:
        membrane.register_hook(lambda g: found.append(g))

    first = layers[0].weight
    first.requires_grad_()  # so that the first membrane has a gradient
    loss = F.cross_entropy(loop(layers, thresholds, leak, spikes, watch), labels)
    loss.backward()
    first.grad = None
    return torch.stack(found).sum(0), loss.detach()
