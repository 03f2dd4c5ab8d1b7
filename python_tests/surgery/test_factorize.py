"""`factorize` and `merge_factors`: what they make, what they refuse, and that their input stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyaccel import models
from pyaccel.nn import FactorizedConv2d, TaskBatchNorm2d
from pyaccel.surgery import factorize, merge_factors


def test_a_network_of_the_users_own_there_and_back():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, (1, 3), bias=False))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    made = factorize(net)
    assert [type(m) for m in made] == [FactorizedConv2d, nn.ReLU, FactorizedConv2d]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    images = torch.randn(2, 3, 9, 9)
    assert made(images).shape == net(images).shape
    for layer in (made[0], made[2]):
        layer.finish_task()
    merged = merge_factors(made, 0)
    assert [type(m) for m in merged] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    made[0].task = made[2].task = 0
    assert torch.equal(merged(images), made(images))
    assert isinstance(factorize(net[0]), FactorizedConv2d) and isinstance(merge_factors(made[0]), nn.Conv2d)


@pytest.mark.parametrize("layers, message", [
    ([nn.Conv2d(3, 4, 3)], "0 has a bias, which every task would change: build it with bias=False"),
    ([nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4)],
    r"1 \(GroupNorm\) holds values that every task would change"),
    ([nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False)], r"1 \(BatchNorm2d\) holds values"),
    ([nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2)], r"2 \(Linear\) holds values"),
    ([nn.Conv2d(4, 4, 3, groups=2, bias=False)], "0 has groups or a padding mode"),
    ([nn.ReLU()], "it has no Conv2d"),
])  # fmt: skip
def test_what_every_task_would_change_is_refused_by_name(layers, message):
    with pytest.raises(ValueError, match=message):
        factorize(nn.Sequential(*layers))


def test_batch_normalisation_becomes_that_of_tasks_and_ordinary_again():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2), nn.ReLU())
    made = factorize(net).double()
    assert isinstance(made[1], TaskBatchNorm2d) and (made[1].eps, made[1].momentum) == (1e-3, 0.2)
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    made(images)
    for layer in made[:2]:
        layer.finish_task()
    merged = merge_factors(made, 0).eval()
    assert type(merged[1]) is nn.BatchNorm2d and merged[1].eps == 1e-3
    made(3 * images)  # the statistics move on; those of the finished task do not
    made[0].task = made[1].task = 0
    assert torch.equal(made.eval()(images), merged(images))


def test_the_read_out_of_a_whole_network_is_refused_and_its_features_are_not():
    net = models.build("cacl_net", classes=5, width=0.1)
    with pytest.raises(ValueError, match=r"readout \(Linear\) holds values"):
        factorize(net)
    assert sum(isinstance(m, FactorizedConv2d) for m in factorize(net.features)) == 5
