"""Operations, incoming events and spikes of the layers of a converted network, counted while images run through it."""

from __future__ import annotations

import torch
from torch import nn

from pyaccel.models.spiking import BalancedLIF
from pyaccel.nn import STDBLIF
from pyaccel.recipes.activity import LayerActivity
from pyaccel.surgery.converted import ConvertedNetwork, EveryStep


@torch.inference_mode()
def activity_of(network: ConvertedNetwork, batches, steps: int) -> list[LayerActivity]:
    """One entry a weight layer, in order, means over the images of `batches` (pairs of images and sample ids).

    A layer's neurons are the first that fire after it; a convolution on a residual shortcut, which has none of its own,
    shares those of the layer whose sum it joins, and the entry of that layer has them.
    """
    found: dict[nn.Module, LayerActivity] = {}
    names = {module: name.removeprefix("body.") for name, module in network.named_modules()}
    waiting: list[LayerActivity] = []
    images = 0

    def connections(module: nn.Module, arguments, output) -> None:
        received = arguments[0]
        weight = module.layer.weight if isinstance(module, EveryStep) else module.weight
        layer = found.setdefault(module, LayerActivity(names[module]))
        layer.inputs, layer.macs = received[0, 0].numel(), weight.numel() * output[0, 0, 0].numel()
        layer.events += float(received.count_nonzero())
        waiting.append(layer)

    def firing(module: nn.Module, arguments, spikes) -> None:
        if waiting:
            waiting[0].neurons = spikes[0, 0].numel()
            waiting[0].spikes += float(spikes.count_nonzero())
        waiting.clear()

    def inner(module: nn.Module) -> nn.Module:
        return module.layer if isinstance(module, EveryStep) else module

    inside = {m.layer for m in network.modules() if isinstance(m, EveryStep)}
    hooks = []
    for module in network.modules():
        if module not in inside and isinstance(inner(module), (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(connections))
        elif isinstance(module, (BalancedLIF, STDBLIF)):
            hooks.append(module.register_forward_hook(firing))
    try:
        for batch, sample_ids in batches:
            network.step_logits(batch, sample_ids, steps)
            waiting.clear()
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise ValueError("activity_of: there are no images to run")
    return [
        LayerActivity(a.name, a.macs, a.inputs, a.neurons, a.events / images, a.spikes / images) for a in found.values()
    ]
