"""Residual networks: one description, from which the artificial and the spiking form are built."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyaccel.models.form import HYBRID_RESNET, PLAIN, Form
from pyaccel.models.layer import Layer, check_dropout, check_norm, size_after, start_artificial

SMALL = 64  # images up to this side meet a 3x3 convolution first, larger ones 7x7, stride 2, and pooling


@dataclass(frozen=True)
class Block:
    """Layers whose last one is joined by the block's input: through `shortcut`, a 1x1 convolution, or as it is."""

    layers: tuple[Layer, ...]
    shortcut: Layer | None


@dataclass(frozen=True)
class ResNet:
    """Residual blocks at 64, 128, 256, 512 channels.

    `preprocess`: the networks of 2005.01807, with three convolutions and 2x2 pooling before the blocks, dropout inside
    them, and a read-out of the whole last map; otherwise those of 1512.03385, with a read-out of its mean.
    """

    blocks: tuple[int, int, int, int]
    source: str
    form: Form = PLAIN
    bottleneck: bool = False
    preprocess: bool = False
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)

    def scaled(self, width: float) -> ResNet:
        """Every layer `width` times as wide (at least 1)."""
        return replace(self, widths=tuple(max(1, round(n * width)) for n in self.widths))

    def layers(
        self, input_shape: tuple[int, int, int], dropout: tuple[float, float] | None = None
    ) -> tuple[list[Layer], list[Block], int]:
        """The layers before the blocks, the blocks, and how many values the read-out reads."""
        drop = check_dropout(self.form.dropout if dropout is None else dropout)[0]
        stem = self._stem(input_shape, drop)
        height, width = size_after(stem, input_shape)
        channels, blocks = stem[-1].outputs, []
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(self._block(channels, self.widths[stage], stride, drop))
                channels = blocks[-1].layers[-1].outputs
                for layer in blocks[-1].layers:
                    height, width = layer.size_after(height, width)
        return stem, blocks, channels * height * width if self.preprocess else channels

    def _stem(self, input_shape: tuple[int, int, int], drop: float) -> list[Layer]:
        channels, first = input_shape[0], self.widths[0]
        if self.preprocess:
            return [
                Layer(channels, first, True, dropout=drop),
                Layer(first, first, True, dropout=drop),
                Layer(first, first, True, pooled=True),
            ]
        if max(input_shape[1:]) <= SMALL:
            return [Layer(channels, first, True)]
        return [Layer(channels, first, True, pooled=True, kernel=7, stride=2)]

    def _block(self, inputs: int, width: int, stride: int, drop: float) -> Block:
        if self.bottleneck:
            layers = (
                Layer(inputs, width, True, kernel=1, dropout=drop),
                Layer(width, width, True, stride=stride, dropout=drop),
                Layer(width, 4 * width, True, kernel=1),
            )
        else:
            layers = (Layer(inputs, width, True, stride=stride, dropout=drop), Layer(width, width, True))
        outputs = layers[-1].outputs
        same = stride == 1 and inputs == outputs
        return Block(layers, None if same else Layer(inputs, outputs, True, kernel=1, stride=stride))


def _hybrid(*blocks: int) -> ResNet:
    return ResNet(blocks, "2005.01807, official code", HYBRID_RESNET, preprocess=True)


DESCRIPTIONS = {
    "resnet12": _hybrid(1, 1, 1, 1),
    "resnet20": _hybrid(2, 2, 2, 2),
    "resnet34_cifar": _hybrid(3, 4, 5, 3),  # 34 layers; the official spiking file has 6, which its own ANN does not fit
    "resnet18": ResNet((2, 2, 2, 2), "1512.03385"),
    "resnet34": ResNet((3, 4, 6, 3), "1512.03385"),
    "resnet50": ResNet((3, 4, 6, 3), "1512.03385", bottleneck=True),
    "resnet101": ResNet((3, 4, 23, 3), "1512.03385", bottleneck=True),
}


class ResidualBlock(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, block: Block, form: Form, norm: str):
        super().__init__()
        parts = [part for layer in block.layers for part in layer.artificial(form, norm)]
        self.body = nn.Sequential(*parts[:-1])  # the last ReLU follows the sum
        self.shortcut = (
            nn.Identity() if block.shortcut is None else nn.Sequential(*block.shortcut.artificial(form, norm)[:-1])
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class ResidualNet(nn.Module):
    """The artificial form: `features`, images to `[B, values]`, and a linear `readout`."""

    def __init__(
        self,
        description: ResNet,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        norm: str | None = None,
        dropout: tuple[float, float] | None = None,
    ):
        super().__init__()
        form = description.form
        norm = check_norm(form.norm if norm is None else norm)
        stem, blocks, features = description.layers(input_shape, dropout)
        parts: list[nn.Module] = []
        for layer in stem:
            parts.extend(layer.artificial(form, norm))
            if layer.pooled:
                parts.append(nn.AvgPool2d(2) if description.preprocess else nn.MaxPool2d(3, 2, 1))
        parts.extend(ResidualBlock(block, form, norm) for block in blocks)
        if not description.preprocess:
            parts.append(nn.AdaptiveAvgPool2d(1))
        self.features = nn.Sequential(*parts, nn.Flatten())
        self.readout = nn.Linear(features, classes, bias=form.bias)
        start_artificial(self, form)

    def forward(self, images: Tensor) -> Tensor:
        return self.readout(self.features(images))
