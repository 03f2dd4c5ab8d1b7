"""Tasks one after another: the published ranks, growth and sizes to the digit, and logits that stay bit-equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cacl_tables import ADDED, ALLOCATED
from torch import nn

from pyaccel import models
from pyaccel.hardware import cost
from pyaccel.models import ContinualNet, factor_parameters
from pyaccel.nn import grown_spare, orthogonality
from pyaccel.surgery import factorize, merge_factors

FULL = (18, 57, 104, 115, 170)
SHAPES = [(27, 64), (576, 64), (576, 128), (1152, 128), (512, 256)]


def published(classes=(5,) * 20, side=32):
    net = models.build("cacl_net", classes=5, input_shape=(3, side, side))
    return ContinualNet(factorize(net.features), classes, net.readout.in_features)


def cumulative(table):
    rows, total = [], [0] * 5
    for added in table:
        total = [a + b for a, b in zip(total, added, strict=True)]
        rows.append(total)
    return rows


def heads(net):
    return sum(p.numel() for p in net.heads.parameters())


def test_ranks_features_and_head_of_the_published_network():
    for side, values in ((32, 1024), (84, 16384)):
        net = published(side=side)
        assert [layer.full_rank for layer in net.layers] == list(FULL)
        assert [(layer.columns, layer.out_channels) for layer in net.layers] == SHAPES
        assert net.heads[0].in_features == values and heads(net) == {32: 102_500, 84: 1_638_500}[side]
    assert factor_parameters(FULL, SHAPES) == 389_558
    assert cost(models.build("cacl_net", classes=5), (3, 32, 32)).convolutions().parameters == 390_848


@pytest.mark.parametrize("table, classes, side, convolutions, megabytes", [
    ("cifar100_01", (5,) * 20, 32, 2_031_166, 8.534664),
    ("mini_imagenet_01", (5,) * 20, 84, 1_619_736, 13.032944),
    ("five_sets", (10,) * 5, 32, 321_026, 1.489104),
    ("cifar100_04", (5,) * 20, 32, 547_115, 2.598460),
    ("mini_imagenet_04", (5,) * 20, 84, 350_059, 7.954236),
])  # fmt: skip
def test_released_sizes_to_the_digit(table, classes, side, convolutions, megabytes):
    net = published(classes, side)
    found = net.factor_parameters(cumulative(ADDED[table])[-1])
    assert found == convolutions
    assert 4 * (found + heads(net)) == round(megabytes * 1e6)


@pytest.mark.parametrize(
    "classes, side, megabytes", [((5,) * 20, 32, 31.73), ((5,) * 20, 84, 37.87), ((10,) * 5, 32, 8.03)]
)
def test_size_of_individual_networks(classes, side, megabytes):
    net = models.build("cacl_net", classes=classes[0], input_shape=(3, side, side))
    # The published baseline has biases in its convolutions.
    own = sum(p.numel() for p in net.parameters()) + sum(outputs for _, outputs in SHAPES)
    assert round(4e-6 * len(classes) * own, 2) == megabytes


@pytest.mark.parametrize("name, ranks", [
    ("cifar100_01", {1: (9, 22, 30, 27, 22), 5: (33, 85, 109, 114, 120), 10: (78, 224, 249, 246, 254), 20: (181, 519,
    546, 597, 692)}), ("cifar100_04", {1: (5, 11, 12, 11, 8), 15: (72, 155, 99, 126, 75), 20: (100, 234, 125, 171,
    105)}), ("mini_imagenet_01", {5: (22, 57, 71, 75, 116), 15: (96, 289, 266, 271, 443), 20: (138, 422, 420, 413,
    665)}), ("mini_imagenet_04", {1: (4, 5, 9, 11, 13), 10: (28, 47, 43, 37, 79), 20: (66, 135, 86, 63, 151)}),
])  # fmt: skip
def test_growth_reproduces_the_released_tables(name, ranks):
    """Every task found room for what it added, and the slots at the end are the released ones."""
    rows, slots = cumulative(ADDED[name]), list(FULL)
    for task, row in ranks.items():
        assert tuple(rows[task - 1]) == row
    for t, row in enumerate(rows):
        for layer in range(5):
            spare = slots[layer] - row[layer]
            assert spare >= 0
            slots[layer] = row[layer] + grown_spare(spare, [r[layer] for r in rows[:t]], FULL[layer])
    assert tuple(slots) == ALLOCATED[name]
    pressed = cumulative(ADDED[name.replace("_01", "_04")])[-1]
    assert all(a >= b for a, b in zip(rows[-1], pressed, strict=True))


def small(tasks=3, seed=0):
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Flatten()
    )
    return ContinualNet(factorize(features), (2,) * tasks, 8 * 16)


def blobs(task, n=64):
    """Two classes of 8x8 images a task: noise around two fixed patterns."""
    generator = torch.Generator().manual_seed(100 + task)
    patterns = torch.randn(2, 1, 8, 8, generator=generator)
    labels = torch.arange(n) % 2
    return patterns[labels] + 0.5 * torch.randn(n, 1, 8, 8, generator=generator), labels


def learn(net, task, *, steps=40, decayed=0.0):
    """One task. decayed: weight decay that also reaches the frozen factors, as one optimizer over whole factors
    does."""
    images, labels = blobs(task)
    parameters = [{"params": net.trained()}]
    if decayed:
        shared = [
            nn.Parameter(b) for layer in net.layers for b in (layer.shared_left, layer.shared_sigma, layer.shared_right)
        ]
        for p in shared:
            p.grad = torch.zeros_like(p)
        parameters.append({"params": shared, "weight_decay": decayed})
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(steps):
        for p in net.trained():
            p.grad = None
        (F.cross_entropy(net(images), labels) + net.penalty(0.1, 1.0)).backward()
        optimizer.step()
    return net.finish_task(generator=torch.Generator().manual_seed(task))


@torch.no_grad()
def asked(net, task):
    return net(blobs(task)[0], task)


@pytest.mark.parametrize("seed", range(3))
def test_old_logits_are_bit_equal_after_new_tasks_and_right(seed):
    net, then = small(seed=seed), {}
    for task in range(3):
        ranks = learn(net, task)
        assert ranks == [layer.ranks[task] for layer in net.layers] and net.finished == task + 1
        then[task] = asked(net, task)
        assert (then[task].argmax(1) == blobs(task)[1]).float().mean() > 0.9
    for task in range(3):
        assert torch.equal(asked(net, task), then[task])
        served = nn.Sequential(merge_factors(net.features, task), net.heads[task])
        with torch.no_grad():
            assert torch.equal(served(blobs(task)[0]), then[task])
    assert all(layer.spare == 0 for layer in net.layers)
    with pytest.raises(RuntimeError, match="all 3 tasks are finished"):
        net.finish_task()


@pytest.mark.parametrize("seed", range(3))
def test_control_weight_decay_on_the_shared_factors_forgets(seed):
    """What the frozen buffers prevent: with decay that reaches them, the same test finds drift."""
    net = small(seed=seed)
    learn(net, 0)
    then = asked(net, 0)
    learn(net, 1, decayed=1.0)
    assert (asked(net, 0) - then).abs().max() > 0.1


def test_other_heads_get_no_gradient_and_a_task_trains_its_own_slots():
    net = small()
    learn(net, 0)
    before = [p.detach().clone() for p in net.heads[0].parameters()]
    assert {id(p) for p in net.trained()} == {id(p) for p in net.features.parameters()} | {
        id(p) for p in net.heads[1].parameters()
    }
    learn(net, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.heads[0].parameters(), before, strict=True))
    assert net.ranks == [tuple(layer.ranks[t] for layer in net.layers) for t in range(2)]
    assert net.factor_parameters() == sum(
        layer.shared_left.numel() + layer.shared_sigma.numel() + layer.shared_right.numel() for layer in net.layers
    )


def frozen_penalties(steps, tasks=4):
    """P(N) + P(C) of what is frozen, summed over the layers, after each task of so many steps; and the last ranks."""
    net, found = small(tasks), []
    for task in range(tasks):
        learn(net, task, steps=steps)
        found.append(sum(float(p) for layer in net.layers for p in (
            orthogonality(layer.shared_left), orthogonality(layer.shared_right))))  # fmt: skip
    return found, net.ranks[-1]


def test_penalties_of_the_frozen_space_do_not_grow_once_a_task_is_long_enough():
    """Steps times learning rate must exceed the factors' own size, or tasks freeze their random start: the control."""
    settled, few = frozen_penalties(150)
    unsettled, many = frozen_penalties(5)
    assert max(settled) < 1 and unsettled[-1] > 5 and unsettled[-1] > unsettled[0]
    assert all(a < b for a, b in zip(few, many, strict=True))  # and pruning finds something to prune


def test_a_saved_network_loads_with_its_ranks():
    net, other = small(), small(seed=9)
    learn(net, 0)
    other.load_state_dict(net.state_dict())
    assert torch.equal(asked(other, 0), asked(net, 0)) and other.ranks == net.ranks


def normalised(tasks=3):
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    return ContinualNet(factorize(features), (2,) * tasks, 8 * 16, hidden=4)


def test_batch_normalisation_keeps_statistics_of_each_task_and_gains_of_the_first():
    """With its running statistics for all tasks, the control, an old task drifts."""
    net, then = normalised(), {}
    for task in range(3):
        trained = len(net.trained())
        assert trained == 2 * 3 + 4 + (4 if task == 0 else 0)  # factors, two linear layers, gains
        learn(net.train(), task)
        then[task] = asked(net.eval(), task)
        assert (then[task].argmax(1) == blobs(task)[1]).float().mean() > 0.9
    assert all(torch.equal(asked(net, task), then[task]) for task in range(3))
    served = nn.Sequential(merge_factors(net.features, 0), net.heads[0]).eval()
    with torch.no_grad():
        assert torch.equal(served(blobs(0)[0]), then[0])
    assert net.norm_parameters() == 2 * 2 * 8 * (1 + 3)
    other = normalised()
    other.load_state_dict(net.state_dict())
    assert torch.equal(asked(other.eval(), 1), then[1]) and not other.norms[0].weight.requires_grad
    for norm in net.norms:
        norm.task_mean[0], norm.task_var[0] = norm.running_mean, norm.running_var
    assert (asked(net, 0) - then[0]).abs().max() > 0.01
    with pytest.raises(IndexError, match="task 3 is not among the 3 finished tasks"):
        net.norms[0].statistics(3)


def test_features_without_factors_are_refused():
    with pytest.raises(ValueError, match="make them with surgery.factorize"):
        ContinualNet(nn.Sequential(nn.Flatten()), (2,), 4)
