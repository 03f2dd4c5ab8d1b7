"""The two-head schedule of source-free adaptation."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from pyaccel.training import TwoHeads, learning_rate_factor, target_weight
from pyaccel.training.source_free import VARIANTS


def two_heads(variant="full", steps=100, seed=0, norm=False):
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Linear(6, 8),
        *([nn.BatchNorm1d(8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))] if norm else [nn.ReLU()]),
    )
    return TwoHeads(
        features,
        nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)),
        classes=3,
        values=8,
        steps=steps,
        variant=variant,
        capacity=10,
    )


class Target(NamedTuple):
    images: torch.Tensor


def batches(n=4, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [Target(torch.randn(size, 6, generator=generator)) for _ in range(n)]


def test_the_schedule_of_the_paper():
    found = [target_weight(step, 5000) for step in (0, 250, 500, 1000, 1250, 2500)]
    assert found == pytest.approx([0, 0.462, 0.762, 0.964, 0.9866, 0.99991], abs=5e-4)
    assert target_weight(5000, 5000) == pytest.approx(1, abs=1e-8)
    assert learning_rate_factor(0, 5000) == 1
    assert learning_rate_factor(5000, 5000) == learning_rate_factor(9999, 5000) == pytest.approx(0.1656, abs=5e-5)
    assert [learning_rate_factor(s, 10) for s in range(10)] == sorted(
        (learning_rate_factor(s, 10) for s in range(10)), reverse=True
    )


def test_the_head_of_office_31_has_the_published_count():
    head = nn.Sequential(nn.Linear(2048, 256), nn.Linear(256, 31))
    assert sum(p.numel() for p in head.parameters()) == 532_511


def test_all_copies_start_alike_and_the_source_never_moves():
    net = two_heads()
    for a, b in (
        (net.features, net.source_features),
        (net.target_head, net.source_head),
        (net.source_to_target, net.source_head),
    ):
        assert all(torch.equal(p, q) and p is not q for p, q in zip(a.parameters(), b.parameters(), strict=True))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.refresh(batches())
    optimizer = net.optimizer(0.1, 0.1)
    for step in range(5):
        net.set_step(step)
        net.set_learning_rates(optimizer)
        optimizer.zero_grad()
        net.loss(batches()[step % 4].images).loss.backward()
        optimizer.step()
    moved = {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"features", "source_to_target", "target_head", "memory"}


def test_at_the_first_step_the_target_head_has_no_gradient_at_all():
    net = two_heads()
    net.refresh(batches())
    net.loss(batches()[0].images).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.target_head.parameters())
    assert any(p.grad.abs().sum() > 0 for p in net.features.parameters())
    net.zero_grad()
    net.set_step(50)
    net.loss(batches()[0].images).loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in net.target_head.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_its_definition(variant, seed):
    net = two_heads(variant, seed=seed)
    net.refresh(batches(seed=seed))
    net.set_step(7)
    images = batches(seed=seed + 9)[0].images
    found = net.loss(images)
    values = net.features(images)
    expected_alpha = 1.0 if variant == "no_source" else target_weight(7, 100)
    ys = net.source_head(net.source_features(images)).argmax(1)
    source = -net.source_to_target(values).log_softmax(1)[torch.arange(16), ys].sum() / 16
    y, w = net.memory.label(values)
    if variant == "naive":
        y = net.target_head(values).argmax(1)
    if variant in ("naive", "no_filter"):
        w = torch.ones(16, dtype=torch.bool)
    terms = -net.target_head(values).log_softmax(1)[torch.arange(16), y]
    target = (
        sum(float(t) for t, kept in zip(terms.detach(), w, strict=True) if kept) / 16
    )  # by B, not by how many are kept
    assert float(found.loss.detach()) == pytest.approx(
        (1 - expected_alpha) * float(source.detach()) + expected_alpha * target, rel=1e-5
    )
    assert float(found.kept) == pytest.approx(float(w.float().mean()))


def test_refresh_moves_running_statistics_as_the_published_code_does_unless_clean():
    net = two_heads(norm=True)
    inner, outer = net.features[3][1], net.features[1]
    assert inner.training and not outer.training and not net.source_features[3][1].training
    before = inner.running_mean.clone()
    net.refresh(batches(), clean=True)
    assert torch.equal(inner.running_mean, before) and inner.training and not outer.training
    net.refresh(batches())
    assert not torch.equal(inner.running_mean, before)
    assert torch.equal(outer.running_mean, torch.zeros(8))
    assert not net.eval().features[3][1].training


def test_learning_rates_follow_the_schedule_in_every_group():
    net = two_heads(steps=200)
    optimizer = net.optimizer(1e-3, 1e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, 1e-3]
    assert all(g["nesterov"] and g["momentum"] == 0.9 and g["weight_decay"] == 5e-4 for g in optimizer.param_groups)
    net.set_step(200)
    net.set_learning_rates(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.656e-5, 1.656e-4], rel=1e-3)
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in net.parameters() if p.requires_grad}


def test_errors():
    with pytest.raises(ValueError, match="variant must be one of full, no_filter, no_source, naive, got 'all'"):
        two_heads("all")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        two_heads(steps=0)
    with pytest.raises(ValueError, match="there are no target images"):
        two_heads().refresh([])
