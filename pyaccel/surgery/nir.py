"""`to_nir`: a spiking network as a graph of the Neuromorphic Intermediate Representation, which other tools read.

NIR's neurons are differential equations; every tool discretises them by Euler's rule with its own step dt::

    tau dv/dt = v_leak - v + r I         v[t] = (1 - dt/tau) v[t-1] + (dt/tau) (v_leak + r I[t])

so a neuron that keeps `leak` of its membrane in a step has tau = dt / (1 - leak) and r = tau / dt, and one without leak
is NIR's IF with r = 1 / dt. NIR's LIF and IF reset to v_reset, here 0: that is reset="hard".
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyaccel.models.dropout import HeldDropout
from pyaccel.models.spiking import SpikingLayer, SpikingNetwork
from pyaccel.models.spiking_resnet import SpikingBlock
from pyaccel.nn import BNTTLIF, LIF, STDBLIF, PoissonEncoder, SpikeAvgPool2d
from pyaccel.surgery.converted import ConstantCurrent, ConvertedNetwork, DropoutScale, EveryStep, Sum

DT = 1e-4  # seconds; snnTorch and SpikingJelly take no other step unless told
READOUTS = ("integrate", "steps")
# In evaluation, which a graph describes.
IDENTITIES = (HeldDropout, DropoutScale, nn.Dropout, nn.Dropout2d, nn.Identity)


def require_nir() -> ModuleType:
    try:
        import nir
    except ImportError as error:
        raise ImportError('NIR graphs need the package nir: pip install "pyaccel[nir]"') from error
    return nir


def to_nir(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    dt: float = DT,
    unroll_reset: bool = False,
    fold_batchnorm: bool = False,
    spikes_in: bool = False,
    readout: str = "integrate",
):
    """The `nir.NIRGraph` of a spiking network in evaluation; write it with `nir.write(path, graph)`.

    Written are a `SpikingNetwork`, what `to_spiking` made with neuron="prompt", or an `nn.Sequential` over
    `[T, B, ...]`, of convolutions and linear layers, `LIF` and `IF`, average pooling, `nn.Flatten`; dropout is left out.
    What a graph cannot say is an error that tells what to do, never left out: see the arguments.

    Args:
        input_shape: of one step of one sample, (C, H, W) or (features,).
        dt: seconds of a time step. It is kept in the graph's metadata; other tools have to be told.
        unroll_reset: write reset="soft", which NIR has no word for, as integrator (LI, or I without leak),
            Threshold and a feedback of -leak * threshold that arrives one step later. It is the same arithmetic but for
            rounding, and `from_nir` makes the same neuron of it again; a tool must know LI, Threshold and feedback to
            read it.
        fold_batchnorm: fold a BatchNorm that all steps share into the layer before it: the same but for rounding.
        spikes_in: the graph starts behind the Poisson encoder, which NIR cannot say; its input is the encoder's spikes.
        readout: of a whole network: "integrate": the graph's output adds up (NIR's I) and is the logits after the
            last of `model.steps` steps; "steps": it is the read-out of each step alone, for tools without I; the sum or
            mean over time is then the caller's.

    Raises:
        ImportError: without the package nir. ValueError: BNTT (its nodes would change with time), delayed neurons and
        those of 2005.01807, reset="soft" without `unroll_reset`, a batch normalisation without `fold_batchnorm` or
        behind a residual sum, an encoder without `spikes_in`, layers that are not known, by name.
    """
    writer = _Writer(dt, unroll_reset, fold_batchnorm)
    if not dt > 0:
        raise ValueError(f"to_nir: dt must be positive, got {dt}")
    if readout not in READOUTS:
        raise ValueError(f"to_nir: readout must be one of {', '.join(READOUTS)}, got {readout!r}")
    if not isinstance(model, (nn.Sequential, SpikingNetwork, ConvertedNetwork)):
        raise ValueError(f"to_nir: expected a spiking network or an nn.Sequential, got {type(model).__name__}; put the "
                         "layers of another network in order in an nn.Sequential")
    writer.start(tuple(input_shape))
    with torch.no_grad():
        if isinstance(model, nn.Sequential):
            writer.sequence("", model)
        else:
            writer.network(model, spikes_in, readout)
    return writer.graph()


class _Writer:
    """Nodes and edges so far. `ends`: the nodes whose sum the next one reads; `shape`: of one step of one sample."""

    def __init__(self, dt: float, unroll_reset: bool, fold_batchnorm: bool):
        self.nir, self.dt = require_nir(), dt
        self.unroll_reset, self.fold_batchnorm = unroll_reset, fold_batchnorm
        self.nodes, self.edges = {}, []
        self.ends: list[str] = []
        self.shape: tuple[int, ...] = ()

    def start(self, shape: tuple[int, ...]) -> None:
        self.nodes["input"] = self.nir.Input(np.array(shape))
        self.ends, self.shape = ["input"], shape

    def graph(self):
        self.add("output", self.nir.Output(np.array(self.shape)))
        return self.nir.NIRGraph(self.nodes, self.edges, metadata={"dt": self.dt})

    def add(self, name: str, node) -> None:
        self.nodes[name] = node
        self.edges += [(end, name) for end in self.ends]
        self.ends = [name]

    def network(self, model: SpikingNetwork | ConvertedNetwork, spikes_in: bool, readout: str) -> None:
        if isinstance(model.encoder, PoissonEncoder) and not spikes_in:
            raise ValueError("to_nir: encoder: NIR has no random encoder; pass spikes_in=True for the graph of what "
                             "follows it, which reads its spikes, or build the network with input='events'")
        if isinstance(model, ConvertedNetwork):
            self.converted(model.body)
        else:
            self.layers(model)
        if readout == "integrate":
            scale = 1 / (model.steps * self.dt) if model.mean_readout else 1 / self.dt
            self.add("logits", self.nir.I(np.full(self.shape, scale)))

    def layers(self, model: SpikingNetwork) -> None:
        self.sequence("features.", model.features)
        if len(self.shape) > 1:
            before = model.flat(torch.zeros(1, 1, *self.shape)).shape[2]
            if before != np.prod(self.shape):  # the mean over pixels of residual networks
                self.pool("mean", self.shape[1:])
            self.flatten("flatten")
        self.sequence("classifier.", model.classifier)
        self.synapse("readout", model.readout)

    def converted(self, body: fx.GraphModule) -> None:
        """Node by node of the graph that `to_spiking` wrote; `at`: where each ends, and its shape."""
        at: dict[fx.Node, tuple[list[str], tuple[int, ...]]] = {}
        for node in body.graph.nodes:
            if node.op == "placeholder":
                at[node] = self.ends, self.shape
                continue
            self.ends, self.shape = at[node.all_input_nodes[0]]
            if node.op == "call_method" and node.target == "flatten":
                self.flatten(node.name)
            elif node.op == "call_method" and node.target == "mean":  # over pixels
                self.pool(f"{node.name}.mean", self.shape[1:])
                if not node.kwargs["keepdim"]:
                    self.flatten(node.name)
            elif node.op == "call_module":
                self.converted_module(node, body.get_submodule(node.target), at)
            at[node] = self.ends, self.shape

    def converted_module(self, node: fx.Node, module: nn.Module, at: dict) -> None:
        layer = module.layer if isinstance(module, EveryStep) else module
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            self.synapse(node.target, layer)
        elif isinstance(layer, ConstantCurrent):  # joins the layer before it
            (before,) = self.ends
            bias = _array(layer.bias / layer.unit.to(layer.bias.dtype))
            written = self.nodes[before]
            if isinstance(written, self.nir.Linear):
                self.nodes[before] = self.nir.Affine(written.weight, bias)
            else:
                written.bias = written.bias + bias
        elif isinstance(layer, Sum):
            (ends, _), ratio = at[node.args[1]], float(layer.ratio)
            if ratio != 1:
                mine, self.ends = self.ends, ends
                self.add(f"{node.target}.ratio", self.nir.Scale(np.full(self.shape, ratio)))
                ends, self.ends = self.ends, mine
            self.ends = self.ends + ends
        else:
            self.module(node.target, layer)

    def sequence(self, prefix: str, modules: nn.Sequential) -> None:
        for name, module in modules.named_children():
            self.module(f"{prefix}{name}", module)

    def module(self, name: str, module: nn.Module) -> None:
        if isinstance(module, SpikingLayer):
            self.layer(name, module)
        elif isinstance(module, SpikingBlock):
            self.block(name, module)
        elif isinstance(module, nn.Sequential):
            self.sequence(f"{name}.", module)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            self.synapse(name, module)
        elif isinstance(module, (LIF, BNTTLIF, STDBLIF)):
            self.neuron(name, module)
        elif isinstance(module, SpikeAvgPool2d):
            kernel = module.kernel_size
            self.pool(name, (kernel, kernel) if isinstance(kernel, int) else tuple(kernel))
        elif isinstance(module, nn.Flatten):
            if module.start_dim != 2 or module.end_dim != -1:
                raise ValueError(f"to_nir: {name}: expected nn.Flatten(2) over [T, B, ...], got "
                                 f"start_dim={module.start_dim}")
            self.flatten(name)
        elif not isinstance(module, IDENTITIES):
            raise ValueError(f"to_nir: {name} ({type(module).__name__}) has no NIR node; known are Conv2d, Linear, "
                             "LIF, IF, SpikeAvgPool2d, Flatten, dropout and what SpikingNetworks consist of")

    def layer(self, name: str, layer: SpikingLayer, residual: list[str] = ()) -> None:
        if layer.norm is not None and residual:
            raise ValueError(f"to_nir: {name}.norm: a batch normalisation behind a residual sum does not fold into "
                             "one layer; train with norm='none'")
        self.synapse(f"{name}.synapse", layer.synapse, layer.norm)
        self.ends += list(residual)
        self.neuron(f"{name}.neuron", layer.neuron)
        if layer.pool is not None:
            self.module(f"{name}.pool", layer.pool)

    def block(self, name: str, block: SpikingBlock) -> None:
        ends, shape = self.ends, self.shape
        residual = ends
        if block.shortcut is not None:
            self.synapse(f"{name}.shortcut", block.shortcut)
            residual = self.ends
        self.ends, self.shape = ends, shape
        for i, layer in enumerate(block.layers):
            self.layer(f"{name}.layers.{i}", layer, residual if i == len(block.layers) - 1 else [])

    def synapse(self, name: str, layer: nn.Conv2d | nn.Linear, norm: nn.Module | None = None) -> None:
        weight, bias = layer.weight.double(), layer.bias
        if norm is not None:
            if not self.fold_batchnorm:
                raise ValueError(f"to_nir: {name}: NIR has no batch normalisation; pass fold_batchnorm=True to fold "
                                 "it into this layer (the same but for rounding)")
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift = 0.0 if norm.bias is None else norm.bias.double()
            bias = ((0.0 if bias is None else bias.double()) - norm.running_mean.double()) * scale + shift
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        weight, dtype = weight.to(layer.weight.dtype), layer.weight.dtype
        if isinstance(layer, nn.Linear):
            if len(self.shape) != 1:
                raise ValueError(f"to_nir: {name}: a linear layer reads vectors, got {self.shape}; put nn.Flatten(2) "
                                 f"before it")
            node = (self.nir.Linear(_array(weight)) if bias is None
                    else self.nir.Affine(_array(weight), _array(bias.to(dtype))))  # fmt: skip
            self.add(name, node)
            self.shape = (layer.out_features,)
            return
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError(f"to_nir: {name}: padding must be numbers of zeros, got {layer.padding!r}, "
                             f"{layer.padding_mode!r}")
        if layer.groups != 1:
            raise ValueError(f"to_nir: {name}: nir takes the shape of a grouped convolution's input from its weight, "
                             f"and refuses the graph; got groups={layer.groups}")
        bias = torch.zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        self.add(name, self.nir.Conv2d(self.shape[1:], _array(weight), *geometry, _array(bias)))
        self.shape = tuple(int(n) for n in self.nodes[name].output_type["output"])

    def neuron(self, name: str, neuron: LIF | BNTTLIF | STDBLIF) -> None:
        if isinstance(neuron, BNTTLIF):
            raise ValueError(f"to_nir: {name}: BNTT normalises every time step differently, and a NIR node is the "
                             "same at every step; train with norm='shared' (fold_batchnorm=True) or norm='none'")
        if isinstance(neuron, STDBLIF) or neuron.neuron["delay"]:
            raise ValueError(f"to_nir: {name}: a delayed neuron fires on the membrane of the step before and resets "
                             "without leak, which NIR's neurons do not; use the prompt neuron (neuron='lif', or "
                             "LIF(delay=False))")
        reset = neuron.neuron["reset"]
        leak, threshold = (self.over_shape(name, what, value)
                           for what, value in (("leak", neuron.leak), ("threshold", neuron.threshold)))
        if not (leak.min() > 0 and leak.max() <= 1) or (leak.max() == 1 and leak.min() < 1):
            raise ValueError(f"to_nir: {name}: leak must be above 0 and at most 1, and 1 for all neurons of a layer "
                             f"or none, got {float(leak.min()):g} to {float(leak.max()):g}")
        leaky = leak.max() < 1
        tau, zero = self.dt / (1 - leak) if leaky else None, np.zeros(self.shape)
        if reset == "hard":
            self.add(name, self.nir.LIF(tau, tau / self.dt, zero, threshold, zero) if leaky
                     else self.nir.IF(np.full(self.shape, 1 / self.dt), threshold, zero))  # fmt: skip
            return
        if reset == "soft" and not self.unroll_reset:
            raise ValueError(f"to_nir: {name}: NIR's neurons reset to a value, and this one subtracts its threshold "
                             "(reset='soft'); pass unroll_reset=True to write it as integrator, threshold and "
                             "feedback, or train with reset='hard'")
        self.add(f"{name}.membrane", self.nir.LI(tau, tau / self.dt, zero) if leaky
                 else self.nir.I(np.full(self.shape, 1 / self.dt)))  # fmt: skip
        self.add(name, self.nir.Threshold(threshold))
        if reset == "soft":
            self.add(f"{name}.reset", self.nir.Scale(-leak * threshold))
            self.edges.append((f"{name}.reset", f"{name}.membrane"))
            self.ends = [name]

    def over_shape(self, name: str, what: str, value: float | Tensor) -> np.ndarray:
        """A number or one value a channel, float64, for each neuron."""
        array = np.asarray(value.detach().double().cpu() if isinstance(value, Tensor) else value, np.float64)
        if array.ndim == 1 and len(array) != self.shape[0]:
            raise ValueError(f"to_nir: {name}: {what} is for {len(array)} channels, its input has {self.shape[0]}")
        if array.ndim:
            array = array.reshape(-1, *[1] * (len(self.shape) - 1))
        return np.broadcast_to(array, self.shape).copy()

    def pool(self, name: str, kernel: tuple[int, int]) -> None:
        self.add(name, self.nir.AvgPool2d(np.array(kernel), np.array(kernel), np.array((0, 0))))
        self.shape = (self.shape[0], *(side // k for side, k in zip(self.shape[1:], kernel, strict=True)))

    def flatten(self, name: str) -> None:
        self.add(name, self.nir.Flatten(np.array(self.shape), start_dim=0, end_dim=-1))
        self.shape = (int(np.prod(self.shape)),)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().contiguous().numpy().copy()
