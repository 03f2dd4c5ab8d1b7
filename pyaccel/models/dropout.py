"""Dropout that holds one mask over all time steps of a pass, drawn by counters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyaccel.nn.state import refuse_recomputation
from pyaccel.reference.philox import DROPOUT, MASK, philox


class HeldDropout(nn.Module):
    """Silences units of `[T, B, ...]` spikes for a whole pass: each with probability `p`, the same at every step.

    What is dropped depends on (seed, stream, pass, sample id, unit) alone, not on T, the batch split or the device:
    a unit falls silent where its 32-bit draw is below floor(p * 2^32); units count in logical (C) order. The number of
    the pass is a buffer, as in `nn.PoissonEncoder`. Evaluation drops nothing.

    Spikes stay what they are, 0 and 1, so that a layer can keep them as bits: who reads them divides by 1 - p.
    """

    def __init__(self, p: float, *, seed: int = 0, stream: int = 0):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"HeldDropout: p must be in [0, 1), got {p}")
        self.p, self.seed, self.stream = float(p), seed, stream
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def set_step(self, step: int) -> None:
        """The next pass drops what pass `step` drops."""
        self.passes.fill_(step)

    def forward(self, spikes: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 0:
            return spikes
        refuse_recomputation(self, "the pass draws anew; networks take recompute_layers or recompute_steps instead")
        kept = self.kept(spikes.shape[1:], sample_ids)
        self.passes += 1
        return spikes.masked_fill(~kept, 0)

    def kept(self, shape: tuple[int, ...], sample_ids: Tensor | None = None) -> Tensor:
        """The mask of the next pass, bool `[B, ...]` of `shape`: True where a unit stays."""
        device = self.passes.device
        ids = torch.arange(shape[0], device=device) if sample_ids is None else sample_ids.to(device)
        units = torch.Size(shape[1:]).numel()
        group = torch.arange((units + 3) // 4, device=device)
        stream = (self.passes + self.stream) & MASK
        domain = torch.full_like(stream, DROPOUT)
        words = philox(self.seed, group[None], ids[:, None], stream, domain)
        return (words.flatten(1)[:, :units] >= int(self.p * 2**32)).reshape(shape)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"
