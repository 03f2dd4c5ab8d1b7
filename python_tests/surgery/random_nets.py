"""Random networks of a user's own: convolutions with and without normalisation, residual sums, concatenations."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A convolution, normalisation, activation; then a residual sum, a concatenation, a depthwise layer, or nothing."""

    def __init__(self, choose: random.Random, channels: int):
        super().__init__()
        self.kind = choose.choice(["plain", "plain", "residual", "cat", "depthwise"])
        width, kernel = choose.randint(3, 7), choose.choice([1, 3, 5])
        stride = choose.choice([1, 1, 2])
        self.stem = nn.Sequential(*self._layer(choose, channels, width, kernel, stride))
        self.outputs = width
        if self.kind == "residual":
            self.body = nn.Sequential(*self._layer(choose, width, 5, 3, 1), *self._layer(choose, 5, width, 3, 1)[:-1])
        elif self.kind == "cat":
            self.left = nn.Sequential(*self._layer(choose, width, 4, 3, 1))
            self.right = nn.Sequential(*self._layer(choose, width, 3, 1, 1))
            self.outputs = 7 + width
        elif self.kind == "depthwise":
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU()
            )
        self.pool = choose.choice([nn.Identity(), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1)])

    @staticmethod
    def _layer(choose, inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        norm = choose.random() < 0.7
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm or choose.random() < 0.3)
        return [conv, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "residual":
            x = F.relu(self.body(x) + x)
        elif self.kind == "cat":
            x = torch.cat([self.left(x), x, self.right(x)], 1)
        elif self.kind == "depthwise":
            x = self.body(x)
        return self.pool(x)


class RandomNet(nn.Module):
    def __init__(self, seed: int, size: int = 9):
        super().__init__()
        choose = random.Random(seed)
        torch.manual_seed(seed)
        channels, blocks = 3, []
        for _ in range(choose.randint(1, 3)):
            blocks.append(Block(choose, channels))
            channels = blocks[-1].outputs
        self.blocks = nn.ModuleList(blocks)
        self.tail = choose.choice(["flatten", "view", "mean", "pool"])
        self.pool = nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            features = self.features(torch.zeros(2, 3, size, size)).shape[1]
        hidden = choose.choice([0, 6])
        norm = choose.random() < 0.5
        self.head = nn.Sequential(
            *([nn.Linear(features, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()] if hidden else []),
            nn.Linear(hidden or features, 4),
        )
        live(self)

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.tail == "flatten":
            return torch.flatten(x, 1)
        if self.tail == "view":
            return x.view(x.size(0), -1)
        return x.mean((2, 3)) if self.tail == "mean" else self.pool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def live(model: nn.Module) -> nn.Module:
    """Normalisations as after some training: every number matters."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.2, 0.3)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(seed: int = 0, count: int = 16, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.randint(4, (count,), generator=generator)


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    # The gradient of a bias in front of a normalisation is rounding alone; a small eps would make steps of it.
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2, eps=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    model.train()
    for step in range(steps):
        x, y = images(seed + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
