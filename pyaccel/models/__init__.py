"""Networks by name: one description each, built as an artificial or a spiking network."""

from __future__ import annotations

from torch import nn

from pyaccel.models import cacl, resnet, vgg
from pyaccel.models.cacl import Cacl, CaclNet
from pyaccel.models.checkpoints import load_official
from pyaccel.models.continual import ContinualNet, factor_parameters, readout
from pyaccel.models.released_continual import load_released_continual
from pyaccel.models.resnet import ResidualNet, ResNet
from pyaccel.models.spiking import SpikingLayer, SpikingNetwork, SpikingVgg
from pyaccel.models.spiking_resnet import SpikingBlock, SpikingResNet
from pyaccel.models.torchvision_layout import load_torchvision
from pyaccel.models.vgg import Vgg, VggNet

__all__ = [
    "DESCRIPTIONS",
    "CaclNet",
    "ContinualNet",
    "ResidualNet",
    "SpikingBlock",
    "SpikingLayer",
    "SpikingNetwork",
    "SpikingResNet",
    "SpikingVgg",
    "VggNet",
    "build",
    "factor_parameters",
    "list_models",
    "load_official",
    "load_released_continual",
    "load_torchvision",
    "readout",
]

DESCRIPTIONS: dict[str, Vgg | ResNet | Cacl] = {**vgg.DESCRIPTIONS, **resnet.DESCRIPTIONS, **cacl.DESCRIPTIONS}
ARTIFICIAL = {Vgg: VggNet, ResNet: ResidualNet, Cacl: CaclNet}
SPIKING = {Vgg: SpikingVgg, ResNet: SpikingResNet}


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
        options: spiking: `steps`, `leak`, `threshold`, `neuron` ("bntt", "lif", "delayed", "stdb"), `norm` ("bntt",
            "shared", "none"), `gain`, `mean_readout`, `dropout`, `seed`, `input` ("poisson", "events") and the
            neuron's own (see `SpikingNetwork`); artificial: `norm` ("batch", "none"), `dropout`, and of a VGG `pool`
            ("average", "max"). `dropout`: two probabilities, after convolutions where the network has dropout, and
            after hidden fully connected layers (`cacl_net`: one number).

    Raises:
        ValueError: an unknown name (the message lists the known ones), images too small for the network, a form that a
            network does not have.
    """
    if name not in DESCRIPTIONS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(list_models())}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape must be (channels, height, width), got {tuple(input_shape)}")
    description = DESCRIPTIONS[name].scaled(width)
    if spiking is None:
        spiking = name.endswith("_bntt")
    network = (SPIKING if spiking else ARTIFICIAL).get(type(description))
    if network is None:
        raise ValueError(f"{name} has no spiking form: build it with spiking=False")
    return network(description, input_shape=tuple(input_shape), classes=classes, **options)
