"""The spiking form of residual networks."""

from __future__ import annotations

from torch import Tensor, nn

from pyaccel.models.resnet import ResNet
from pyaccel.models.spiking import SpikingLayer, SpikingNetwork


class SpikingBlock(nn.Module):
    """Spiking layers; the block's input joins the last one as a current, beside its weights (2005.01807's code).

    No neuron lies on the shortcut, a 1x1 convolution or nothing. Where the last layer is normalised, the sum is: a
    definition of this library, no paper at hand has residual BNTT networks.
    """

    def __init__(self, layers: list[SpikingLayer], shortcut: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shortcut = shortcut

    def forward(self, spikes: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        residual = spikes if self.shortcut is None else self.shortcut(spikes)
        for layer in self.layers[:-1]:
            spikes = layer(spikes, sample_ids)
        return self.layers[-1](spikes, sample_ids, residual)


class SpikingResNet(SpikingNetwork):
    """A residual network of spiking neurons; see `SpikingNetwork`, `SpikingBlock`.

    Large images: the 3x3 maximum after the first convolution is a 2x2 mean here. The networks of 1512.03385 read out
    the mean of the last map.
    """

    def hidden_layers(self, description: ResNet, input_shape, dropout, make):
        stem, blocks, outputs = description.layers(input_shape, dropout)
        self.flattens = description.preprocess
        features, kind, before = [], self.input_kind, 0.0
        for layer in stem:
            features.append(make(layer, kind, before))
            kind, before = "pooled" if layer.pooled else "binary", layer.dropout
        for block in blocks:
            layers, inner, dropped = [], kind, 0.0
            for layer in block.layers:
                layers.append(make(layer, inner, dropped))
                inner, dropped = "binary", layer.dropout
            shortcut = None if block.shortcut is None else block.shortcut.spike_synapse(kind)
            features.append(SpikingBlock(layers, shortcut))
            kind = "binary"
        return features, [], outputs, 0.0

    def flat(self, spikes: Tensor) -> Tensor:
        return spikes.flatten(2) if self.flattens else spikes.mean((-2, -1))
