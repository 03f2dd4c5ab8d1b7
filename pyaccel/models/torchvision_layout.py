"""Weights of ImageNet in torchvision's layout, read from a file into the residual networks of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyaccel.models.checkpoints import _read
from pyaccel.models.resnet import ResidualBlock, ResidualNet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def load_torchvision(
    model: ResidualNet, source: str | os.PathLike | Mapping[str, Tensor], *, readout: bool = True
) -> None:
    """Copy a state dict of torchvision's `resnet18`, `34`, `50` or `101` into the `ResidualNet` of the same depth.

    Args:
        model: from `build("resnet50", input_shape=(3, 224, 224), ...)`, with batch normalisation and the 7x7 beginning.
        source: a `.safetensors` file, a file of `torch.save` (read without executing anything in it), or the dict.
        readout: take `fc` too; False leaves the model's read-out, of however many classes, as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names that are missing or left over and shapes that differ, all of them listed; another kind of
            model. The model is then unchanged.
    """
    if not isinstance(model, ResidualNet):
        raise ValueError(f"load_torchvision: fits a ResidualNet, got {type(model).__name__}")
    weights = dict(source) if isinstance(source, Mapping) else _file(Path(source))
    pairs = _names(model)
    if readout:
        pairs |= {
            f"readout.{part}": f"fc.{part}" for part in ("weight", "bias") if getattr(model.readout, part) is not None
        }
    own = model.state_dict()
    optional = {ours for ours in pairs if ours.endswith("num_batches_tracked")}  # absent from old files
    missing = [theirs for ours, theirs in pairs.items() if theirs not in weights and ours not in optional]
    missing += [name for name in own if name not in pairs and not name.startswith("readout.")]
    left = [name for name in weights if name not in pairs.values() and not (name.startswith("fc.") and not readout)]
    shapes = [
        f"{theirs} (file {list(weights[theirs].shape)}, model {list(own[ours].shape)})"
        for ours, theirs in pairs.items()
        if theirs in weights and weights[theirs].shape != own[ours].shape
    ]
    problems = [
        f"{what} {_listed(names)}"
        for what, names in (("missing:", missing), ("left over:", left), ("other shapes:", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"load_torchvision: the weights do not fit this {type(model).__name__}: {'; '.join(problems)}")
    with torch.no_grad():
        for ours, theirs in pairs.items():
            if theirs in weights:
                own[ours].copy_(weights[theirs])


def _file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file of weights")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a sound safetensors file: {error}") from error
    content = _read(file)
    return dict(content.get("state_dict", content))


def _names(model: ResidualNet) -> dict[str, str]:
    """Of each tensor of `features`: its name in torchvision."""
    pairs: dict[str, str] = {}

    def add(ours: str, theirs: str, module: nn.Module) -> None:
        for part in ("weight",) if isinstance(module, nn.Conv2d) else NORM:
            pairs[f"{ours}.{part}"] = f"{theirs}.{part}"

    stage, position = 1, 0
    for name, child in model.features.named_children():
        name = f"features.{name}"
        if isinstance(child, nn.Conv2d):
            add(name, "conv1", child)
        elif isinstance(child, nn.BatchNorm2d):
            add(name, "bn1", child)
        elif isinstance(child, ResidualBlock):
            layers = [m for m in child.body if isinstance(m, nn.Conv2d)]
            if any(m.stride != (1, 1) for m in layers):  # every stage but the first begins by halving the size
                stage, position = stage + 1, 0
            counts = {nn.Conv2d: 0, nn.BatchNorm2d: 0}
            for i, module in child.body.named_children():
                if type(module) in counts:
                    counts[type(module)] += 1
                    kind = "conv" if isinstance(module, nn.Conv2d) else "bn"
                    add(f"{name}.body.{i}", f"layer{stage}.{position}.{kind}{counts[type(module)]}", module)
            for i, module in child.shortcut.named_children():
                add(f"{name}.shortcut.{i}", f"layer{stage}.{position}.downsample.{i}", module)
            position += 1
    return pairs


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
