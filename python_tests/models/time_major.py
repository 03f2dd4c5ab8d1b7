"""The networks as their papers write them, in plain torch: all layers at one time step, then the next step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import models, reference
from pyaccel.nn import BNTTLIF, STDBLIF


def run(model: models.SpikingNetwork, inputs: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Logits `[B, classes]` of encoded `inputs` `[T, B, C, H, W]`.

    masks: of each layer with dropout, entries 0 and 1/(1 - p), as `torch.nn.Dropout` makes them from ones.
    """
    states: dict[str, tuple] = {}
    total = 0.0
    for t, spikes in enumerate(inputs.unbind(0)):
        for name, part in model.features.named_children():
            spikes = _part(f"features.{name}", part, spikes, t, states, masks)
        spikes = model.flat(spikes[None])[0]
        for name, part in model.classifier.named_children():
            spikes = _part(f"classifier.{name}", part, spikes, t, states, masks)
        total = total + spikes @ model.readout.weight.t()
    return total / len(inputs) if model.mean_readout else total


def _part(name, part, spikes, t, states, masks):
    if isinstance(part, models.SpikingLayer):
        return _layer(name, part, spikes, 0.0, t, states, masks)
    entered = spikes
    for i, layer in enumerate(part.layers[:-1]):
        spikes = _layer(f"{name}.layers.{i}", layer, spikes, 0.0, t, states, masks)
    joined = entered if part.shortcut is None else F.conv2d(entered, part.shortcut.weight, stride=part.shortcut.stride)
    return _layer(f"{name}.layers.{len(part.layers) - 1}", part.layers[-1], spikes, joined, t, states, masks)


def _layer(name, layer, spikes, residual, t, states, masks):
    weight = layer.synapse.weight
    if weight.dim() == 4:
        current = F.conv2d(spikes, weight, stride=layer.synapse.stride, padding=layer.synapse.padding)
    else:
        current = spikes @ weight.t()
    out, states[name] = _neuron(layer.neuron, (current + residual)[None], states.get(name), t)
    spikes = out[0]
    if layer.pool is not None:
        return F.avg_pool2d(spikes, 2)
    return spikes * masks[f"{name}.dropout"] if layer.dropout is not None and masks else spikes


def _neuron(neuron, current, state, t):
    if isinstance(neuron, STDBLIF):
        membrane, since = state or (None, None)
        options = dict(leak=neuron.leak, threshold=float(neuron.threshold), alpha=neuron.alpha, beta=neuron.beta)
        out, *state = reference.stdb_lif(current, membrane, since, **options)
        return out, state
    options = dict(leak=neuron.leak, threshold=float(neuron.threshold), **neuron.neuron)
    if isinstance(neuron, BNTTLIF):
        given = {}
        if not neuron.training:
            given = dict(mean=neuron.running_mean[t : t + 1], var=neuron.running_var[t : t + 1])
        options |= dict(eps=neuron.eps, **given)
        out, state, _, _ = reference.bntt_lif(current, neuron.weight[t : t + 1], state, **options)
        return out, state
    return reference.lif(current, state, **options)


def masks_of(model: models.SpikingNetwork, images: Tensor, sample_ids: Tensor | None = None) -> dict[str, Tensor]:
    """What the dropout of the next pass of `model` will be, entries 0 and 1/(1 - p)."""
    shapes, found = {}, {}
    handles = [
        m.register_forward_hook(lambda m, a, out, name=name: shapes.__setitem__(name, out.shape[1:]))
        for name, m in model.named_modules()
        if isinstance(m, models.dropout.HeldDropout)
    ]
    training = model.training
    with torch.no_grad():
        model.eval()(images, steps=1)
    model.train(training)
    for handle in handles:
        handle.remove()
    for name, shape in shapes.items():
        module = model.get_submodule(name)
        found[name] = module.kept(shape, sample_ids).to(images.dtype) / (1 - module.p)
    return found
