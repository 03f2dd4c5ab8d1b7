"""From one stage of cumulative training to the next: nested images, growth of a VGG to a description, what to prune."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyaccel import surgery
from pyaccel.data import epoch_order
from pyaccel.models.vgg import Vgg
from pyaccel.recipes.classifier import Images
from pyaccel.surgery.channels import channel_map


def nested(images: Images, fraction: float) -> Images:
    """A class-balanced share of the images; a smaller share is part of a larger one, always the same."""
    order = epoch_order(len(images), 0, 0)
    labels = torch.as_tensor(images.labels)[order]
    rank = torch.empty(len(order), dtype=torch.int64)  # how many of the same class come before it
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        rank[of_class] = torch.arange(len(of_class))
    order = order[rank.argsort(stable=True)]
    return images.subset(order[: max(1, round(fraction * len(images)))])


def blocks_of(model: nn.Module) -> list[list[str]]:
    """Names of the convolutions of a chain network, pooled block by pooled block, in the order of the graph."""
    blocks: list[list[str]] = [[]]
    for node in channel_map(model, "blocks_of").graph.nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            blocks[-1].append(node.target)
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)) and blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def widths_of(description: Vgg) -> list[list[int]]:
    """Widths of the convolutions of a description, block by block."""
    blocks: list[list[int]] = [[]]
    for entry in description.convolutions:
        if isinstance(entry, int):
            blocks[-1].append(entry)
        elif entry == "A":
            blocks.append([])
    return [block for block in blocks if block]


def grown(
    model: nn.Module,
    target: Vgg,
    calibration: Tensor,
    *,
    seed: int,
    kept: Mapping[str, float] | None = None,
    above: float = 0.9,
) -> nn.Module:
    """`model`, widened and deepened to `target` block by block, computing what it computed.

    A layer that kept no more than the share `above` of its filters in the last pruning (`kept`: share by name; those
    not named kept all) is neither widened nor followed by a new one: it has shown that it is wide enough.

    Raises:
        ValueError: another number of blocks than the target's, more layers in one, or wider ones.
    """
    wanted = widths_of(target)
    blocks = blocks_of(model)
    if len(blocks) != len(wanted) or any(len(have) > len(want) for have, want in zip(blocks, wanted, strict=True)):
        raise ValueError(
            f"cannot grow blocks of {[len(b) for b in blocks]} convolutions to {[len(w) for w in wanted]}: choose "
            "stages with the same blocks, each at least as deep as before"
        )
    grows = {name: (kept or {}).get(name, 1.0) > above for block in blocks for name in block}
    for have, want in zip(blocks, wanted, strict=True):
        for name, width in zip(have, want, strict=False):
            model = _widened(model, name, width, seed) if grows[name] else model
        for width in want[len(have) :] if grows[have[-1]] else []:
            model = surgery.deepen(model, have[-1], calibration=calibration)
            new = _behind(model, have[-1])
            model = _widened(model, new, width, seed)
            have.append(new)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    for name, width in zip(linear, target.hidden, strict=False):
        model = _widened(model, name, width, seed)
    return model


def _widened(model: nn.Module, name: str, width: int, seed: int) -> nn.Module:
    now = len(model.get_submodule(name).weight)
    if now > width:
        raise ValueError(
            f"cannot grow {name} of {now} outputs to {width}: choose stages each at least as wide as before"
        )
    return surgery.widen(model, name, width, seed=seed) if width > now else model


def _behind(model: nn.Module, name: str) -> str:
    """The convolution that follows another one."""
    names = [found for block in blocks_of(model) for found in block]
    return names[names.index(name) + 1]


def pruned_for_growth(model: nn.Module, rate: float) -> tuple[nn.Module, dict[str, float]]:
    """The network without the share `rate` of its filters that are weakest in their layers, and what each layer kept.

    A filter's score is its L1 norm over the mean of its layer; the ranking is over the network. So layers keep
    different
    shares: the network finds its widths.
    """
    channels = channel_map(model, "pruned_for_growth")
    norms = {
        name: model.get_submodule(name).weight.detach().abs().flatten(1).sum(1)
        for name, space in channels.writes.items()
        if isinstance(model.get_submodule(name), nn.Conv2d) and not space.root().frozen
    }
    scores = {name: norm / norm.mean().clamp_min(1e-12) for name, norm in norms.items()}
    limit = torch.cat(list(scores.values())).quantile(rate)
    rates = {name: float((score < limit).float().mean()) for name, score in scores.items()}
    smaller = surgery.shrink(surgery.prune_filters(model, rates, "l1"))
    kept = {name: len(smaller.get_submodule(name).weight) / len(norm) for name, norm in norms.items()}
    return smaller, kept
