"""`shrink`: pruned filters taken out, so that a smaller count becomes less time; and the same sizes made anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyaccel.surgery.channels import channel_map
from pyaccel.surgery.prune import dead_channels
from pyaccel.surgery.reindex import carried_optimizer, formatted, gather, places, resize


def shrink(model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
    """A copy of `model` without its pruned filters: smaller layers, the same function.

    Taken out are channels that are exactly zero where they are written and where they are read, as `prune_filters`
    leaves them: row j of the convolution, entry j of its normalisation, column j (or block of columns, behind a
    flattening) of the layers behind it, and the same slices of every state tensor of `optimizer`. One channel is always
    left. Trained on, the copy follows the path of the model with zeros (a masked one).

    Returns:
        The copy; with `optimizer`, (copy, new optimizer) as `prune_filters` does.
    """
    channels = channel_map(model, "shrink")
    kept = {}
    for space, dead in dead_channels(model, channels).items():
        if dead.any():
            alive = (~dead).nonzero()[:, 0]
            kept[space] = alive if len(alive) else torch.tensor([0])
    moves = places(model, channels, kept)
    smaller = copy.deepcopy(model)
    gather(smaller, moves)
    if optimizer is None:
        return smaller
    return smaller, carried_optimizer(optimizer, model, smaller, moves, "shrink")


def like_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with the sizes and the values of `tensors`, a state dict of its shrunk or widened form.

    What a run needs to resume whose network has changed: build the first network, then this, then load.
    ValueError for other names than the model's.
    """
    own = model.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(
            f"like_tensors: expected the names of the model, got others: {sorted(own.keys() ^ tensors.keys())}"
        )
    made = copy.deepcopy(model)
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        module = made.get_submodule(owner)
        old = getattr(module, key)
        new = formatted(value.to(old.device, old.dtype, copy=True), old.detach())
        if isinstance(old, nn.Parameter):
            setattr(module, key, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module._buffers[key] = new
    resize(made)
    return made
