"""`quantize`: convolution and linear layers replaced by quantised ones, each at its own width."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from pyaccel.nn.quant import QuantConv2d, QuantLinear, _Quantized

# Layers with weights of their own that multiply activations, for which there is no quantised form.
UNKNOWN = (
    nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.Embedding, nn.EmbeddingBag,
    nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip


def quantize(
    model: nn.Module,
    bits: int | Sequence[int] | Mapping[str, int],
    *,
    quantizer: str = "symmetric",
    momentum: float = 0.99,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of `model` whose `nn.Conv2d` and `nn.Linear` layers are `QuantConv2d` and `QuantLinear`.

    Args:
        bits: one width for weights and activations of every layer (1..16), a list of one width a layer in the order of
            `model.named_modules()`, or {layer name: width}; layers that a mapping leaves out stay as they are.
        quantizer, momentum: see `nn.QuantLinear`.
        skip: names of layers to leave in full precision; they take no place in a list.

    Batch normalisation stays in float and is not folded: folding after the choice of bits would change the ranges.
    A quantised layer is quantised anew from its full-precision weight, at the new width, and keeps its activation range.
    Widths between 1, 2, 4, 8 and 16 are stored in the next of these: `hardware.compression` reports both.

    Raises:
        ValueError: a list of the wrong length (the message lists the layers), an unknown name, a width outside 1..16.
        TypeError: a layer with weights that has no quantised form, by name; put it into `skip` to leave it alone.
    """
    layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear, QuantConv2d, QuantLinear)}
    known = dict(model.named_modules())
    for name in (*skip, *(bits if isinstance(bits, Mapping) else ())):
        if name not in known:
            raise ValueError(f"quantize: the model has no layer {name!r}; its layers are {', '.join(layers)}")
    for name, module in known.items():
        if name not in skip and (isinstance(module, UNKNOWN) or (isinstance(module, (nn.Conv2d, nn.Linear)) and name not in layers)):
            inside = any(name.startswith(f"{outer}.") and isinstance(known[outer], UNKNOWN) for outer in known if outer)
            if not inside:
                raise TypeError(f"quantize: cannot quantise {name} ({type(module).__name__}); leave it alone with skip=[{name!r}]")
    layers = {name: m for name, m in layers.items() if name not in skip}
    widths = _widths(layers, bits)
    made = copy.deepcopy(model)
    for name, width in widths.items():
        parent, _, child = name.rpartition(".")
        new = _quantized(made.get_submodule(name), width, quantizer, momentum)
        if not name:
            return new
        setattr(made.get_submodule(parent), child, new)
    return made


def _widths(layers: Mapping[str, nn.Module], bits: int | Sequence[int] | Mapping[str, int]) -> dict[str, int]:
    if isinstance(bits, Mapping):
        for name in bits:
            if name not in layers:
                raise ValueError(f"quantize: {name!r} is no convolution or linear layer; these are {', '.join(layers)}")
        widths = dict(bits)
    elif isinstance(bits, int):
        widths = dict.fromkeys(layers, bits)
    else:
        if len(bits) != len(layers):
            raise ValueError(f"quantize: {len(bits)} widths for {len(layers)} layers ({', '.join(layers)}); give one each")
        widths = dict(zip(layers, bits, strict=True))
    for name, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 16:
            raise ValueError(f"quantize: the width of {name} must be a whole number in 1..16, got {width!r}")
    return widths


def _quantized(layer: nn.Module, width: int, quantizer: str, momentum: float) -> nn.Module:
    options = dict(
        weight_bits=width, activation_bits=width, quantizer=quantizer, momentum=momentum, device=layer.weight.device,
        dtype=layer.weight.dtype,
    )  # fmt: skip
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        new = QuantLinear(layer.in_features, layer.out_features, bias, **options)
    else:
        new = QuantConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, bias,
            padding_mode=layer.padding_mode, **options,
        )  # fmt: skip
    new.weight, new.bias = layer.weight, layer.bias
    if isinstance(layer, _Quantized):
        new.activation_max.copy_(layer.activation_max)
    new.train(layer.training)
    return new
