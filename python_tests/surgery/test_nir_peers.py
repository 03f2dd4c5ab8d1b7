"""NIR graphs between this library and others: the same spikes for the same input, where the neurons are the same.

Weights, inputs and leaks are multiples of small powers of two and thresholds are none, so that every tool's arithmetic
is exact in float32, whatever its order, and no membrane ever lies on the threshold (where `>` and `>=` would differ).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyaccel.nn import IF, LIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.surgery import from_nir, to_nir

pytest.importorskip("nir")
pytest.importorskip("nirtorch")
THRESHOLD = 1 + 2**-18
STEPS = 12


def exact(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-8, 9, layer.weight.shape) / 8)
        if layer.bias is not None:
            layer.bias.copy_(torch.randint(0, 3, layer.bias.shape) / 8)
    return layer


def alive(spikes):
    return 0.02 < float(spikes.mean()) < 0.98


@pytest.fixture(autouse=True, params=range(3))
def seed(request):
    torch.manual_seed(request.param)


def binary(*shape):
    return (torch.rand(STEPS, 4, *shape) < 0.5).float()


def ours(leak=0.5):
    return nn.Sequential(exact(SpikeLinear(20, 30)), LIF(leak, THRESHOLD, reset="hard"),
                         exact(SpikeLinear(30, 10, bias=False)), LIF(leak, THRESHOLD, reset="hard"))  # fmt: skip


def ours_on_images(kind=LIF):
    neuron = IF(THRESHOLD, reset="hard") if kind is IF else LIF(0.5, THRESHOLD, reset="hard")
    return nn.Sequential(exact(SpikeConv2d(2, 6, 3, padding=1)), neuron, SpikeAvgPool2d(2), nn.Flatten(2),
                         exact(SpikeLinear(96, 10, bias=False, kind="pooled")),
                         LIF(0.5, THRESHOLD, reset="hard"))  # fmt: skip


def stepwise(model, sequence):
    """A peer's graph module, one step a call, with the state that it hands out."""
    state, found = None, []
    for step in sequence:
        out, state = model(step, state)
        found.append(out[0] if isinstance(out, tuple) else out)
    return torch.stack(found)


def test_to_snntorch():
    peer = pytest.importorskip("snntorch.import_nir")
    model, given = ours(), binary(20)
    expected = model(given)
    found = stepwise(peer.import_from_nir(to_nir(model, (20,))), given)
    assert alive(expected) and torch.equal(found.float(), expected)


@pytest.mark.parametrize("leak", [0.5, 0.75])
def test_from_snntorch(leak):
    snn = pytest.importorskip("snntorch")
    peer = pytest.importorskip("snntorch.export_nir")

    def leaky(n):  # its export needs a value for each neuron
        leaks, thresholds = torch.full((n,), leak), torch.full((n,), THRESHOLD)
        return snn.Leaky(leaks, thresholds, init_hidden=True, reset_mechanism="zero", reset_delay=False)

    model = nn.Sequential(exact(nn.Linear(20, 30)), leaky(30), exact(nn.Linear(30, 10)), leaky(10))
    given = binary(20)
    graph = peer.export_to_nir(model, given[0], ignore_dims=[0])
    for module in model:
        if isinstance(module, snn.Leaky):
            module.reset_mem()
    expected = torch.stack([model(step) for step in given])
    assert alive(expected) and torch.equal(from_nir(graph)(given), expected)


@pytest.mark.parametrize("kind", [LIF, IF])
def test_to_spikingjelly(kind):
    peer = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    model, given = ours_on_images(kind), binary(2, 8, 8)
    expected = model(given)
    assert alive(expected) and torch.equal(stepwise(peer.import_from_nir(to_nir(model, (2, 8, 8))), given), expected)


@pytest.mark.parametrize("decay_input", [False, True])
def test_from_spikingjelly(decay_input):
    peer = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    from spikingjelly.activation_based import functional, layer, neuron

    lif = neuron.LIFNode(tau=2.0, decay_input=decay_input, v_threshold=THRESHOLD, v_reset=0.0)
    model = nn.Sequential(exact(layer.Conv2d(2, 6, 3, padding=1)), lif, layer.AvgPool2d(2, 2), layer.Flatten(),
                          exact(layer.Linear(96, 10)), neuron.IFNode(v_threshold=THRESHOLD, v_reset=0.0))  # fmt: skip
    given = binary(2, 8, 8)
    graph = peer.export_to_nir(model, given[0])
    functional.reset_net(model)
    expected = torch.stack([model(step) for step in given])
    assert alive(expected) and torch.equal(from_nir(graph)(given), expected)


def test_spikes_differ_where_the_neurons_do():
    """The control: read with another dt, which is another leak, the same graph gives other spikes."""
    model, given = ours(), binary(20)
    assert not torch.equal(from_nir(to_nir(model, (20,)), dt=0.5e-4)(given), model(given))
    soft = nn.Sequential(model[0], LIF(0.5, THRESHOLD), model[2], LIF(0.5, THRESHOLD))
    assert not torch.equal(soft(given), model(given))
