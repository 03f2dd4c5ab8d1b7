"""The arithmetic of benchmarks/scaling.py: what it counts, and what more processes cost."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pyaccel import models
from pyaccel.hardware import cost


@pytest.fixture(scope="module")
def scaling():
    file = Path(__file__).parent.parent / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("scaling", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


@pytest.mark.parametrize("name", ["vgg16", "resnet34"])
def test_work_is_what_the_cost_model_counts(scaling, name):
    options = dict(classes=10, input_shape=scaling.SHAPE, width=0.05)
    spiking = models.build(name, spiking=True, steps=2, **options)
    work, whole = scaling.work_of(spiking), cost(models.build(name, spiking=False, **options), scaling.SHAPE)
    assert work.macs == whole.macs - spiking.readout.weight.numel()
    assert work.neurons == sum(layer.outputs for layer in whole.layers if "shortcut" not in layer.name) - 10
    assert work.parameters == sum(p.numel() for p in spiking.parameters())


def test_rings(scaling):
    machine = replace(scaling.Machine(), start=0.0, hop=0.0)
    assert scaling.all_reduce(3e11, 1, machine) == 0.0
    assert scaling.all_reduce(3e11, 8, machine) == pytest.approx(2 * 7 / 8)  # 300 GB/s
    assert scaling.all_reduce(3e11, 16, machine) == pytest.approx(2 * 7 / 8 + 2 * 1 / 2 * 3e11 / 8 / 4e10)


def test_a_row(scaling):
    work = scaling.Work(((10**9, 10**6),), 10**6, (64,), 25_000_000)
    machine = scaling.Machine()
    alone, many = (scaling.row(work, 2e-3, n, 32, 25, False, machine) for n in (1, 64))
    assert alone.step == alone.compute == 0.064 and alone.communication == 0.0
    assert 0 < many.communication < 0.01 and many.images_per_second > 63 * alone.images_per_second
    slow = scaling.row(work, 2e-3, 512, 1, 25, True, machine)  # the processors' agreement takes longer than a step
    assert slow.step == slow.agreement and slow.communication > 0.9
    assert alone.hours(90, replace(machine, gpu_hours=1e15)) == pytest.approx(90 * scaling.IMAGES * 2e-3 / 3600)
    assert slow.hours(90, replace(machine, gpu_hours=100.0)) > slow.hours(90, machine)
