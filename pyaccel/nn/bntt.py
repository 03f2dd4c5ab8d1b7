"""`BNTTLIF`: batch normalisation through time and the neurons behind it, as a module; its statistics over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.nn.neuron import _Neuron
from pyaccel.ops.running import track_statistics_
from pyaccel.reference.neuron import state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BNTTLIF(_Neuron):
    """Batch normalisation through time and LIF in one kernel: `[T, B, channels, ...]` in, spikes out (2010.01729).

    Each of the `steps` time steps has statistics, running statistics and a `weight` (gamma, initially 1) a channel; there
    is no bias. Training uses batch statistics and updates the running ones (momentum 0.1, unbiased variance, as
    `nn.BatchNorm2d`), once a pass, also where activation checkpointing runs it twice; evaluation uses the running ones.
    Buffers and weight are `[steps, channels]`. Fewer than `steps` steps may be run: the first T are used.

    `stateful=True` carries membrane and step over to the next call, until `reset_state()`: chunks of time are one sequence.

    `synchronise`: batch statistics of all processes (True: of the default group, or a `ProcessGroup`), where
    torch.distributed is initialised: one all-reduce a layer forward and one backward. Gradients of the parameters stay
    local sums, as `DistributedDataParallel` expects. See `convert_sync_bntt`.

    Raises ValueError for more than `steps` steps: what was not trained has no statistics.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        leak: float = 0.95,
        threshold: float = 1.0,
        *,
        eps: float = 1e-4,
        momentum: float = 0.1,
        synchronise: bool | ProcessGroup = False,
        **options,
    ):
        super().__init__(leak, threshold, **options)
        self.channels, self.steps, self.eps, self.momentum = channels, steps, eps, momentum
        self.synchronise = synchronise
        self.first_step = 0  # the row of the next call's first step
        self.weight = nn.Parameter(torch.ones(steps, channels))
        self.register_buffer("running_mean", torch.zeros(steps, channels))
        self.register_buffer("running_var", torch.ones(steps, channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def reset_state(self) -> None:
        super().reset_state()
        self.first_step = 0

    def carry(self, first_step: int, membrane: Tensor) -> None:
        super().carry(first_step, membrane)
        self.first_step = first_step

    def forward(self, current: Tensor) -> Tensor:
        membrane, rows = self._carried(), self._rows(current.shape[0])
        state = state_dtype(current.dtype)
        given, total = {}, None
        if not self.training:
            given = dict(mean=self.running_mean[rows].to(state), var=self.running_var[rows].to(state))
        elif self.synchronise:
            total = _total_over(self.synchronise)
        spikes, membrane, mean, var = ops.bntt_lif(
            current, self.weight[rows].to(state), membrane, eps=self.eps, reduce=total, **given, **self._options(current)
        )
        if self.training:
            self._track(mean, var, rows.start, current[0, :, 0].numel() if current.shape[0] else 0, total)
        self._keep(membrane)
        if self.stateful:
            self.first_step = rows.stop
        return spikes

    def _rows(self, steps: int) -> slice:
        first = self.first_step
        if first + steps > self.steps:
            after = f" after {first} others; reset_state() starts a new sequence" if first else "; later steps have no statistics"
            raise ValueError(f"BNTTLIF: trained for {self.steps} steps, got {steps}{after}")
        return slice(first, first + steps)

    def _track(self, mean: Tensor, var: Tensor, first: int, count: int, total: _Total | None) -> None:
        if total is not None:  # of all processes: known on the device alone
            unbiased = var * (total.count / (total.count - 1).clamp_min(1)).to(var.dtype)
        elif count < 2:
            raise ValueError(f"BNTTLIF: training needs more than one value a channel and step, got {count}")
        else:
            unbiased = var * (count / (count - 1))
        track_statistics_(
            self.running_mean, self.running_var, self.num_batches_tracked, mean, unbiased, first=first, momentum=self.momentum
        )

    def extra_repr(self) -> str:
        synchronised = ", synchronised" if self.synchronise else ""
        return (
            f"{self.channels}, steps={self.steps}, eps={self.eps:g}, momentum={self.momentum:g}, "
            f"{super().extra_repr()}{synchronised}"
        )


class _Total:
    """`reduce` of `ops.bntt_lif`: the sum over a group's processes; keeps the first row of the first call, which counts values."""

    def __init__(self, group: ProcessGroup | None):
        self.group, self.count = group, None

    def __call__(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor, group=self.group)
        if self.count is None:
            self.count = tensor[0]
        return tensor


def _total_over(synchronise: bool | ProcessGroup) -> _Total | None:
    """None where one process is everybody."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = None if synchronise is True else synchronise
    return _Total(group) if torch.distributed.get_world_size(group) > 1 else None


def convert_sync_bntt(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Let every `BNTTLIF` of `model` take its statistics over the processes of a group (None: of all); returns `model`.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, to be called before wrapping in `DistributedDataParallel`; weights
    and buffers stay the same tensors, and without torch.distributed the model computes what it computed.
    """
    for module in model.modules():
        if isinstance(module, BNTTLIF):
            module.synchronise = True if process_group is None else process_group
    return model
