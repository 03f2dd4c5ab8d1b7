"""Spiking networks that read frames of events in place of Poisson spikes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyaccel import models


def frames(steps=4, batch=3, most=3):
    return torch.randint(0, most + 1, (steps, batch, 2, 16, 16), generator=torch.Generator().manual_seed(0)).float()


def network(name="vgg5", **options):
    torch.manual_seed(0)
    options = dict(steps=4, width=0.1, classes=5, input_shape=(2, 16, 16), spiking=True) | options
    return models.build(name, input="events", **options)


@pytest.mark.parametrize("name", ["vgg5", "mlp", "resnet20", "vgg5_hybrid"])
def test_counts_reach_the_first_layer_as_they_are_and_gradients_its_weights(name):
    model, events = network(name, norm="bntt"), frames()
    first = next(m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    seen = []
    first.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    F.cross_entropy(model(events), torch.tensor([0, 1, 2])).backward()
    given, current = seen[0]
    assert given.max() == 3 and torch.equal(given.reshape(events.shape), events)
    if isinstance(first, torch.nn.Conv2d):
        geometry = dict(stride=first.stride, padding=first.padding)
        each = torch.stack([F.conv2d(step, first.weight, **geometry) for step in events])
        torch.testing.assert_close(current, each)
    assert first.weight.grad.abs().sum() > 0


def test_the_same_spikes_from_the_encoder_or_as_events_give_the_same_logits():
    images = torch.rand(3, 2, 16, 16)
    torch.manual_seed(0)
    poisson = models.build("vgg5", steps=4, width=0.1, classes=5, input_shape=(2, 16, 16), spiking=True).eval()
    events = network().eval()
    events.load_state_dict({k: v for k, v in poisson.state_dict().items() if k in events.state_dict()})
    spikes = poisson.encoder(images)
    assert torch.equal(poisson(images), events(spikes))
    assert torch.equal(poisson.step_logits(images), events.step_logits(spikes))


def test_nothing_is_drawn_and_fewer_steps_are_a_prefix():
    model, events = network().eval(), frames()
    assert torch.equal(model(events), model(events)) and not list(model.encoder.buffers())
    torch.testing.assert_close(model(events, steps=2), model.step_logits(events)[1])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="input of a spiking network must be one of poisson, events, got 'dvs'"):
        models.build("vgg5", classes=5, spiking=True, input="dvs")
    with pytest.raises(ValueError, match=r"frames \[T, B, C, H, W\] of at least 4 steps, got shape \(3, 2, 16, 16\)"):
        network()(frames()[0])
    with pytest.raises(ValueError, match=r"at least 4 steps, got shape \(3, "):
        network()(frames(steps=3))
