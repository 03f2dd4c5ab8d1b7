"""Several processes as one run: torchrun starts them, torch.distributed connects them; alone, everything here is local.

What the loop and the recipes need beyond DistributedDataParallel: the process group of a launch, agreement after a step,
and small values from one rank or from all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world() -> int:
    """Processes of this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 .. world() - 1. Rank 0 writes, prints and logs."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it started this one: NCCL between GPUs, gloo between CPUs.

    Each process gets the GPU of its local rank. ValueError where a machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"this machine has {gpus} GPUs and torchrun started a process with local rank {local}; choose "
                f"--nproc-per-node {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(local)
    store, number, processes = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun hands out the store of the attempt that failed, with the addresses of its processes.
        # (On several nodes no count is common to all: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt its own.)
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=processes)
    yield
    # Not after an error: the others may wait in a collective for ever, and torchrun ends them.
    dist.destroy_process_group()


def largest(*numbers: int) -> tuple[int, ...]:
    """Each number's maximum over all ranks: what one asks for, all do."""
    if world() == 1:
        return numbers
    found = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return tuple(found.tolist())


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in a new tensor."""
    values = values.clone()
    if world() > 1:
        dist.all_reduce(values)
    return values


def from_all(value: T) -> list[T]:
    """The value of every rank, in their order. It is pickled between processes of one run: plain values."""
    if world() == 1:
        return [value]
    found: list = [None] * world()
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """Rank 0's value."""
    if world() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        largest(0)  # dist.barrier would set up a GPU collective where there are GPUs


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics that each rank gathered from its own images."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
