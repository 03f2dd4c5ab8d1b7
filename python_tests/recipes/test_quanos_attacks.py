"""White-box attacks on quantised networks, and the controls for masked gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyaccel import surgery
from pyaccel.data import Batch
from pyaccel.recipes.quanos_attacks import accuracy_on, adversarial_loss, craft, fgsm, noise, pgd, unclipped


@pytest.fixture
def quantised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    model = surgery.quantize(model, 4)
    x = torch.rand(60, 1, 8, 8)
    for _ in range(3):
        model(x)
    return model.eval(), x, torch.arange(60) % 3


def gradient(model, x, y):
    leaf = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), y).backward()
    return leaf.grad


def test_the_true_gradient_is_zero_and_the_straight_through_one_is_not(quantised):
    """A step that leaves every code of the input as it is changes nothing: all that "noise" claims."""
    model, x, y = quantised
    scale = model[0].activation_max / 15
    middle = ((x / scale).round() * scale).clamp(0, 1)  # codes are furthest from their borders
    with torch.no_grad():
        assert torch.equal(model(middle + 0.3 * scale), model(middle))
    assert (gradient(model, x, y) != 0).float().mean() > 0.9


def test_unclipped_changes_no_value_and_only_gradients_of_clipped_inputs(quantised):
    model, x, y = quantised
    model[0].activation_max.fill_(0.5)  # half of the pixels lie beyond the range
    plain = gradient(model, x, y)
    with unclipped(model), torch.no_grad():
        assert torch.equal(model(x), surgery.quantize(model, 4).eval()(x))
    with unclipped(model):
        free = gradient(model, x, y)
    beyond = x > 0.5 * (1 + 1e-5)
    assert (plain[beyond] == 0).all() and (free[beyond] != 0).float().mean() > 0.9
    assert torch.equal(plain, gradient(model, x, y))  # the hooks are gone


def test_attacks_stay_in_their_ball_and_do_harm(quantised):
    model, x, y = quantised
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(40):  # fit noise: any attack shows
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    batches = list(zip(x.split(25), y.split(25), strict=True))
    clean = accuracy_on(model, [b for b, _ in batches], batches)
    reached = {}
    for name, attack in (("fgsm", fgsm(0.1)), ("pgd", pgd(0.1, 5)), ("noise", noise(0.1))):
        moved = craft(attack, model.train(), batches)
        assert model.training
        for ours, (given, _) in zip(moved, batches, strict=True):
            assert (ours - given).abs().max() <= 0.1 + 1e-6 and ours.min() >= 0 and ours.max() <= 1
        reached[name] = accuracy_on(model, moved, batches)
    assert clean > 0.9 and reached["pgd"] <= reached["fgsm"] < reached["noise"] - 0.2


def test_a_zero_gradient_is_named_and_not_counted_as_an_attack(quantised):
    model, x, y = quantised
    with torch.no_grad():
        model[1].bias.fill_(-100)  # every unit dead
    with pytest.warns(RuntimeWarning, match="the gradient of 2 of 2 batches is exactly zero"):
        moved = craft(fgsm(0.1), model, [(x[:30], y[:30]), (x[30:], y[30:])])
    assert torch.equal(torch.cat(moved), x)
    with pytest.raises(ValueError, match="x must lie in"):
        craft(fgsm(0.1), model, [(x + 1, y)])


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_adversarial_training_attacks_half_of_each_batch(quantised, kind):
    model, x, y = quantised
    model.train()
    seen = []
    model[0].register_forward_pre_hook(lambda m, i: seen.append((m.training, i[0].detach().clone())))
    batch = Batch(x, y, torch.arange(60))
    torch.manual_seed(7)
    loss, metrics = adversarial_loss(kind, 0.1, 3)(model, batch)
    used = [images for training, images in seen if training]
    assert len(used) == 1 and model.training and 0 <= metrics["accuracy"] <= 1
    moved = (used[0] - x).abs().flatten(1).amax(1)
    assert (moved[30:] == 0).all() and (moved[:30] > 0.05).all() and moved.max() <= 0.1 + 1e-6
    loss.backward()
    assert (model[0].weight.grad != 0).any()
    seen.clear()
    torch.manual_seed(7)
    adversarial_loss(kind, 0.1, 3)(model.train(), batch)
    # activation ranges have moved on by one batch, the starting points have not
    assert torch.equal([i for t, i in seen if t][0][30:], used[0][30:])
