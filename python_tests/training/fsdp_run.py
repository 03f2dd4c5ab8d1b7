"""Two training steps of a spiking network, sharded by FSDP2 over the processes of torchrun, against the plain network.

`test_fsdp.py` starts it. Arguments: a folder, where each rank writes what it saw.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from pyaccel import models
from pyaccel.nn import convert_sync_bntt
from pyaccel.training import distributed

SHAPE, BATCH = (2, 8, 8), 4


def build() -> models.SpikingNetwork:
    torch.manual_seed(0)
    return models.build("vgg5", classes=4, input_shape=SHAPE, width=0.1, spiking=True, steps=3).double().train()


def train(model: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images, sample_ids), labels).backward()
        optimizer.step()


def difference(sharded: nn.Module, plain: nn.Module) -> float:
    return max(
        float((ours.full_tensor() - theirs).detach().abs().max())
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True)
    )


def main(out: Path) -> None:
    images = torch.rand(BATCH, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = images, torch.arange(BATCH) % 4, torch.arange(BATCH)
    part = slice(*(BATCH * rank // distributed.world() for rank in (distributed.rank(), distributed.rank() + 1)))
    plain, start = build(), build()
    train(plain, *batch)

    def sharded(synchronised: bool) -> nn.Module:
        model = convert_sync_bntt(build()) if synchronised else build()
        for layer in (*model.features, *model.classifier):
            fully_shard(layer)
        fully_shard(model)
        train(model, *(tensor[part] for tensor in batch))
        return model

    model = sharded(synchronised=True)
    seen = {
        "difference": difference(model, plain),
        "moved": difference(model, start),
        "apart": difference(sharded(synchronised=False), plain),
        "held": sum(p.to_local().numel() for p in model.parameters()),
        "whole": sum(p.numel() for p in plain.parameters()),
        "statistics": max(float((a - b).abs().max()) for a, b in zip(model.buffers(), plain.buffers(), strict=True)),
    }
    (out / f"{distributed.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # it returned a view; nothing here changes it in place
    with distributed.process_group():
        main(Path(sys.argv[1]))
