"""Failing memory as a module: what is stored in it comes back quantised, with some of its bits flipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.hardware import SramConfig
from pyaccel.nn.state import refuse_recomputation
from pyaccel.reference.neuron import state_dtype
from pyaccel.reference.sram import code_range


class NoisyMemory(nn.Module):
    """`y = ops.sram_noise(x)`: x stored in one bank of hybrid 8T-6T memory and read back. The gradient is straight-through.

    Which bits flip depends on (seed, stream, pass, element) alone. `redraw=False` is one chip: the same bits at every pass
    (weights, persistent failures). `redraw=True` draws anew at every pass, in training and in evaluation (activations,
    read failures); the number of the pass is a buffer, saved with the model, and `set_pass` sets it. Weights and
    activations may both be stored: as a parametrisation of `weight`, or after a layer (`surgery.with_noisy_memory`).

    In a redrawing memory, sample b of the batch is sample `first_sample + b` of what the batch is a part of: a process
    that holds a slice of a batch, or an evaluation that cuts a data set into batches, says where its slice begins
    (`set_pass`, `set_memory_pass`), and the bits are those of the whole.

    Args:
        config: word width, 8T bits and probabilities; flips only (a stuck cell's value is `ops.flip_bits`' business).
        scale: the step of the code, positive, fixed: a step taken from each batch would leak between its images and
            scale the noise away. `calibrated` finds it.
        signed: two's complement words (weights), or unsigned ones (after a ReLU).
        redraw, seed, stream, mode: see above and `ops.flip_bits`.

    `active = False` keeps the quantiser and turns the failures off (see `without_failures`).
    """

    def __init__(
        self,
        config: SramConfig,
        scale: float,
        *,
        signed: bool,
        redraw: bool,
        seed: int = 0,
        stream: int = 0,
        mode: str = "dense",
    ):
        super().__init__()
        _check_semantics(config)
        if not scale > 0:
            raise ValueError(f"NoisyMemory: scale must be positive, got {scale}")
        self.config, self.signed, self.redraw, self.mode = config, signed, redraw, mode
        self.active = True
        self.register_buffer("scale", torch.tensor(float(scale)))
        # [seed, stream, first element]: a tensor, so that a compiled graph is not specialised to the numbers
        self.register_buffer("key", torch.tensor([seed, stream, 0], dtype=torch.int64), persistent=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        # No buffer: DistributedDataParallel would give every rank the slice of rank 0.
        self.first_sample = torch.zeros((), dtype=torch.int64)

    @classmethod
    def calibrated(cls, config: SramConfig, largest: float, **options) -> NoisyMemory:
        """Step such that the magnitude `largest` is the largest code; 1 where nothing but zero is stored."""
        top = code_range(config.word_bits, options["signed"])[1]
        return cls(config, largest / top if largest > 0 else 1.0, **options)

    def set_pass(self, number: int, *, first_sample: int = 0) -> None:
        """The next pass draws what pass `number` draws, for a batch whose first sample has the number `first_sample`."""
        if first_sample < 0:
            raise ValueError(f"NoisyMemory: first_sample must be >= 0, got {first_sample}")
        self.passes.fill_(number)
        self.first_sample.fill_(first_sample)

    def set_bank(self, config: SramConfig, *, seed: int) -> None:
        """Failures of another bank and chip, at the step that is there: ValueError for words of another width."""
        if config.word_bits != self.config.word_bits:
            raise ValueError(
                f"NoisyMemory: the step belongs to words of {self.config.word_bits} bits, got {config.word_bits}"
            )
        _check_semantics(config)
        self.config = config
        self.key[0] = seed

    def forward(self, x: Tensor) -> Tensor:
        key = self.key.cpu().clone()
        if self.redraw and self.active:
            refuse_recomputation(self, "the pass draws anew; leave failing outputs outside the block")
            key[1] = (key[1] + self.passes.cpu()) & 0xFFFFFFFF
            key[2] = self.first_sample * (x.numel() // max(1, len(x)) if x.dim() else 0)
            self.passes += 1
        probability = self.config.probabilities if self.active else 0.0
        scale = self.scale.to(state_dtype(x.dtype))
        bits = self.config.word_bits
        return ops.sram_noise(x, scale, probability, word_bits=bits, signed=self.signed, seed=key, mode=self.mode)

    def extra_repr(self) -> str:
        c = self.config
        stored = "signed" if self.signed else "unsigned"
        return f"word_bits={c.word_bits}, n8t={c.n8t}, p6={c.p6:g}, p8={c.p8:g}, {stored}, redraw={self.redraw}, mode={self.mode}"


def _check_semantics(config: SramConfig) -> None:
    if config.semantics != "flip":
        raise ValueError("NoisyMemory: config.semantics must be flip; use ops.flip_bits for stuck cells")


class StoredOutput(nn.Module):
    """A layer whose output is stored in failing memory before the next one reads it."""

    def __init__(self, layer: nn.Module, memory: NoisyMemory):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, *args, **kwargs) -> Tensor:
        return self.memory(self.layer(*args, **kwargs))


def set_memory_pass(model: nn.Module, number: int, *, first_sample: int = 0) -> None:
    """`NoisyMemory.set_pass` of every redrawing memory of `model`. Under data parallelism, before each forward pass:
    the same number on every rank, and the place of the rank's slice in the batch."""
    for module in model.modules():
        if isinstance(module, NoisyMemory) and module.redraw:
            module.set_pass(number, first_sample=first_sample)


@contextmanager
def without_failures(model: nn.Module) -> Iterator[None]:
    """Inside, every `NoisyMemory` of `model` still quantises but nothing fails: the baseline of every comparison."""
    memories = [m for m in model.modules() if isinstance(m, NoisyMemory)]
    before = [m.active for m in memories]
    for memory in memories:
        memory.active = False
    try:
        yield
    finally:
        for memory, active in zip(memories, before, strict=True):
            memory.active = active
