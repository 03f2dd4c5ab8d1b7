"""Steps of VGG16 and ResNet34 at 224x224: forward, backward, and the memory that was counted before."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pyaccel import models
from pyaccel.data import Batch
from pyaccel.recipes.bntt import logits
from pyaccel.recipes.classifier import cross_entropy
from pyaccel.training.plan import step_memory

SIDE, CLASSES = 224, 1000


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def batch_of(size):
    images = torch.rand(size, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(size), torch.arange(size))


def allocator_peak(step):
    """The most bytes that torch's CPU allocator had given out at once during `step`, above what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def check(name, width, steps, size, unseen, **options):
    torch.manual_seed(0)
    model = models.build(
        name, classes=CLASSES, input_shape=(3, SIDE, SIDE), width=width, spiking=True, steps=steps, **options
    ).to(memory_format=torch.channels_last)
    loss_fn, batch, optimizer = cross_entropy(logits), batch_of(size), sgd(model)
    before = model.readout.weight.detach().clone()
    counted = step_memory(model, sgd, loss_fn, batch)
    losses = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model, batch)[0]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    step()
    optimizer.zero_grad(set_to_none=True)
    measured = allocator_peak(step) + counted.weights + counted.optimizer
    print(f"{name} width {width:g} T {steps} batch {size} {options}: counted {counted.peak / 2**20:.0f} MiB, allocated "
          f"{measured / 2**20:.0f} MiB, loss {losses}")
    assert all(0 < loss < 50 for loss in losses)
    dead = [n for n, p in model.named_parameters() if not (torch.isfinite(p.grad).all() and p.grad.any())]
    assert not dead
    assert not torch.equal(model.readout.weight, before)
    assert abs(counted.peak - measured) <= unseen * measured, (counted.peak, measured)


@pytest.mark.parametrize("name", ["vgg16", "resnet34"])
def test_a_narrow_network_at_full_size(name):
    check(name, 0.125, 2, 3, 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recompute_layers": True}], ids=["plain", "recompute_layers"])
@pytest.mark.parametrize("name", ["vgg16", "resnet34"])
def test_the_published_width(name, options):
    check(name, 1.0, 2, 4, 0.15, **options)
