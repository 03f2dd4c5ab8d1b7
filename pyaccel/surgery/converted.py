"""`ConvertedNetwork`, what `to_spiking` makes of an artificial network, and the small parts that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from pyaccel.models.spiking import BalancedLIF
from pyaccel.nn import STDBLIF, PoissonEncoder, every_step


class EveryStep(nn.Module):
    """A layer without memory, applied to every step of `[T, B, ...]`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, sequence: Tensor) -> Tensor:
        return every_step(self.layer, sequence)


class DropoutScale(nn.Module):
    """Divides by 1 - p in training: held dropout leaves spikes 0 and 1, and who reads them makes up for it."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, current: Tensor) -> Tensor:
        return current / (1 - self.p) if self.training else current

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class ConstantCurrent(nn.Module):
    """A bias of the artificial network as a current at every step: `current + bias / unit`, along dimension 2.

    `unit`: how much of the artificial network's activation one spike of the input stands for.
    """

    def __init__(self, bias: Tensor):
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    def forward(self, current: Tensor) -> Tensor:
        bias = self.bias / self.unit.to(self.bias.dtype)
        return current + bias.view(-1, *[1] * (current.dim() - 3)).to(current.dtype)


class Sum(nn.Module):
    """`a + ratio * b`: a residual addition, `b` brought to the unit of `a`. 1 where both count alike."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ratio", torch.ones((), dtype=torch.float64))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b * self.ratio.to(b.dtype)


class ConvertedNetwork(nn.Module):
    """A feed-forward network of spiking neurons behind a Poisson encoder; made by `to_spiking`.

    `network(images, sample_ids=None, steps=None)` -> logits `[B, classes]`: the sum (or mean) over time of what the
    last layer puts out, without leak or spikes. `step_logits(...)` -> `[T, B, classes]`: the same after each step.
    `sample_ids` (int64 `[B]`) make the random draws independent of the batch an image is in.

    `neurons`: the spiking layers by qualified name, in order. After writing thresholds by hand call `update_units()`.
    `first_synapse`: the layer that reads the encoder's spikes, if it is the only one.
    """

    def __init__(self, body: fx.GraphModule, encoder: PoissonEncoder, *, mean_readout: bool):
        super().__init__()
        self.encoder, self.body, self.mean_readout = encoder, body, mean_readout
        self.steps = encoder.steps
        self.update_units()

    @property
    def neurons(self) -> dict[str, BalancedLIF | STDBLIF]:
        kinds = (BalancedLIF, STDBLIF)
        return {f"body.{n.target}": self._module(n) for n in self.body.graph.nodes if self._is(n, kinds)}

    @property
    def first_synapse(self) -> nn.Module | None:
        node = next(iter(self.body.graph.nodes))
        while len(node.users) == 1:
            (node,) = node.users
            if node.op == "call_module" and isinstance(self._module(node), (nn.Conv2d, nn.Linear)):
                return self._module(node)
            if not (node.op == "call_method" and node.target == "flatten"):
                return None
        return None

    def _module(self, node: fx.Node) -> nn.Module:
        return self.body.get_submodule(node.target)

    def _is(self, node: fx.Node, kinds) -> bool:
        return node.op == "call_module" and isinstance(self._module(node), kinds)

    @torch.no_grad()
    def update_units(self) -> None:
        """Follow from the encoder on how much activation one spike stands for, and bring biases and sums to it.

        The rate of a neuron is its activation over `unit`, and unit = threshold * unit of its inputs; the encoder's
        is 1 / gain. Without biases, and where both branches of every sum count alike, nothing depends on it.
        """
        units: dict[fx.Node, float] = {}
        for node in self.body.graph.nodes:
            read = [units[n] for n in node.all_input_nodes if n in units]
            if node.op == "placeholder":
                if node.name != "sample_ids":
                    units[node] = 1.0 / self.encoder.gain
                continue
            if node.op == "output" or not read:
                continue
            units[node] = read[0]
            if node.op != "call_module":
                continue
            module = self._module(node)
            if isinstance(module, (BalancedLIF, STDBLIF)):
                units[node] = read[0] * float(module.threshold)
            elif isinstance(module, ConstantCurrent):
                module.unit.fill_(read[0])
            elif isinstance(module, Sum):
                first, second = (units[n] for n in node.args)
                module.ratio.fill_(second / first)

    def currents(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        """What the last layer puts out at each step, `[T, B, classes]`."""
        spikes = self.encoder(images, sample_ids, steps=self.steps if steps is None else steps)
        return self.body(spikes, sample_ids)

    def forward(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        currents = self.currents(images, sample_ids, steps)
        return currents.mean(0) if self.mean_readout else currents.sum(0)

    def step_logits(self, images: Tensor, sample_ids: Tensor | None = None, steps: int | None = None) -> Tensor:
        total = self.currents(images, sample_ids, steps).cumsum(0)
        if not self.mean_readout:
            return total
        count = torch.arange(1, total.shape[0] + 1, device=total.device, dtype=total.dtype)
        return total / count[:, None, None]
