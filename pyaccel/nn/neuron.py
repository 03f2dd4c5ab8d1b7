"""Spiking neurons as modules over `pyaccel.ops`. A module starts from zero state at every call unless `stateful=True`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.ops.checks import whole
from pyaccel.reference.neuron import state_dtype


class _Neuron(nn.Module):
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
        super().__init__()
        self.leak = _parameter(leak, learn_leak)
        self.threshold = _parameter(threshold, learn_threshold)
        self.neuron = dict(
            reset=reset,
            detach_reset=detach_reset,
            surrogate=surrogate,
            surrogate_scale=surrogate_scale,
            surrogate_width=surrogate_width,
        )
        self.stateful = stateful
        self.membrane: Tensor | None = None

    def reset_state(self) -> None:
        """Forget the state kept by a stateful module."""
        self.membrane = None

    def detach_state(self) -> None:
        """Keep the state, cut its history (truncated backpropagation through time)."""
        self.membrane = None if self.membrane is None else self.membrane.detach()

    def _options(self, current: Tensor) -> dict:
        """Keyword arguments of the operator; learnable values in the state dtype of `current`."""

        def value(p: float | Tensor) -> float | Tensor:
            return p.to(state_dtype(current.dtype)) if isinstance(p, Tensor) else p

        return dict(leak=value(self.leak), threshold=value(self.threshold), **self.neuron)

    def _keep(self, membrane: Tensor) -> None:
        self.membrane = membrane if self.stateful else None

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
        spikes, membrane = ops.lif(current, self.membrane, **self._options(current))
        self._keep(membrane)
        return spikes


class IF(LIF):
    """Integrate-and-fire: `LIF` without leak."""

    def __init__(self, threshold: float = 1.0, **options):
        super().__init__(1.0, threshold, **options)


class BNTTLIF(_Neuron):
    """Batch normalisation through time and LIF in one kernel: `[T, B, channels, ...]` in, spikes out (2010.01729).

    Each of the `steps` time steps has statistics, running statistics and a `weight` (gamma, initially 1) a channel; there
    is no bias. Training uses batch statistics and updates the running ones (momentum 0.1, unbiased variance, as
    `nn.BatchNorm2d`); evaluation uses the running ones. Buffers and weight are `[steps, channels]`. Fewer than `steps`
    steps may be run: the first T are used, in every call: `stateful=True` carries the membrane over, not the step.

    Raises ValueError for more than `steps` steps: what was not trained has no statistics.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        leak: float = 0.95,
        threshold: float = 1.0,
        *,
        eps: float = 1e-4,
        momentum: float = 0.1,
        **options,
    ):
        super().__init__(leak, threshold, **options)
        self.channels, self.steps, self.eps, self.momentum = channels, steps, eps, momentum
        self.weight = nn.Parameter(torch.ones(steps, channels))
        self.register_buffer("running_mean", torch.zeros(steps, channels))
        self.register_buffer("running_var", torch.ones(steps, channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, current: Tensor) -> Tensor:
        steps = current.shape[0]
        rows = slice(0, steps)
        if steps > self.steps:
            raise ValueError(f"BNTTLIF: trained for {self.steps} steps, got {steps}; later steps have no statistics")
        state = state_dtype(current.dtype)
        given = {}
        if not self.training:
            given = dict(mean=self.running_mean[rows].to(state), var=self.running_var[rows].to(state))
        spikes, membrane, mean, var = ops.bntt_lif(
            current, self.weight[rows].to(state), self.membrane, eps=self.eps, **given, **self._options(current)
        )
        if self.training:
            self._track(mean, var, rows, current[0, :, 0].numel() if steps else 0)
        self._keep(membrane)
        return spikes

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, rows: slice, count: int) -> None:
        if count < 2:
            raise ValueError(f"BNTTLIF: training needs more than one value a channel and step, got {count}")
        self.running_mean[rows].lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var[rows].lerp_((var * (count / (count - 1))).to(self.running_var), self.momentum)
        self.num_batches_tracked += 1

    def extra_repr(self) -> str:
        return f"{self.channels}, steps={self.steps}, eps={self.eps:g}, momentum={self.momentum:g}, {super().extra_repr()}"


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
        if self.training:  # on the device, without reading it: a captured graph counts on
            key = key.clone()
            key[1] = (key[1] + 1 + self.passes) & 0xFFFFFFFF
            self.passes += 1
        return ops.poisson_encode(
            image, self.steps if steps is None else steps, gain=self.gain, seed=key, sample_ids=sample_ids
        )

    def extra_repr(self) -> str:
        return f"steps={self.steps}, gain={self.gain:g}"




class STDBLIF(nn.Module):
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
        super().__init__()
        self.leak, self.alpha, self.beta, self.form, self.stateful = leak, alpha, beta, form, stateful
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float64))
        self.state: tuple[Tensor, Tensor] | None = None

    def reset_state(self) -> None:
        """Forget the state kept by a stateful module."""
        self.state = None

    def detach_state(self) -> None:
        """Keep the state, cut its history (truncated backpropagation through time)."""
        self.state = None if self.state is None else (self.state[0].detach(), self.state[1])

    def forward(self, current: Tensor) -> Tensor:
        membrane, since = self.state or (None, None)
        spikes, membrane, since = ops.stdb_lif(
            current, membrane, since, leak=self.leak, threshold=self.threshold, alpha=self.alpha, beta=self.beta,
            form=self.form,
        )  # fmt: skip
        self.state = (membrane, since) if self.stateful else None
        return spikes

    def extra_repr(self) -> str:
        return f"leak={self.leak}, threshold={_shown(self.threshold)}, alpha={self.alpha}, beta={self.beta}, form={self.form}"
