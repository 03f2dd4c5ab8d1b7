"""Take channels by number out of every parameter, buffer and optimizer state that has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyaccel.surgery.channels import ChannelMap, Space


@dataclass
class Places:
    """Where channels lie: (name of the parameter or buffer, dimension, numbers along it)."""

    found: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def add(self, module: nn.Module, name: str, key: str, dim: int, index: Tensor) -> None:
        if getattr(module, key, None) is not None:
            self.found.append((f"{name}.{key}" if name else key, dim, index))

    def __iter__(self) -> Iterator[tuple[str, int, Tensor]]:
        return iter(self.found)


def places(model: nn.Module, channels: ChannelMap, chosen: Mapping[Space, Tensor], *, alone: bool = False) -> Places:
    """Where the `chosen` channels of each space lie, with those of untouched neighbours in a concatenation.

    alone: without the neighbours; for setting the chosen ones to zero.
    """
    index = (lambda layout: _alone(layout, chosen)) if alone else (lambda layout: layout.index(chosen))
    found = Places()
    for name, space in channels.writes.items():
        if space.root() in chosen:
            for key in ("weight", "bias"):
                found.add(model.get_submodule(name), name, key, 0, chosen[space.root()])
    for name, layout in channels.carries.items():
        if layout.touches(chosen):
            for key in ("weight", "bias", "running_mean", "running_var"):
                found.add(model.get_submodule(name), name, key, 0, index(layout))
    for name, layout in channels.reads.items():
        if layout.touches(chosen):
            found.add(model.get_submodule(name), name, "weight", 1, index(layout))
    return found


def _alone(layout, chosen: Mapping[Space, Tensor]) -> Tensor:
    nothing = torch.empty(0, dtype=torch.int64)
    return layout.index({part.root(): chosen.get(part.root(), nothing) for part in layout.parts})


def gather(model: nn.Module, moves: Places) -> None:
    """Rebuild `model` in place: every place holds what lay at the given numbers, and layers know their new sizes."""
    for name, dim, index in moves:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, key)
        new = taken(old.detach(), dim, index)
        if isinstance(old, nn.Parameter):
            setattr(module, key, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module._buffers[key] = new
    resize(model)


def resize(model: nn.Module) -> None:
    """The sizes that layers name, from what they hold."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            if module.groups > 1 and module.weight.shape[1] == 1:  # depthwise
                module.groups = len(module.weight)
            module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            held = module.weight if module.weight is not None else module.running_mean
            module.num_features = module.num_features if held is None else len(held)


def taken(old: Tensor, dim: int, index: Tensor) -> Tensor:
    """old.index_select, in the memory format of `old`."""
    return formatted(old.index_select(dim, index.to(old.device)), old)


def formatted(new: Tensor, old: Tensor) -> Tensor:
    """`new` in the memory format of `old`."""
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return new.contiguous(memory_format=torch.channels_last) if channels_last else new.contiguous()


def carried_optimizer(
    optimizer: torch.optim.Optimizer,
    old: nn.Module,
    new: nn.Module,
    moves: Places,
    op: str,
    *,
    beside: Mapping[str, str] | None = None,
) -> torch.optim.Optimizer:
    """A new optimizer of the same class over the parameters of `new`, with groups, settings and state of `optimizer`.

    State of a parameter's shape (momentum, second moments) moves as the parameter did; other state is copied.
    beside: new parameters that `old` has not, each with the old one whose group it enters, without state.
    ValueError for a parameter of the optimizer that `old` does not have (it would be trained no more), and for state
    that cannot be moved because it has another shape than its parameter.
    """
    names = {id(p): name for name, p in old.named_parameters()}
    strangers = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ValueError(
            f"{op}: the optimizer holds {strangers} parameters that this model does not have; give the optimizer that "
            "trains this very model (after `shrink` or `widen`: the one that they returned)"
        )
    new_ones = dict(new.named_parameters())
    added: dict[str, list[str]] = {}
    for name, neighbour in (beside or {}).items():
        added.setdefault(neighbour, []).append(name)
    groups, state = [], {}
    by_name: dict[str, list[tuple[int, Tensor]]] = {}
    for name, dim, index in moves:
        by_name.setdefault(name, []).append((dim, index))
    for group in optimizer.param_groups:
        parameters = []
        for p in group["params"]:
            name = names[id(p)]
            parameters += [(name, new_ones[name]), *((other, new_ones[other]) for other in added.get(name, []))]
            if p in optimizer.state:
                where = f"{op}: the state of {type(optimizer).__name__} for {name}"
                state[new_ones[name]] = {
                    key: _moved(value, p, by_name.get(name, []), f"{where}, {key},")
                    for key, value in optimizer.state[p].items()
                }
        named = group.get("param_names") is not None
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**settings, "params": parameters if named else [p for _, p in parameters]})
    known = inspect.signature(type(optimizer)).parameters
    made = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})
    made.state.update(state)
    return made


def _moved(value, parameter: Tensor, moves: list[tuple[int, Tensor]], what: str):
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Tensor) and (value.shape == parameter.shape or value.dim() == 0 or not moves):
        value = value.clone()  # keeps the memory format
        for dim, index in moves if value.shape == parameter.shape else ():
            value = taken(value, dim, index)
        return value
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{what} cannot follow the channels: expected the shape {list(parameter.shape)}, got {shape}; use SGD, Adam or "
        "another optimizer with such state, or make a new one"
    )


def zero(model: nn.Module, optimizer: torch.optim.Optimizer | None, dead: Places) -> None:
    """Set the places to zero, in parameters and in the optimizer's state; running statistics stay as they are."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, dim, index in dead:
            p = parameters.get(name)
            if p is None:
                continue
            p.index_fill_(dim, index.to(p.device), 0)
            for value in (optimizer.state.get(p, {}) if optimizer is not None else {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.index_fill_(dim, index.to(value.device), 0)
