"""Batch normalisation for tasks one after another: gains of the first task, statistics of each task's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TaskBatchNorm2d(nn.Module):
    """`nn.BatchNorm2d` that a finished task reads as it was when that task was finished.

    Gain and bias are learned by the first task and frozen (2009.01956, official code). Running statistics go on moving
    with every batch, which would make old tasks forget; so each finished task keeps a copy of them.

    images `[B, C, H, W]` to the same shape.

    Attributes:
        weight, bias: `[C]`; they ask for no gradient once a task is finished.
        running_mean, running_var: of the task being trained; the next task goes on from them.
        task_mean, task_var: of the finished tasks, `[T, C]`; buffers.
        task: whose statistics `forward` uses, counted from 0; None: the current ones, as in training.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, device=None, dtype=None):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels, **kind)), nn.Parameter(torch.zeros(channels, **kind))
        self.register_buffer("running_mean", torch.zeros(channels, **kind))
        self.register_buffer("running_var", torch.ones(channels, **kind))
        self.register_buffer("task_mean", torch.empty(0, channels, **kind))
        self.register_buffer("task_var", torch.empty(0, channels, **kind))
        self.task: int | None = None

    @torch.no_grad()
    def finish_task(self) -> None:
        """Keep the statistics for this task; after the first one, freeze gain and bias."""
        self.task_mean = torch.cat([self.task_mean, self.running_mean[None]])
        self.task_var = torch.cat([self.task_var, self.running_var[None]])
        self._freeze()

    def statistics(self, task: int) -> tuple[Tensor, Tensor]:
        """Mean and variance `[C]` of a finished task; IndexError for any other."""
        if not 0 <= task < len(self.task_mean):
            raise IndexError(f"TaskBatchNorm2d: task {task} is not among the {len(self.task_mean)} finished tasks")
        return self.task_mean[task], self.task_var[task]

    def forward(self, images: Tensor) -> Tensor:
        if self.task is not None:
            return F.batch_norm(images, *self.statistics(self.task), self.weight, self.bias, False, 0.0, self.eps)
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)  # fmt: skip

    @torch.no_grad()
    def ordinary(self, task: int | None = None) -> nn.BatchNorm2d:
        """The normalisation to serve a task with, in evaluation."""
        mean, var = (self.running_mean, self.running_var) if task is None else self.statistics(task)
        made = nn.BatchNorm2d(self.channels, self.eps, self.momentum, device=mean.device, dtype=mean.dtype)
        made.load_state_dict({"weight": self.weight, "bias": self.bias, "running_mean": mean, "running_var": var,
                              "num_batches_tracked": made.num_batches_tracked})  # fmt: skip
        return made

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}, tasks={len(self.task_mean)}"

    def _freeze(self) -> None:
        for p in (self.weight, self.bias):
            p.requires_grad_(not len(self.task_mean))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("task_mean", "task_var"):
            own, there = getattr(self, name), state_dict.get(prefix + name)
            if there is not None and there.dim() == 2 and len(there) != len(own):
                setattr(self, name, own.new_empty(len(there), self.channels))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._freeze()
