"""Networks as modules: copies, pickles, state dicts, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from pyaccel import models

SMALL = dict(classes=4, width=0.1, input_shape=(3, 16, 16))
NETWORKS = {
    "vgg, bntt": ("vgg5", dict(spiking=True, steps=4)),
    "vgg, lif": ("vgg5", dict(spiking=True, steps=4, neuron="lif")),
    "vgg, stdb": ("vgg5_hybrid", dict(spiking=True, steps=8, threshold=0.02)),
    "vgg, delayed": ("vgg5_robust", dict(spiking=True, steps=8, threshold=0.02)),
    "vgg, shared": ("vgg5", dict(spiking=True, steps=4, norm="shared")),
    "resnet, bntt": ("resnet18", dict(spiking=True, steps=4)),
    "resnet, stdb": ("resnet12", dict(spiking=True, steps=10, threshold=0.02)),
    "vgg": ("vgg16_hybrid", dict(spiking=False)),
    "resnet": ("resnet50", dict(spiking=False)),
}


def build(network: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    name, options = NETWORKS[network]
    return models.build(name, **(SMALL | options))


def run(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(2)  # of the artificial networks' dropout
    return model(images())


def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def trained(network: str) -> nn.Module:
    """After one step: running statistics and passes differ from a fresh network's."""
    model = build(network)
    model(images()).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize("network", NETWORKS)
def test_copies_and_pickles_compute_the_same(network):
    model = trained(network)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    expected = run(model)  # in training: the next pass, with its own draws
    assert expected.std() > 0
    for other in copies:
        assert torch.equal(run(other), expected)
        assert not any(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(run(copies[0].eval()), run(model.eval()))


@pytest.mark.parametrize("network", NETWORKS)
def test_state_dict_makes_the_same_network(network, tmp_path):
    model, other = trained(network), build(network, seed=1)
    assert not torch.equal(run(model), run(other))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(run(model), run(other))
    assert torch.equal(run(model.eval()), run(other.eval()))


def test_thresholds_travel_with_the_state_dict():
    model, other = build("vgg, stdb"), build("vgg, stdb")
    for i, layer in enumerate((*model.features, *model.classifier)):
        layer.neuron.threshold.fill_(0.01 * (i + 1))
    other.load_state_dict(model.state_dict())
    assert [float(m.neuron.threshold) for m in (*other.features, *other.classifier)] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert torch.equal(other.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize(
    "network", ["vgg, bntt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg, lif", "resnet, bntt"))]
)
def test_compiles_as_one_graph(network):
    model, compiled = build(network), build(network)
    whole = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second pass draws other spikes from the same graph
        expected, found = model(images()), whole(images())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.square().sum().backward()
        found.square().sum().backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert int(compiled.encoder.passes) == 2


@pytest.mark.slow
def test_compiles_with_inductor():
    model, compiled = build("vgg, bntt"), build("vgg, bntt")
    found = torch.compile(compiled, fullgraph=True)(images())
    torch.testing.assert_close(found, model(images()), rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())


@pytest.mark.parametrize("network", ["vgg, bntt", "resnet, stdb"])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_computes_the_same(network, training):
    model, other = (build(network).double().train(training) for _ in range(2))
    other = other.to(memory_format=torch.channels_last)
    expected = model(images().double())
    found = other(images().double().contiguous(memory_format=torch.channels_last))
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
