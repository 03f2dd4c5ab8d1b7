"""Running statistics, moved once a forward pass: not again where activation checkpointing runs the pass a second time."""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel.ops.library import register


def recomputing() -> bool:
    """Whether this runs inside a backward pass: activation checkpointing (of either kind) then repeats a forward pass.

    What a forward pass leaves behind (statistics, counters, state) was left behind the first time.
    """
    return torch._C._current_graph_task_id() != -1


def track_statistics_(
    running_mean: Tensor, running_var: Tensor, batches: Tensor, mean: Tensor, var: Tensor, *, first: int, momentum: float
) -> None:
    """Move running statistics `[steps, C]` towards those of a batch, `[T, C]`, from row `first` on, in place::

        running[first:first + T] += momentum * (batch - running[first:first + T])

    `batches` counts the sequences that were started: it rises by one where `first` is 0. Inside a backward pass nothing
    moves (see `recomputing`); an operator, so that a compiled graph asks again at every call.
    """
    _track(running_mean, running_var, batches, mean, var, first, momentum)


def _move(running_mean, running_var, batches, mean, var, first, momentum):
    if recomputing():
        return
    rows = slice(first, first + mean.shape[0])
    running_mean[rows].lerp_(mean.to(running_mean), momentum)
    running_var[rows].lerp_(var.to(running_var), momentum)
    if first == 0:
        batches += 1


_track = register(
    "track_statistics_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) batches, Tensor mean, Tensor var, "
    "int first, float momentum) -> ()",
    kernel=None,
    fake=lambda *arguments: None,
    fallback=_move,
)
