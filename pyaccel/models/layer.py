"""One weight layer of a description, and what the artificial and the spiking form make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pyaccel.models.form import Form
from pyaccel.nn import SpikeConv2d, SpikeLinear


@dataclass(frozen=True)
class Layer:
    """A convolution (odd kernel, padded to keep the size) or a fully connected layer; then 2x2 pooling or dropout."""

    inputs: int
    outputs: int
    convolution: bool
    pooled: bool = False
    dropout: float = 0.0
    kernel: int = 3
    stride: int = 1

    def synapse(self, bias: bool = False) -> nn.Module:
        if self.convolution:
            return nn.Conv2d(**self._convolution())
        return nn.Linear(self.inputs, self.outputs, bias=bias)

    def spike_synapse(self, kind: str) -> nn.Module:
        """The same weights over spikes of this `kind` (see `ops.spike_conv2d`)."""
        if self.convolution:
            return SpikeConv2d(**self._convolution(), kind=kind)
        return SpikeLinear(self.inputs, self.outputs, bias=False, kind=kind)

    def _convolution(self) -> dict:
        return dict(
            in_channels=self.inputs, out_channels=self.outputs, kernel_size=self.kernel, stride=self.stride,
            padding=self.kernel // 2, bias=False,
        )  # fmt: skip

    def artificial(self, form: Form, norm: str) -> list[nn.Module]:
        """The layer with batch normalisation (unless it has a bias), ReLU and dropout; without its pooling."""
        bias = form.bias and not self.convolution
        parts = [self.synapse(bias)]
        if norm == "batch" and not bias:
            parts.append((nn.BatchNorm2d if self.convolution else nn.BatchNorm1d)(self.outputs))
        parts.append(nn.ReLU())
        if self.dropout:
            parts.append(nn.Dropout(self.dropout))
        return parts

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the next layer meets; 0 where nothing is left to pool."""
        height, width = (height - 1) // self.stride + 1, (width - 1) // self.stride + 1
        return (height // 2, width // 2) if self.pooled else (height, width)


def size_after(layers: Sequence[Layer], input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the images behind `layers`. ValueError if nothing is left."""
    height, width = input_shape[1:]
    for count, layer in enumerate(layers, start=1):
        height, width = layer.size_after(height, width)
        if min(height, width) < 1:
            raise ValueError(
                f"images of {input_shape[1]}x{input_shape[2]} are too small for this network: "
                f"nothing is left to pool after {count} layers; use larger images or a shallower network"
            )
    return height, width


def check_norm(norm: str) -> str:
    if norm not in ("batch", "none"):
        raise ValueError(f"norm of an artificial network must be batch or none, got {norm!r}")
    return norm


def check_dropout(dropout: tuple[float, float]) -> tuple[float, float]:
    """Probabilities after marked convolutions and after hidden fully connected layers, 0 <= p < 1."""
    dropout = tuple(dropout)
    if len(dropout) != 2 or not all(0 <= p < 1 for p in dropout):
        raise ValueError(
            f"dropout must be two probabilities in [0, 1), of convolutions and of fully connected layers, got {dropout}"
        )
    return dropout


def start_artificial(model: nn.Module, form: Form) -> None:
    """Initial weights of the artificial form (see `Form.hybrid_start`); biases 0."""
    for part in model.modules():
        if not isinstance(part, (nn.Conv2d, nn.Linear)):
            continue
        if not form.hybrid_start:
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
        elif isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(part.weight, 0.0, 0.01)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
