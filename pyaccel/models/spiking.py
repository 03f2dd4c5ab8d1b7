"""Spiking networks, run layer by layer over all time steps: exact, because no layer looks back at a later one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyaccel.models.vgg import Layer, Vgg
from pyaccel.nn import BNTTLIF, LIF, PoissonEncoder, SpikeAvgPool2d, every_step

NORMS = ("bntt", "shared", "none")


class SpikingLayer(nn.Module):
    """Weights, normalisation and neurons, pooling: `[T, B, ...]` spikes in, `[T, B, ...]` spikes out.

    `norm`: "bntt" (statistics and gain of every step, fused with the neuron), "shared" (one BatchNorm without bias over
    all steps), "none". `kind`: what spikes come in (see `ops.spike_conv2d`). For backward a layer keeps its current
    and 1 to 3 bits of each spike it read.
    """

    def __init__(self, layer: Layer, norm: str, kind: str, *, steps: int, leak: float, threshold: float, **neuron):
        super().__init__()
        self.synapse = layer.spike_synapse(kind)
        self.norm: nn.Module | None = None
        if norm == "shared":
            self.norm = (nn.BatchNorm2d if layer.convolution else nn.BatchNorm1d)(layer.outputs, eps=1e-4)
            self.norm.bias = None
        if norm == "bntt":
            self.neuron: nn.Module = BNTTLIF(layer.outputs, steps, leak, threshold, **neuron)
        else:
            self.neuron = LIF(leak, threshold, **neuron)
        self.pool = SpikeAvgPool2d(2) if layer.pooled else None

    def forward(self, spikes: Tensor) -> Tensor:
        current = self.synapse(spikes)
        if self.norm is not None:
            current = every_step(self.norm, current)
        spikes = self.neuron(current)
        return spikes if self.pool is None else self.pool(spikes)


class SpikingVgg(nn.Module):
    """A VGG of spiking neurons behind a Poisson encoder (2010.01729).

    `model(images, sample_ids=None, steps=None)` -> logits `[B, classes]`: the mean over time of a linear read-out
    without leak or spikes. `step_logits(...)` -> `[T, B, classes]`: the same after each step, for accuracy over time.
    `sample_ids` (int64 `[B]`) make the encoder's draws independent of the batch an image is in.
    """

    def __init__(
        self,
        description: Vgg,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        steps: int = 25,
        leak: float = 0.95,
        threshold: float = 1.0,
        norm: str = "bntt",
        gain: float = 0.5,
        seed: int = 0,
        **neuron,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm of a spiking network must be one of {', '.join(NORMS)}, got {norm!r}")
        layers = description.layers(input_shape)
        kinds = ["signed"] + ["pooled" if layer.pooled else "binary" for layer in layers[:-1]]
        built = [
            SpikingLayer(layer, norm, kind, steps=steps, leak=leak, threshold=threshold, **neuron)
            for layer, kind in zip(layers, kinds, strict=True)
        ]
        split = sum(layer.convolution for layer in layers)
        self.steps = steps
        self.encoder = PoissonEncoder(steps, gain, seed=seed)
        self.features = nn.Sequential(*built[:split])
        self.classifier = nn.Sequential(*built[split:])
        self.readout = nn.Linear(layers[-1].outputs, classes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight, gain=2)  # the official code's choice; BNTT is scale free

    def spikes(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        """Spikes of the last hidden layer, `[T, B, features]`."""
        hidden = self.features(self.encoder(images, sample_ids, steps=steps))
        return self.classifier(hidden.flatten(2))

    def forward(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        # Linear in the spikes, so their mean over time may be taken first.
        return self.readout(self.spikes(images, sample_ids, steps).mean(0))

    def step_logits(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        spikes = self.spikes(images, sample_ids, steps)
        count = torch.arange(1, spikes.shape[0] + 1, device=spikes.device, dtype=spikes.dtype)
        return self.readout(spikes).cumsum(0) / count[:, None, None]
