"""Measuring one trained network for `sram_noise`: all of its sites lie in memory, any of them can be made to fail."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import attacks, ops
from pyaccel.hardware import SramConfig
from pyaccel.hardware.sram import measured_magnitude
from pyaccel.nn import set_memory_pass
from pyaccel.recipes.classifier import Normalised
from pyaccel.surgery.memory import noisy_sites, with_noisy_memory
from pyaccel.training import distributed

WORD_BITS = 8
SAFE = SramConfig(WORD_BITS, n8t=WORD_BITS)
# Passes are numbered: attacks draw with the first ones, the evaluation of what they made with a draw they never saw.
EVALUATION = 1 << 16

Setting = tuple[int, float]  # 8T bits of a word, and the probability that one of its 6T bits flips
Placement = Mapping[str, Setting]  # by site; sites that are not in it do not fail


class Cells:
    """What was measured of one network, in a file that grows cell by cell: a killed run measures none of them again.

    Keys and values are JSON values. Another network (`fingerprint`) finds nothing in it. Of several processes, all get
    what rank 0 measured, and rank 0 writes.
    """

    def __init__(self, file: Path, fingerprint: int):
        self.file, self.fingerprint = file, fingerprint
        self.known: dict[str, Any] = distributed.from_first(self._read() if distributed.rank() == 0 else {})

    def get(self, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        text = json.dumps([self.fingerprint, key], sort_keys=True)
        if text not in self.known:
            value = distributed.from_first(json.loads(json.dumps(measure())))
            if distributed.rank() == 0:
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(json.dumps([text, value]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.known[text] = value
        return self.known[text]

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        found, sound = {}, 0
        content = self.file.read_bytes()
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):  # the kill came while it was written
                break
            text, value = json.loads(line)
            found[text] = value
            sound += len(line)
        if sound < len(content):
            os.truncate(self.file, sound)
        return found


def fingerprint(model: nn.Module) -> int:
    """CRC-32 of the weights and buffers of a model."""
    found = 0
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(values.numpy(), zlib.crc32(name.encode(), found))
    return found


def sites_of(model: nn.Module) -> list[str]:
    """Where noise may be put: the weights of every convolution and linear layer, the outputs of every ReLU."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append(f"{name}/weight")
        elif isinstance(module, nn.ReLU):
            found.append(f"{name}/activation")
    return found


class Bench:
    """`model` with every site in 8-bit memory, pixels in [0, 1] as its input. Without failures it is the baseline."""

    def __init__(
        self, model: nn.Module, calibration: Iterable[Tensor], mean: Sequence[float] | None,
        std: Sequence[float] | None, batch_size: int, device: torch.device,
    ):  # fmt: skip
        """calibration: normalised images; activations take their steps from the largest value seen."""
        stored = with_noisy_memory(model, dict.fromkeys(sites_of(model), SAFE), calibration=calibration)
        self.memories = noisy_sites(stored)
        self.model = Normalised(stored, mean, std).eval().requires_grad_(False).to(device)
        self.batch_size = batch_size

    def place(self, placement: Placement, chip: int) -> None:
        """Failures where `placement` has them, and nowhere else. `chip`: the seed of masks and draws."""
        for site, memory in self.memories.items():
            n8t, p = placement.get(site, (WORD_BITS, 0.0))
            memory.set_bank(SramConfig(WORD_BITS, n8t=n8t, p6=p), seed=chip)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of images that are classified rightly, each with a fresh draw of every failing output."""
        return self._right([x], y)[0]

    def fgsm(
        self, x: Tensor, y: Tensor, epsilons: Sequence[float], gradient: str = "noisy", samples: int = 1
    ) -> list[float]:
        """Accuracy at clip(x + eps * sign(gradient), 0, 1), for each eps; one gradient serves them all."""
        direction = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
        for at in self._pieces(len(y)):
            set_memory_pass(self.model, 0, first_sample=at.start)
            slope = attacks.input_gradient(self.model, x[at], y[at], gradient=gradient, samples=samples)
            direction[at] = slope.sign().to(torch.int8)
        return self._right([(x + eps * direction).clamp(0, 1) for eps in epsilons], y)

    def pgd(self, x: Tensor, y: Tensor, eps: float, steps: int, gradient: str, samples: int) -> float:
        """Accuracy after PGD with steps of eps / 4 from a random start."""
        attacked = x.clone()
        for at in self._pieces(len(y)):
            set_memory_pass(self.model, 0, first_sample=at.start)
            attacked[at] = attacks.pgd(
                self.model, x[at], y[at], eps, eps / 4, steps, gradient=gradient, samples=samples, seed=at.start
            )
        return self._right([attacked], y)[0]

    @torch.no_grad()
    def magnitude(self, site: str, x: Tensor) -> float:
        """mu of a site as it is placed, on its own codes: mean |q' - q| / (2^W - 1) over one batch of images."""
        memory, seen = self.memories[site], []
        handle = memory.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        set_memory_pass(self.model, EVALUATION)
        self.model(x[: self.batch_size])
        handle.remove()
        before = ops.sram_noise(seen[0][0], memory.scale, 0.0, word_bits=WORD_BITS, signed=memory.signed, seed=0)
        return measured_magnitude(before / memory.scale, seen[0][1] / memory.scale, WORD_BITS)[0]

    @torch.no_grad()
    def _right(self, versions: Sequence[Tensor], y: Tensor) -> list[float]:
        right = torch.zeros(len(versions), dtype=torch.int64)
        for at in self._pieces(len(y)):
            for i, x in enumerate(versions):
                set_memory_pass(self.model, EVALUATION, first_sample=at.start)
                right[i] += int((self.model(x[at]).argmax(1) == y[at]).sum())
        return (distributed.total(right).double() / len(y)).tolist()

    def _pieces(self, images: int) -> Iterator[slice]:
        """This process's share of the batches. A draw belongs to an image, so the shares together are the whole."""
        stride = self.batch_size * distributed.world()
        for start in range(distributed.rank() * self.batch_size, images, stride):
            yield slice(start, min(start + self.batch_size, images))
