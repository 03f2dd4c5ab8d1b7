"""`to_crossbars`: a model whose linear and convolution layers run on analog crossbars; and what sets such a chip up."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from pyaccel.hardware import CrossbarConfig
from pyaccel.nn.analog import AnalogConv2d, AnalogLinear


def to_crossbars(model: nn.Module, config: CrossbarConfig, *, chip: int, digital: Iterable[str] = ()) -> nn.Module:
    """A copy of `model` with every `nn.Linear` and `nn.Conv2d` on crossbars of chip number `chip`; biases,
    normalisation, activations and pooling stay digital.

    The copy is an ordinary differentiable module with the same parameter names: it can be attacked with full knowledge,
    fine-tuned, saved. Another `chip` draws other variation; the same one is the same chip on every device.

    Args:
        model: untouched.
        digital: qualified names of layers to leave as they are (layers below them included).

    Raises:
        ValueError: a layer that cannot be mapped (grouped, padding other than zeros, or a subclass of `nn.Linear` or
            `nn.Conv2d`, whose owner may read its weight past it), by name; an unknown name in `digital`; nothing to
            map.
    """
    digital = tuple(digital)
    names = {name for name, _ in model.named_modules()}
    for name in digital:
        if name not in names:
            raise ValueError(f"to_crossbars: digital names {name!r}, but the model has no such layer")
    mapped = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}  # a layer that appears twice is one layer
    for name, layer in list(mapped.named_modules(remove_duplicate=False)):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or any(name == d or name.startswith(f"{d}.") for d in digital):
            continue
        analog = made[layer] = made.get(layer) or _analog(name, layer, config, chip)
        if name == "":
            return analog
        parent, _, child = name.rpartition(".")
        setattr(mapped.get_submodule(parent), child, analog)
    if not made:
        raise ValueError("to_crossbars: the model has no nn.Linear or nn.Conv2d left to map")
    return mapped


def _analog(name: str, layer: nn.Module, config: CrossbarConfig, chip: int) -> nn.Module:
    options = dict(bias=layer.bias is not None, config=config, chip=chip, name=name, device="meta")
    if type(layer) is nn.Linear:
        analog: nn.Module = AnalogLinear(layer.in_features, layer.out_features, **options)
    elif type(layer) is nn.Conv2d and _plain(layer):
        analog = AnalogConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, **options
        )
    else:
        raise ValueError(
            f"to_crossbars: cannot map {name!r}, {type(layer).__name__}({layer.extra_repr()}): only plain nn.Linear "
            f"and nn.Conv2d with groups=1, numeric zero padding; leave it digital with digital=({name!r},)"
        )
    analog.weight, analog.bias = layer.weight, layer.bias
    return analog.train(layer.training)


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def analog_layers(model: nn.Module) -> dict[str, AnalogLinear | AnalogConv2d]:
    """The crossbar layers of a model by qualified name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (AnalogLinear, AnalogConv2d))}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module returns to the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _one_or_more(op: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{op}: needs at least one batch of inputs")
    return itertools.chain([first], iterator)


def calibrate_converters(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the ADC range of every crossbar layer of `model`, in place, to the largest partial sum that each column meets
    on `batches` of inputs, in evaluation mode. Earlier ranges are forgotten. Layers see what the converting layers
    before them produce, so ranges grow with the batches; give one batch that is large enough, or several alike.
    """
    layers = [layer for layer in analog_layers(model).values() if layer.config.adc_bits is not None]
    if not layers:
        raise ValueError("calibrate_converters: no layer of this model has an ADC (CrossbarConfig.adc_bits)")
    batches = _one_or_more("calibrate_converters", batches)
    for layer in layers:
        layer.adc_range, layer.measuring = None, True
    try:
        with _evaluating(model):
            for x in batches:
                model(x)
    finally:
        for layer in layers:
            layer.measuring = False


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the running statistics of every batch normalisation of `model` anew, in place, as the plain average over
    `batches` of inputs (calibration "bn_reestimate"). Nothing else changes."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError("reestimate_batchnorm: the model has no batch normalisation with running statistics")
    batches = _one_or_more("reestimate_batchnorm", batches)
    momenta = [norm.momentum for norm in norms]
    try:
        with _evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's cumulative average
                norm.train()
            for x in batches:
                model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
