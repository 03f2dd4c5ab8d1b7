"""Spiking networks, run layer by layer over all time steps: exact, because no layer looks back at a later one."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyaccel.models.dropout import HeldDropout
from pyaccel.models.form import Form
from pyaccel.models.layer import Layer, start_artificial
from pyaccel.models.recompute import layer_by_layer, piece_by_piece
from pyaccel.models.vgg import Vgg
from pyaccel.nn import BNTTLIF, LIF, STDBLIF, PoissonEncoder, SpikeAvgPool2d, every_step

NORMS = ("bntt", "shared", "none")
NEURONS = ("bntt", "lif", "delayed", "stdb")
INPUTS = ("poisson", "events")


class BalancedLIF(LIF):
    """`LIF` whose threshold is a buffer, set by threshold balancing and saved with the model (as in `STDBLIF`)."""

    def __init__(self, leak: float = 1.0, threshold: float = 1.0, **options):
        super().__init__(leak, threshold, **options)
        if isinstance(self.threshold, nn.Parameter):
            raise ValueError("a delayed neuron holds its threshold in a buffer: use neuron='lif' with learn_threshold")
        del self.threshold
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float64))


def make_neuron(neuron: str, channels: int, steps: int, leak: float, threshold: float, **options) -> nn.Module:
    if neuron == "bntt":
        return BNTTLIF(channels, steps, leak, threshold, **options)
    if neuron == "lif":
        return LIF(leak, threshold, **options)
    if neuron == "delayed":
        return BalancedLIF(leak, threshold, delay=True, **options)
    return STDBLIF(leak, threshold, **options)


def neuron_and_norm(usual: str, neuron: str | None, norm: str | None) -> tuple[str, str]:
    """The neuron, one of NEURONS, and the normalisation, one of NORMS, from what was asked for and the usual neuron."""
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm of a spiking network must be one of {', '.join(NORMS)}, got {norm!r}")
    if neuron is not None and neuron not in NEURONS:
        raise ValueError(f"neuron of a spiking network must be one of {', '.join(NEURONS)}, got {neuron!r}")
    if neuron is None:
        neuron = "bntt" if norm == "bntt" else "lif" if norm is not None and usual == "bntt" else usual
    if norm is None:
        norm = "bntt" if neuron == "bntt" else "none"
    if (neuron == "bntt") != (norm == "bntt"):
        raise ValueError(f"norm 'bntt' and neuron 'bntt' are one kernel, got norm={norm!r} with neuron={neuron!r}")
    return neuron, norm


class SpikingLayer(nn.Module):
    """Weights, normalisation and neurons, pooling or dropout: `[T, B, ...]` spikes in, `[T, B, ...]` spikes out.

    `norm`: "bntt" (statistics and gain of every step, fused with the neuron), "shared" (one BatchNorm without bias over
    all steps), "none". `kind`: what spikes come in (see `ops.spike_conv2d`). `input_dropout`: with what probability
    they were dropped; the current is scaled for it. `forward(..., residual=current)` adds a current before the
    normalisation. For backward a layer keeps its current and 1 to 3 bits of each spike it read.
    """

    def __init__(
        self,
        layer: Layer,
        kind: str,
        *,
        neuron: str,
        norm: str,
        steps: int,
        leak: float,
        threshold: float,
        input_dropout: float = 0.0,
        seed: int = 0,
        **options,
    ):
        super().__init__()
        self.synapse = layer.spike_synapse(kind)
        self.input_dropout = input_dropout
        self.norm: nn.Module | None = None
        if norm == "shared":
            self.norm = (nn.BatchNorm2d if layer.convolution else nn.BatchNorm1d)(layer.outputs, eps=1e-4)
            self.norm.bias = None
        self.neuron = make_neuron(neuron, layer.outputs, steps, leak, threshold, **options)
        self.dropout = HeldDropout(layer.dropout, seed=seed) if layer.dropout else None
        self.pool = SpikeAvgPool2d(2) if layer.pooled else None

    def forward(self, spikes: Tensor, sample_ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        current = self.synapse(spikes)
        if self.training and self.input_dropout:
            current = current / (1 - self.input_dropout)
        if residual is not None:
            current = current + residual
        if self.norm is not None:
            current = every_step(self.norm, current)
        spikes = self.neuron(current)
        if self.dropout is not None:
            spikes = self.dropout(spikes, sample_ids)
        return spikes if self.pool is None else self.pool(spikes)


class EventInput(nn.Module):
    """Stands where the encoder does: frames of events `[T, B, C, H, W]` are what the first layer reads at each step."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def forward(self, events: Tensor, sample_ids: Tensor | None = None, *, steps: int | None = None) -> Tensor:
        most = self.steps if steps is None else steps
        if events.dim() != 5 or events.shape[0] < most:
            raise ValueError(
                f"a network with input='events' reads frames [T, B, C, H, W] of at least {most} steps, "
                f"got shape {tuple(events.shape)}; `pyaccel.data.bin_events` makes them of a recording"
            )
        return events[:most]

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class SpikingNetwork(nn.Module):
    """Spiking features and classifier behind a Poisson encoder, and a linear read-out without leak or spikes.

    `model(images, sample_ids=None, steps=None)` -> logits `[B, classes]`: the read-out's mean over time, or its sum in
    the networks of 2005.01807. `step_logits(...)` -> `[T, B, classes]`: the same after each step. `sample_ids` (int64
    `[B]`) make the random draws independent of the batch an image is in. With input="events" the network reads frames
    of event recordings, `[T, B, C, H, W]`, in place of images, and draws nothing.

    Args:
        input: "poisson" (images through the encoder) or "events"; `input_shape` is (C, H, W) in both.
        neuron: "bntt" (prompt LIF fused with BNTT), "lif" (prompt LIF), "delayed" (the neuron of 2005.01807, which
            fires on the membrane of the step before) or "stdb" (the delayed neuron with the spike-time surrogate); the
            last two hold their threshold in a buffer. None: the description's.
        norm: "bntt", "shared" or "none"; None: what goes with the neuron.
        steps, leak, gain, mean_readout, dropout: None: the description's (see `Form`).
        threshold: of every neuron.
        seed: of the encoder and of dropout.
        recompute_layers: in training a layer keeps only the spikes it reads, and computes the rest again in the backward
            pass: memory of one layer, a third more time.
        recompute_steps: in training the network keeps only its membranes after every so many time steps, and computes
            the steps between again: activations of so many steps, whatever T is. Not both.
        options: of the neuron (`reset`, `surrogate`, `alpha`, ...; see `nn.LIF`, `nn.STDBLIF`).
    """

    def __init__(
        self,
        description,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        steps: int | None = None,
        leak: float | None = None,
        threshold: float = 1.0,
        neuron: str | None = None,
        norm: str | None = None,
        gain: float | None = None,
        mean_readout: bool | None = None,
        dropout: tuple[float, float] | None = None,
        seed: int = 0,
        input: str = "poisson",
        recompute_layers: bool = False,
        recompute_steps: int | None = None,
        **options,
    ):
        super().__init__()
        if recompute_steps is not None and recompute_steps < 1:
            raise ValueError(f"recompute_steps must be at least 1, got {recompute_steps}")
        if recompute_layers and recompute_steps is not None:
            raise ValueError("recompute_layers and recompute_steps were both given; choose one")
        self.recompute_layers, self.recompute_steps = recompute_layers, recompute_steps
        if input not in INPUTS:
            raise ValueError(f"input of a spiking network must be one of {', '.join(INPUTS)}, got {input!r}")
        form: Form = description.form
        neuron, norm = neuron_and_norm(form.neuron, neuron, norm)
        steps = form.steps if steps is None else steps
        leak = form.leak if leak is None else leak

        def make(layer: Layer, kind: str, input_dropout: float = 0.0) -> SpikingLayer:
            return SpikingLayer(
                layer, kind, neuron=neuron, norm=norm, steps=steps, leak=leak, threshold=threshold,
                input_dropout=input_dropout, seed=seed, **options,
            )  # fmt: skip

        self.steps = steps
        self.mean_readout = form.mean_readout if mean_readout is None else mean_readout
        self.input_kind = "any" if input == "events" else "signed"  # of the values that the first layer reads
        if input == "events":
            self.encoder: nn.Module = EventInput(steps)
        else:
            self.encoder = PoissonEncoder(steps, form.gain if gain is None else gain, seed=seed)
        parts = self.hidden_layers(description, input_shape, dropout, make)
        features, classifier, outputs, self.readout_dropout = parts
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(*classifier)
        self.readout = nn.Linear(outputs, classes, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, HeldDropout):
                module.stream = zlib.crc32(name.encode())
        if form.neuron == "bntt":  # the official code's choice; BNTT is scale free
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.xavier_uniform_(module.weight, gain=2)
        else:
            start_artificial(self, form)

    def hidden_layers(
        self, description, input_shape: tuple[int, int, int], dropout, make: Callable[..., SpikingLayer]
    ) -> tuple[list[nn.Module], list[nn.Module], int, float]:
        """Features, classifier, how many values the read-out reads, and the probability that one was dropped."""
        raise NotImplementedError

    def flat(self, spikes: Tensor) -> Tensor:
        """`[T, B, C, H, W]` of the features as the classifier reads it."""
        return spikes.flatten(2)

    def spikes(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        """What the read-out reads, `[T, B, values]`: spikes of the last hidden layer."""
        again = self.recompute_layers and torch.is_grad_enabled()
        hidden = self.encoder(images, sample_ids, steps=steps)
        for layer in self.features:
            hidden = layer_by_layer(layer, hidden, sample_ids) if again else layer(hidden, sample_ids)
        hidden = self.flat(hidden)
        for layer in self.classifier:
            hidden = layer_by_layer(layer, hidden, sample_ids) if again else layer(hidden, sample_ids)
        if self.training and self.readout_dropout:
            hidden = hidden / (1 - self.readout_dropout)
        return hidden

    def forward(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        # Linear in the spikes, so their mean or sum over time may be taken first.
        if self.recompute_steps is not None and torch.is_grad_enabled():
            steps = self.steps if steps is None else steps
            total = piece_by_piece(
                self, self.encoder, lambda images, count: self.spikes(images, sample_ids, count).sum(0),
                images, steps, self.recompute_steps,
            )  # fmt: skip
            return self.readout(total / steps if self.mean_readout else total)
        spikes = self.spikes(images, sample_ids, steps)
        return self.readout(spikes.mean(0) if self.mean_readout else spikes.sum(0))

    def step_logits(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        spikes = self.spikes(images, sample_ids, steps)
        total = self.readout(spikes).cumsum(0)
        if not self.mean_readout:
            return total
        count = torch.arange(1, spikes.shape[0] + 1, device=spikes.device, dtype=spikes.dtype)
        return total / count[:, None, None]


class SpikingVgg(SpikingNetwork):
    """A VGG of spiking neurons (2010.01729, 2005.01807); see `SpikingNetwork`."""

    def hidden_layers(self, description: Vgg, input_shape, dropout, make):
        layers, outputs = description.layers(input_shape, dropout)
        kinds = [self.input_kind] + ["pooled" if layer.pooled else "binary" for layer in layers[:-1]]
        before = [0.0] + [layer.dropout for layer in layers]
        built = [make(*three) for three in zip(layers, kinds, before[:-1], strict=True)]
        split = sum(layer.convolution for layer in layers)
        return built[:split], built[split:], outputs, before[-1]
