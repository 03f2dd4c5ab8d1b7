"""The prototype memory: entropy, selection, and the fused filter against one pair at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel.nn import PrototypeMemory, choose_prototypes, self_entropy
from pyaccel.reference.prototypes import label_and_keep, point_to_set


def drawn(n, k, d, seed, spread=0.7):
    """Features around one centre a class, and probabilities that mostly agree."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator)
    truth = torch.randint(k, (n,), generator=generator)
    features = (centres[truth] + spread * torch.randn(n, d, generator=generator)).relu() + 1e-3
    logits = 3 * torch.randn(n, k, generator=generator) + 3 * torch.nn.functional.one_hot(truth, k)
    return features, logits.softmax(1), truth


def test_entropy_of_certain_and_uniform_predictions():
    for k in (2, 3, 31, 65):
        assert self_entropy(torch.full((1, k), 1 / k)) == pytest.approx(1, abs=1e-6)
        assert abs(float(self_entropy(torch.eye(k)[:1]))) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 9), st.integers(0, 10_000))
def test_selection_follows_its_definition(n, k, capacity, seed):
    p = (3 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).softmax(1)
    chosen = choose_prototypes(p, capacity)
    entropy, predicted = self_entropy(p), p.argmax(1)
    lowest = {c: entropy[predicted == c].min() for c in range(k) if (predicted == c).any()}
    assert chosen.threshold == max(lowest.values())
    assert chosen.missing == [c for c in range(k) if c not in lowest]
    for c, rows in enumerate(chosen.rows):
        assert len(rows) >= 1
        if c in lowest:
            members = [i for i in range(n) if predicted[i] == c and entropy[i] <= chosen.threshold]
            assert set(rows.tolist()) <= set(members) and len(rows) == min(len(members), capacity)
            left = set(members) - set(rows.tolist())
            assert all(entropy[i] >= entropy[rows].max() for i in left)
            assert entropy[rows].tolist() == sorted(entropy[rows].tolist())
        else:
            assert rows.tolist() == [int(p[:, c].argmax())]


def test_a_class_never_predicted_gets_its_own_most_probable_sample():
    """The published code takes the class number for a sample number here."""
    p = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])
    chosen = choose_prototypes(p)
    assert chosen.missing == [2] and chosen.rows[2].tolist() == [1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n, k, d, capacity", [(40, 3, 5, 100), (129, 7, 33, 4), (5, 7, 8, 3), (64, 2, 1, 2)])
def test_the_fused_filter_is_the_one_by_pairs(n, k, d, capacity, seed):
    features, p, _ = drawn(n, k, d, seed)
    memory = PrototypeMemory(k, d, capacity)
    chosen = memory.update(features, p)
    points = drawn(23, k, d, seed + 100)[0]
    sets = [features[rows].double() for rows in chosen.rows]
    found = memory.similarities(points)
    for one, other in zip(found, point_to_set(points.double(), sets), strict=True):
        assert (one - other).abs().max() < 1e-5
    labels, keep = memory.label(points)
    expected = label_and_keep(points.double(), sets)
    mean = found.mean.sort(1, descending=True).values
    clear = mean[:, 0] - mean[:, 1] > 1e-5  # d = 1 has every cosine 1
    margin = (found.smallest.gather(1, labels[:, None]) - found.largest.gather(1, found.mean.topk(2).indices[:, 1:]))[
        :, 0
    ]
    assert torch.equal(labels[clear], expected[0][clear])
    assert torch.equal(keep[clear & (margin.abs() > 1e-6)], expected[1][clear & (margin.abs() > 1e-6)])
    assert memory.counts.tolist() == [len(rows) for rows in chosen.rows]
    if d > 1 and not chosen.missing:  # a sample that stands for two classes ties
        assert clear.all() and (margin.abs() > 1e-6).all()


def test_the_filter_is_strict():
    memory = PrototypeMemory(2, 3)
    same = torch.tensor([[1.0, 2.0, 0.5]])
    memory.update(same.repeat(2, 1), torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    assert memory.label(same)[1].tolist() == [False]
    other = torch.tensor([[1.0, 2.0, 0.5], [0.5, 0.1, 3.0]])
    memory.update(other, torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    labels, keep = memory.label(other)
    assert labels.tolist() == [0, 1] and keep.tolist() == [True, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_scale_changes_neither_labels_nor_filter(seed, scale):
    features, p, _ = drawn(50, 4, 16, seed)
    memory, scaled = PrototypeMemory(4, 16, 8), PrototypeMemory(4, 16, 8)
    memory.update(features, p)
    scaled.update(features * scale, p)
    points = drawn(30, 4, 16, seed + 1)[0]
    found = memory.similarities(points)
    labels, keep = memory.label(points)
    margin = (found.smallest.gather(1, labels[:, None]) - found.largest.gather(1, found.mean.topk(2).indices[:, 1:]))[
        :, 0
    ]
    gap = found.mean.topk(2).values
    clear = (margin.abs() > 1e-5) & (gap[:, 0] - gap[:, 1] > 1e-5)
    others = scaled.label(points * scale)
    assert torch.equal(others[0][clear], labels[clear]) and torch.equal(others[1][clear], keep[clear])


def test_repeats_do_not_weigh_and_memory_travels_in_a_state_dict():
    features, p, _ = drawn(7, 3, 4, 0)
    memory, wide = PrototypeMemory(3, 4, 7), PrototypeMemory(3, 4, 101)
    memory.update(features, p)
    wide.update(features, p)
    points = torch.rand(9, 4)
    for a, b in zip(memory.similarities(points), wide.similarities(points), strict=True):
        torch.testing.assert_close(a, b)
    copy = PrototypeMemory(3, 4, 7)
    copy.load_state_dict(memory.state_dict())
    assert torch.equal(copy.similarities(points).mean, memory.similarities(points).mean)
    assert memory.label(torch.zeros(0, 4))[0].shape == (0,)


def test_no_gradient_passes_through_labels():
    memory = PrototypeMemory(2, 3)
    memory.update(torch.rand(4, 3), torch.tensor([[0.9, 0.1], [0.1, 0.9]] * 2))
    features = torch.rand(2, 3, requires_grad=True)
    assert not memory.similarities(features).mean.requires_grad and not memory.label(features)[0].requires_grad


def test_errors():
    with pytest.raises(
        ValueError, match=r"expected probabilities \[N, K\] of N >= 1 samples and K >= 2 classes, got \[0, 3\]"
    ):
        choose_prototypes(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="expected at least 2 classes, 1 value and 1 prototype, got 1, 4, 100"):
        PrototypeMemory(1, 4)
    with pytest.raises(
        ValueError, match=r"expected features \[N, 4\] and probabilities \[N, 3\], got \[5, 4\] and \[6, 3\]"
    ):
        PrototypeMemory(3, 4).update(torch.zeros(5, 4), torch.zeros(6, 3))
