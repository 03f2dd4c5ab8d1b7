"""VGG networks: one description, from which the artificial and the spiking form are built.

3x3 convolutions, stride 1, padding 1, no bias; "A" is 2x2 average pooling after the layer before it. Papers disagree on
what a VGG9 is, so names carry the paper where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pyaccel.nn import SpikeConv2d, SpikeLinear

POOL = "A"


@dataclass(frozen=True)
class Vgg:
    """Convolution channels with pooling marks, then the widths of the hidden fully connected layers."""

    convolutions: tuple[int | str, ...]
    hidden: tuple[int, ...]
    source: str

    def scaled(self, width: float) -> Vgg:
        """Every layer `width` times as wide (at least 1)."""

        def scale(n: int) -> int:
            return max(1, round(n * width))

        convolutions = tuple(c if c == POOL else scale(c) for c in self.convolutions)
        return Vgg(convolutions, tuple(map(scale, self.hidden)), self.source)

    def layers(self, input_shape: tuple[int, int, int]) -> list[Layer]:
        """The weight layers up to the read-out, with the shapes they meet."""
        channels, height, width = input_shape
        found: list[Layer] = []
        for entry in self.convolutions:
            if entry == POOL:
                if min(height, width) < 2:
                    raise ValueError(
                        f"images of {input_shape[1]}x{input_shape[2]} are too small for this network: "
                        f"nothing is left to pool after {len(found)} layers; use larger images or a shallower network"
                    )
                height, width = height // 2, width // 2
                found[-1] = Layer(found[-1].inputs, found[-1].outputs, True, True)
            else:
                found.append(Layer(channels, int(entry), True, False))
                channels = int(entry)
        features = channels * height * width
        for outputs in self.hidden:
            found.append(Layer(features, outputs, False, False))
            features = outputs
        return found


@dataclass(frozen=True)
class Layer:
    inputs: int
    outputs: int
    convolution: bool
    pooled: bool

    def synapse(self) -> nn.Module:
        if self.convolution:
            return nn.Conv2d(self.inputs, self.outputs, 3, padding=1, bias=False)
        return nn.Linear(self.inputs, self.outputs, bias=False)

    def spike_synapse(self, kind: str) -> nn.Module:
        """The same weights over spikes of this `kind` (see `ops.spike_conv2d`)."""
        if self.convolution:
            return SpikeConv2d(self.inputs, self.outputs, 3, padding=1, bias=False, kind=kind)
        return SpikeLinear(self.inputs, self.outputs, bias=False, kind=kind)


DESCRIPTIONS = {
    "vgg5": Vgg((64, "A", 128, 128, "A"), (1024,), "a small network for demonstrations"),
    "vgg9_bntt": Vgg((64, 64, "A", 128, 128, "A", 256, 256, 256, "A"), (1024,), "2010.01729, official code"),
    "vgg11_bntt": Vgg(
        (64, "A", 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"), (4096,), "2010.01729, official code"
    ),
}


class VggNet(nn.Sequential):
    """The artificial form: convolution or linear, batch normalisation, ReLU, pooling; then the read-out."""

    def __init__(self, description: Vgg, *, input_shape: tuple[int, int, int], classes: int, norm: str = "batch"):
        if norm not in ("batch", "none"):
            raise ValueError(f"norm of an artificial network must be batch or none, got {norm!r}")
        layers = description.layers(input_shape)
        parts: list[nn.Module] = []
        for i, layer in enumerate(layers):
            if not layer.convolution and (i == 0 or layers[i - 1].convolution):
                parts.append(nn.Flatten())
            parts.append(layer.synapse())
            if norm == "batch":
                parts.append((nn.BatchNorm2d if layer.convolution else nn.BatchNorm1d)(layer.outputs))
            parts.append(nn.ReLU())
            if layer.pooled:
                parts.append(nn.AvgPool2d(2))
        super().__init__(*parts, nn.Linear(layers[-1].outputs, classes, bias=False))
        for part in self:
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
