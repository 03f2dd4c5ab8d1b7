"""`prune_filters`: the filters of least worth set to zero for good; `shrink` then takes them out.

The criteria of 2003.02800 (abstract; the definitions are this library's, specification section 2): L1 norm of a
filter's weights, mean activation, random. Ranking is within a layer. A filter is pruned hard: its weights, bias and
affine normalisation become zero, what later layers make of its channel becomes zero, and so does the optimizer's state
of all that. Clearing the state is what matters: gradients of such a filter are zero, momentum would revive it.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from pyaccel.surgery.channels import ChannelMap, Space, channel_map
from pyaccel.surgery.reindex import Places, carried_optimizer, places, zero

CRITERIA = ("l1", "activation", "random")


def prune_filters(
    model: nn.Module,
    rate: float | Mapping[str, float],
    criterion: str = "l1",
    *,
    widths: Mapping[str, int] | None = None,
    skip: Collection[str] = (),
    coupled: str = "leave",
    min_keep: int = 1,
    activations: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
):
    """A copy of `model` in which a share `rate` of the filters of each convolution is zero; earlier zeros count.

    Args:
        rate: 0..1, for every convolution, or {layer: rate} for those to prune (linear layers may be among them). A
            layer of O filters loses round(O rate) in all, but keeps `min_keep`. Never revives one.
        criterion: "l1": sum |w| of the filter, without bias and normalisation; "activation": `activations[layer]`, as
            `activation_means` collects; "random": uniform among the survivors, by `seed` and the layer's name.
        widths: O of each layer where `model` has been shrunk before; default: what the layers have now.
        skip: names of convolutions to leave alone.
        coupled: filters that feed an addition, of a residual network: "leave" them alone, or prune them "joint"ly: one
            set of numbers for all layers of the sum, by the sum of their scores (this library's choice).
        optimizer: the one that trains `model`.

    Returns:
        The copy; with `optimizer`, (copy, new optimizer): of the same class, with the groups and state of the old one,
        the state of pruned filters zero. It holds them at zero after every step (`hold_pruned`). A scheduler has to be
        told of it: `scheduler.optimizer = optimizer`, or a new one.

    Raises:
        ValueError: a convolution that cannot be pruned, by name and reason (grouped; its channels pass through an
            unknown operation); an unknown name; a rate outside 0..1; missing activations; a model that fx cannot trace.
    """
    channels = channel_map(model, "prune_filters")
    _check(criterion, coupled, rate, activations)
    rates = _rates(model, channels, rate, skip, coupled)
    dead = dead_channels(model, channels)
    chosen: dict[Space, Tensor] = {}
    for space, layers in _spaces(channels, rates).items():
        gone = dead.get(space, torch.zeros(space.size, dtype=torch.bool))
        now = space.size - int(gone.sum())
        whole = _width(widths, layers[0], space.size)
        wanted = max(min_keep, whole - round(whole * rates[layers[0]]))
        score = sum(_scores(model, layer, criterion, activations, gone, seed) for layer in layers)
        order = score.masked_fill(gone, torch.inf).argsort(stable=True)
        lost = gone.clone()
        lost[order[: max(0, now - wanted)]] = True
        chosen[space] = lost.nonzero()[:, 0]
    pruned = copy.deepcopy(model)
    zeros = places(pruned, channels, chosen, alone=True)
    zero(pruned, None, zeros)
    if optimizer is None:
        return pruned
    carried = carried_optimizer(optimizer, model, pruned, Places(), "prune_filters")
    hold_pruned(pruned, carried)
    return pruned, carried


def hold_pruned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep every pruned filter of `model` at zero, in parameters and state, now and after each step of `optimizer`.

    `prune_filters` does so for the optimizer that it returns; needed again for one made anew for a checkpoint.
    """
    channels = channel_map(model, "hold_pruned")
    chosen = {space: gone.nonzero()[:, 0] for space, gone in dead_channels(model, channels).items()}
    zeros = places(model, channels, chosen, alone=True)
    zero(model, optimizer, zeros)
    optimizer.register_step_post_hook(lambda done, _args, _kwargs: zero(model, done, zeros))


def pruned_filters(model: nn.Module) -> dict[str, Tensor]:
    """Which filters of each convolution and linear layer are pruned: {layer: bool [filters]}."""
    channels = channel_map(model, "pruned_filters")
    dead = dead_channels(model, channels)
    return {
        name: dead.get(space.root(), torch.zeros(space.root().size, dtype=torch.bool))
        for name, space in channels.writes.items()
    }


def dead_channels(model: nn.Module, channels: ChannelMap) -> dict[Space, Tensor]:
    """Channels that are written as zeros and read by zeros only: bool [size] for each space that may change.

    Both, as either may be the zero start of a layer. What lies between, such as a normalisation's shift, is then moot.
    """
    found: dict[Space, Tensor] = {}
    for name, space in channels.writes.items():
        root = space.root()
        if root.frozen:
            continue
        module = model.get_submodule(name)
        zeros = _all_zero(module.weight, 0)
        if module.bias is not None:
            zeros &= _all_zero(module.bias, 0)
        found[root] = found[root] & zeros if root in found else zeros
    for name, layout in channels.reads.items():
        columns, offset = _all_zero(model.get_submodule(name).weight, 1), 0
        for part in layout.parts:
            root, features = part.root(), part.root().size * layout.block
            if root in found:
                found[root] = found[root] & columns[offset : offset + features].view(root.size, layout.block).all(1)
            offset += features
    return found


def _all_zero(tensor: Tensor, dim: int) -> Tensor:
    """Along `dim`, where everything is zero: bool [size], on the CPU."""
    return (tensor.detach() == 0).movedim(dim, 0).reshape(tensor.shape[dim], -1).all(1).cpu()


def _check(criterion, coupled, rate, activations) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"prune_filters: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if coupled not in ("leave", "joint"):
        raise ValueError(f"prune_filters: coupled must be leave or joint, got {coupled!r}")
    for value in rate.values() if isinstance(rate, Mapping) else [rate]:
        if not 0 <= value <= 1:
            raise ValueError(f"prune_filters: a rate is a share of the filters, 0..1, got {value}")
    if criterion == "activation" and activations is None:
        raise ValueError(
            "prune_filters: criterion 'activation' needs activations=activation_means(model), collected by "
            "watch_activations(model) while it trained"
        )


def _rates(model, channels: ChannelMap, rate, skip, coupled) -> dict[str, float]:
    """The rate of each layer to prune, in the order of the network."""
    for name in (*skip, *(rate if isinstance(rate, Mapping) else ())):
        if name not in channels.writes:
            raise ValueError(
                f"prune_filters: the model uses no convolution or linear layer {name!r}; it has "
                f"{', '.join(channels.writes)}"
            )
    rates, refused = {}, []
    for name, space in channels.writes.items():
        root, named = space.root(), isinstance(rate, Mapping) and name in rate
        if name in skip or (
            not named and (isinstance(rate, Mapping) or type(model.get_submodule(name)) is not nn.Conv2d)
        ):
            continue
        if root.frozen and (named or root.frozen != "they are the output of the model"):
            refused.append(f"{name} (its channels are fixed: {root.frozen})")
        elif root.summed and coupled == "leave":
            if named:
                refused.append(f'{name} (its channels enter an addition; coupled="joint" prunes them together)')
        elif not root.frozen:
            rates[name] = rate[name] if isinstance(rate, Mapping) else rate
    if refused:
        raise ValueError(f"prune_filters: cannot prune {'; '.join(refused)}; leave such layers alone with skip=[...]")
    if not rates:
        raise ValueError("prune_filters: there is no convolution left to prune")
    return rates


def _spaces(channels: ChannelMap, rates: Mapping[str, float]) -> dict[Space, list[str]]:
    found: dict[Space, list[str]] = {}
    for name in rates:
        found.setdefault(channels.writes[name].root(), []).append(name)
    for space, layers in found.items():
        missing = [name for name in channels.writers(space) if name not in rates]
        if missing:
            raise ValueError(
                f"prune_filters: {', '.join(layers)} must be pruned together with {', '.join(missing)}, whose channels "
                "are added to theirs; name all of them, or none"
            )
    return found


def _width(widths: Mapping[str, int] | None, layer: str, now: int) -> int:
    if widths is None or (now == 1 and layer not in widths):  # one channel left: a depthwise layer looks like any other
        return now
    if layer not in widths:
        raise ValueError(f"prune_filters: widths must name every layer to prune; {layer} is missing")
    return widths[layer]


def _scores(model, layer: str, criterion: str, activations, gone: Tensor, seed: int) -> Tensor:
    if criterion == "l1":  # in float64: what is zero in one mode and absent in the other must not change the order
        return model.get_submodule(layer).weight.detach().abs().flatten(1).sum(1, dtype=torch.float64).cpu()
    if criterion == "activation":
        if layer not in activations or len(activations[layer]) != len(gone):
            raise ValueError(f"prune_filters: activations must hold [{len(gone)}] means for {layer}")
        return activations[layer].double().cpu()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{layer}".encode()))  # it takes 32 bits
    score = torch.zeros(len(gone), dtype=torch.float64)
    score[~gone] = torch.rand(int((~gone).sum()), generator=generator, dtype=torch.float64)
    return score
