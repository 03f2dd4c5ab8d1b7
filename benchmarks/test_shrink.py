"""Shrinking turns into time: a training step of VGG16 at the sizes that a pruning schedule goes through.

Uniform pruning by L1 of a linear ramp over the whole run to 80 % of the filters: epoch t of E keeps 1 - 0.8 t / E. The
network is pruned and shrunk to some of these sizes, with its optimizer; a step (forward, backward, SGD with momentum)
is timed at each. The run's share of the dense run's time is their mean over the ramp, by trapezoids, as is the share of
products. Goal: share of time <= share of products + 0.25. What the surgery itself takes is added, one an epoch of
E=100. Figures are CPU time of all threads; wall time is beside them.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from timing import measure

from pyaccel import models, surgery
from pyaccel.hardware import cost

pytestmark = pytest.mark.benchmark
RATE, BATCH, SHAPE = 0.8, 32, (3, 32, 32)
KEPT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
STEPS_AN_EPOCH, EPOCHS = 390, 100  # 50,000 images in batches of 128


def dense():
    torch.manual_seed(0)
    model = models.build("vgg16", classes=10, input_shape=SHAPE).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)


def step_of(model, optimizer, x, y):
    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def test_training_while_pruning(table, quick, device):
    x = torch.randn(BATCH, *SHAPE, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=device)
    jobs, macs, seconds = {}, {}, []
    for kept in KEPT if not quick else KEPT[::4]:
        model, optimizer = dense()
        model.to(device)
        step_of(model, optimizer, x, y)()  # momentum to carry
        start = time.perf_counter()
        masked, mask_optimizer = surgery.prune_filters(model, 1 - kept, optimizer=optimizer)
        shrunk, shrunk_optimizer = surgery.shrink(masked, mask_optimizer)
        seconds.append(time.perf_counter() - start)
        with torch.no_grad():
            assert (masked.eval()(x) - shrunk.eval()(x)).abs().max() < 1e-4
        shrunk.train()
        macs[kept] = cost(shrunk, SHAPE).convolutions().macs
        jobs[f"{kept:g}"] = step_of(shrunk, shrunk_optimizer, x, y)
    times = measure(jobs, 2 if quick else 7, device)
    whole = times["1"]
    for kept, count in macs.items():
        found = times[f"{kept:g}"]
        table.append({"kept": kept, "products of dense": count / macs[1.0], "step, s": found.cpu, "wall, s": found.wall,
                      "time of dense": found.cpu / whole.cpu, "wall of dense": found.wall / whole.wall})  # fmt: skip
    surgery_share = max(seconds) / (STEPS_AN_EPOCH * 4 * whole.wall)  # batches of 128: four of these
    products = over_ramp({kept: count / macs[1.0] for kept, count in macs.items()})
    spent = over_ramp({kept: times[f"{kept:g}"].cpu / whole.cpu for kept in macs})
    wall = over_ramp({kept: times[f"{kept:g}"].wall / whole.wall for kept in macs})
    table.append({"kept": "1 to 0.2", "products of dense": products, "time of dense": spent, "wall of dense": wall,
                  "surgery": surgery_share, "goal": products + 0.25,
                  "met": "yes" if spent + surgery_share <= products + 0.25 else "no"})  # fmt: skip


def over_ramp(values: dict[float, float]) -> float:
    """The mean of a quantity over kept = 1 .. 0.2, by trapezoids."""
    kept = sorted(values)
    areas = ((b - a) * (values[a] + values[b]) / 2 for a, b in zip(kept, kept[1:], strict=False))
    return sum(areas) / (kept[-1] - kept[0])
