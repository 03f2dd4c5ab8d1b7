"""Spiking networks over any number of time steps at constant memory: a few steps at a time, states carried over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyaccel.nn import PoissonEncoder
from pyaccel.nn.state import Stateful


@contextmanager
def streaming(network: nn.Module) -> Iterator[None]:
    """Inside, the neurons of `network` carry their state from call to call, starting from none; evaluation mode.

    Networks with normalisation through time go on at the step where the last call ended, up to the T of their training.
    """
    neurons = [m for m in network.modules() if isinstance(m, Stateful)]
    modes = [(m, m.training) for m in network.modules()]
    before = [m.stateful for m in neurons]
    network.eval()
    try:
        for neuron in neurons:
            neuron.stateful = True
            neuron.reset_state()
        yield
    finally:
        for neuron, stateful in zip(neurons, before, strict=True):
            neuron.stateful = stateful
            neuron.reset_state()
        for module, training in modes:
            module.training = training


@contextmanager
def first_step(encoder: PoissonEncoder, step: int) -> Iterator[None]:
    """Inside, the encoder draws what belongs to time `step` and later. TypeError for a network that reads events."""
    if not isinstance(encoder, PoissonEncoder):
        raise TypeError(f"streaming: expected a network behind a Poisson encoder, got {type(encoder).__name__}")
    encoder.key[2] = step
    try:
        yield
    finally:
        encoder.key[2] = 0


def chunks(steps: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of the pieces that `steps` are cut into."""
    for first in range(0, steps, chunk):
        yield first, min(chunk, steps - first)


@torch.no_grad()
def stream_logits(
    network: nn.Module,
    images: Tensor,
    *,
    steps: int | None = None,
    at: Sequence[int] = (),
    chunk: int = 25,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """The logits of a spiking network after `steps` steps, `[B, classes]`; or after each of `at`, `[len(at), B,
    classes]`.

    The answer is that of `network.step_logits(images, sample_ids, steps)`, the same spikes and, up to the order of
    sums, the same logits, but memory holds `chunk` steps at a time, whatever T is: for hundreds and thousands of steps.
    In evaluation mode, without gradients.

    Args:
        network: a `ConvertedNetwork` or a `SpikingNetwork`; with BNTT for no more steps than it was trained for.
        steps: T; None: the network's own, or the last of `at`. At most 65,536.
        at: after how many steps to take the logits, increasing.
        chunk: steps at a time.
    """
    at = tuple(at)
    if list(at) != sorted(set(at)) or (at and (at[0] < 1 or (steps is not None and at[-1] > steps))):
        raise ValueError(f"stream_logits: at must be increasing numbers of steps, from 1 up to steps, got {list(at)}")
    if chunk < 1:
        raise ValueError(f"stream_logits: chunk must be at least 1, got {chunk}")
    steps = (at[-1] if at else network.steps) if steps is None else steps
    if steps < 1:
        raise ValueError(f"stream_logits: steps must be at least 1, got {steps}")
    wanted = at or (steps,)
    total: Tensor | float = 0.0
    found = []
    with streaming(network):
        for first, count in chunks(wanted[-1], chunk):
            with first_step(network.encoder, first):
                sums = network.step_logits(images, sample_ids, count)
            if network.mean_readout:
                sums = sums * torch.arange(1, count + 1, device=sums.device, dtype=sums.dtype)[:, None, None]
            for step in wanted:
                if first < step <= first + count:
                    found.append((total + sums[step - first - 1]) / (step if network.mean_readout else 1))
            total = total + sums[-1]
    return torch.stack(found) if at else found[0]
