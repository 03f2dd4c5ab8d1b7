"""`nn.BNTTLIF(synchronise=...)`: two processes with half a batch each are one process with the whole, and say little to each other."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sync_bntt_rank import CHANNELS, STEPS, train
from torch import nn as torch_nn

from pyaccel import models, nn

RANK = (Path(__file__).parent / "sync_bntt_rank.py").read_text()


@pytest.fixture(scope="module")
def alone():
    return train(slice(None), [], nn.convert_sync_bntt)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, run_python):
    folder = str(tmp_path_factory.mktemp("ranks"))
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda rank: run_python(RANK, FOLDER=folder, RANK=str(rank)), range(2)))
    for done in runs:
        assert done.returncode == 0, done.stderr
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("how", ["default", "group"])
def test_two_processes_are_one(alone, ranks, how):
    parts = [results[how] for results in ranks]

    def same(got, wanted):
        assert (got - wanted).abs().max() <= 1e-10 * max(1.0, float(wanted.abs().max()))

    for step in range(2):
        assert torch.equal(torch.cat([p["spikes"][step] for p in parts], 1), alone["spikes"][step])
        assert 0.05 < alone["spikes"][step].mean() < 0.95
    assert torch.equal(torch.cat([p["inference"] for p in parts], 1), alone["inference"])
    same(torch.cat([p["grad"] for p in parts], 1), alone["grad"])
    for k, wanted in enumerate(alone["parameters"]):
        assert wanted.any()
        same(sum(p["parameters"][k] for p in parts), wanted)
    for k, wanted in enumerate(alone["buffers"]):
        for p in parts:  # unbiased by the number of all values
            same(p["buffers"][k], wanted)
    # One collective a layer and direction: forward of both layers, backward of both, twice.
    forward, backward = ((3, STEPS, CHANNELS), "torch.float64"), ((2, STEPS, CHANNELS), "torch.float64")
    assert all(p["calls"] == 2 * [forward, forward, backward, backward] for p in parts)


def test_apart_they_are_not_one(alone, ranks):
    """Negative control."""
    parts = [results["apart"] for results in ranks]
    assert not torch.equal(torch.cat([p["spikes"][0] for p in parts], 1), alone["spikes"][0])
    assert all(p["calls"] == [] for p in parts)


def test_without_processes_nothing_changes():
    x, results = torch.randn(5, 4, 3, 6), []
    for synchronise in (False, True):
        module, y = nn.BNTTLIF(3, 5, synchronise=synchronise), x.clone().requires_grad_()
        module(y).sum().backward()
        results.append((y.grad, module.running_var))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_model_is_converted_in_place():
    model = torch_nn.Sequential(nn.LIF(), torch_nn.Sequential(nn.BNTTLIF(3, 5)), nn.BNTTLIF(3, 5))
    before = copy.deepcopy(model.state_dict())
    assert nn.convert_sync_bntt(model) is model and model[2].synchronise is True and model[1][0].synchronise is True
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert repr(model[2]).endswith("synchronised)") and copy.deepcopy(model)[2].synchronise is True


def test_models_take_it_as_an_option():
    made = models.build("vgg9_bntt", classes=10, spiking=True, steps=3, synchronise=True)
    layers = [m for m in made.modules() if isinstance(m, nn.BNTTLIF)]
    assert layers and all(m.synchronise is True for m in layers)
