"""VGG networks: one description, from which the artificial and the spiking form are built.

3x3 convolutions, stride 1, padding 1, no bias; after the layer before it "A" is 2x2 pooling, "D" dropout. Papers
disagree on what a VGG9 is, so names carry the paper where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from pyaccel.models.form import BNTT, CROSSBAR, HYBRID, PLAIN, ROBUST, Form
from pyaccel.models.layer import Layer, check_dropout, check_norm, size_after, start_artificial

POOL, DROP = "A", "D"
LARGE = 64  # images with a side beyond it get the ImageNet classifier


@dataclass(frozen=True)
class Vgg:
    """Convolution channels with marks, then the widths of the hidden fully connected layers.

    `large_hidden`: their widths for images larger than 64x64, if they differ.
    """

    convolutions: tuple[int | str, ...]
    hidden: tuple[int, ...]
    source: str
    form: Form = BNTT
    large_hidden: tuple[int, ...] | None = None

    def scaled(self, width: float) -> Vgg:
        """Every layer `width` times as wide (at least 1)."""

        def scale(n: int) -> int:
            return max(1, round(n * width))

        convolutions = tuple(c if isinstance(c, str) else scale(c) for c in self.convolutions)
        large = None if self.large_hidden is None else tuple(map(scale, self.large_hidden))
        return replace(self, convolutions=convolutions, hidden=tuple(map(scale, self.hidden)), large_hidden=large)

    def layers(
        self, input_shape: tuple[int, int, int], dropout: tuple[float, float] | None = None
    ) -> tuple[list[Layer], int]:
        """The weight layers up to the read-out, with the shapes they meet, and how many values the read-out reads."""
        convolution_dropout, hidden_dropout = check_dropout(self.form.dropout if dropout is None else dropout)
        channels = input_shape[0]
        found: list[Layer] = []
        for i, entry in enumerate(self.convolutions):
            if isinstance(entry, str):
                continue
            mark = self.convolutions[i + 1] if i + 1 < len(self.convolutions) else None
            drop = convolution_dropout if mark == DROP else 0.0
            found.append(Layer(channels, entry, True, pooled=mark == POOL, dropout=drop))
            channels = entry
        height, width = size_after(found, input_shape)
        features = channels * height * width
        large = self.large_hidden is not None and max(input_shape[1:]) > LARGE
        for outputs in self.large_hidden if large else self.hidden:
            found.append(Layer(features, outputs, False, dropout=hidden_dropout))
            features = outputs
        return found, features


def dropped(*convolutions: int | str) -> tuple[int | str, ...]:
    """Dropout after every convolution that no pooling follows."""
    marked: list[int | str] = []
    for entry, following in zip(convolutions, (*convolutions[1:], None), strict=True):
        marked.append(entry)
        if entry != POOL and following != POOL:
            marked.append(DROP)
    return tuple(marked)


def hybrid(*convolutions: int | str, hidden: int = 4096) -> Vgg:
    return Vgg(dropped(*convolutions), (hidden, hidden), "2005.01807, official code", HYBRID)


def plain(*blocks: tuple[int, int]) -> Vgg:
    """Blocks of (layers, channels), pooling after each."""
    convolutions = sum(((channels,) * layers + (POOL,) for layers, channels in blocks), ())
    return Vgg(convolutions, (), "1409.1556, with batch normalisation", PLAIN, large_hidden=(4096, 4096))


DESCRIPTIONS = {
    "mlp": Vgg((), (100, 100), "two hidden layers, for tasks as small as 8x8 digits"),
    "vgg5": Vgg((64, "A", 128, 128, "A"), (1024,), "a small network for demonstrations"),
    "vgg9_bntt": Vgg((64, 64, "A", 128, 128, "A", 256, 256, 256, "A"), (1024,), "2010.01729, official code"),
    "vgg11_bntt": Vgg(
        (64, "A", 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"), (4096,), "2010.01729, official code"
    ),
    "vgg5_hybrid": hybrid(64, "A", 128, 128, "A"),
    "vgg9_hybrid": hybrid(64, "A", 128, 256, "A", 256, 512, "A", 512, "A", 512),
    "vgg11_hybrid": hybrid(64, "A", 128, 256, 256, "A", 512, 512, 512, "A", 512, 512, hidden=1024),
    "vgg16_hybrid": hybrid(
        64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512
    ),
    "vgg5_robust": Vgg((64, "A", 128, "D", 128, "A"), (1024, 1024), "2003.10399, official code", ROBUST),
    "vgg8_crossbar": Vgg(
        (128, 128, "A", 256, 256, "A", 512, 512, "A"), (1024,), "NeuroSim; for 2008.11298 inferred", CROSSBAR
    ),
    "vgg16_crossbar": Vgg(
        (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512, "A"), (512, 256),
        "DetectX, of the group of 2008.11298; for that paper inferred", PLAIN,
    ),
    "vgg11": plain((1, 64), (1, 128), (2, 256), (2, 512), (2, 512)),
    "vgg13": plain((2, 64), (2, 128), (2, 256), (2, 512), (2, 512)),
    "vgg16": plain((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)),
    "vgg19": plain((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)),
}  # fmt: skip


class VggNet(nn.Sequential):
    """The artificial form: convolution or linear, batch normalisation, ReLU, pooling or dropout; then the read-out."""

    def __init__(
        self,
        description: Vgg,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        norm: str | None = None,
        pool: str | None = None,
        dropout: tuple[float, float] | None = None,
    ):
        form = description.form
        norm, pool = check_norm(form.norm if norm is None else norm), form.pool if pool is None else pool
        if pool not in ("average", "max"):
            raise ValueError(f"pool of an artificial network must be average or max, got {pool!r}")
        layers, features = description.layers(input_shape, dropout)
        parts: list[nn.Module] = []
        flat = False
        for layer in layers:
            if not layer.convolution and not flat:
                parts.append(nn.Flatten())
                flat = True
            parts.extend(layer.artificial(form, norm))
            if layer.pooled:
                parts.append(nn.AvgPool2d(2) if pool == "average" else nn.MaxPool2d(2))
        if not flat:
            parts.append(nn.Flatten())
        super().__init__(*parts, nn.Linear(features, classes, bias=form.bias))
        start_artificial(self, form)
