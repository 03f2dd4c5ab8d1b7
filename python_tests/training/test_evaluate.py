from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyaccel.training import accuracy


@pytest.fixture
def model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_every_image_counts_once(tiny, model):
    batches = tiny.TinyBatches(22, size=8)  # Batches of 8, 8 and 6: a mean of batch means would be another number.
    result = accuracy(model, batches)
    logits = model.eval()(batches.images)
    hits = logits.argmax(1) == batches.labels
    assert result["n"] == 22 and result["accuracy"] == hits.sum().item() / 22
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, batches.labels).item(), rel=1e-6)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    means = [hits[ids].float().mean().item() for ids in order.split(8)]
    assert sum(means) / 3 != pytest.approx(result["accuracy"])


def test_limit_cuts_inside_a_batch(tiny, model):
    batches = tiny.TinyBatches(20, size=8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:11]
    hits = model.eval()(batches.images[order]).argmax(1) == batches.labels[order]
    assert accuracy(model, batches, limit=11)["accuracy"] == hits.sum().item() / 11
    assert accuracy(model, batches, limit=11)["n"] == 11
    assert accuracy(model, list(batches.epoch(0)), limit=99)["n"] == 20


def test_modes_and_gradients_are_as_before(tiny, model):
    model.train()
    model[2].eval()
    before = model[2].running_mean.clone()
    accuracy(model, tiny.TinyBatches())
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert torch.equal(model[2].running_mean, before) and torch.is_grad_enabled()
    with pytest.raises(RuntimeError):
        accuracy(model, tiny.TinyBatches(), forward=lambda model, batch: model(batch.images[..., :2]))
    assert model.training and not model[2].training


def test_forward_and_errors(tiny, model):
    batches = tiny.TinyBatches()
    truth = lambda model, batch: F.one_hot(batch.labels, 3).float()  # noqa: E731
    assert accuracy(model, batches, forward=truth)["accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"expected logits \[4, classes\], got \[2, 4, 3\]"):
        accuracy(model, batches, forward=lambda model, batch: torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="no images"):
        accuracy(model, [])
