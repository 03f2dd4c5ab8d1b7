"""What one process of `test_sync_bntt.py` does: two training passes and an inference pass over its part of a batch."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn as torch_nn

from pyaccel import nn

STEPS, BATCH, CHANNELS = 5, 6, 3


def noise(seed: int) -> torch.Tensor:
    shape = STEPS, BATCH, CHANNELS, 4, 4
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(part: slice, calls: list, convert=lambda model: model) -> dict:
    model = torch_nn.Sequential(
        nn.BNTTLIF(CHANNELS, STEPS, learn_leak=True, surrogate="atan"),
        nn.BNTTLIF(CHANNELS, STEPS, learn_threshold=CHANNELS, surrogate="atan", detach_reset=False),
    )
    model = convert(model.double())
    x = noise(0)[:, part].clone().requires_grad_()
    calls.clear()
    spikes = []
    for step in range(2):
        out = model(0.4 + (1 + step) * x)
        (out * noise(1)[:, part]).sum().backward()
        spikes.append(out.detach())
    trained = list(calls)
    model.eval()
    inference = model(x).detach()
    assert calls == trained  # evaluation has its statistics
    return dict(
        spikes=spikes, inference=inference, grad=x.grad, parameters=[p.grad for p in model.parameters()],
        buffers=list(model.buffers()), calls=trained,
    )  # fmt: skip


def main() -> None:
    rank, folder = int(os.environ["RANK"]), os.environ["FOLDER"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append((tuple(tensor.shape), str(tensor.dtype)))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    group, part = dist.new_group(), (slice(0, 2), slice(2, BATCH))[rank]  # parts of different sizes
    results = {
        "default": train(part, calls, nn.convert_sync_bntt),
        "group": train(part, calls, lambda model: nn.convert_sync_bntt(model, group)),
        "apart": train(part, calls),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
