"""Counted memory of a step against what torch's allocator saw, and the plan made of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pyaccel import models, recipes
from pyaccel.cli import main
from pyaccel.data import Batch
from pyaccel.recipes import classifier, planning
from pyaccel.recipes.bntt import logits
from pyaccel.recipes.classifier import cross_entropy
from pyaccel.recipes.planning import LINE, Line
from pyaccel.training.plan import LiveBytes, measure_step, step_memory


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def batch_of(size, shape):
    return Batch(torch.rand(size, *shape), torch.zeros(size, dtype=torch.int64), torch.arange(size))


def allocator_peak(model, loss_fn, batch):
    """The peak of torch's CPU allocator over a second step, above what there was before it."""
    optimizer = sgd(model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, batch)[0].backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Convolutions may copy tensors to layouts of their own inside the library, unseen: where many layers are of the largest
# size, as at the start of a residual network, three such copies are a quarter of the peak.
@pytest.mark.parametrize(("name", "options", "unseen"), [
    ("vgg5", dict(spiking=True, steps=6), 0.15),
    ("vgg5", dict(spiking=True, steps=6, norm="shared"), 0.15),
    ("vgg5", dict(spiking=False), 0.15),
    ("resnet20", dict(spiking=True, steps=3), 0.3),
])  # fmt: skip
def test_counted_bytes_are_what_the_allocator_gives_out(name, options, unseen):
    shape = (3, 32, 32)
    model = models.build(name, classes=10, input_shape=shape, width=0.5, **options)
    model = model.to(memory_format=torch.channels_last)  # as recipes do
    loss_fn, batch = cross_entropy(logits if options["spiking"] else classifier.logits), batch_of(16, shape)
    counted = step_memory(model, sgd, loss_fn, batch)
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    fixed = sum(tensor.numel() * tensor.element_size() for tensor in batch)
    assert counted.weights == weights + fixed
    assert counted.gradients == counted.optimizer == sum(p.numel() * p.element_size() for p in model.parameters())
    measured = allocator_peak(model, loss_fn, batch) + counted.weights + counted.optimizer
    assert abs(counted.peak - measured) <= unseen * measured, (counted.peak, measured)


def test_the_model_and_the_batch_are_not_touched():
    model = models.build("mlp", classes=10, input_shape=(1, 8, 8), spiking=True, steps=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step_memory(model, sgd, cross_entropy(logits), batch_of(4, (1, 8, 8)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_more_of_a_batch_needs_more():
    model = models.build("vgg5", classes=10, spiking=True, steps=4, width=0.25)
    small, large = (step_memory(model, sgd, cross_entropy(logits), batch_of(n, (3, 32, 32))) for n in (8, 16))
    assert large.weights - small.weights == 8 * (3 * 32 * 32 * 4 + 16)
    assert 1.8 < large.activations / small.activations < 2.1


def test_live_bytes_come_and_go():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        assert live.now == 8000
        del a
        assert live.now == 4000 and live.peak == 8000
        del b
        assert live.now == 0


def test_a_line_of_two_measurements():
    line = Line((10, 200.0), (20, 300.0))
    assert line.at(40) == 500.0 and line.reaches(1000.0) == 90 and line.reaches(50.0) == 0
    assert Line((10, 2.0), (20, 1.0)).at(50) == 1.0
    with pytest.raises(ValueError, match="batches of 10 and 20 need the same; plan a larger batch"):
        Line((10, 2.0), (20, 1.0)).reaches(5.0)


def test_plan_of_a_recipe(capsys, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    arguments = ["bntt", "--preset", "desk", "--width", "0.1", "--steps", "3", "--norms", "[bntt]"]
    assert main(["plan", *arguments, "--count-only", "--memory", "2"]) == 0
    header, rule, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["bntt", "64"] and cells[6:9] == ["-", "-", "-"] and cells[9].endswith(" in 2.0 GiB")
    assert int(cells[9].split()[0]) > 64
    assert main(["plan", *arguments, "--at", "4", "--network", "bntt"]) == 0
    found = json.loads(capsys.readouterr().out.removeprefix(LINE))
    assert found["bytes"] > 2**20 and found["seconds"] > 0
    assert main(["plan"]) == 2 and "plan: expected the name of a recipe first" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
def test_every_recipe_says_what_it_trains(recipe):
    """Each network that `pyaccel plan` counts is one whose training step runs, with its own loss and optimizer."""
    module = recipes.find(recipe).load()
    config = module.preset("smoke")
    images = planning.training_set(config, recipe, module)
    found = planning.networks_of(recipe, module, config, images)
    assert found
    for name, network in found.items():
        plan = step_memory(network.build(), planning.optimizer_of(config, network), network.loss, planning.batch_of(images, 6))
        assert plan.weights > 0 and plan.activations > 0, name
        taken, seconds = measure_step(network.build(), planning.optimizer_of(config, network), network.loss,
                                      planning.batch_of(images, 6), steps=2)  # fmt: skip
        assert taken > plan.peak and seconds > 0, name


def test_a_batch_that_does_not_run_is_planned_from_smaller_ones(monkeypatch):
    asked = []

    def measure(arguments):
        size = int(arguments[-1])
        asked.append(size)
        if size > 40:
            raise ValueError("plan: a measuring process failed: out of memory")
        return {"bytes": 100 + 10 * size, "seconds": 0.5 * size}

    monkeypatch.setattr(planning, "measure_apart", measure)
    memory, time = planning.measured_lines(["bntt"], 64)
    assert asked == [32, 64, 16, 32] and memory.at(64) == 740 and time.at(64) == 32
    memory, _ = planning.measured_lines(["bntt"], 24)
    assert asked[4:] == [12, 24] and memory.reaches(1100) == 100
    with pytest.raises(ValueError, match="out of memory"):
        planning.measured_lines(["bntt"], 1000)


def test_double_precision_and_other_modules_are_counted_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    loss = lambda model, batch: (model(batch.images.double()).square().mean(), {})  # noqa: E731
    assert step_memory(model, sgd, loss, batch_of(2, (3, 2, 2))).gradients == 8 * 65
