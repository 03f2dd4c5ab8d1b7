"""Networks by name: one description each, built as an artificial or a spiking network."""

from __future__ import annotations

from torch import nn

from pyaccel.models.spiking import SpikingLayer, SpikingVgg
from pyaccel.models.vgg import DESCRIPTIONS, VggNet

__all__ = ["SpikingLayer", "SpikingVgg", "VggNet", "build", "list_models"]


def list_models() -> list[str]:
    """The names that `build` takes."""
    return sorted(DESCRIPTIONS)


def build(
    name: str,
    *,
    classes: int,
    spiking: bool | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    width: float = 1.0,
    **options,
) -> nn.Module:
    """The network `name` for images of `input_shape` (C, H, W).

    Args:
        spiking: the spiking or the artificial form; None: spiking for the names ending in `_bntt`.
        width: every hidden layer this many times as wide.
        options: spiking: `steps`, `leak`, `threshold`, `norm` ("bntt", "shared", "none"), `gain` and `seed` of the
            encoder, and the neuron's (`reset`, `surrogate`, ...; see `nn.LIF`); artificial: `norm` ("batch", "none").

    Raises:
        ValueError: an unknown name (the message lists the known ones), or images too small for the network.
    """
    if name not in DESCRIPTIONS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(list_models())}")
    description = DESCRIPTIONS[name].scaled(width)
    if spiking is None:
        spiking = name.endswith("_bntt")
    network = SpikingVgg if spiking else VggNet
    return network(description, input_shape=tuple(input_shape), classes=classes, **options)
