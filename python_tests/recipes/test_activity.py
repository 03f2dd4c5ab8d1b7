from __future__ import annotations

import pytest
import torch

from pyaccel import models
from pyaccel.models.vgg import Vgg
from pyaccel.recipes.activity import Activity

STEPS = 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = models.SpikingVgg(Vgg((4, "A", 5), (7,), ""), input_shape=(2, 6, 6), classes=3, steps=STEPS, gain=1.0)
    return net.eval()


def test_counts_equal_those_of_the_tensors(model):
    images = torch.rand(3, 2, 6, 6) - 0.5
    with torch.inference_mode(), Activity(model) as activity:
        model.step_logits(images[:2], torch.arange(2))
        model.step_logits(images[2:], torch.arange(2, 3))
    layers = activity.layers()
    assert [layer.name for layer in layers] == ["features.0", "features.1", "classifier.0", "readout"]
    assert [layer.macs for layer in layers] == [9 * 2 * 4 * 36, 9 * 4 * 5 * 9, 45 * 7, 7 * 3]
    assert [layer.inputs for layer in layers] == [72, 36, 45, 7]
    assert [layer.neurons for layer in layers] == [144, 45, 7, 0]

    coded = model.encoder(images, torch.arange(3))
    assert (coded < 0).any(), "the negative control needs negative spikes"
    assert layers[0].events == pytest.approx(float(coded.abs().sum()) / 3)
    with torch.inference_mode():
        first = model.features[0]
        pooled = first(coded)
        fired = first.neuron(first.synapse(coded))
    assert layers[0].spikes == pytest.approx(float(fired.sum()) / 3) and fired.sum() > 0
    assert layers[0].rate == pytest.approx(float(fired.mean()) * STEPS)
    assert layers[1].events == pytest.approx(float((pooled != 0).sum()) / 3)  # a pooled quarter is one event
    assert layers[1].events != pytest.approx(float(pooled.sum()) / 3)
    assert layers[1].incoming_rate == pytest.approx(float((pooled != 0).float().mean()) * STEPS)
    assert layers[3].events == layers[2].spikes


def test_hooks_are_gone_afterwards_and_nothing_is_an_error(model):
    with Activity(model) as activity:
        pass
    model.step_logits(torch.rand(1, 2, 6, 6))
    with pytest.raises(ValueError, match="no image has run"):
        activity.layers()
