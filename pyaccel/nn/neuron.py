"""Spiking neurons as modules over `pyaccel.ops`. A module starts from zero state at every call unless `stateful=True`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.nn.state import Stateful, refuse_recomputation
from pyaccel.ops.checks import whole
from pyaccel.reference.neuron import state_dtype


class _Neuron(Stateful):
    """What every neuron module shares: options, learnable leak and threshold, and state between calls when asked for."""

    def __init__(
        self,
        leak: float,
        threshold: float,
        *,
        reset: str = "soft",
        detach_reset: bool = True,
        surrogate: str = "triangle",
        surrogate_scale: float | None = None,
        surrogate_width: float | None = None,
        learn_leak: bool | int = False,
        learn_threshold: bool | int = False,
        stateful: bool = False,
    ):
        super().__init__(stateful)
        self.leak = _parameter(leak, learn_leak)
        self.threshold = _parameter(threshold, learn_threshold)
        self.neuron = dict(
            reset=reset,
            detach_reset=detach_reset,
            surrogate=surrogate,
            surrogate_scale=surrogate_scale,
            surrogate_width=surrogate_width,
        )

    def _options(self, current: Tensor) -> dict:
        """Keyword arguments of the operator; learnable values in the state dtype of `current`."""

        def value(p: float | Tensor) -> float | Tensor:
            return p.to(state_dtype(current.dtype)) if isinstance(p, Tensor) else p

        return dict(leak=value(self.leak), threshold=value(self.threshold), **self.neuron)

    def extra_repr(self) -> str:
        shown = {"leak": self.leak, "threshold": self.threshold, **self.neuron}
        parts = [f"{k}={v if not isinstance(v, Tensor) else 'learnable'}" for k, v in shown.items() if v is not None]
        return ", ".join(parts + (["stateful=True"] if self.stateful else []))


def _shown(value: float | Tensor) -> str:
    """A number for `repr`, or `meta` where a tensor has no value."""
    return "meta" if isinstance(value, Tensor) and value.is_meta else f"{float(value):g}"


def _parameter(value: float, learn: bool | int) -> float | nn.Parameter:
    """A constant, a learnable 0-d value (`learn=True`), or one learnable value for each of `learn` channels."""
    if not learn:
        return float(value)
    return nn.Parameter(torch.full(() if learn is True else (int(learn),), float(value)))


class LIF(_Neuron):
    """Leaky integrate-and-fire neurons over time: `[T, ...]` current in, spikes of the same shape out (`ops.lif`).

    `learn_leak` and `learn_threshold`: False, True (one value), or the number of channels (one value each; dimension 2
    of the input). `stateful=True` carries the membrane over to the next call, until `reset_state()`.
    """

    def __init__(self, leak: float = 0.95, threshold: float = 1.0, *, delay: bool = False, **options):
        super().__init__(leak, threshold, **options)
        self.neuron["delay"] = delay

    def forward(self, current: Tensor) -> Tensor:
        spikes, membrane = ops.lif(current, self._carried(), **self._options(current))
        self._keep(membrane)
        return spikes


class IF(LIF):
    """Integrate-and-fire: `LIF` without leak."""

    def __init__(self, threshold: float = 1.0, **options):
        super().__init__(1.0, threshold, **options)


class PoissonEncoder(nn.Module):
    """Images `[B, ...]` to signed Poisson spikes `[steps, B, ...]` (`ops.poisson_encode`), fresh at every pass.

    What is drawn depends on (seed, stream, pass, sample id, step, pixel) alone. The number of the pass is a buffer: it
    advances by itself, is saved with the model, and `set_step(n)` sets it (the training loop does, so that a resumed
    run draws what the uninterrupted one does). Evaluation draws from a stream of its own and does not advance it.
    """

    def __init__(self, steps: int, gain: float = 0.5, *, seed: int = 0, stream: int = 0):
        super().__init__()
        self.steps, self.gain = steps, gain
        # [seed, stream, first step]: a tensor, so that a compiled graph is not specialised to the numbers
        seed = whole("PoissonEncoder", "seed", seed, -(1 << 63), (1 << 64) - 1)
        stream = whole("PoissonEncoder", "stream", stream, 0, (1 << 32) - 1)
        key = [seed - (1 << 64) if seed >= 1 << 63 else seed, stream, 0]
        self.register_buffer("key", torch.tensor(key, dtype=torch.int64), persistent=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def set_step(self, step: int) -> None:
        """The next pass draws what pass `step` draws."""
        self.passes.fill_(step)

    def forward(self, image: Tensor, sample_ids: Tensor | None = None, *, steps: int | None = None) -> Tensor:
        key = self.key
        if self.training:
            refuse_recomputation(self, "the pass draws anew; leave the encoder outside the block")
            # on the device, without reading it: a captured graph counts on
            key = key.clone()
            key[1] = (key[1] + 1 + self.passes) & 0xFFFFFFFF
            self.passes += 1
        return ops.poisson_encode(
            image, self.steps if steps is None else steps, gain=self.gain, seed=key, sample_ids=sample_ids
        )

    def extra_repr(self) -> str:
        return f"steps={self.steps}, gain={self.gain:g}"


class STDBLIF(Stateful):
    """Delayed LIF neurons with the spike-time surrogate (`ops.stdb_lif`, 2005.01807): `[T, ...]` current in, spikes out.

    `threshold` is a buffer, set by threshold balancing and saved with the model. `stateful=True` carries membrane and
    steps since the last spike over to the next call, until `reset_state()`.
    """

    def __init__(
        self,
        leak: float = 1.0,
        threshold: float = 1.0,
        *,
        alpha: float = 0.3,
        beta: float = 0.01,
        form: str = "exact",
        stateful: bool = False,
    ):
        super().__init__(stateful)
        self.leak, self.alpha, self.beta, self.form = leak, alpha, beta, form
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float64))
        self.since: Tensor | None = None

    def reset_state(self) -> None:
        super().reset_state()
        self.since = None

    def carry(self, first_step: int, membrane: Tensor, since: Tensor) -> None:
        super().carry(first_step, membrane)
        self.since = since

    def carried_state(self) -> tuple[Tensor, ...]:
        return self.membrane, self.since

    def forward(self, current: Tensor) -> Tensor:
        spikes, membrane, since = ops.stdb_lif(
            current, self._carried(), self.since, leak=self.leak, threshold=self.threshold, alpha=self.alpha, beta=self.beta,
            form=self.form,
        )  # fmt: skip
        self._keep(membrane)
        self.since = since if self.stateful else None
        return spikes

    def extra_repr(self) -> str:
        return f"leak={self.leak}, threshold={_shown(self.threshold)}, alpha={self.alpha}, beta={self.beta}, form={self.form}"
