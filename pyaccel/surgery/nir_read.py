"""`from_nir`: a network of this library's modules from a graph of the Neuromorphic Intermediate Representation."""

from __future__ import annotations

import os
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyaccel.nn import LIF, SpikeConv2d, SpikeLinear, every_step
from pyaccel.surgery.nir import DT, require_nir

SAME = 1e-6  # relative: graphs of other tools hold float32


class NirNetwork(nn.Module):
    """The network of a NIR graph: `[T, B, ...]` in, `[T, B, ...]` out, all steps of a node at once, state from zero.

    `network.node("name")` is the module of a node; parameters train as any.
    """

    def __init__(self, order: list[tuple[str, list[str], nn.Module]], given: str, result: list[str]):
        super().__init__()
        self.parts = nn.ModuleDict({_key(name): module for name, _, module in order})
        self.order = [(name, sources) for name, sources, _ in order]
        self.given, self.result = given, result

    def node(self, name: str) -> nn.Module:
        return self.parts[_key(name)]

    def forward(self, sequence: Tensor) -> Tensor:
        values = {self.given: sequence}
        for name, sources in self.order:
            values[name] = self.node(name)(_added(values, sources))
        return _added(values, self.result)


class Integrator(nn.Module):
    """NIR's LI and I: v[t] = leak v[t-1] + gain x[t], without threshold; leak and gain float64 `[...]` of one step."""

    def __init__(self, leak: Tensor, gain: Tensor):
        super().__init__()
        self.register_buffer("leak", leak)
        self.register_buffer("gain", gain)

    def forward(self, sequence: Tensor) -> Tensor:
        sequence = sequence * self.gain.to(sequence.dtype)
        if bool((self.leak == 1).all()):
            return sequence.cumsum(0)
        leak, membrane, found = self.leak.to(sequence.dtype), torch.zeros_like(sequence[0]), []
        for current in sequence.unbind(0):
            membrane = leak * membrane + current
            found.append(membrane)
        return torch.stack(found)


class Scaled(nn.Module):
    """`gain * x` of every step, gain `[...]` of one step."""

    def __init__(self, gain: Tensor):
        super().__init__()
        self.register_buffer("gain", gain)

    def forward(self, sequence: Tensor) -> Tensor:
        return sequence * self.gain.to(sequence.dtype)


class Pool2d(nn.Module):
    """Average (or sum) pooling of `[T, B, C, H, W]`, zeros of the padding counted."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], factor: int):
        super().__init__()
        self.pool, self.factor = nn.AvgPool2d(kernel, stride, padding), factor

    def forward(self, sequence: Tensor) -> Tensor:
        pooled = every_step(self.pool, sequence)
        return pooled if self.factor == 1 else pooled * self.factor


def from_nir(graph: Any, *, dt: float | None = None, **options) -> NirNetwork:
    """The network of a `nir.NIRGraph`, or of the file that `nir.write` made of one.

    Read are Input, Output, Linear, Affine, Conv2d, AvgPool2d, SumPool2d, Flatten, Scale, LIF, IF, LI, I, and the
    integrator with Threshold (and feedback) that `to_nir` writes for reset="none" ("soft"). LIF and IF become `nn.LIF`
    with reset="hard". Edges that meet add up.

    Args:
        dt: seconds of a step; None: what the graph's metadata say, else 1e-4, as snnTorch and SpikingJelly have it.
        options: of the neurons, which no graph holds: `surrogate`, `detach_reset`, ... (see `nn.LIF`).

    Raises:
        ImportError: without the package nir. ValueError: nodes that are not known, recurrent connections, v_leak or
        v_reset other than 0, parameters that differ within a channel, a step longer than tau, more than one input or
        output.
    """
    nir = require_nir()
    if isinstance(graph, (str, os.PathLike)):
        graph = nir.read(graph)
    return _Reader(nir, graph, dt, options).network()


class _Reader:
    def __init__(self, nir, graph, dt: float | None, options: dict):
        self.nir, self.options = nir, options
        metadata = graph.metadata if isinstance(graph.metadata, dict) else {}
        self.dt = float(metadata.get("dt", DT)) if dt is None else dt
        if not self.dt > 0:
            raise ValueError(f"from_nir: dt must be positive, got {self.dt}")
        self.nodes = dict(graph.nodes)
        self.sources: dict[str, list[str]] = {name: [] for name in self.nodes}
        for before, after in dict.fromkeys((str(a), str(b)) for a, b in graph.edges):
            self.sources[after].append(before)
        self.modules: dict[str, nn.Module] = {}
        self.makers: dict[type, Callable[[str, Any], nn.Module]] = {
            nir.Linear: self.linear, nir.Affine: self.linear, nir.Conv2d: self.convolution, nir.AvgPool2d: self.pool,
            nir.SumPool2d: self.pool, nir.Flatten: self.flatten, nir.Scale: self.scale, nir.LIF: self.lif,
            nir.IF: self.lif, nir.LI: self.integrator, nir.I: self.integrator,
        }  # fmt: skip

    def network(self) -> NirNetwork:
        ends = {kind: [n for n, node in self.nodes.items() if isinstance(node, kind)]
                for kind in (self.nir.Input, self.nir.Output)}  # fmt: skip
        for kind, names in ends.items():
            if len(names) != 1:
                raise ValueError(f"from_nir: expected one {kind.__name__} node, got {', '.join(names) or 'none'}")
        (given,), (result,) = ends.values()
        for name in [n for n, node in self.nodes.items() if isinstance(node, self.nir.Threshold)]:
            self.fold_threshold(name)
        try:
            names = list(TopologicalSorter(self.sources).static_order())
        except CycleError as error:
            raise ValueError(f"from_nir: recurrent connections are not read, got the cycle "
                             f"{' -> '.join(error.args[1])}; only the feedback of -leak * threshold that to_nir writes "
                             "for reset='soft' is") from None
        order = []
        for name in names:
            if name in (given, result):
                continue
            if not self.sources[name]:
                raise ValueError(f"from_nir: node {name!r} has no input")
            module = self.modules.get(name) or self.make(name)
            self.modules[name] = module
            order.append((name, self.sources[name], module))
        return NirNetwork(order, given, self.sources[result])

    def make(self, name: str) -> nn.Module:
        maker = self.makers.get(type(self.nodes[name]))
        if maker is None:
            known = ", ".join(kind.__name__ for kind in self.makers)
            raise ValueError(f"from_nir: node {name!r} ({type(self.nodes[name]).__name__}) is not read; known are "
                             f"{known}")
        return maker(name, self.nodes[name])

    def fold_threshold(self, name: str) -> None:
        """Integrator and Threshold as one neuron, with the feedback of a soft reset if there is one."""
        before = self.sources[name]
        if len(before) != 1 or not isinstance(self.nodes[before[0]], (self.nir.LI, self.nir.I)):
            raise ValueError(f"from_nir: node {name!r} (Threshold): expected one LI or I node before it, got "
                             f"{', '.join(before)}")
        membrane = before[0]
        leak, gain = self.euler(membrane, self.nodes[membrane])
        threshold = np.asarray(self.nodes[name].threshold, np.float64)
        soft = -leak * threshold
        feedback = [n for n in self.sources[membrane] if self.sources[n] == [name]]
        readers = [n for n, found in self.sources.items() if membrane in found]
        if readers != [name]:
            raise ValueError(f"from_nir: node {membrane!r}: its membrane is read by {', '.join(readers)}; only by a "
                             f"Threshold is read")
        for n in feedback:
            node = self.nodes[n]
            if not isinstance(node, self.nir.Scale) or not np.allclose(gain * node.scale, soft, rtol=SAME, atol=0):
                raise ValueError(f"from_nir: node {n!r}: feedback to {membrane!r} is read only as a Scale of -leak * "
                                 "threshold, the soft reset")
        others = [n for n, found in self.sources.items() if n != membrane and set(found) & set(feedback)]
        if len(feedback) > 1 or others:
            raise ValueError(f"from_nir: node {membrane!r}: more than one feedback, or a feedback with other readers")
        self.sources[name] = [n for n in self.sources[membrane] if n not in feedback]
        for n in (membrane, *feedback):
            del self.nodes[n], self.sources[n]
        self.modules[name] = self.neuron(name, leak, gain, threshold, "soft" if feedback else "none")

    def euler(self, name: str, node: Any) -> tuple[np.ndarray, np.ndarray]:
        """leak and gain of v[t] = leak v[t-1] + gain I[t], float64."""
        r = np.asarray(node.r, np.float64)
        if isinstance(node, (self.nir.IF, self.nir.I)):
            return np.ones_like(r), r * self.dt
        share = self.dt / np.asarray(node.tau, np.float64)
        if not (share > 0).all() or share.max() > 1 + SAME:
            raise ValueError(f"from_nir: node {name!r}: tau must be at least the step, {self.dt:g} s, got "
                             f"{float(np.min(node.tau)):g}; give the dt that the graph was made for")
        return np.maximum(1 - share, 0), r * share

    def lif(self, name: str, node: Any) -> nn.Module:
        for what in ("v_leak", "v_reset"):
            if np.any(getattr(node, what, 0)):
                raise ValueError(f"from_nir: node {name!r}: {what} must be 0, got "
                                 f"{float(np.max(np.abs(getattr(node, what)))):g}")
        return self.neuron(name, *self.euler(name, node), np.asarray(node.v_threshold, np.float64), "hard")

    def neuron(self, name: str, leak: np.ndarray, gain: np.ndarray, threshold: np.ndarray, reset: str) -> nn.Module:
        """v = leak v + gain I with its threshold; a gain that is not 1 scales the current."""
        values, channels = {}, {}
        for what, array in (("leak", leak), ("threshold", threshold)):
            rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
            if (rows != rows[:, :1]).any():
                raise ValueError(f"from_nir: node {name!r}: {what} differs within a channel; one value a channel is "
                                 f"read")
            values[what] = rows[:, 0]
            channels[what] = 0 if (rows == rows[0, 0]).all() else len(rows)
        neuron = LIF(float(values["leak"][0]), float(values["threshold"][0]), reset=reset,
                     learn_leak=channels["leak"], learn_threshold=channels["threshold"], **self.options)  # fmt: skip
        with torch.no_grad():
            for what, parameter in (("leak", neuron.leak), ("threshold", neuron.threshold)):
                if channels[what]:
                    parameter.copy_(torch.from_numpy(values[what]))
        if np.allclose(gain, 1, rtol=0, atol=SAME):
            return neuron
        return nn.Sequential(Scaled(torch.from_numpy(np.array(gain))), neuron)

    def integrator(self, name: str, node: Any) -> nn.Module:
        if np.any(getattr(node, "v_leak", 0)):
            raise ValueError(f"from_nir: node {name!r}: v_leak must be 0, got {float(np.max(np.abs(node.v_leak))):g}")
        return Integrator(*(torch.from_numpy(np.array(values)) for values in self.euler(name, node)))

    def linear(self, name: str, node: Any) -> nn.Module:
        if node.weight.ndim != 2:
            raise ValueError(f"from_nir: node {name!r}: weight must be [out, in], got {list(node.weight.shape)}")
        bias = getattr(node, "bias", None)
        layer = SpikeLinear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None, kind=self.kind(name))
        return _filled(layer, node.weight, bias)

    def convolution(self, name: str, node: Any) -> nn.Module:
        out, inputs, *kernel = node.weight.shape
        stride, dilation = _pair(node.stride), _pair(node.dilation)
        padding = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if padding == "same" and (stride != (1, 1) or any(r % 2 for r in reach)):
                raise ValueError(f"from_nir: node {name!r}: padding 'same' is read with stride 1 and odd kernels")
            padding = [r // 2 if padding == "same" else 0 for r in reach]
        bias = node.bias if np.any(node.bias) else None  # NIR has no convolution without one
        groups = int(node.groups)
        layer = SpikeConv2d(inputs * groups, out, tuple(kernel), stride, _pair(padding), dilation, groups,
                            bias=bias is not None, kind=self.kind(name))  # fmt: skip
        return _filled(layer, node.weight, bias)

    def kind(self, name: str) -> str:
        """What a layer keeps for backward: bits, where it reads the spikes of one neuron."""
        spiking = len(self.sources[name]) == 1 and isinstance(self.modules.get(self.sources[name][0]), LIF)
        return "binary" if spiking else "any"

    def pool(self, name: str, node: Any) -> nn.Module:
        kernel, stride, padding = _pair(node.kernel_size), _pair(node.stride), _pair(node.padding)
        return Pool2d(kernel, stride, padding, kernel[0] * kernel[1] if isinstance(node, self.nir.SumPool2d) else 1)

    def flatten(self, name: str, node: Any) -> nn.Module:
        start, end = int(node.start_dim), int(node.end_dim)  # of one sample; time and batch stand before
        return nn.Flatten(start + 2 if start >= 0 else start, end + 2 if end >= 0 else end)

    def scale(self, name: str, node: Any) -> nn.Module:
        return Scaled(torch.from_numpy(np.array(node.scale)))


def _filled(layer: nn.Module, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    layer = layer.to(torch.float64 if weight.dtype == np.float64 else torch.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(np.asarray(weight)))
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(np.asarray(bias)))
    return layer


def _pair(value: Any) -> tuple[int, int]:
    first, second = np.broadcast_to(np.asarray(value), (2,)).tolist()
    return int(first), int(second)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _added(values: dict[str, Tensor], names: list[str]) -> Tensor:
    total = values[names[0]]
    for name in names[1:]:
        total = total + values[name]
    return total
