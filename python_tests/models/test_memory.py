"""What a spiking network keeps for backward: bytes of saved tensors a neuron and step."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pyaccel import models
from pyaccel.nn import BNTTLIF, LIF, STDBLIF


def saved_bytes(model, run, dtype: torch.dtype | None = None) -> float:
    """Bytes kept for backward by `run()`, parameters and tensors of a parameter's shape aside, a neuron and step."""
    kept: dict[int, tuple[int, object]] = {}
    ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored and tensor.shape not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: so that no address is used twice
        return tensor

    neurons = []
    handles = [
        m.register_forward_hook(lambda m, a, s: neurons.append(s.numel()))
        for m in model.modules()
        if isinstance(m, (BNTTLIF, LIF, STDBLIF))
    ]
    cast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        run().sum().backward()
    for handle in handles:
        handle.remove()
    return sum(size for size, _ in kept.values()) / sum(neurons)


@pytest.mark.parametrize("dtype, limit", [(None, 4.2), (torch.bfloat16, 2.2)])
def test_convolution_bntt_and_neuron_keep_current_and_bits(dtype, limit):
    model = models.build("vgg9_bntt", classes=10, width=0.25, steps=4)
    layer = model.features[1]  # 16 to 16 channels, spikes in
    spikes = (torch.rand(4, 8, 16, 32, 32) > 0.8).float()
    found = saved_bytes(layer, lambda: layer(spikes), dtype)
    assert (4.0 if dtype is None else 2.0) < found <= limit


@pytest.mark.parametrize(
    "name, options, dtype, limit",
    [
        ("vgg9_bntt", {}, None, 4.2),
        ("vgg9_bntt", {}, torch.bfloat16, 2.2),
        ("vgg9_bntt", {"neuron": "lif"}, None, 4.2),
        ("resnet18", {}, None, 4.2),
        ("resnet20", {"threshold": 0.3}, None, 0.5),
    ],
    ids=["vgg float32", "vgg bfloat16", "vgg without normalisation", "resnet", "stdb resnet"],
)
def test_whole_networks_keep_little(name, options, dtype, limit):
    torch.manual_seed(0)
    model = models.build(name, classes=10, width=0.25, steps=4, spiking=True, **options)
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    assert saved_bytes(model, lambda: model(x), dtype) <= limit


def test_measure_sees_what_a_plain_layer_keeps():
    layer = models.build("vgg9_bntt", classes=10, width=0.25, steps=4).features[1]
    plain = torch.nn.Sequential(layer.synapse, layer.neuron)
    layer.synapse.__class__ = torch.nn.Conv2d
    spikes = (torch.rand(4, 8, 16, 32, 32) > 0.8).float()

    def run():
        return plain[1](plain[0](spikes.flatten(0, 1)).unflatten(0, (4, 8)))

    assert saved_bytes(plain, run) >= 8.0  # the current and the spikes, 4 bytes each
