"""What one epoch adds up: means of metrics, kept on the device so that no step waits for a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .distributed import from_all, world


class Averages:
    """Means of named values over samples, summed in float64. `state()` and `load()` carry them through a checkpoint."""

    def __init__(self):
        self.samples = 0
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    def add(self, values: Mapping[str, Tensor | float], samples: int) -> None:
        """Add one batch: each value is the mean over its `samples`, a number or a tensor of one element."""
        self.samples += samples
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            value = value.detach().reshape(()).double() if isinstance(value, Tensor) else float(value)
            self._sums[name] = (total + value * samples, count + samples)

    def means(self) -> dict[str, float]:
        """The means so far; waits for the device."""
        return {name: float(total) / count if count else float("nan") for name, (total, count) in self._sums.items()}

    def over_ranks(self) -> Averages:
        """The averages over the samples of all ranks; this object itself in a run of one process."""
        if world() == 1:
            return self
        everyone, whole = from_all((self.samples, {n: (float(t), c) for n, (t, c) in self._sums.items()})), Averages()
        for samples, sums in everyone:
            whole.samples += samples
            for name, (total, count) in sums.items():
                before, counted = whole._sums.get(name, (0.0, 0))
                whole._sums[name] = (before + total, counted + count)
        return whole

    def state(self) -> dict:
        return {"samples": self.samples, "sums": dict(self._sums)}

    def load(self, state: Mapping, device: torch.device) -> None:
        self.samples = state["samples"]
        self._sums = {name: (total.to(device) if isinstance(total, Tensor) else total, count)
                      for name, (total, count) in state["sums"].items()}


class FiniteCheck:
    """Looks for losses that are not finite, many steps at a time: only `raise_if_any` waits for the device."""

    def __init__(self):
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, loss: Tensor, step: int) -> None:
        """Note the loss, a tensor of one element, of a step."""
        self._pending.append((step, loss.detach().reshape(())))

    def raise_if_any(self, advice: str) -> None:
        """FloatingPointError that names the first step whose loss is nan or inf, and the loss."""
        if self._pending:
            losses = torch.stack([loss for _, loss in self._pending]).tolist()
            for (step, _), loss in zip(self._pending, losses, strict=True):
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {step}; {advice}")
            self._pending.clear()
