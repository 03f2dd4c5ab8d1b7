"""What a training step will need, before it is run: bytes by a step without data or arithmetic, or by measured ones."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .transfer import map_tensors

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict]]
Optimize = Callable[[nn.Module], torch.optim.Optimizer]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it while they live: `now`, and `peak` since it was last set."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step. peak: the most that lives at once, the other three included; scratch memory of single
    kernels and what an allocator keeps free come on top."""

    weights: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def activations(self) -> int:
        """What is left of the peak for what forward keeps for backward, and what backward holds with it."""
        return self.peak - self.weights - self.gradients - self.optimizer


def step_memory(model: nn.Module, optimize: Optimize, loss_fn: Loss, batch: Any, *,
                amp: torch.dtype | None = None) -> StepMemory:
    """The memory of one training step (forward, backward, optimizer) on such a batch, found without computing anything.

    model: on the CPU or on "meta"; it is copied, not changed. batch: as `loss_fn(model, batch)` takes it; only shapes and
    dtypes matter, so meta tensors will do. It runs on stand-ins of torch's FakeTensorMode: what a batch of any size
    would need on any device is found on any machine.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        stand_in = _stand_in(model)
        batch = map_tensors(batch, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        with LiveBytes() as live:
            for tensor in (*stand_in.parameters(), *stand_in.buffers(), *tree_leaves(batch)):
                if isinstance(tensor, Tensor):
                    live.count(tensor)
            weights = live.now
            optimizer = optimize(stand_in)
            for _ in range(2):  # the first step makes the optimizer's state
                live.peak = live.now
                _step(stand_in, optimizer, loss_fn, batch, "cpu", amp)
            gradients = sum(_bytes(p.grad) for p in stand_in.parameters() if p.grad is not None)
            state = sum(_bytes(leaf) for leaf in tree_leaves(optimizer.state_dict()["state"]) if isinstance(leaf, Tensor))
            return StepMemory(weights, gradients, state, live.peak)


def measure_step(model: nn.Module, optimize: Optimize, loss_fn: Loss, batch: Any, *, amp: torch.dtype | None = None,
                 steps: int = 4) -> tuple[int, float]:
    """(bytes, seconds) of a training step of `model`, which is trained, on the device where it is.

    bytes: the peak of torch's allocator on CUDA; on the CPU the peak of the whole process, so start one for each
    measurement. seconds: the median of the steps after the first.
    """
    device = next(model.parameters()).device
    optimizer, found = optimize(model), []
    model.train()
    for _ in range(steps):
        started = time.perf_counter()
        _step(model, optimizer, loss_fn, batch, device.type, amp)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return peak_memory(device), statistics.median(found[1:])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Loss, batch: Any, device: str,
          amp: torch.dtype | None) -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
        loss, _ = loss_fn(model, batch)
    loss.backward()
    del loss
    optimizer.step()


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak of torch's allocator on CUDA, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _stand_in(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no memory; made inside a FakeTensorMode."""
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied parameters stay tied
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, tensor.requires_grad)
            made[id(tensor)] = found
        return made[id(tensor)]

    memo = {id(tensor): empty(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).train()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
