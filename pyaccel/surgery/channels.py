"""Which channels of a network belong together: followed through the graph that torch.fx traces.

A *space* is a set of channels with one numbering: what a convolution or linear layer writes, its batch normalisation
scales, and the layers behind it read. Additions and products join spaces, concatenations put them side by side,
flattening makes a block of features of every channel. Removing or repeating a channel means doing it in all of them.
Whatever passes through an operation that is not known here is frozen, with a reason that names it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

CARRIERS = (nn.BatchNorm1d, nn.BatchNorm2d)
# One channel in, the same channel out.
SAME_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.Identity, nn.Upsample, nn.ZeroPad2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
SAME_FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardtanh, torch.relu, torch.sigmoid,
    torch.tanh,
    F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.interpolate, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    F.sigmoid, F.tanh, operator.neg, torch.abs, torch.clamp,
)  # fmt: skip
RESIZING = (nn.MaxPool2d, nn.AvgPool2d, nn.Upsample, nn.ZeroPad2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
            F.max_pool2d, F.avg_pool2d, F.interpolate, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)  # fmt: skip
SAME_METHODS = ("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "detach", "float", "clamp", "abs")
JOINS = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.sub, torch.mul,
         "add", "add_", "sub", "mul", "mul_"}  # fmt: skip
ADDITIONS = JOINS - {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
NO_TENSORS = ("size", "dim", "ndimension", getattr)


@dataclass(eq=False)
class Space:
    """Channels with one numbering. `frozen`: why they must stay as they are; `summed`: they enter an addition."""

    size: int | None = None
    frozen: str | None = None
    summed: bool = False
    joined: Space | None = None

    def root(self) -> Space:
        return self if self.joined is None else self.joined.root()

    def freeze(self, reason: str) -> None:
        root = self.root()
        root.frozen = root.frozen or reason

    def join(self, other: Space) -> None:
        mine, theirs = self.root(), other.root()
        if mine is not theirs:
            mine.size = mine.size if mine.size is not None else theirs.size
            mine.frozen, mine.summed = mine.frozen or theirs.frozen, mine.summed or theirs.summed
            theirs.joined = mine


@dataclass(frozen=True)
class Layout:
    """Channels of one tensor, spaces side by side, each with `block` values of an image (None: not known). Once flat,
    these are neighbouring features; the layouts that `ChannelMap` holds have as many features a channel as the
    layer."""

    parts: tuple[Space, ...]
    flat: bool | None = False
    block: int | None = 1

    def channels(self) -> int | None:
        sizes = [part.root().size for part in self.parts]
        return None if None in sizes else sum(sizes)

    def freeze(self, reason: str) -> None:
        for part in self.parts:
            part.freeze(reason)

    def index(self, chosen: dict[Space, Tensor], values: dict[Space, Tensor] | None = None) -> Tensor:
        """For each feature of the new tensor its number in the old one; with `values`, their entries instead."""
        found, offset = [], 0
        for part in self.parts:
            root = part.root()
            picked = chosen.get(root, torch.arange(root.size))
            if values is None:
                entries = ((offset + picked)[:, None] * self.block + torch.arange(self.block)).flatten()
            else:
                entries = values.get(root, torch.ones(len(picked), dtype=torch.float64)).repeat_interleave(self.block)
            found.append(entries)
            offset += root.size
        return torch.cat(found)

    def touches(self, spaces: Iterable[Space]) -> bool:
        return any(part.root() in spaces for part in self.parts)


@dataclass
class ChannelMap:
    """By qualified name of a module: the space it writes, the layout it reads or carries; and the graph itself."""

    graph: fx.Graph
    values: dict[fx.Node, Layout | None] = field(default_factory=dict)  # what each node computes, where it is followed
    writes: dict[str, Space] = field(default_factory=dict)
    reads: dict[str, Layout] = field(default_factory=dict)
    carries: dict[str, Layout] = field(default_factory=dict)

    def writers(self, space: Space) -> list[str]:
        return [name for name, written in self.writes.items() if written.root() is space.root()]

    def readers(self, space: Space) -> Iterator[str]:
        return (name for name, layout in self.reads.items() if layout.touches({space.root()}))


def channel_map(model: nn.Module, op: str) -> ChannelMap:
    """Follow the channels of `model`, which takes one tensor. ValueError, naming `op`, if fx cannot trace it."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a user's forward raises on symbols
        raise ValueError(
            f"{op}: torch.fx cannot trace {type(model).__name__} ({str(error).splitlines()[0]}); its forward must not "
            "decide by values or shapes of tensors"
        ) from error
    return _Follower(model, graph).follow()


class _Follower:
    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.modules = dict(model.named_modules())
        self.map = ChannelMap(graph)
        self.values = self.map.values
        self.tied = {name: f"shares a parameter with {other}" for name, other in _tied(model).items()}
        for node in graph.nodes:
            if node.op == "get_attr":
                owner = str(node.target).rpartition(".")[0]
                self.tied[owner] = f"has its {node.target} read past it (node {node.name!r} of the graph)"

    def follow(self) -> ChannelMap:
        for node in self.map.graph.nodes:
            self.values[node] = getattr(self, node.op)(node)
        return self.map

    def placeholder(self, node: fx.Node) -> Layout:
        return Layout((Space(frozen="they are the input of the model"),), flat=None, block=None)

    def get_attr(self, node: fx.Node) -> None:
        return None

    def output(self, node: fx.Node) -> None:
        self._freeze(node, "they are the output of the model")

    def call_module(self, node: fx.Node) -> Layout | None:
        name, module = str(node.target), self.modules[node.target]
        x = self._layout(node.args[0]) if node.args else None
        if len(node.args) != 1 or node.kwargs:
            return self._unknown(node, f"{name} ({type(module).__name__})")
        if type(module) in (nn.Conv2d, nn.Linear) and "weight" not in module._parameters:
            return self._unknown(node, f"{name} ({type(module).__name__} whose weight is computed)")
        if type(module) is nn.Conv2d:
            return self._convolution(name, module, x)
        if type(module) is nn.Linear:
            return self._linear(name, module, x)
        if x is None:
            return None
        if type(module) in CARRIERS:
            return self._carried(name, x, module.num_features)
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return _flattened(x)
        if type(module) in SAME_MODULES:
            if type(module) in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d) and _is_one(module.output_size):
                return replace(x, block=1)
            resized = type(module) in RESIZING and not x.flat
            return replace(x, block=None) if resized else x
        return self._unknown(node, f"{name} ({type(module).__name__})")

    def call_function(self, node: fx.Node) -> Layout | None:
        return self._call(node, node.target)

    def call_method(self, node: fx.Node) -> Layout | None:
        return self._call(node, node.target)

    def _call(self, node: fx.Node, what) -> Layout | None:
        x = self._layout(node.args[0]) if node.args else None
        label = (
            f"{what if isinstance(what, str) else getattr(what, '__name__', what)} (node {node.name!r} of the graph)"
        )
        if what in NO_TENSORS:
            return None
        if what in JOINS:
            return self._join(node, what, label)
        if what in (torch.cat, torch.concat):
            return self._cat(node, label)
        if x is None or len([a for a in node.all_input_nodes if self.values.get(a) is not None]) != 1:
            return self._unknown(node, label)
        arguments = node.args[1:]
        if what in (torch.flatten, "flatten") and (arguments, dict(node.kwargs)) in (
            ((1,), {}),
            ((), {"start_dim": 1}),
        ):
            return _flattened(x)
        if what in ("view", "reshape", torch.reshape) and len(arguments) == 2 and arguments[1] == -1:
            return _flattened(x)
        if what in (torch.mean, "mean") and self._means_pixels(node):
            keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
            return Layout(x.parts, flat=not keep, block=1)
        if what in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d) and _is_one(arguments[0] if arguments else None):
            return replace(x, block=1)
        if what in SAME_FUNCTIONS or what in SAME_METHODS:
            resized = what in RESIZING and not x.flat
            return replace(x, block=None) if resized else x
        return self._unknown(node, label)

    # ------------------------------------------------------------------------------------------------ what layers do

    def _convolution(self, name: str, module: nn.Conv2d, x: Layout | None) -> Layout:
        if module.groups == module.in_channels == module.out_channels and module.groups > 1 and x is not None:
            self._check_tied(name, x)
            return replace(self._carried(name, x, module.out_channels), block=None)
        if module.groups > 1:
            reason = f"{name} is a grouped convolution (groups={module.groups})"
            if x is not None:
                x.freeze(f"they are read by {name}, a grouped convolution")
            return Layout((self._written(name, module.out_channels, reason),), block=None)
        self._read(name, x, module.in_channels, flat=False)
        return Layout((self._written(name, module.out_channels),), block=None)

    def _linear(self, name: str, module: nn.Linear, x: Layout | None) -> Layout:
        reason = None
        if x is not None and x.flat is False:
            reason = f"{name} is a linear layer over images that were not flattened"
            x.freeze(reason)
        else:
            self._read(name, x, module.in_features, flat=True)
        return Layout((self._written(name, module.out_features, reason),), flat=True)

    def _written(self, name: str, size: int, reason: str | None = None) -> Space:
        space = self.map.writes.setdefault(name, Space(size))
        if reason or name in self.tied:
            space.freeze(reason or f"{name} {self.tied[name]}")
        return space

    def _read(self, name: str, x: Layout | None, features: int, *, flat: bool) -> None:
        if x is None:
            return
        x = self._sized(x, features, flat, f"they do not fit the {features} inputs of {name}")
        self._check_tied(name, x)
        self._record(self.map.reads, name, x)

    def _carried(self, name: str, x: Layout, features: int) -> Layout:
        x = self._sized(x, features, bool(x.flat), f"they do not fit the {features} channels of {name}")
        self._record(self.map.carries, name, x)
        return x

    def _record(self, records: dict[str, Layout], name: str, x: Layout) -> None:
        if x.channels() is None:
            return
        if name in records:
            self._unite(records[name], x, f"{name} is used twice, on other channels")
        records[name] = x if x.flat else replace(x, block=1)

    def _sized(self, x: Layout, features: int, flat: bool, problem: str) -> Layout:
        """The layout with its block, now that the number of its features is known."""
        if len(x.parts) == 1 and x.parts[0].root().size is None and not flat:
            x.parts[0].root().size = features
        channels = x.channels()
        if channels is None:
            return x
        block = features // max(1, channels) if flat else 1
        known = x.block if x.flat else None
        if channels * block != features or (flat and known is not None and known != block):
            x.freeze(problem)
        return replace(x, block=block) if flat else x

    def _check_tied(self, name: str, x: Layout) -> None:
        if name in self.tied:
            x.freeze(f"{name} {self.tied[name]}")

    # ------------------------------------------------------------------------------------------- several tensors, none

    def _join(self, node: fx.Node, what, label: str) -> Layout | None:
        operands = list(node.args[:2])
        layouts = [self._layout(a) for a in operands if isinstance(a, fx.Node)]
        if not any(layouts):
            return None
        if None in layouts:
            return self._unknown(node, label)
        if len(layouts) == 2:
            self._unite(*layouts, f"they pass through {label}, whose operands differ in channels")
            if what in ADDITIONS:
                for part in (*layouts[0].parts, *layouts[1].parts):
                    part.root().summed = True
            if layouts[0].block != layouts[1].block:
                return replace(layouts[0], block=layouts[0].block if layouts[0].flat else None)
        return layouts[0]

    def _unite(self, a: Layout, b: Layout, problem: str) -> None:
        same = len(a.parts) == len(b.parts) and a.flat == b.flat
        if a.flat and None not in (a.block, b.block) and a.block != b.block:
            same = False
        sizes = [[part.root().size for part in layout.parts] for layout in (a, b)]
        if same and (sizes[0] == sizes[1] or None in (*sizes[0], *sizes[1])):
            for mine, theirs in zip(a.parts, b.parts, strict=True):
                mine.join(theirs)
        else:
            a.freeze(problem)
            b.freeze(problem)

    def _cat(self, node: fx.Node, label: str) -> Layout | None:
        pieces = node.args[0] if node.args else ()
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        layouts = [self._layout(piece) for piece in pieces]
        flat = {layout.flat for layout in layouts if layout is not None}
        if dim != 1 or None in layouts or len(flat) != 1 or (True in flat and any(x.block != 1 for x in layouts)):
            return self._unknown(node, label)
        parts = tuple(part for layout in layouts for part in layout.parts)
        return Layout(parts, flat.pop(), 1 if all(x.block == 1 for x in layouts) else None)

    def _unknown(self, node: fx.Node, label: str) -> None:
        self._freeze(node, f"they pass through {label}, which is not known here")

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for other in node.all_input_nodes:
            if (layout := self.values.get(other)) is not None:
                layout.freeze(reason)

    def _layout(self, argument) -> Layout | None:
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def _means_pixels(self, node: fx.Node) -> bool:
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(axes, (tuple, list)) and sorted(axes) in ([2, 3], [-2, -1])


def _flattened(x: Layout) -> Layout:
    return x if x.flat else replace(x, flat=True)


def _is_one(size) -> bool:
    return size in (1, (1, 1), [1, 1])


def _tied(model: nn.Module) -> dict[str, str]:
    """Modules that hold a parameter which another one holds too, and which."""
    owners: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                first = owners.setdefault(id(parameter), name)
                if first != name:
                    found[name], found[first] = first, name
    return found
