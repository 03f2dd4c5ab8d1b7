"""What a pruning schedule saves, by calculation: the accounting of 2003.02800's specification, section 6."""

from __future__ import annotations

import torch

from pyaccel import models
from pyaccel.hardware import cost, training_compute

COUNTS = ("macs", "accesses", "filters")


def planned_saving(
    model: str, input_shape: tuple[int, int, int], *, epochs: int, rate: float, retrain: int = 10, ramp: float = 1.0
) -> dict[str, float]:
    """1 - C_pwt / C_base for a linear ramp of uniform pruning over the first share `ramp` of the epochs.

    Epoch t = 0 .. E-1 runs at the kept share 1 - p min(1, t / (ramp E)) of every convolution's filters, widths
    max(1, round(kept * width)); classifier ignored. C_base: E dense epochs, then `retrain` at the final widths.

    Returns:
        The saving, 0..1, under three counts: "macs" (products: about the square of what is kept) and "accesses" (inputs
        and weights), which are physical, and "filters" (cost proportional to the number of filters), which is not.
    """
    with torch.device("meta"):
        network = models.build(model, classes=10, input_shape=input_shape, spiking=False)
    layers = []
    for layer in cost(network, input_shape).convolutions().layers:
        convolution = network.get_submodule(layer.name)
        inputs, outputs = convolution.in_channels, convolution.out_channels
        layers.append(
            (inputs, outputs, layer.weights // (inputs * outputs), layer.macs // layer.weights, layer.inputs // inputs)
        )

    def width(channels: int, kept: float) -> int:
        return max(1, round(kept * channels))

    def counts(kept: float) -> dict[str, float]:
        found = dict.fromkeys(COUNTS, 0.0)
        for number, (inputs, outputs, taps, pixels, image) in enumerate(layers):
            read, written = width(inputs, kept) if number else inputs, width(outputs, kept)
            found["macs"] += read * written * taps * pixels
            found["accesses"] += read * written * taps + read * image
        found["filters"] = kept
        return found

    pruned = [counts(1 - rate * min(1.0, t / (ramp * epochs))) for t in range(epochs)]
    dense, final = counts(1.0), counts(1 - rate)
    saving = {}
    for count in COUNTS:
        base = training_compute([(epochs, dense[count]), (retrain, final[count])])
        saving[count] = 1 - training_compute([(1, epoch[count]) for epoch in pruned]) / base
    return saving
