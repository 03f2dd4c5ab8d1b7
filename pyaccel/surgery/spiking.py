"""`to_spiking`: an artificial feed-forward network as a spiking one with the same weights (2005.01807)."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from pyaccel.models.dropout import HeldDropout
from pyaccel.models.spiking import BalancedLIF
from pyaccel.nn import STDBLIF, PoissonEncoder, SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.surgery.converted import ConstantCurrent, ConvertedNetwork, DropoutScale, EveryStep, Sum
from pyaccel.surgery.spiking_graph import Step, read_graph

POOLED = {"binary": "pooled", "signed": "pooled_signed"}
NEURONS = ("delayed", "stdb", "prompt")


def to_spiking(
    ann: nn.Module,
    *,
    steps: int,
    neuron: str = "delayed",
    leak: float = 1.0,
    threshold: float = 1.0,
    gain: float = 1.0,
    mean_readout: bool = False,
    fold_batchnorm: bool = False,
    keep_biases: bool = False,
    seed: int = 0,
    **options,
) -> ConvertedNetwork:
    """The spiking network with the weights of `ann`, which stays untouched and shares nothing with it.

    Every ReLU becomes a layer of neurons, everything between two of them adds up currents, and images enter as signed
    Poisson spikes; the last layer accumulates without leak or spikes (2005.01807, sections 1 and 2). With the delayed
    neuron a network of L spiking layers puts out nothing before step L. Thresholds are `threshold` until
    `balance_thresholds` sets them.

    Converted are `Conv2d`, `Linear`, `ReLU`, `AvgPool2d`, `AdaptiveAvgPool2d` and means over pixels, `Dropout` (one
    mask held over time), `Flatten`, `Identity` and additions of two branches, as modules, functions or methods.

    Args:
        ann: traced by torch.fx; one input, images `[B, ...]`, one output.
        steps: time steps T of a pass.
        neuron: "delayed" (fires on the membrane of the step before), "stdb" (the same with the spike-time surrogate of
            2005.01807), "prompt" (integrates, then fires).
        leak: what remains of a membrane after one step; 1: IF.
        gain: of the encoder; a value x spikes with probability min(gain * abs(x), 1).
        mean_readout: logits are the mean over time (2003.10399), not the sum (2005.01807).
        fold_batchnorm: fold the running statistics of a batch normalisation into the layer before it. What is left is a
            bias, a constant current.
        keep_biases: a layer's bias becomes a constant current, divided by the product of the thresholds before it (and
            kept so by `balance_thresholds`), so that rates stay proportional to activations. The paper has no biases.
        seed: of the encoder and of dropout.
        options: of the neuron: `surrogate`, `surrogate_scale`, `alpha`, ... (see `nn.LIF`, `nn.STDBLIF`).

    Raises:
        ValueError: a layer or operation that has no spiking form (maximum pooling, a bias or batch normalisation that
            was not asked for, another activation, ...), by name and with what to do; a network without ReLU.
    """
    if neuron not in NEURONS:
        raise ValueError(f"to_spiking: neuron must be one of {', '.join(NEURONS)}, got {neuron!r}")
    steps_of = read_graph(ann, fold_batchnorm=fold_batchnorm, keep_biases=keep_biases)
    if not any(step.kind == "relu" for step in steps_of):
        raise ValueError("to_spiking: the network has no ReLU, so there is nothing that could spike")

    def make_neuron() -> nn.Module:
        if neuron == "stdb":
            return STDBLIF(leak, threshold, **options)
        return BalancedLIF(leak, threshold, delay=neuron == "delayed", **options)

    body = _Builder(make_neuron, seed).build(steps_of)
    network = ConvertedNetwork(body, PoissonEncoder(steps, gain, seed=seed), mean_readout=mean_readout)
    return network.train(ann.training)


@dataclass
class _Value:
    """A node of the new graph, `[T, B, ...]`. kind: what spikes it holds (see `ops.spike_conv2d`), None if it is not
    known to be spikes that bits can hold. dropped: with what probability its units were dropped and not yet made up
    for."""

    node: fx.Node
    kind: str | None
    dropped: float = 0.0


class _Builder:
    """Writes the spiking graph, step by step."""

    def __init__(self, make_neuron: Callable[[], nn.Module], seed: int):
        self.make_neuron, self.seed = make_neuron, seed
        self.graph, self.root = fx.Graph(), nn.Module()
        self.names: set[str] = set()
        self.values: dict[str, _Value] = {}

    def build(self, steps: list[Step]) -> fx.GraphModule:
        images, self.sample_ids = self.graph.placeholder("spikes"), self.graph.placeholder("sample_ids")
        for step in steps:
            inputs = [self.values[name] for name in step.inputs]
            if step.kind == "input":
                made = _Value(images, "signed")
            elif step.kind == "output":
                self.graph.output(self.made_up(inputs[0], step.name).node)
                continue
            else:
                made = getattr(self, step.kind)(step, *inputs)
            self.values[step.name] = made
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def call(self, name: str, module: nn.Module, *arguments: fx.Node) -> fx.Node:
        """A call of `module`, which gets this name or, where it is taken, one beside it."""
        found, count = name, 1
        while found in self.names:
            count += 1
            found = f"{name}_{count}"
        self.names.add(found)
        parent = self.root
        *path, child = found.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(child, module)
        return self.graph.call_module(found, arguments)

    def made_up(self, value: _Value, name: str) -> _Value:
        """The value with dropout made up for."""
        if not value.dropped:
            return value
        return _Value(self.call(f"{name}_scale", DropoutScale(value.dropped), value.node), None)

    def weights(self, step: Step, value: _Value) -> _Value:
        layer: nn.Module = step.module
        spike_layer = _over_spikes(layer, value.kind)
        node = self.call(step.name, spike_layer if spike_layer is not None else EveryStep(layer), value.node)
        made = self.made_up(_Value(node, None, value.dropped), step.name)
        if step.bias is None:
            return made
        return _Value(self.call(f"{step.name}_bias", ConstantCurrent(step.bias), made.node), None)

    def relu(self, step: Step, value: _Value) -> _Value:
        current = self.made_up(value, step.name)
        return _Value(self.call(step.name, self.make_neuron(), current.node), "binary")

    def dropout(self, step: Step, value: _Value) -> _Value:
        if not step.p:
            return value
        module = HeldDropout(step.p, seed=self.seed, stream=zlib.crc32(step.name.encode()))
        node = self.call(step.name, module, value.node, self.sample_ids)
        return _Value(node, value.kind, 1 - (1 - value.dropped) * (1 - step.p))

    def pool(self, step: Step, value: _Value) -> _Value:
        kernel = _plain_window(step.module)
        module = EveryStep(copy.deepcopy(step.module)) if kernel is None else SpikeAvgPool2d(kernel)
        kind = POOLED.get(value.kind) if kernel == (2, 2) else None
        return _Value(self.call(step.name, module, value.node), kind, value.dropped)

    def pixel_mean(self, step: Step, value: _Value) -> _Value:
        return _Value(
            self.graph.call_method("mean", (value.node, (-2, -1)), {"keepdim": step.keepdim}), None, value.dropped
        )

    def flatten(self, step: Step, value: _Value) -> _Value:
        return _Value(self.graph.call_method("flatten", (value.node, 2)), value.kind, value.dropped)

    def add(self, step: Step, a: _Value, b: _Value) -> _Value:
        a, b = self.made_up(a, f"{step.name}_a"), self.made_up(b, f"{step.name}_b")
        return _Value(self.call(step.name, Sum(), a.node, b.node), None)


def _over_spikes(layer: nn.Module, kind: str | None) -> nn.Module | None:
    """The layer in the form that keeps bits of its spikes for backward; None where its input is not of such a kind."""
    if kind is None:
        return None
    if isinstance(layer, nn.Linear):
        made: nn.Module = SpikeLinear(layer.in_features, layer.out_features, bias=False, kind=kind, device="meta")
    elif isinstance(layer.padding, str):
        return None
    else:
        made = SpikeConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups,
            bias=False, kind=kind, device="meta",
        )  # fmt: skip
    made.weight = layer.weight
    return made


def _plain_window(pool: nn.Module) -> tuple[int, int] | None:
    """Kernel of an average pooling whose windows neither overlap nor reach beyond the image."""
    if not isinstance(pool, nn.AvgPool2d) or pool.ceil_mode or pool.divisor_override:
        return None

    def pair(x) -> tuple[int, int]:
        return (x, x) if isinstance(x, int) else tuple(x)

    kernel = pair(pool.kernel_size)
    return kernel if pair(pool.padding) == (0, 0) and pair(pool.stride) == kernel else None
