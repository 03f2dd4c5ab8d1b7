"""`balance_thresholds`: firing thresholds of a converted network, measured layer by layer on its own spikes
(2005.01807).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyaccel.nn import BNTTLIF, LIF, STDBLIF
from pyaccel.surgery.streaming import chunks, first_step, streaming


class _Reached(Exception):
    """The layer that is measured has its current: nothing behind it need run."""


@torch.no_grad()
def balance_thresholds(
    snn: nn.Module,
    loader: Iterable,
    *,
    percentile: float | None = None,
    scale: float = 1.0,
    steps: int = 1000,
    layers: Sequence[str] | None = None,
    chunk: int = 25,
) -> nn.Module:
    """A copy of `snn` whose thresholds are the largest current that each layer met, times `scale`.

    Layer by layer, in order: the network runs `steps` steps with the thresholds found so far (without `scale`), leak 1
    and without dropout, on Poisson-coded images, up to the layer whose turn it is::

        V_l = max over steps, images, channels and pixels of the current W_l s_{l-1}[t] of one step
        V_l = max over steps and batches of its `percentile` over images, channels and pixels    (as DIET-SNN's code)

    so each layer is measured on the spikes that the layers before it really send. Afterwards every V_l is multiplied
    by `scale`. A percentile is the nearest rank: the k-th smallest of n values, k = ceil(percentile / 100 * n).

    Memory holds `chunk` steps of one layer at a time: it does not grow with `steps`, nor with the depth. Work grows
    with the square of the depth: no spikes are kept between layers.

    Args:
        snn: from `to_spiking`, or a `SpikingNetwork` with "delayed", "stdb" or "lif" neurons. Untouched.
        loader: batches of training images as the network gets them: tensors, tuples that start with one, or objects
            with `images` (and `sample_ids`). All of them are used: give one batch (the paper: 512 images), or few.
        percentile: None for the maximum, or 0 < percentile <= 100. The maximum is set by outliers.
        scale: the paper's code takes 0.7; less for fewer steps.
        steps: T of the search; the paper's code: 1000.
        layers: qualified names of the neurons to balance; None: all. The paper's residual networks balance the three
            layers before their blocks and leave the threshold of the rest at 1.
        chunk: steps at a time.

    Raises:
        ValueError: no batches, an unknown layer, a layer that no positive current reaches, BNTT neurons.
    """
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"balance_thresholds: percentile must be above 0 and at most 100, got {percentile}")
    for name, value in (("scale", scale), ("steps", steps), ("chunk", chunk)):
        if not value > 0:
            raise ValueError(f"balance_thresholds: {name} must be positive, got {value}")
    batches = [_images(batch) for batch in loader]
    if not batches:
        raise ValueError("balance_thresholds: needs at least one batch of training images")
    balanced = copy.deepcopy(snn)
    neurons = _neurons_in_order(balanced, batches[0])
    wanted = list(neurons) if layers is None else list(layers)
    for name in wanted:
        if name not in neurons:
            raise ValueError(f"balance_thresholds: no neurons are called {name!r}; these are {', '.join(neurons)}")
    leaks = {name: neuron.leak for name, neuron in neurons.items()}
    found = {}
    for neuron in neurons.values():
        neuron.leak = 1.0
    for name, neuron in neurons.items():
        if name in wanted:
            found[name] = _largest(balanced, name, neuron, batches, percentile, steps, chunk)
            set_threshold(balanced, neuron, found[name])
    for name, neuron in neurons.items():
        neuron.leak = leaks[name]
        if name in found:
            set_threshold(balanced, neuron, scale * found[name])
    return balanced


def thresholds(snn: nn.Module) -> dict[str, float]:
    """The threshold of each layer of neurons, by name."""
    return {name: float(m.threshold) for name, m in snn.named_modules() if isinstance(m, (LIF, STDBLIF))}


def set_threshold(snn: nn.Module, neuron: nn.Module, value: float) -> None:
    """Write one threshold, and bring the network's units to it where it has them."""
    if isinstance(neuron.threshold, Tensor):
        neuron.threshold.fill_(value)
    else:
        neuron.threshold = value
    if hasattr(snn, "update_units"):
        snn.update_units()


def _images(batch) -> tuple[Tensor, Tensor | None]:
    if hasattr(batch, "images"):
        return batch.images, getattr(batch, "sample_ids", None)
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], None)


def _run(snn: nn.Module, batch: tuple[Tensor, Tensor | None], steps: int) -> None:
    images, sample_ids = batch
    device = next(snn.parameters()).device
    snn.step_logits(images.to(device), None if sample_ids is None else sample_ids.to(device), steps)


def _neurons_in_order(snn: nn.Module, batch: tuple[Tensor, Tensor | None]) -> dict[str, nn.Module]:
    """The layers of neurons in the order in which one step of one image runs through them."""
    named = {m: name for name, m in snn.named_modules() if isinstance(m, (LIF, STDBLIF, BNTTLIF))}
    if any(isinstance(m, BNTTLIF) for m in named):
        raise ValueError("balance_thresholds: BNTT normalises what its neurons get, so there is nothing to balance")
    order: dict[str, nn.Module] = {}

    def note(module: nn.Module, *_) -> None:
        order.setdefault(named[module], module)

    hooks = [module.register_forward_hook(note) for module in named]
    try:
        with streaming(snn):
            _run(snn, (batch[0][:1], None), 1)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _largest(snn, name: str, neuron: nn.Module, batches, percentile: float | None, steps: int, chunk: int) -> float:
    """The maximum, or percentile, of the current that reaches `neuron`."""
    largest = torch.tensor(-math.inf, dtype=torch.float64)

    def measure(_, arguments: tuple[Tensor, ...]) -> None:
        nonlocal largest
        current = arguments[0].flatten(1)
        if percentile is None:
            value = current.max()
        else:  # of each step
            rank = max(1, math.ceil(percentile / 100 * current.shape[1]))
            value = current.kthvalue(rank, dim=1).values.max()
        largest = torch.maximum(largest.to(value.device), value.double())
        raise _Reached

    hook = neuron.register_forward_pre_hook(measure)
    try:
        for batch in batches:
            with streaming(snn):
                for first, count in chunks(steps, chunk):
                    with first_step(snn.encoder, first):
                        try:
                            _run(snn, batch, count)
                        except _Reached:
                            pass
    finally:
        hook.remove()
    if not float(largest) > 0:
        raise ValueError(
            f"balance_thresholds: no positive current reaches {name!r} (largest {float(largest):g}); is the layer "
            f"dead, or "
            "are there more spiking layers than steps?"
        )
    return float(largest)
