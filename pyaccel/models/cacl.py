"""The network of 2009.01956 (continual learning by SVD), in its dense form: no padding, no normalisation, no bias."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyaccel.models.form import Form
from pyaccel.models.layer import start_artificial


@dataclass(frozen=True)
class Cacl:
    """Four 3x3 convolutions, with 2x2 maximum and dropout after each pair, a 2x2 convolution, and a 2x2 mean."""

    widths: tuple[int, int, int, int, int]
    source: str
    dropout: float = 0.15

    def scaled(self, width: float) -> Cacl:
        """Every layer `width` times as wide (at least 1)."""
        return replace(self, widths=tuple(max(1, round(n * width)) for n in self.widths))


DESCRIPTIONS = {"cacl_net": Cacl((64, 64, 128, 128, 256), "2009.01956, official code")}


class CaclNet(nn.Module):
    """`features`, images to `[B, values]`, and a linear `readout` with bias: the head of one task."""

    def __init__(
        self, description: Cacl, *, input_shape: tuple[int, int, int], classes: int, dropout: float | None = None
    ):
        super().__init__()
        p = description.dropout if dropout is None else dropout
        a, b, c, d, e = description.widths
        channels, height, width = input_shape
        height, width = ((((n - 4) // 2 - 4) // 2 - 1) // 2 for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"images of {input_shape[1]}x{input_shape[2]} are too small for this network: it needs 24x24 or larger"
            )

        def pair(inputs: int, first: int, second: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, first, 3, bias=False), nn.ReLU(), nn.Conv2d(first, second, 3, bias=False), nn.ReLU(),
                nn.MaxPool2d(2), nn.Dropout(p),
            ]  # fmt: skip

        self.features = nn.Sequential(
            *pair(channels, a, b), *pair(b, c, d), nn.Conv2d(d, e, 2, bias=False), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self.readout = nn.Linear(e * height * width, classes)
        start_artificial(self, Form())

    def forward(self, images: Tensor) -> Tensor:
        return self.readout(self.features(images))
