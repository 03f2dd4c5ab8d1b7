"""An artificial network as the list of steps that `to_spiking` converts; what has no spiking form is named here."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

CONVERTED = (
    "Conv2d, Linear, ReLU, AvgPool2d, AdaptiveAvgPool2d, a mean over pixels, Dropout, Flatten, Identity, an addition "
    "of two "
    "branches"
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Step:
    """kind: input, weights, relu, dropout, pool, pixel_mean, flatten, add, output. inputs: names of earlier steps.

    module: of weights a copy without bias, of pool the pooling. bias: what is added to weights. p: of dropout.
    """

    kind: str
    name: str
    inputs: tuple[str, ...] = ()
    module: nn.Module | None = None
    bias: Tensor | None = None
    p: float = 0.0
    keepdim: bool = False


class _Tracer(fx.Tracer):
    """Enters containers and blocks; layers of torch and of this library stay whole, to be converted or named."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__.startswith("pyaccel.nn") or super().is_leaf_module(module, name)


def read_graph(ann: nn.Module, *, fold_batchnorm: bool, keep_biases: bool) -> list[Step]:
    """The steps of `ann`, in order. ValueError names the first thing that cannot be converted, and says what to do."""
    root = (
        nn.Sequential(ann) if _Tracer().is_leaf_module(ann, "") else ann
    )  # a bare layer would be traced as its inside
    try:
        graph = _Tracer().trace(root)
    except Exception as error:
        raise ValueError(
            f"to_spiking: torch.fx cannot trace {type(ann).__name__} ({error}); its forward must be feed-forward, "
            f"without "
            "branches that depend on values"
        ) from error
    fx.GraphModule(root, graph).graph.eliminate_dead_code()
    return _Reader(dict(root.named_modules()), fold_batchnorm, keep_biases).read(graph)


class _Reader:
    def __init__(self, modules: dict[str, nn.Module], fold_batchnorm: bool, keep_biases: bool):
        self.modules, self.fold_batchnorm, self.keep_biases = modules, fold_batchnorm, keep_biases
        self.steps: dict[str, Step] = {}
        self.of_node: dict[fx.Node, Step] = {}  # several nodes share a step where nothing is left to do

    def read(self, graph: fx.Graph) -> list[Step]:
        for node in graph.nodes:
            if node.op == "placeholder":
                if any(step.kind == "input" for step in self.steps.values()):
                    raise ValueError(
                        f"to_spiking: expected a network with one input, the images; {node.name!r} is a second one"
                    )
                self.append(node, "input")
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise ValueError("to_spiking: expected a network with one output, the logits, got several")
                self.append(node, "output", node.args[0])
            elif node.op == "get_attr":
                self.refuse(node, "a parameter or constant that enters the computation outside a layer")
            elif node.op == "call_module":
                self.module(node, self.modules[node.target])
            elif not _is_size(node):
                self.function(node)
        return list(self.steps.values())

    def append(self, node: fx.Node, kind: str, *inputs: fx.Node, **fields) -> None:
        base = str(node.target) if node.op == "call_module" else node.name
        name, count = base, 1
        while name in self.steps:  # a layer that is called again
            count += 1
            name = f"{base}_{count}"
        for given in inputs:
            if given not in self.of_node:
                self.refuse(node, "an input that is not an activation")
        step = Step(kind, name, tuple(self.of_node[given].name for given in inputs), **fields)
        self.steps[name] = self.of_node[node] = step

    def skip(self, node: fx.Node, given: fx.Node) -> None:
        self.of_node[node] = self.of_node[given]

    def refuse(self, node: fx.Node, what: str) -> None:
        where = f"{node.target!r}" if node.op == "call_module" else f"{_words(node.target)} ({node.name})"
        raise ValueError(f"to_spiking: cannot convert {where}: {what}; converted are {CONVERTED}")

    # ---- layers

    def module(self, node: fx.Node, module: nn.Module) -> None:
        given, kind = node.args[0] if node.args else None, type(module)
        if kind in (nn.Conv2d, nn.Linear):
            self.weights(node, module, given)
        elif kind is nn.ReLU:
            self.append(node, "relu", given)
        elif kind in (nn.AvgPool2d, nn.AdaptiveAvgPool2d):
            self.append(node, "pool", given, module=module)
        elif kind is nn.Dropout:
            self.append(node, "dropout", given, p=module.p)
        elif kind is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                self.refuse(node, f"{module}, which does not flatten everything but the batch")
            self.append(node, "flatten", given)
        elif kind is nn.Identity:
            self.skip(node, given)
        elif kind in NORMS:
            self.norm(node, module, given)
        elif isinstance(module, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)):
            self.refuse(node, f"{module}, a maximum of spikes is no maximum of rates; train with average pooling")
        else:
            self.refuse(node, f"{kind.__name__} has no spiking form")

    def weights(self, node: fx.Node, layer: nn.Module, given: fx.Node) -> None:
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            self.refuse(node, f"padding_mode={layer.padding_mode!r}; only zeros")
        followed = [self.modules.get(user.target) for user in node.users if user.op == "call_module"]
        folds = self.fold_batchnorm and any(isinstance(m, NORMS) for m in followed)
        if layer.bias is not None and not self.keep_biases and not folds:
            what = "it has a bias, which the paper's networks have not; train without, or pass keep_biases=True"
            self.refuse(node, f"{what} for a constant current")
        own = copy.deepcopy(layer)
        bias = None if own.bias is None else own.bias.detach()
        own.bias = None
        self.append(node, "weights", given, module=own, bias=bias)

    def norm(self, node: fx.Node, norm: nn.Module, given: fx.Node) -> None:
        step = self.of_node.get(given)
        if not self.fold_batchnorm:
            self.refuse(node, f"{type(norm).__name__}; train without, or pass fold_batchnorm=True")
        if not norm.track_running_stats:
            self.refuse(node, f"{type(norm).__name__} has no running statistics to fold")
        if step is None or step.kind != "weights" or len(given.users) != 1:
            self.refuse(node, f"{type(norm).__name__} can only be folded into the one layer right before it")
        layer = step.module
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        bias = None if step.bias is None else nn.Parameter(step.bias)
        scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        weight, bias = fuse(layer.weight, bias, norm.running_mean, norm.running_var, norm.eps, scale, shift)
        layer.weight, step.bias = nn.Parameter(weight.detach()), bias.detach()
        self.skip(node, given)

    # ---- functions and methods

    def function(self, node: fx.Node) -> None:
        target = node.target if node.op == "call_function" else getattr(Tensor, str(node.target), node.target)
        given = node.args[0] if node.args else None
        if target in (F.relu, torch.relu, torch.relu_, F.relu_, Tensor.relu, Tensor.relu_):
            self.append(node, "relu", given)
        elif target in (operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_):
            both = node.args
            if len(both) != 2 or not all(isinstance(a, fx.Node) for a in both) or node.kwargs.get("alpha", 1) != 1:
                self.refuse(node, "an addition of something other than two activations")
            self.append(node, "add", *both)
        elif target in (F.dropout,):
            self.append(node, "dropout", given, p=float(_argument(node, 1, "p", 0.5)))
        elif target in (torch.flatten, Tensor.flatten):
            self.flattened(
                node, given, _argument(node, 1, "start_dim", 0) == 1 and _argument(node, 2, "end_dim", -1) == -1
            )
        elif target in (Tensor.view, Tensor.reshape, torch.reshape):
            sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple) else node.args[1:]
            first = sizes[0] if sizes else None
            self.flattened(
                node, given, len(sizes) == 2 and sizes[1] == -1 and isinstance(first, fx.Node) and _is_size(first)
            )
        elif target is F.avg_pool2d:
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
            values = dict(zip(names, node.args[1:], strict=False)) | {
                k: v for k, v in node.kwargs.items() if k in names
            }
            self.append(node, "pool", given, module=nn.AvgPool2d(**values))
        elif target is F.adaptive_avg_pool2d:
            self.append(node, "pool", given, module=nn.AdaptiveAvgPool2d(_argument(node, 1, "output_size", None)))
        elif target in (torch.mean, Tensor.mean):
            axes = _argument(node, 1, "dim", None)
            if not isinstance(axes, (tuple, list)) or sorted(a % 4 for a in axes) != [2, 3]:
                self.refuse(node, f"a mean over {axes}; only over the pixels, (2, 3)")
            self.append(node, "pixel_mean", given, keepdim=bool(_argument(node, 2, "keepdim", False)))
        else:
            self.refuse(node, "an operation without spiking form")

    def flattened(self, node: fx.Node, given: fx.Node, everything: bool) -> None:
        if not everything:
            self.refuse(node, "a change of shape that does not flatten everything but the batch; use flatten(1)")
        self.append(node, "flatten", given)


def _argument(node: fx.Node, place: int, name: str, otherwise):
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, otherwise)


def _is_size(node: fx.Node) -> bool:
    """Whether a node is the batch size, or the shape it is taken from: `x.size(0)`, `x.shape[0]`."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_size(node.args[0])


def _words(target: Callable | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
