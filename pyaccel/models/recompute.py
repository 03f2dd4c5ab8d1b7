"""Memory for time: parts of a spiking network whose activations are computed once more in the backward pass.

`layers`: a layer keeps what it reads, and nothing else. `steps`: the network keeps the membranes between pieces of time,
and nothing else. Both give the gradients of the plain pass: random layers draw the same again, and statistics move once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyaccel.nn import PoissonEncoder
from pyaccel.nn.state import Stateful, repeating


def layer_by_layer(layer: nn.Module, *arguments) -> Tensor:
    """`layer(*arguments)`, which keeps its arguments for the backward pass and computes the rest again there."""
    return checkpoint(_repeatable(layer, layer), *arguments, use_reentrant=False, preserve_rng_state=False)


def piece_by_piece(
    network: nn.Module, encoder: nn.Module, total: Callable[[Tensor, int], Tensor], images: Tensor, steps: int, piece: int
) -> Tensor:
    """The sum over time of what a network spikes, `piece` time steps at a time.

    total(images, steps): the sum over the next `steps` steps of the network in its present state. Events `[T, B, ...]`
    are cut like time is. ValueError where layers mix time steps (one BatchNorm over all of them).
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"recompute_steps: {name} takes its statistics over all time steps; recompute layers instead")
    neurons = [module for module in network.modules() if isinstance(module, Stateful)]
    numbers = _passes(network)
    states: list[Tensor] = []
    sum_of_all = None
    for first in range(0, steps, piece):
        count = min(piece, steps - first)

        def run(*carried: Tensor, first=first, count=count) -> tuple[Tensor, ...]:
            _set_passes(numbers)  # one pass, however many pieces: what is held over time stays held
            with _carrying(neurons, first, carried), _from_step(encoder, first):
                found = total(images if isinstance(encoder, PoissonEncoder) else images[first : first + count], count)
                return found, *(state for neuron in neurons for state in neuron.carried_state())

        found, *states = checkpoint(
            _repeatable(network, run), *states, use_reentrant=False, preserve_rng_state=False
        )
        sum_of_all = found if sum_of_all is None else sum_of_all + found
    return sum_of_all


@contextmanager
def _carrying(neurons: list[Stateful], first: int, states: tuple[Tensor, ...]) -> Iterator[None]:
    """Inside, neurons start from these states (none: from zero) and keep theirs at the end."""
    before = [neuron.stateful for neuron in neurons]
    each = len(states) // max(1, len(neurons))
    try:
        for i, neuron in enumerate(neurons):
            neuron.stateful = True
            neuron.reset_state()
            if states:
                neuron.carry(first, *states[i * each : (i + 1) * each])
        yield
    finally:
        for neuron, stateful in zip(neurons, before, strict=True):
            neuron.reset_state()
            neuron.stateful = stateful


@contextmanager
def _from_step(encoder: nn.Module, first: int) -> Iterator[None]:
    if not isinstance(encoder, PoissonEncoder):
        yield
        return
    encoder.key[2] += first
    try:
        yield
    finally:
        encoder.key[2] -= first


Passes = list[tuple[nn.Module, Tensor | int]]


def _passes(module: nn.Module) -> Passes:
    """The modules that draw anew at every pass, each with the number of its next one."""
    return [(m, m.passes.clone() if isinstance(m.passes, Tensor) else m.passes)
            for m in module.modules() if hasattr(m, "passes")]  # fmt: skip


def _set_passes(passes: Passes) -> None:
    for module, number in passes:
        if isinstance(number, Tensor):
            module.passes.copy_(number)
        else:
            module.passes = number


def _repeatable(module: nn.Module, run: Callable) -> Callable:
    """`run`, whose second call draws what the first did, and moves no statistics of torch's BatchNorm again."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    before: list[Passes] = []

    def once_more(*arguments):
        if not before:
            before.append(_passes(module))
            return run(*arguments)
        now, moved = _passes(module), [buffer.clone() for buffer in statistics]
        try:
            _set_passes(before[0])
            with repeating():
                return run(*arguments)
        finally:
            _set_passes(now)
            for buffer, value in zip(statistics, moved, strict=True):
                buffer.data.copy_(value)  # unseen by autograd, which has just saved the buffer and reads nothing of it

    return once_more
