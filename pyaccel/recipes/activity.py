"""What the layers of a spiking network do while images run through it: operations, incoming events, spikes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pyaccel.models import SpikingLayer, SpikingVgg


@dataclass
class LayerActivity:
    """Counts of one weight layer.

    macs: multiply-accumulates of one step if the layer were dense. inputs, neurons: values that enter and neurons
    that it has, of one image and step (neurons 0: the read-out, which does not spike). events: inputs that were not
    zero, spikes: spikes of its neurons before any pooling; both over all steps, and means over the images.
    """

    name: str
    macs: int = 0
    inputs: int = 0
    neurons: int = 0
    events: float = 0.0
    spikes: float = 0.0

    @property
    def incoming_rate(self) -> float:
        """Events over all steps per input."""
        return self.events / self.inputs

    @property
    def rate(self) -> float:
        """Spikes over all steps per neuron (2010.01729, energy section)."""
        return self.spikes / self.neurons


class Activity:
    """Counts, as long as it is entered, over every `model.step_logits(...)`; `layers()` gives the means.

    `model.forward` averages over time before the read-out and would count its input wrongly: use `step_logits`.
    """

    def __init__(self, model: SpikingVgg):
        self.model = model
        self.images = 0
        self._layers: list[LayerActivity] = []
        self._handles: list = []

    def __enter__(self) -> Activity:
        self._watch(self.model.encoder, self._count_images)
        for name, module in self.model.named_modules():
            if isinstance(module, SpikingLayer):
                self._watch_layer(LayerActivity(name), module.synapse, module.neuron)
        self._watch_layer(LayerActivity("readout"), self.model.readout, None)
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def layers(self) -> list[LayerActivity]:
        """One entry a weight layer, in order. ValueError before any image."""
        if not self.images:
            raise ValueError("Activity: no image has run through the network yet")
        return [
            LayerActivity(
                a.name, a.macs, a.inputs, a.neurons, float(a.events) / self.images, float(a.spikes) / self.images
            )
            for a in self._layers
        ]

    def _watch(self, module: nn.Module, hook) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _watch_layer(self, activity: LayerActivity, synapse: nn.Module, neuron: nn.Module | None) -> None:
        self._layers.append(activity)

        def connections(module, arguments: tuple[Tensor], output: Tensor) -> None:
            (received,) = arguments  # [T, B, C, H, W] of a convolution, else [T, B, features]; output alike
            activity.inputs = received[0, 0].numel()
            activity.macs = module.weight.numel() * output[0, 0, 0].numel()
            activity.events = activity.events + received.count_nonzero()

        def firing(module, arguments, spikes: Tensor) -> None:
            activity.neurons = spikes[0, 0].numel()
            activity.spikes = activity.spikes + spikes.count_nonzero()

        self._watch(synapse, connections)
        if neuron is not None:
            self._watch(neuron, firing)

    def _count_images(self, module, arguments, spikes: Tensor) -> None:
        self.images += spikes.shape[1]
