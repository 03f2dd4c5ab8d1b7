"""Other libraries' LIF neurons on the same work, where they are installed: u = leak*v + x, soft reset, detached.

SpikingJelly's LIFNode with decay_input=False has leak = 1 - 1/tau; snnTorch's Leaky resets one step later (its own
definition), so its spikes differ: the amount of work is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def peers(leak: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name with version -> function of the current `[T, ...]`."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        import spikingjelly
        from spikingjelly.activation_based import functional, neuron, surrogate

        node = neuron.LIFNode(
            tau=1 / (1 - leak), decay_input=False, v_reset=None, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m"
        )

        def jelly(x: Tensor) -> Tensor:
            functional.reset_net(node)
            return node(x)

        found[f"spikingjelly {getattr(spikingjelly, '__version__', '')}".strip()] = jelly
    except ImportError:
        pass
    try:
        import snntorch

        cell = snntorch.Leaky(beta=leak, reset_mechanism="subtract")

        def torch_cell(x: Tensor) -> Tensor:
            membrane, spikes = torch.zeros_like(x[0]), []
            for step in x.unbind(0):
                s, membrane = cell(step, membrane)
                spikes.append(s)
            return torch.stack(spikes)

        found[f"snntorch {snntorch.__version__}"] = torch_cell
    except ImportError:
        pass
    return found
