"""What a network computes and moves for one image: multiply-accumulates, parameters, memory accesses; and in training.

One count for every recipe. Multiply-accumulates are half of what `torch.utils.flop_counter` counts for matrix products
and convolutions, so functional code and factorised layers count like `nn.Conv2d`; additions, normalisation and
activation functions count nothing. Accesses are elements, not bytes, as in the energy models of the pruning papers:
every weight once, every input (and, where asked for, output) once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Operators of multiply-accumulates; whatever else has a formula (neurons, noise, quantisers) is none.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "quantized_linear", "quantized_conv2d",
            "crossbar_matmul", "_int_mm", "_scaled_mm", "_scaled_dot_product", "_flash_attention",
            "_efficient_attention")  # fmt: skip


@dataclass(frozen=True)
class LayerCost:
    """One layer with products, for one image.

    Attributes:
        name: qualified name of the module.
        weights: elements of its weight (of several: all parameters but biases), n.
        macs: multiply-accumulates, M.
        weight_bits, activation_bits: widths of the operands (32 where the layer names none).
        parameters: all its own parameters.
        inputs, outputs: elements of the activations that it reads and writes.
        kind: "convolution", "linear" or "other".
    """

    name: str
    weights: int
    macs: int
    weight_bits: int = 32
    activation_bits: int = 32
    parameters: int = 0
    inputs: int = 0
    outputs: int = 0
    kind: str = "other"


@dataclass(frozen=True)
class Cost:
    """Sums over `layers` for one image. `parameters`: of the whole model, normalisation included."""

    layers: tuple[LayerCost, ...]
    parameters: int

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def accesses(self) -> int:
        """sum over layers of inputs + weights: H W I + k^2 I O for a convolution."""
        return sum(layer.inputs + layer.weights for layer in self.layers)

    @property
    def accesses_with_outputs(self) -> int:
        return self.accesses + sum(layer.outputs for layer in self.layers)

    def convolutions(self) -> Cost:
        """The convolutions alone, as the tables of pruning papers count; `parameters` are then theirs."""
        layers = tuple(layer for layer in self.layers if layer.kind == "convolution")
        return Cost(layers, sum(layer.parameters for layer in layers))


def cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """What `model` computes for one input of `input_shape` (without batch; images: C, H, W).

    The model runs once on zeros, in evaluation mode, and is left as it was; one on the "meta" device costs no time.
    Works for any module that takes one tensor. Layers in the order of their first use; one used twice counts twice.
    """
    example = next(iter(model.parameters()), torch.zeros(()))
    return count(model, torch.zeros((1, *input_shape), device=example.device, dtype=example.dtype))


def count(model: nn.Module, example: Tensor) -> Cost:
    """As `cost`, over a given batch `[B, ...]`; figures are for one of its inputs (rounded down)."""
    own: dict[str, list[int]] = {}  # products, inputs, outputs of each module's own operators
    open_calls: list[list[int]] = []  # products before a call, and those of the calls inside it
    counter = FlopCounterMode(display=False)
    modules = dict(model.named_modules())
    names = {module: name for name, module in reversed(modules.items())}

    def products() -> int:
        return sum(n for op, n in counter.get_flop_counts().get("Global", {}).items() if _is_product(op)) // 2

    def before(module, _inputs):
        open_calls.append([products(), 0])

    def after(module, inputs, output):
        start, inside = open_calls.pop()
        spent = products() - start
        if open_calls:
            open_calls[-1][1] += spent
        if spent > inside:
            found = own.setdefault(names[module], [0, 0, 0])
            for i, n in enumerate((spent - inside, _elements(inputs), _elements(output))):
                found[i] += n

    hooks = [hook for module in names for hook in (module.register_forward_pre_hook(before),
                                                    module.register_forward_hook(after))]  # fmt: skip
    batch = max(1, len(example))
    try:
        with _evaluating(model), counter:
            # Gradients on the input keep quantised layers on their float form, which needs no activation range.
            model(example.detach().clone().requires_grad_(example.is_floating_point()))
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(_layer(name, modules[name], [n // batch for n in found]) for name, found in own.items())
    return Cost(layers, sum(p.numel() for p in model.parameters()))


def layer_costs(model: nn.Module, example: Tensor) -> list[LayerCost]:
    """The layers of `count(model, example)`: weights and multiply-accumulates of every layer with products."""
    return list(count(model, example).layers)


def training_compute(schedule: Iterable[tuple[float, float]], *, backward: float = 2.0) -> float:
    """C = (1 + backward) * sum over stages of images * count.

    schedule: (images seen, count for one image), one pair a stage or epoch: `|D_s| E_s` and `cost(model, ...).macs`, or
    `.accesses`. backward: what the backward pass costs against the forward pass (2: gradients of inputs and of weights;
    the first layer's is overstated). Ratios of two schedules do not depend on it.
    """
    return (1 + backward) * sum(images * figure for images, figure in schedule)


def _is_product(op) -> bool:
    return getattr(op, "__name__", str(op)).startswith(PRODUCTS)


def _elements(values) -> int:
    if isinstance(values, Tensor):
        return values.numel()
    return sum(map(_elements, values)) if isinstance(values, (tuple, list)) else 0


def _layer(name: str, module: nn.Module, figures: list[int]) -> LayerCost:
    own = dict(module.named_parameters(recurse=False))
    if not own and hasattr(module, "parametrizations"):
        own = dict(module.named_parameters())
    convolution = isinstance(module, nn.modules.conv._ConvNd) or "Conv" in type(module).__name__
    kind = "convolution" if convolution else "linear" if "Linear" in type(module).__name__ else "other"
    weights = sum(p.numel() for key, p in own.items() if "bias" not in key)
    macs, inputs, outputs = figures
    return LayerCost(name, weights, macs, getattr(module, "weight_bits", 32), getattr(module, "activation_bits", 32),
                     sum(p.numel() for p in own.values()), inputs, outputs, kind)  # fmt: skip


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
