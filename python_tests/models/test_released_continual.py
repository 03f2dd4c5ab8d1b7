"""Released models of 2009.01956: the layout of their files, read into a network whose every task is finished."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cacl_tables import ADDED, ALLOCATED

from pyaccel.models import load_released_continual

SHAPES = {
    "conv1": (64, 3, 3),
    "conv2": (64, 64, 3),
    "conv3": (128, 64, 3),
    "conv4": (128, 128, 3),
    "conv6": (256, 128, 2),
}


def written(folder, tasks=3):
    """A folder in the released layout, with the ranks and slots of the CIFAR-100 model with lambda_s 0.4."""
    torch.manual_seed(0)
    weights, total, ranks = {}, [0] * 5, {}
    for t, added in enumerate(ADDED["cifar100_04"][:tasks]):
        total = [a + b for a, b in zip(total, added, strict=True)]
        ranks[t] = list(total)
    for (name, (outputs, inputs, k)), slots in zip(SHAPES.items(), ALLOCATED["cifar100_04"], strict=True):
        weights[f"{name}.N"] = torch.randn(outputs, slots) / outputs
        weights[f"{name}.C"] = torch.randn(slots, inputs * k * k) / inputs
        weights[f"{name}.Sigma"] = torch.randn(slots)
    names = ["12", "6", "18"][:tasks]
    for name in names:
        weights[f"last.{name}.0.weight"], weights[f"last.{name}.0.bias"] = torch.randn(5, 1024), torch.randn(5)
    torch.save(weights, folder / "final_model.pth")
    torch.save(ranks, folder / "task_identifiers.pth")
    torch.save({name: t for t, name in enumerate(names)}, folder / "task_name_count.pth")
    return weights, ranks


def theirs(weights, ranks, task, name, images):
    """The released forward pass, written out: prefixes, roots of |sigma| on both sides, one convolution."""
    x = images
    for index, (layer, (outputs, inputs, k)) in enumerate(SHAPES.items()):
        r = ranks[task][index]
        root = weights[f"{layer}.Sigma"][:r].abs().sqrt()
        w = (weights[f"{layer}.N"][:, :r] * root) @ (root[:, None] * weights[f"{layer}.C"][:r])
        x = F.conv2d(x, w.view(outputs, inputs, k, k)).relu()
        if layer in ("conv2", "conv4"):
            x = F.max_pool2d(x, 2)
    return F.linear(F.avg_pool2d(x, 2).flatten(1), weights[f"last.{name}.0.weight"], weights[f"last.{name}.0.bias"])


def test_every_task_gives_the_released_logits(tmp_path):
    weights, ranks = written(tmp_path)
    net, names = load_released_continual(tmp_path)
    assert names == ["12", "6", "18"] and net.ranks == [tuple(r) for r in ranks.values()] and net.finished == 3
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for task, name in enumerate(names):
            torch.testing.assert_close(
                net(images, task), theirs(weights, ranks, task, name, images), rtol=1e-4, atol=1e-5
            )


def test_what_does_not_fit_is_refused(tmp_path):
    weights, ranks = written(tmp_path)
    torch.save(
        {k: v for k, v in weights.items() if k not in ("conv4.C", "last.6.0.bias")}, tmp_path / "final_model.pth"
    )
    with pytest.raises(ValueError, match=r"final_model\.pth lacks conv4\.C, last\.6\.0\.bias"):
        load_released_continual(tmp_path)
    torch.save(weights | {"conv3.N": torch.zeros(64, 192)}, tmp_path / "final_model.pth")
    with pytest.raises(ValueError, match=r"conv3 has N \[64, 192\].*expected \[128, r\] and \[r, 576\]"):
        load_released_continual(tmp_path)
    torch.save(weights, tmp_path / "final_model.pth")
    torch.save({0: ranks[0]}, tmp_path / "task_identifiers.pth")
    with pytest.raises(ValueError, match=r"expected ranks of 3 tasks, got those of \[0\]"):
        load_released_continual(tmp_path)
    (tmp_path / "task_name_count.pth").unlink()
    with pytest.raises(FileNotFoundError, match="task_name_count.pth: no such checkpoint"):
        load_released_continual(tmp_path)
