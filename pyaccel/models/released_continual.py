"""The models that the official code of 2009.01956 was released with, read into `ContinualNet`.

A folder as that code writes it: `final_model.pth`, a state dict with `convI.N`, `convI.C`, `convI.Sigma` and for each
task name `last.NAME.0.weight` and `.bias`; `task_identifiers.pth`, {task counted from 0: cumulative ranks};
`task_name_count.pth`, {task name: task}.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pyaccel.models.cacl import DESCRIPTIONS, CaclNet
from pyaccel.models.checkpoints import _read
from pyaccel.models.continual import ContinualNet
from pyaccel.nn.factorized import FactorizedConv2d

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv6")


def load_released_continual(folder: str | os.PathLike) -> tuple[ContinualNet, list[str]]:
    """The network of `folder`, every task finished, and the names of its tasks in the order of learning.

    Files are read without executing anything in them. Spare slots are left out. FileNotFoundError; ValueError for
    files that do not fit each other or the published network.
    """
    folder = Path(folder)
    weights, ranks, numbers = (
        _read(folder / name) for name in ("final_model.pth", "task_identifiers.pth", "task_name_count.pth")
    )
    names = sorted(numbers, key=numbers.get)
    missing = [
        f"{layer}.{part}" for layer in LAYERS for part in ("N", "C", "Sigma") if f"{layer}.{part}" not in weights
    ]
    missing += [
        f"last.{name}.0.{part}"
        for name in names
        for part in ("weight", "bias")
        if f"last.{name}.0.{part}" not in weights
    ]
    if missing:
        raise ValueError(
            f"{folder}: final_model.pth lacks {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}"
        )
    if sorted(ranks) != list(range(len(names))):
        raise ValueError(f"{folder}: expected ranks of {len(names)} tasks, got those of {sorted(ranks)}")
    heads = [(weights[f"last.{name}.0.weight"], weights[f"last.{name}.0.bias"]) for name in names]
    dense = CaclNet(DESCRIPTIONS["cacl_net"], input_shape=(3, 32, 32), classes=1).features
    convolutions = {n: m for n, m in dense.named_children() if isinstance(m, torch.nn.Conv2d)}
    for index, ((name, old), theirs) in enumerate(zip(convolutions.items(), LAYERS, strict=True)):
        layer = FactorizedConv2d(old.in_channels, old.out_channels, old.kernel_size, rank=0)
        cumulative = [int(ranks[t][index]) for t in range(len(names))]
        left, sigma, right = (weights[f"{theirs}.{part}"].detach().clone() for part in ("N", "Sigma", "C"))
        if left.shape[:1] + right.shape[1:] != (layer.out_channels, layer.columns) or len(sigma) < max(cumulative):
            raise ValueError(
                f"{folder}: {theirs} has N {list(left.shape)}, C {list(right.shape)}, expected "
                f"[{layer.out_channels}, r] and [r, {layer.columns}] with r at least {max(cumulative)}"
            )
        last = cumulative[-1]
        layer.shared_left, layer.shared_sigma, layer.shared_right = (
            left[:, :last].contiguous(),
            sigma[:last],
            right[:last],
        )
        layer.prefixes = torch.tensor(cumulative, dtype=torch.int64)
        setattr(dense, name, layer)
    net = ContinualNet(dense, [len(bias) for _, bias in heads], heads[0][0].shape[1])
    with torch.no_grad():
        for head, (weight, bias) in zip(net.heads, heads, strict=True):
            head.weight.copy_(weight)
            head.bias.copy_(bias)
    return net.eval(), names
