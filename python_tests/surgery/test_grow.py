"""Growth keeps the function, in evaluation and in training; what breaks it is shown to."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import RandomNet, images, live, optimizer_of, train
from torch import nn

from pyaccel import models
from pyaccel.surgery import deepen, widen
from pyaccel.surgery.channels import channel_map


def net(dtype=torch.float32, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)

    def layer(inputs, outputs):
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm),
            *([nn.BatchNorm2d(outputs)] if norm else []),
            nn.ReLU(),
        ]

    model = nn.Sequential(
        *layer(3, 8), nn.MaxPool2d(2), *layer(8, 12), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 4)
    )
    return live(model).to(dtype).eval()


def error(a: nn.Module, b: nn.Module, x, training: bool = False) -> float:
    """Largest difference relative to the largest output; statistics of both stay as they are."""
    a, b = (copy.deepcopy(m).train(training) for m in (a, b))
    with torch.no_grad():
        left, right = a(x), b(x)
    return float((left - right).abs().max() / left.abs().max())


def x_of(model: nn.Module, seed: int = 3, count: int = 32):
    return images(seed, count)[0].to(next(model.parameters()).dtype)


@pytest.mark.parametrize("split", ["uneven", "even"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype, evaluation, training", [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-11)])
def test_wider(dtype, evaluation, training, norm, split):
    model = net(dtype, norm)
    x = x_of(model)
    layers = [name for name, space in channel_map(model, "test").writes.items() if not space.root().frozen]
    assert len(layers) == 2
    for layer in layers:
        wider = widen(model, layer, 19, split=split, seed=4)
        assert error(model, wider, x) < evaluation and error(model, wider, x, training=True) < training


@pytest.mark.parametrize("dtype, evaluation, training", [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-12, 1e-9)])
@pytest.mark.parametrize("after", ["2", "0", "1", "6"])
def test_deeper(dtype, evaluation, training, after):
    model = net(dtype)
    x = x_of(model)
    deeper = deepen(model, after, calibration=x)
    assert error(model, deeper, x) < evaluation and error(model, deeper, x, training=True) < training
    assert error(net(dtype, norm=False), deepen(net(dtype, norm=False), "1"), x) == 0


def test_another_batch_differs_by_its_statistics_alone():
    model = net(torch.float64)
    deeper = deepen(model, "2", calibration=x_of(model, 1, 64))
    assert error(model, deeper, x_of(model, 2, 64)) < 1e-12
    assert 1e-6 < error(model, deeper, x_of(model, 2, 64), training=True) < 0.2


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_chains_of_five_on_random_networks(seed):
    choose = random.Random(seed)
    model = RandomNet(seed).double().eval()
    grown, x = model, x_of(model)
    names = set(model.state_dict())
    for _ in range(5):
        channels = channel_map(grown, "test")
        free = [name for name, space in channels.writes.items() if not space.root().frozen]
        relus = [
            n.target
            for n in channels.graph.nodes
            if n.op == "call_module" and type(grown.get_submodule(n.target)) is nn.ReLU
        ]
        if choose.random() < 0.6 and free:
            layer = choose.choice(free)
            grown = widen(grown, layer, channels.writes[layer].root().size + choose.randint(0, 5), seed=seed)
        elif relus:
            grown = deepen(grown, choose.choice(relus), calibration=x, kernel=choose.choice([1, 3, 5]))
    assert error(model, grown, x) < 1e-11
    assert error(model.float(), grown.float(), x.float()) < 1e-5
    assert names == set(model.state_dict())


def test_parameter_counts():
    model = net()
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    q = 11
    wider, deeper = widen(model, "0", q), deepen(model, "6", calibration=x_of(model))
    assert wider[0].weight.numel() == q * 3 * 9 and wider[4].weight.numel() == 12 * q * 9
    assert count(wider) - count(model) == 3 * (3 * 9 + 2 + 12 * 9)
    assert count(deeper) - count(model) == 12 * 12 * 9 + 2 * 12


def test_negative_controls():
    """No division; a tap beside the centre; a plain normalisation: each destroys the function where it should."""
    model = net()
    x = x_of(model)
    wider = widen(model, "0", 13, seed=1, split="even")
    undivided = copy.deepcopy(wider)
    with torch.no_grad():
        undivided[4].weight[:, :8] = model[4].weight
    assert error(model, undivided, x) > 1e-2
    shifted = deepen(model, "2", calibration=x)
    with torch.no_grad():
        tap = shifted[2][1].weight
        tap.copy_(tap.roll((1, 1), (2, 3)))
    assert error(model, shifted, x) > 1e-2
    plain = deepen(model, "2", calibration=x)
    plain[2][2].reset_parameters()
    assert error(model, plain, x) < 1e-4 < 1e-2 < error(model, plain, x, training=True)


def test_even_copies_are_tied_and_uneven_ones_are_not():
    model = net()
    for split, apart in (("even", False), ("uneven", True)):
        wider = widen(model, "0", 16, seed=2, split=split)
        x, y = images(1, 32)
        nn.functional.cross_entropy(wider.train()(x), y).backward()
        source = torch.tensor(
            [int((wider[0].weight[:8] == row).flatten(1).all(1).nonzero()[0]) for row in wider[0].weight]
        )
        once = (source.bincount(minlength=8) == 2).nonzero()[:, 0]
        for unit in once.tolist():
            first, second = (source == unit).nonzero()[:, 0].tolist()
            difference = (wider[0].weight.grad[first] - wider[0].weight.grad[second]).abs().max()
            size = wider[0].weight.grad[first].abs().max()
            assert (difference > 1e-3 * size) == apart and (apart or difference <= 1e-5 * size)
        assert len(once)


def test_copies_stay_tied_through_training_and_uneven_ones_part():
    """The rank of the widened layer: it does not grow with even shares, it does with uneven ones."""
    model, ranks = net(torch.float64), {}
    for split in ("even", "uneven"):
        wider = widen(model, "4", 24, split=split, seed=2)
        train(wider, optimizer_of(wider, "sgd"), 5)
        ranks[split] = int(torch.linalg.matrix_rank(wider[4].weight.detach().flatten(1), rtol=1e-9))
    assert ranks == {"even": 12, "uneven": 24}


def test_sums_share_one_mapping_and_concatenations_keep_their_places():
    model = live(models.build("resnet18", classes=4, input_shape=(3, 32, 32), width=0.1)).double().eval()
    wider = widen(model, "features.0", 17, seed=3)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    assert error(model, wider, x) < 1e-12
    assert [len(wider.get_submodule(n).weight) for n in ("features.0", "features.3.body.3", "features.4.body.3")] == [
        17
    ] * 3
    assert wider.features[5].body[0].in_channels == wider.features[5].shortcut[0].in_channels == 17


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimizer_comes_along(kind):
    model = net()
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, 2)
    wider, carried = widen(model, "0", 12, seed=1, optimizer=optimizer)
    key = "momentum_buffer" if kind == "sgd" else "exp_avg_sq"
    old, new = optimizer.state[model[0].weight][key], carried.state[wider[0].weight][key]
    assert torch.equal(new[:8], old) and all((row == old).flatten(1).all(1).any() for row in new[8:])
    assert carried.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] and type(carried) is type(optimizer)
    deeper, again = deepen(wider, "6", calibration=x_of(model), optimizer=carried)
    assert sum(len(g["params"]) for g in again.param_groups) == len(list(deeper.parameters()))
    assert torch.equal(again.state[deeper[0].weight][key], new) and deeper[6][1].weight not in again.state
    before = copy.deepcopy(deeper.state_dict())
    train(deeper, again, 1)
    assert all(not torch.equal(before[n], p) for n, p in deeper.named_parameters())
    assert optimizer.state[model[0].weight][key].shape[0] == 8


def test_what_cannot_grow_is_named():
    model = net()
    for call, message in (
        (lambda: widen(model, "9", 7), "cannot widen 9: its channels are fixed: they are the output of the model"),
        (lambda: widen(model, "1", 20), "no convolution or linear layer '1'; it has 0, 4, 9"),
        (lambda: widen(model, "0", 7), "has 8 outputs already, got width 7"),
        (lambda: widen(model, "0", 9, split="half"), "split must be uneven or even"),
        (lambda: deepen(model, "2"), "needs calibration="),
        (lambda: deepen(model, "2", kernel=2), "kernel must be odd"),
        (lambda: deepen(model, "x"), "no layer 'x'"),
        (lambda: deepen(model, "9", calibration=x_of(model)), "9 is not followed by a ReLU of its own but by output"),
        (lambda: deepen(model, "3", calibration=x_of(model)), "3 is not followed by a ReLU of its own but by 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Flatten(), nn.Linear(100, 4))
    with pytest.raises(ValueError, match="used more than once"):
        deepen(twice, "0")
    tanh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(196, 4))
    with pytest.raises(ValueError, match="not followed by a ReLU of its own but by 1"):
        deepen(tanh, "0")
    assert error(tanh.eval(), widen(tanh, "0", 9), images()[0]) < 1e-6
