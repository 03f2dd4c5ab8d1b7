"""Convolution, linear layer and pooling for spikes: as torch's, but keeping bits of their input for backward."""

from __future__ import annotations

from torch import Tensor, nn

from pyaccel import ops

ANY = "any"


class SpikeConv2d(nn.Conv2d):
    """`nn.Conv2d` over spikes `[..., C, H, W]` (any leading dimensions); keeps 1 to 4 bits a spike for backward.

    `kind`: "binary", "signed", "pooled" or "pooled_signed" (see `ops.spike_conv2d`); "any": values of no special kind,
    such as counts of events, kept as they are. Only zero padding.
    """

    def __init__(self, *args, kind: str = "binary", **options):
        super().__init__(*args, **options)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"SpikeConv2d: padding must be numbers of zeros, got {self.padding!r}, {self.padding_mode!r}")
        self.kind = kind

    def forward(self, spikes: Tensor) -> Tensor:
        if self.kind == ANY:
            return super().forward(spikes.flatten(0, -4)).unflatten(0, spikes.shape[:-3])
        return ops.spike_conv2d(
            spikes, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, kind=self.kind,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class SpikeLinear(nn.Linear):
    """`nn.Linear` over spikes `[..., in]`; keeps 1 to 4 bits a spike for backward (`kind` as in `SpikeConv2d`)."""

    def __init__(self, *args, kind: str = "binary", **options):
        super().__init__(*args, **options)
        self.kind = kind

    def forward(self, spikes: Tensor) -> Tensor:
        if self.kind == ANY:
            return super().forward(spikes)
        return ops.spike_linear(spikes, self.weight, self.bias, kind=self.kind)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class SpikeAvgPool2d(nn.Module):
    """Average pooling of `[..., H, W]` with stride = kernel, keeping nothing for backward."""

    def __init__(self, kernel_size: int | tuple[int, int]):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, spikes: Tensor) -> Tensor:
        return ops.spike_avg_pool2d(spikes, self.kernel_size)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"
